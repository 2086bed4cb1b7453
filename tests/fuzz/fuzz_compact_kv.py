# SPDX-License-Identifier: Apache-2.0
"""Random calls of compact_kv, bit by bit: in place and to new pages, shared prefixes, layers in a list, any layout.

What lies between the slots of a cache, and all of it after a call that raised, must be as before: ``run`` looks.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import layouts
import spoiling
import torch

from mmkernels import backends, compact_kv
from mmkernels.ops.compact_kv import cases
from mmkernels.testing.case import Case, Inputs, inference_only, map_tensors

OP = "compact_kv"
KINDS = ("in_place", "moved")
SIMPLEST: dict[str, Any] = {
    "B": 1, "H": 1, "d": 1, "layers": 1, "page": 1, "lens": (1,), "share": 1.0, "shared": False, "listed": False,
    "positions": False, "dtype": "fp32", "family": "random", "threads": 1, "layouts": (), "int64": False,
}  # fmt: skip
DTYPES = {**layouts.DTYPES, "int8": torch.int8}
LAYOUTS = tuple(name for name in layouts.LAYOUTS if name != "expanded")
VARIED = tuple("dtype B H d layers page lens share shared listed positions family threads".split())
KNOWN: dict[str, Callable[[dict[str, Any], str], bool]] = {}


@inference_only
def run(inputs: Inputs) -> torch.Tensor:
    """The public op on copies, gaps included; caches, lengths, positions and table in one tensor."""
    caches = {n: _copy(inputs[n]) for n in cases.CACHES}
    given = {n: list(c) if inputs["listed"] else c for n, c in caches.items()}
    call = {**{k: v for k, v in inputs.items() if k != "listed"}, **given}
    try:
        found = compact_kv(**call)
    except Exception:
        for n, cache in caches.items():
            assert torch.equal(_bytes(cache), _bytes(inputs[n])), (
                f"{n} changed by a call that raised"
            )
        raise
    for n, cache in caches.items():
        if not inputs["listed"]:
            assert _gaps_stay(cache, inputs[n]), f"{n} changed between its slots"
    return cases._told({**inputs, **caches}, found)


@inference_only
def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return run(inputs)


CASES = SimpleNamespace(run=run, plain=plain, check=cases.check)


def _copy(t: torch.Tensor) -> torch.Tensor:
    memory = t.untyped_storage().clone()
    return t.new_empty(0).set_(memory, t.storage_offset(), t.shape, t.stride())


def _bytes(t: torch.Tensor) -> torch.Tensor:
    memory = t.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(memory, 0, (len(memory),), (1,))


def _gaps_stay(cache: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether memory that is no slot is as it was."""
    after = _copy(cache)
    after.copy_(before)
    return torch.equal(_bytes(after), _bytes(before))


def draw(r: random.Random, kind: str) -> dict[str, Any]:
    """The letters of a valid call."""
    B, page = r.choice((0, 1, 1, 2, 3, 6)), r.choice((1, 2, 3, 7, 16, 64, 256))
    length = lambda: r.choice((0, 1, page, page + 1, r.randint(1, 40), r.randint(1, 150)))
    return {
        **SIMPLEST, "seed": r.randrange(2**31), "B": B, "H": r.randint(1, 3), "d": r.choice((1, 3, 8, 40)),
        "layers": r.randint(1, 3), "page": page, "lens": tuple(length() for _ in range(max(B, 1))),
        "share": r.choice((0.0, 0.05, 0.4, 0.95, 1.0)), "shared": r.random() < 0.3, "listed": r.random() < 0.3,
        "positions": r.random() < 0.3, "dtype": r.choice(tuple(DTYPES)), "family": r.choice(cases.FAMILIES),
        "threads": r.choice((1, 2, 3, 5)), "int64": r.random() < 0.5, "moved": kind == "moved",
        "layouts": layouts.drawn(r, cases.CACHES, 0.3, LAYOUTS),
    }  # fmt: skip


