# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: patches every model of transformers before its first use, and writes outcomes."""

import functools
import json
import os
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers_models import last_line

import mmkernels
from mmkernels.hf import NothingToPatch

OUT = Path(os.environ["MMKERNELS_PEER_OUT"])
seen: weakref.WeakSet[Any] = weakref.WeakSet()


def patched(model: Any) -> None:
    """Once a model; its parts are patched with it."""
    if model in seen or torch.compiler.is_compiling():
        return
    seen.update(m for m in model.modules() if isinstance(m, PreTrainedModel))
    try:
        mmkernels.patch(model, cache=True)
    except NothingToPatch:
        pass


def before(method: Any) -> Any:
    """The method, of a model that has been patched by then."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched(self)
        return method(self, *args, **kwargs)

    return run


if os.environ["MMKERNELS_PEER_PATCH"] == "1":
    for owner, name in ((PreTrainedModel, "train"), (PreTrainedModel, "to"),
                        (GenerationMixin, "generate"), (PreTrainedModel, "__call__")):  # fmt: skip
        setattr(owner, name, before(getattr(owner, name)))


def pytest_runtest_logreport(report: Any) -> None:
    """A line for every test, and for every failure before or after one."""
    if report.when != "call" and report.outcome == "passed":
        return
    why = last_line(report) if report.failed else ""
    line = {"test": report.nodeid, "outcome": report.outcome, "why": why}
    with OUT.open("a") as file:
        file.write(json.dumps(line) + "\n")
