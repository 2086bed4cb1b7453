# SPDX-License-Identifier: Apache-2.0
"""Random calls of mrope: batches and packed tokens, any table of channels, every pairing, stride and dtype."""

import random
from collections.abc import Callable
from typing import Any

import layouts
import spoiling
import torch

from mmkernels.ops.mrope import cases
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "mrope"
CASES = cases
KINDS = ("batch", "packed")
SIMPLEST: dict[str, Any] = {
    "B": 1, "L": 1, "Hq": 1, "Hk": 0, "d": 1, "r": 0, "layout": "1d", "theta": 1e4, "pairing": "half", "scale": 1.0,
    "packed": False, "dtype": "fp32", "family": "random", "threads": 1, "layouts": (), "int32": False, "A": 0,
}  # fmt: skip
LAYOUTS = layouts.LAYOUTS
VARIED = tuple("dtype layout pairing scale d r family threads A".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call; A axes in a random table, or those of a layout."""
    d = r.choice((1, 2, 3, 5, 8, 16, 17, 32, 48, 64, 80, 96, 128, 192, 256))
    x = {
        **SIMPLEST, "seed": r.randrange(2**31), "packed": kind == "packed", "B": r.choice((0, 1, 1, 2, 3)),
        "L": r.choice((0, 1, 2, 5, 9, 33, 70)), "Hq": r.randint(0, 6), "Hk": r.randint(0, 3), "d": d,
        "r": 2 * r.randint(0, d // 2) if r.random() < 0.5 else d // 2 * 2, "layout": r.choice(sorted(cases.AXES)),
        "theta": r.choice((100.0, 1e4, 5e6)), "pairing": r.choice(("half", "adjacent")),
        "scale": r.choice((1.0, 1.0, 0.7, 1.31)), "A": r.choice((0, 0, 1, 2, 5)),
        "dtype": r.choice(("fp32", "fp32", "bf16", "fp16", "fp64")), "family": r.choice(cases.FAMILIES),
        "threads": r.choice((1, 2, 3, 5)), "int32": r.random() < 0.3,
    }  # fmt: skip
    x["layouts"] = layouts.drawn(r, ("query", "key", "grad"), 0.4)
    return x


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    inputs = cases.make_inputs(
        Case("fuzz", x), layouts.DTYPES[x["dtype"]], seed=x["seed"], family=x["family"]
    )
    if x["A"]:
        g = torch.Generator().manual_seed(x["seed"])
        tokens = inputs["query"].shape[:-2]
        inputs["axis"] = torch.randint(0, x["A"], (x["r"],), generator=g)
        inputs["inv_freq"] = torch.rand(x["r"], generator=g).view(torch.int32)
        inputs["position_ids"] = torch.randint(-50, 5000, (x["A"], *tokens), generator=g)
    for name, layout, seed in x["layouts"]:
        if name != "grad":
            inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    if x["int32"]:
        inputs["position_ids"] = inputs["position_ids"].int()
    return inputs, map_tensors(inputs, lambda t: t)


def _axis(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> Inputs | None:
    axis = inputs["axis"]
    if axis is None or not axis.numel():
        return None
    axis = axis.clone()
    axis[r.randrange(len(axis))] = r.choice((-1, -(2**40), inputs["position_ids"].shape[0], 2**62))
    return {"axis": axis}


def _longer(t: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(t.shape)
    shape[dim] += 1
    return t.new_zeros(shape)


SPOILED: dict[str, Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]] = {
    "rank": lambda r, i, x: {"query": i["query"].flatten()},
    "dtype": lambda r, i, x: {"query": torch.zeros(i["query"].shape, dtype=torch.int64)},
    "key_dtype": lambda r, i, x: {"key": i["key"].to(torch.float16 if x["dtype"] == "bf16" else torch.bfloat16)},
    "key_width": lambda r, i, x: {"key": _longer(i["key"], -1)},
    "key_tokens": lambda r, i, x: {"key": _longer(i["key"], -3)},
    "pairing": lambda r, i, x: {"pairing": r.choice(("", "neox", "Half"))},
    "odd": lambda r, i, x: {"inv_freq": cases.bits(2 * r.randint(0, 5) + 1), "axis": None},
    "wide": lambda r, i, x: {"inv_freq": cases.bits(x["d"] // 2 * 2 + 2), "axis": None},
    "axis_length": lambda r, i, x: {"axis": torch.zeros(x["r"] + 1, dtype=torch.int64)},
    "axis_value": _axis,
    "positions_float": lambda r, i, x: {"position_ids": i["position_ids"].float()},
    "positions_length": lambda r, i, x: {"position_ids": _longer(i["position_ids"], -1)} if x["L"] else None,
}  # fmt: skip
spoil = spoiling.by_one_of(SPOILED)