def build(x: dict[str, Any]) -> tuple[Inputs, Inputs]:
    """The call, twice: there is nothing to spell out."""
    dtype = torch.float32 if x["dtype"] == "int8" else DTYPES[x["dtype"]]
    inputs = cases.make_inputs(Case("fuzz", x), dtype, seed=x["seed"], family=x["family"])
    if x["shared"]:
        _share(inputs, x["page"])
    for name in cases.CACHES:
        if x["dtype"] == "int8":
            inputs[name] = (inputs[name] * 30).clamp(-128, 127).to(torch.int8)
    for name, layout, seed in x["layouts"]:
        inputs[name] = layouts.laid_out(inputs[name], layout, seed)
    if x["int64"]:
        inputs["block_table"] = inputs["block_table"].long()
    else:
        inputs["seq_lens"] = inputs["seq_lens"].int()
    if x["positions"]:
        inputs["next_positions"] = inputs["seq_lens"] + 5
    inputs["listed"] = x["listed"]
    return inputs, map_tensors(inputs, lambda t: t)


def _share(inputs: Inputs, page: int) -> None:
    """The first page of all sequences that fill it becomes one page, whose tokens stay."""
    full = inputs["seq_lens"] >= page
    if full.sum() < 2:
        return
    for name in ("block_table", "target_table"):
        if name in inputs:
            inputs[name][full, 0] = inputs["block_table"][full, 0][0].to(inputs[name].dtype)
    inputs["keep"][full, :page] = True


def _kept(i: Inputs) -> torch.Tensor:
    return i["keep"] & (torch.arange(i["keep"].shape[1]) < i["seq_lens"][:, None])


def _at(
    r: random.Random, tensor: torch.Tensor, value: int, where: torch.Tensor
) -> torch.Tensor | None:
    """``tensor`` with ``value`` at one of the places ``where`` marks."""
    places = where.nonzero().tolist()
    if not places:
        return None
    changed = tensor.long().clone()
    changed[tuple(r.choice(places))] = value
    return changed


def _page(name: str) -> Any:
    """A page in use that does not exist."""

    def change(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
        table = i.get(name, i["block_table"])
        lens, pages = (
            i["seq_lens"] if name == "block_table" else _kept(i).sum(1),
            i["key_cache"].shape[1],
        )
        used = torch.arange(table.shape[1]) * x["page"] < lens[:, None]
        changed = _at(r, table, r.choice((-1, pages, pages + 5, 2**40, -(2**40))), used)
        return None if changed is None else {name: changed}

    return change


def _lens(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    room = min(i["keep"].shape[1], i["block_table"].shape[1] * x["page"])
    changed = _at(
        r, i["seq_lens"], r.choice((-1, -(2**31), room + 1, 2**31 - 1)), torch.ones(x["B"])
    )
    return None if changed is None else {"seq_lens": changed}


def _room(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    return {"target_table": torch.zeros(x["B"], 0).long()} if _kept(i).any() else None


def _owner(r: random.Random, i: Inputs, x: dict[str, Any]) -> Inputs | None:
    """A page that one sequence writes is also one of another."""
    kept, page = _kept(i), x["page"]
    b, source = kept.nonzero().unbind(1)
    target = (kept.cumsum(1) - 1)[b, source]
    place = lambda table, j: table[b, j // page].long() * page + j % page
    table = i.get("target_table", i["block_table"])
    moved = (place(i["block_table"], source) != place(table, target)).nonzero()[:, 0].tolist()
    others = {int(other) for other in (i["seq_lens"] > 0).nonzero()}
    choices = [(m, other) for m in moved[:20] for other in others - {int(b[m])}]
    if not choices:
        return None
    m, other = r.choice(choices)
    changed = i["block_table"].clone()
    changed[other, 0] = table[b[m], target[m] // page]
    return {"block_table": changed, "target_table": table}


SPOILED: dict[str, Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]] = {
    "rank": lambda r, i, x: {"key_cache": i["key_cache"][0], "listed": False},
    "value_shape": lambda r, i, x: {"value_cache": i["value_cache"][..., :0]},
    "value_dtype": lambda r, i, x: {"value_cache": i["value_cache"].to(torch.int16)},
    "keep_int": lambda r, i, x: {"keep": i["keep"].long()},
    "keep_rows": lambda r, i, x: {"keep": i["keep"].new_zeros(x["B"] + 1, i["keep"].shape[1])},
    "lens_float": lambda r, i, x: {"seq_lens": i["seq_lens"].float()},
    "table_rows": lambda r, i, x: {"block_table": i["block_table"].new_zeros(x["B"] + 1, 4)},
    "positions": lambda r, i, x: {"next_positions": torch.zeros(x["B"] + 1).long()},
    "page": _page("block_table"),
    "target_page": _page("target_table"),
    "lens": _lens,
    "room": _room,
    "owner": _owner,
}
spoil = spoiling.by_one_of(SPOILED)
