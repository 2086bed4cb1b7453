# SPDX-License-Identifier: Apache-2.0
"""Random calls of pack_embeddings on plans of plan_pack (whose own random batches: tests/test_pack_embeddings.py)."""

import random
from collections.abc import Callable
from typing import Any

import layouts
import spoiling
import torch

from mmkernels.ops.pack_embeddings import cases
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "pack_embeddings"
CASES = cases
KINDS = ("samples",)
SIMPLEST: dict[str, Any] = {
    "S": 1, "L": 1, "V": 1, "D": 1, "M": 0, "rows": 1, "media": 0, "scale": None, "padding": None, "unplaced": 0,
    "dtype": "fp32", "family": "random", "threads": 1, "layouts": (), "features": "",
}  # fmt: skip
LAYOUTS = layouts.LAYOUTS
VARIED = tuple("dtype S L V D M rows media scale padding unplaced family threads features".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    V = r.choice((1, 2, 5, 40, 300))
    x = {
        **SIMPLEST, "seed": r.randrange(2**31), "S": r.choice((0, 1, 2, 5, 9)), "L": r.choice((1, 2, 7, 40)), "V": V,
        "D": r.choice((1, 2, 3, 8, 17, 64, 129)), "M": r.choice((0, 1, 1, 2, 5, 8)), "rows": r.choice((1, 2, 9, 40)),
        "media": r.choice((0, 1, 2, 3)), "scale": r.choice((None, None, 0.125, 6.9)),
        "padding": r.choice((None, None, r.randrange(V))), "dtype": r.choice(tuple(layouts.DTYPES)),
        "family": r.choice(cases.FAMILIES), "threads": r.choice((1, 2, 3, 5)),
        "features": r.choice(("", "", *layouts.DTYPES)),
    }  # fmt: skip
    x["unplaced"] = r.choice((0, 0, 1, 6)) if x["M"] == 1 else 0
    x["layouts"] = layouts.drawn(r, ("embed_weight", "features", "grad"), 0.3)
    return x


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    inputs = cases.make_inputs(
        Case("fuzz", x), layouts.DTYPES[x["dtype"]], seed=x["seed"], family=x["family"]
    )
    inputs = {n: inputs[n] for n in cases.ARGUMENTS}
    if x["features"]:  # of a dtype of their own, with more digits than the embeddings
        dtype = layouts.DTYPES[x["features"]]
        inputs["features"] = [(f.double() * 1.1).to(dtype) for f in inputs["features"]]
    for name, layout, seed in x["layouts"]:
        if name == "features":
            inputs[name] = [
                layouts.laid_out(f, layout, seed + i) for i, f in enumerate(inputs[name])
            ]
        elif name == "embed_weight":
            inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    return inputs, map_tensors(inputs, lambda t: t)


def _source(values: Callable[[int, int], tuple[int, ...]]) -> Any:
    def change(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
        source = i["plan"].clone()
        if not len(source):
            return None
        count = sum(len(f) for f in i["features"])
        source[r.randrange(len(source))] = r.choice(values(x["V"], count))
        return {"plan": source}

    return change


def _twice(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    placed = i["plan"][i["plan"] < 0]
    return {"plan": torch.cat([i["plan"], placed[:1]])} if len(placed) else None


def _feature(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda r, i, x: (
        {"features": [change(f) for f in i["features"]]} if i["features"] else None
    )


SPOILED: dict[str, Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]] = {
    "text": _source(lambda V, count: (V, V + 1, 2**40)),
    "feature": _source(lambda V, count: (-count - 1, -count - 2, -(2**40))),
    "twice": _twice,
    "int32": lambda r, i, x: {"plan": i["plan"].int()},
    "two_dims": lambda r, i, x: {"plan": i["plan"][None]},
    "feature_width": _feature(lambda f: f.new_zeros(len(f), f.shape[1] + 1)),
    "feature_dtype": _feature(lambda f: torch.zeros(f.shape, dtype=torch.int64)),
    "weight_rank": lambda r, i, x: {"embed_weight": i["embed_weight"][None]},
    "weight_dtype": lambda r, i, x: {"embed_weight": torch.zeros(i["embed_weight"].shape, dtype=torch.int64)},
}  # fmt: skip
spoil = spoiling.by_one_of(SPOILED)
