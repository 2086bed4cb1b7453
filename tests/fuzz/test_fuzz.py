# SPDX-License-Identifier: Apache-2.0
"""A share of ``make fuzz``: MMKERNELS_FUZZ_CASES random calls an op (500), from seed MMKERNELS_FUZZ_SEED on."""

import os
import random
from types import SimpleNamespace
from typing import Any

import fuzzing
import pytest
import torch
from layouts import LAYOUTS, laid_out

from mmkernels.testing import which_kernel_ran

CASES = int(os.environ.get("MMKERNELS_FUZZ_CASES", "500"))
SEED = int(os.environ.get("MMKERNELS_FUZZ_SEED", "20251125"))
PARTS = [(op, kind) for op in fuzzing.OPS for kind in fuzzing.module_of(op).KINDS]


@pytest.mark.parametrize(("op", "kind"), PARTS)
def test_random_calls(op: str, kind: str) -> None:
    module = fuzzing.module_of(op)
    for seed in range(SEED, SEED + CASES // len(module.KINDS)):
        message = fuzzing.run_one(module, kind, seed)
        assert not message, fuzzing.details(module, kind, seed, message)


@pytest.mark.parametrize(("op", "kind"), PARTS)
def test_the_native_kernel_takes_them(op: str, kind: str) -> None:
    module = fuzzing.module_of(op)
    inputs, _ = module.build(module.draw(random.Random(SEED), kind))
    with which_kernel_ran() as ran:
        module.CASES.run(inputs)
    assert ran and set(ran.values()) == {"native"}


@pytest.mark.parametrize("op", fuzzing.OPS)
def test_calls_differ_and_every_way_to_spoil_one_is_used(op: str) -> None:
    module = fuzzing.module_of(op)
    drawn = [module.draw(random.Random(s), k) for k in module.KINDS for s in range(200)]
    for letter in module.VARIED:
        assert len({str(x[letter]) for x in drawn}) > 1, letter
    used = {layout for x in drawn for _, layout, _ in x["layouts"]}
    assert used == set(module.LAYOUTS)
    ways = {module.spoil(random.Random(i), module.build(x)[0], x)[0] for i, x in enumerate(drawn)}
    assert ways == set(module.SPOILED)


def test_a_wrong_kernel_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value of every output off by one per cent."""
    module = fuzzing.module_of("patch_embed")
    run = module.CASES.run

    def wrong(inputs: Any) -> torch.Tensor:
        out = run(inputs)
        scale = torch.ones_like(out)
        if out.numel():
            scale.view(-1)[-1] = 1.01
        return out * scale

    changed = SimpleNamespace(**{**vars(module.CASES), "run": wrong})
    monkeypatch.setattr(module, "CASES", changed)
    letters = module.draw(random.Random("a call"), "image") | {"D": 33, "B": 3}
    message = fuzzing.failure(module, letters)
    assert message.startswith("bound out")
    small, why = fuzzing.shrunk(module, letters, message, lambda x: fuzzing.failure(module, x))
    assert why.startswith("bound out") and small["D"] == small["B"] == 1 and not small["layouts"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout: str) -> None:
    for shape in ((4,), (3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)):
        tensor = torch.randn(shape)
        moved = [laid_out(tensor, layout, seed) for seed in range(8)]
        assert all(m.shape == tensor.shape for m in moved)
        if layout != "expanded":
            assert all(torch.equal(m, tensor) for m in moved)
