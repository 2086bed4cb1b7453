# SPDX-License-Identifier: Apache-2.0
"""Random calls of merge_embeddings: by token id and by row, looked up and given, several modalities."""

import random
from collections.abc import Callable
from typing import Any

import layouts
import spoiling
import torch

from mmkernels.ops.merge_embeddings import cases
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "merge_embeddings"
CASES = cases
KINDS = ("id", "row")
SIMPLEST: dict[str, Any] = {
    "B": 1, "L": 1, "V": 1, "D": 1, "M": 0, "by": "id", "embeds": False, "scale": None, "padding": None, "share": 0.0,
    "dtype": "fp32", "family": "random", "threads": 1, "layouts": (), "features": "", "int32": False,
}  # fmt: skip
LAYOUTS = layouts.LAYOUTS
VARIED = tuple("dtype B L V D M embeds scale padding share family threads int32 features".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    V = r.choice((1, 2, 5, 40, 300))
    x = {
        **SIMPLEST, "seed": r.randrange(2**31), "by": kind, "B": r.choice((0, 1, 1, 2, 5)), "V": V,
        "L": r.choice((0, 1, 2, 7, 33, 130)), "D": r.choice((1, 2, 3, 8, 17, 64, 129)),
        "M": r.choice((0, 1, 1, 2, 5, 8)),
        "embeds": r.random() < 0.3, "share": r.choice((0.0, 0.1, 0.5, 1.0)), "dtype": r.choice(tuple(layouts.DTYPES)),
        "family": r.choice(cases.FAMILIES), "threads": r.choice((1, 2, 3, 5)),
        "features": r.choice(("", "", *layouts.DTYPES)), "int32": r.random() < 0.3,
    }  # fmt: skip
    if not x["embeds"]:
        x |= {
            "scale": r.choice((None, None, 0.125, 6.9)),
            "padding": r.choice((None, None, r.randrange(V))),
        }
    x["layouts"] = layouts.drawn(r, ("embed_weight", "inputs_embeds", "features", "grad"), 0.3)
    return x


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    inputs = cases.make_inputs(
        Case("fuzz", x), layouts.DTYPES[x["dtype"]], seed=x["seed"], family=x["family"]
    )
    if x["int32"]:
        inputs["input_ids"] = inputs["input_ids"].int()
    if x["features"]:  # of a dtype of their own, with more digits than the embeddings
        dtype = layouts.DTYPES[x["features"]]
        inputs["features"] = [(f.double() * 1.1).to(dtype) for f in inputs["features"]]
    for name, layout, seed in x["layouts"]:
        if name == "features":
            inputs[name] = [
                layouts.laid_out(f, layout, seed + i) for i, f in enumerate(inputs[name])
            ]
        elif isinstance(inputs.get(name), torch.Tensor):
            inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    return inputs, map_tensors(inputs, lambda t: t)


def _id(values: Callable[[int], tuple[int, ...]]) -> Any:
    """A text token's id becomes one of these."""

    def change(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
        ids = i["input_ids"].clone()
        text = ((ids >= 0) & (ids < x["V"])).nonzero()
        if i["embed_weight"] is None or not len(text):
            return None
        ids[tuple(text[r.randrange(len(text))])] = r.choice(values(x["V"]))
        return {"input_ids": ids}

    return change


def _rows(change: Callable[[random.Random, torch.Tensor, int], torch.Tensor | None]) -> Any:
    def spoiled(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
        places = i.get("feature_rows") or []
        full = [m for m, p in enumerate(places) if len(p)]
        if not full:
            return None
        m = r.choice(full)
        changed = change(r, places[m].clone(), i["input_ids"].numel())
        return (
            None if changed is None else {"feature_rows": [*places[:m], changed, *places[m + 1 :]]}
        )

    return spoiled


def _put(values: Callable[[int], tuple[int, ...]]) -> Any:
    def change(r: random.Random, rows: torch.Tensor, T: int) -> torch.Tensor:
        rows[r.randrange(len(rows))] = r.choice(values(T))
        return rows

    return _rows(change)


def _twice(r: random.Random, rows: torch.Tensor, T: int) -> torch.Tensor | None:
    if len(rows) < 2:
        return None
    rows[0] = rows[1]
    return rows


def _feature(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def spoiled(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
        if not i["features"]:
            return None
        m = r.randrange(len(i["features"]))
        features = list(i["features"])
        features[m] = change(features[m])
        return {"features": features, "feature_counts": None}

    return spoiled


def _counts(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    counts = [list(c) for c in i.get("feature_counts") or []]
    if not counts or not counts[0]:
        return None
    counts[r.randrange(len(counts))][r.randrange(len(counts[0]))] += r.choice((-1, 1, 100))
    return {"feature_counts": counts}


SPOILED: dict[str, Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]] = {
    "id": _id(lambda V: (-1, V, V + 1, 2**31 - 1)),
    "float_ids": lambda r, i, x: {"input_ids": i["input_ids"].double()},
    "row": _put(lambda T: (-1, T, T + 5, 2**40)),
    "row_twice": _rows(_twice),
    "row_dtype": _rows(lambda r, rows, T: rows.int()),
    "row_missing": _rows(lambda r, rows, T: rows[1:]),
    "more_rows": _feature(lambda f: torch.cat([f, f.new_zeros(1, f.shape[1])])),
    "feature_width": _feature(lambda f: f.new_zeros(len(f), f.shape[1] + 1)),
    "feature_dtype": _feature(lambda f: torch.zeros(f.shape, dtype=torch.int64)),
    "counts": _counts,
    "no_text": lambda r, i, x: {"embed_weight": None, "inputs_embeds": None},
    "embeds_shape": lambda r, i, x: {"inputs_embeds": torch.zeros(*i["input_ids"].shape, 1, 1)},
    "check": lambda r, i, x: {"check": "later"},
    "scalar": lambda r, i, x: {"input_ids": torch.tensor(0)},
}  # fmt: skip
spoil = spoiling.by_one_of(SPOILED)
