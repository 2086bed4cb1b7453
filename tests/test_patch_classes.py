# SPDX-License-Identifier: Apache-2.0
"""Whole models of transformers, patched and not: logits, gradients of every parameter, generated tokens.

In fp64 both must be the same to rounding: the kernels have fp64 templates, so this is their index maths and the table's
rows. In fp32 and bf16 the error against fp64 is held to that of the unpatched model (TOLERANCES.md).
"""

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from vlm_zoo import CASES, Entry
from vlm_zoo_more import ZOO as EVERY

import mmkernels

Inputs = dict[str, Any]
# Unpatched they have no fp64 (Kosmos-2, Gemma 4's ears), or nothing to replace (Kosmos-2.5: tested below).
WITHOUT = ("Kosmos2", "Kosmos2_5", "Gemma4")
ZOO = [e for e in EVERY if e.name not in WITHOUT]
PARTS = (
    11  # of the zoo; an ordinary run takes one, another with every commit, `make full` takes all
)
Tensors = dict[str, torch.Tensor]
MOST = 1.25  # of the unpatched model's error


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    floats = lambda v: torch.is_tensor(v) and v.is_floating_point()
    return {k: v.to(dtype) if floats(v) else v for k, v in inputs.items()}


def ran(model: Any, inputs: Inputs) -> Tensors:
    """``out`` and the gradient of every parameter that has one."""
    model.zero_grad()
    result = model(**inputs)
    out = next(
        result[k] for k in ("logits", "logits_per_image", "last_hidden_state") if k in result
    )
    g = torch.Generator().manual_seed(9)
    (out * torch.randn(out.shape, generator=g).to(out.dtype)).sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads = {n: g.clone() for n, g in named.items() if g.numel()}
    return {"out": out.detach().clone(), **grads}


def cases(entry: Entry) -> list[tuple[str, Inputs]]:
    made = ((c, entry.batch(c, torch.Generator().manual_seed(3))) for c in CASES)
    return [(case, inputs) for case, inputs in made if inputs is not None]


def errors(got: Tensors, truth: Tensors) -> list[float]:
    """Of the output, and of all gradients as one vector: the length of the error over that of the truth."""
    out, *grads = truth
    found = []
    for names in ([out], grads):
        off = torch.cat([(got[n].double() - truth[n]).flatten() for n in names])
        found.append((off.norm() / torch.cat([truth[n].flatten() for n in names]).norm()).item())
    return found


def taken(entries: list[Entry]) -> list[Any]:
    """All of them, those of other turns marked ``full``."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-list", "--count", "HEAD"]
    told = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    turn = int(told or 0) % PARTS
    marks = lambda i: () if i % PARTS == turn else (pytest.mark.full,)
    return [pytest.param(e, id=e.name, marks=marks(i)) for i, e in enumerate(entries)]


@pytest.mark.full
@pytest.mark.parametrize("entry", [e for e in EVERY if e.name in WITHOUT], ids=lambda e: e.name)
def test_without_fp64(entry: Entry) -> None:
    """In fp32 alone, or nothing is found."""
    model = entry.build()
    for case, inputs in cases(entry):
        before = ran(model, inputs)["out"]
        try:
            with mmkernels.patch(model):
                after = ran(model, inputs)["out"]
        except mmkernels.NothingToPatch:
            assert entry.name == "Kosmos2_5"
            return
        assert (after - before).abs().max() <= 1e-4 * before.abs().max(), case


@pytest.mark.parametrize("entry", taken(ZOO))
def test_patched_equals_unpatched(entry: Entry) -> None:
    model = entry.build()
    exact = copy.deepcopy(model).double()
    for case, inputs in cases(entry):
        truth = ran(exact, cast(inputs, torch.float64))
        with mmkernels.patch(exact):
            same = ran(exact, cast(inputs, torch.float64))
        assert same.keys() == truth.keys(), case
        for name, value in truth.items():
            off = (same[name] - value).abs().max()
            assert off <= 1e-6 * value.abs().max().clamp(min=1e-3), (case, name, off)
        for dtype in (torch.float32, torch.bfloat16):
            assert_no_worse(model, cast(inputs, dtype), dtype, (case, dtype))


def assert_no_worse(model: Any, inputs: Inputs, dtype: torch.dtype, told: Any) -> None:
    """Than the unpatched model, whose error is the largest over parameters scaled by up to 6 %, which round otherwise:
    a single error is luck. Scaled only as often as it takes."""
    ours, worst = [], [0.0, 0.0]
    for i in range(16):
        there = copy.deepcopy(model)
        for p in there.parameters():
            p.data *= 1 + i / 256
        there.to(dtype)
        truth = ran(copy.deepcopy(there).double(), cast(inputs, torch.float64))
        worst = [max(pair) for pair in zip(worst, errors(ran(there, inputs), truth), strict=True)]
        if not ours:
            with mmkernels.patch(there):
                ours = errors(ran(there, inputs), truth)
        if all(mine <= MOST * other for mine, other in zip(ours, worst, strict=True)):
            return
    raise AssertionError((told, ours, worst))


@pytest.mark.parametrize("entry", taken([e for e in ZOO if e.generates]))
def test_the_same_tokens(entry: Entry) -> None:
    model = entry.build()
    for case, inputs in cases(entry):
        if case == "right":
            continue
        options: Inputs = {
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        theirs = model.generate(**copy.deepcopy(inputs), **options)
        with mmkernels.patch(model):
            ours = model.generate(**copy.deepcopy(inputs), **options)
        for row in range(len(theirs.sequences)):
            for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
                best = b[row].topk(2).values
                bound = 1e-4 * b[row].abs().max()
                if a[row].argmax() != b[row].argmax():
                    assert best[0] - best[1] <= bound, (case, row, step)
                    break
