# SPDX-License-Identifier: Apache-2.0
"""Random calls of patch_merge: dense batches, packed images, blocks; every norm, order, edge and dtype."""

import random
from collections.abc import Callable
from typing import Any

import layouts
import spoiling
import torch

from mmkernels.ops.norm import Norm
from mmkernels.ops.patch_merge import cases
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "patch_merge"
CASES = cases
KINDS = ("dense", "packed", "blocks")
SIMPLEST: dict[str, Any] = {
    "B": 1, "H": 1, "W": 1, "C": 1, "m": (1, 1), "grids": (), "blocks": False, "order": "kkc", "transposed": False,
    "pad": False, "norm": "", "after": False, "affine": False, "dtype": "fp32", "family": "random", "threads": 1,
    "layouts": (), "int32": False,
}  # fmt: skip
LAYOUTS = tuple(
    name for name in layouts.LAYOUTS if name != "expanded"
)  # equal values have no variance
VARIED = tuple("dtype order m norm after affine pad transposed family threads".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    m = r.choice(((1, 1), (2, 2), (2, 2), (3, 3), (1, 4), (2, 3), (4, 1)))
    x = {
        **SIMPLEST, "seed": r.randrange(2**31), "m": m, "order": r.choice(("kkc", "ckk")),
        "C": r.choice((1, 2, 3, 7, 16, 33, 63, 64, 65, 128, 300, 700)), "affine": r.random() < 0.7,
        "norm": r.choice(("", "layer", "layer", "rms")), "after": r.random() < 0.4,
        "dtype": r.choice(("fp32", "fp32", "bf16", "fp16", "fp64")), "family": r.choice(cases.FAMILIES),
        "threads": r.choice((1, 2, 3, 5)), "int32": r.random() < 0.3,
    }  # fmt: skip
    x |= (
        {"blocks": True}
        if kind == "blocks"
        else {"pad": r.random() < 0.4, "transposed": r.random() < 0.3}
    )
    side = lambda step: r.randint(1, 9) if x["pad"] else step * r.randint(1, 5)
    if kind == "dense":
        x |= {"B": r.choice((0, 1, 1, 2, 3)), "H": side(m[0]), "W": side(m[1])}
    else:
        images = r.choice((1, 1, 2, 3, 5))
        x["grids"] = tuple((r.randint(1, 3), side(m[0]), side(m[1])) for _ in range(images))
    x["layouts"] = layouts.drawn(r, ("features", "grad"), 0.4, LAYOUTS)
    return x


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    case = Case("fuzz", x)
    inputs = cases.make_inputs(case, layouts.DTYPES[x["dtype"]], seed=x["seed"], family=x["family"])
    for name, layout, seed in x["layouts"]:
        if name != "grad":
            inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    if x["int32"] and "grid_thw" in inputs:
        inputs["grid_thw"] = inputs["grid_thw"].int()
    return inputs, map_tensors(inputs, lambda t: t)


def _more_rows(t: torch.Tensor, dim: int) -> torch.Tensor:
    shape = list(t.shape)
    shape[dim] += 1
    return t.new_zeros(shape)


def _grid(change: Callable[[random.Random, torch.Tensor], torch.Tensor]) -> Any:
    return lambda r, i, x: (
        {"grid_thw": change(r, i["grid_thw"].clone())} if "grid_thw" in i else None
    )


def _negative(r: random.Random, grid: torch.Tensor) -> torch.Tensor:
    grid[r.randrange(len(grid)), r.randrange(3)] = r.choice((0, -1, -7))
    return grid


def _huge(r: random.Random, grid: torch.Tensor) -> torch.Tensor:
    grid[r.randrange(len(grid)), r.randrange(3)] *= r.choice((2, 3, 1000, 2**20))
    return grid


SPOILED: dict[str, Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]] = {
    "rank": lambda r, i, x: {"features": i["features"].flatten()},
    "dtype": lambda r, i, x: {"features": torch.zeros(i["features"].shape, dtype=torch.int64)},
    "merge_size": lambda r, i, x: {"merge_size": r.choice((0, -1, (2, 0), (1, 2, 3)))},
    "order": lambda r, i, x: {"order": "kck"},
    "side": lambda r, i, x: (
        {"features": _more_rows(i["features"], 1)} if not x["grids"] and not x["pad"] and x["m"][0] > 1 else None
    ),
    "tokens": lambda r, i, x: {"features": _more_rows(i["features"], 0)} if "grid_thw" in i else None,
    "grid_negative": _grid(_negative),
    "grid_huge": _grid(_huge),
    "grid_float": _grid(lambda r, g: g.float()),
    "grid_shape": _grid(lambda r, g: g[:, :2]),
    "norm_width": lambda r, i, x: {"norm": Norm("rms", i["features"].new_ones(2000))},
    "norm_kind": lambda r, i, x: {"norm": Norm("group")},
    "eps": lambda r, i, x: {"norm": Norm("layer", eps=r.choice((-1.0, float("nan"))))},
}  # fmt: skip
spoil = spoiling.by_one_of(SPOILED)
