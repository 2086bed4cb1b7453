# SPDX-License-Identifier: Apache-2.0
"""Random calls of paged_attention: decodes and packed prefills, pages, groups of heads, int8, prefixes; any layout."""

import random
from collections.abc import Callable
from typing import Any

import layouts
import spoiling
import torch

from mmkernels.ops.paged_attention import cases
from mmkernels.testing.case import Case, Inputs, map_tensors

OP = "paged_attention"
CASES = cases
KINDS = ("decode", "packed", "prefix")
SIMPLEST: dict[str, Any] = {
    "B": 1, "H": 1, "G": 1, "d": 32, "page": 1, "lens": (1,), "chunk": (), "causal": True, "int8": False, "prefix": (),
    "all_in_groups": True, "dtype": "fp32", "family": "random", "threads": 1, "layouts": (), "int64": False,
}  # fmt: skip
LAYOUTS = tuple(name for name in layouts.LAYOUTS if name != "expanded")
VARIED = tuple("dtype B H G d page causal int8 family threads".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    B, page = r.choice((0, 1, 1, 2, 3, 6)), r.choice((1, 2, 3, 7, 16, 64, 256))
    length = lambda: r.choice((0, 1, page, 63, 64, 65, r.randint(1, 200), r.randint(1, 1500)))
    x = {
        **SIMPLEST, "seed": r.randrange(2**31), "B": B, "H": r.randint(1, 3), "G": r.choice((1, 2, 3, 4, 7, 8, 15, 16)),
        "d": r.choice((1, 3, 32, 40, 64, 72, 80, 96, 128, 256)), "page": page,
        "lens": tuple(length() for _ in range(max(B, 1))), "causal": r.random() < 0.8, "int8": r.random() < 0.2,
        "dtype": r.choice(list(layouts.DTYPES)), "family": r.choice(cases.FAMILIES), "threads": r.choice((1, 2, 3, 5)),
        "int64": r.random() < 0.5,
    }  # fmt: skip
    if kind == "packed" or (kind == "prefix" and r.random() < 0.5):
        x["chunk"] = tuple(
            r.choice((0, 1, 2, 16, r.randint(1, 40), r.randint(1, 100))) for _ in range(max(B, 1))
        )
    if kind == "prefix":
        x["prefix"] = tuple(length() for _ in range(r.choice((1, 1, 2, 3))))
        x["all_in_groups"] = r.random() < 0.5
    x["layouts"] = layouts.drawn(r, ("query", "key_cache", "value_cache", "grad"), 0.3, LAYOUTS)
    return x


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    inputs = cases.make_inputs(
        Case("fuzz", x), layouts.DTYPES[x["dtype"]], seed=x["seed"], family=x["family"]
    )
    for name, layout, seed in x["layouts"]:
        if name != "grad":
            inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    if x["int64"]:
        names = ("block_table", "seq_lens", "cu_seqlens_q")
        inputs |= {n: inputs[n].long() for n in names if n in inputs}
    return inputs, map_tensors(inputs, lambda t: t)


def _at(
    r: random.Random, tensor: torch.Tensor, value: int, where: torch.Tensor
) -> torch.Tensor | None:
    """``tensor`` with ``value`` at one of the places ``where`` marks."""
    places = where.nonzero().tolist()
    if not places:
        return None
    changed = tensor.clone()
    changed[tuple(r.choice(places))] = value
    return changed


def _page(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    table, pages = i["block_table"].long(), i["key_cache"].shape[0]
    used = torch.arange(table.shape[1]) * x["page"] < i["seq_lens"][:, None]
    changed = _at(r, table, r.choice((-1, pages, pages + 5, 2**40, -(2**40))), used)
    return None if changed is None else {"block_table": changed}


def _lens(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    value = r.choice((-1, -(2**31), i["block_table"].shape[1] * x["page"] + 1, 2**31 - 1))
    changed = _at(r, i["seq_lens"], value, torch.ones(len(i["seq_lens"])))
    return None if changed is None else {"seq_lens": changed}


def _starts(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    if "cu_seqlens_q" not in i or len(i["cu_seqlens_q"]) < 2:
        return None
    value = r.choice((-1, len(i["query"]) + 1))
    return {"cu_seqlens_q": _at(r, i["cu_seqlens_q"], value, torch.ones(x["B"] + 1))}


def _groups(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    if "shared_prefix" not in i or not x["B"]:
        return None
    groups, pages, lens = i["shared_prefix"]
    wrong = _at(r, groups, r.choice((-2, len(lens), 2**40)), torch.ones(x["B"]))
    return {"shared_prefix": (wrong, pages, lens)}


SPOILED: dict[str, Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]] = {
    "rank": lambda r, i, x: {"query": i["query"].flatten(1)},
    "width": lambda r, i, x: {"query": i["query"].new_zeros(*i["query"].shape[:2], x["d"] + 1)},
    "dtype": lambda r, i, x: {"query": i["query"].int()},
    "heads": lambda r, i, x: {"query": i["query"].new_zeros(len(i["query"]), 0, x["d"])},
    "value_shape": lambda r, i, x: {"value_cache": i["value_cache"][..., :0]},
    "scale": lambda r, i, x: {"k_scale": None if x["int8"] else 1.0},
    "table_rows": lambda r, i, x: {"block_table": i["block_table"].new_zeros(x["B"] + 1, 4)},
    "lens_float": lambda r, i, x: {"seq_lens": i["seq_lens"].float()},
    "page": _page,
    "lens": _lens,
    "starts": _starts,
    "groups": _groups,
}
spoil = spoiling.by_one_of(SPOILED)
