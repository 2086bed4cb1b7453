# SPDX-License-Identifier: Apache-2.0
"""Random calls of ``rope_write_kv``, by the bound, and with one slot spoiled. It has no gradient: a loop of its own."""

import os
import random
from typing import Any

import pytest
import torch
from layouts import LAYOUTS, laid_out

from mmkernels.ops.mrope.cases import AXES
from mmkernels.ops.rope_write_kv import cases
from mmkernels.testing import Case

CASES = int(os.environ.get("MMKERNELS_FUZZ_CASES", "500"))
SEED = int(os.environ.get("MMKERNELS_FUZZ_SEED", "20251125"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(r: random.Random) -> Case:
    d = r.choice((1, 2, 5, 16, 33, 64, 80, 128, 256))
    norm = d >= 16 and r.random() < 0.4
    sizes: dict[str, Any] = {
        **cases.CASES[0].sizes, "T": r.choice((0, 1, 2, 7, 40)), "Hq": r.randint(0, 5), "Hk": r.randint(0, 3), "d": d,
        "r": 2 * r.randint(0, d // 2) if r.random() < 0.5 else d // 2 * 2, "layout": r.choice(sorted(AXES)),
        "pairing": r.choice(("half", "adjacent")), "scale": r.choice((1.0, 1.2)), "page": r.choice((1, 2, 5, 16)),
        "norm": norm, "cache": r.choice(("", "", "fp32", "bf16", "fp16", "int8", "fp8")),
        "skip": r.choice((0.0, 0.3, 1.0)), "decode": r.random() < 0.5, "per_head": r.random() < 0.5,
    }  # fmt: skip
    return Case("fuzz", sizes)


def test_random_calls() -> None:
    for seed in range(SEED, SEED + CASES):
        r = random.Random(seed)
        case, dtype, family = draw(r), r.choice(DTYPES), r.choice(cases.FAMILIES)
        inputs = cases.make_inputs(case, dtype, seed=seed, family=family)
        for name in ("query", "key", "value"):
            layout = r.choice((*LAYOUTS, "", ""))
            inputs[name] = laid_out(inputs[name], layout, seed) if layout else inputs[name]
        torch.set_num_threads(r.choice((1, 2, 3)))
        got = cases.results(inputs)
        failed = [c for c in cases.compared(inputs, got) if not c.ratio <= 1]
        assert not failed, f"seed {seed}, {dtype}, {family}, {case.sizes}: " + "; ".join(
            map(str, failed)
        )


def test_a_spoiled_slot_is_found_before_anything_is_written() -> None:
    for seed in range(SEED, SEED + CASES // 4):
        r = random.Random(f"spoiled {seed}")
        case = draw(r)
        case = Case("fuzz", {**case.sizes, "T": r.randint(2, 60), "skip": 0.2})
        inputs = cases.make_inputs(case, torch.float32, seed=seed)
        slots = inputs["slot_mapping"]
        t = r.randrange(case.T)
        count = inputs["key_cache"].shape[0] * case.page
        taken = [s for i, s in enumerate(slots.tolist()) if i != t and s >= 0]
        slots[t] = r.choice((-2, count, 2**50, -(2**63), *taken[:4]))
        before = {n: inputs[n].clone() for n in ("key_cache", "value_cache")}
        with pytest.raises(ValueError, match=r"rope_write_kv: slot_mapping\[\d+\] is"):
            cases.run(inputs)
        for name, cache in before.items():
            assert torch.equal(inputs[name].view(torch.uint8), cache.view(torch.uint8))
