# SPDX-License-Identifier: Apache-2.0
"""Compaction: pages of several sizes, tokens dropped in several patterns, targets in place and elsewhere.

Letters: B sequences, H heads of d, ``layers``, ``page`` its slots; ``lens`` repeated over the batch; ``share`` of the
tokens that is kept; ``moved``: the last pages of every target are new ones.
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.compact_kv.api import CompactedKV, compact_kv
from mmkernels.testing.case import Case, Inputs, Invalid, inference_only
from mmkernels.testing.yardstick import Comparison, Tensors, compare

FAMILIES = ("random", "visual")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 3, "H": 2, "d": 8, "layers": 2, "page": 4, "lens": (13, 8, 5), "share": 0.4, "moved": False,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("plain"),
    _case("pages_of_1", page=1),
    _case("pages_of_256", page=256, lens=(300, 256, 1), d=64),
    _case("moved", moved=True),
    _case("few", share=0.05, B=5, lens=(40, 1, 17), page=16),
    _case("nearly_all", share=0.95, lens=(100, 64), d=5, H=3),
    _case("empty_batch", "empty", B=0),
    _case("empty_sequences", "empty", lens=(0,)),
    _case("qwen2_7b_quarter", "bench", B=1, H=4, d=128, layers=7, page=16, lens=(2048,), share=0.25),
]  # fmt: skip


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``compact_kv``. ``visual``: text around a block of tokens some of which are dropped."""
    g = torch.Generator().manual_seed(seed)
    lens = [case.lens[b % len(case.lens)] for b in range(case.B)]
    counts = [-(-n // case.page) for n in lens]
    pages = sum(counts) * 2 + 1
    order = torch.randperm(pages, generator=g).tolist()
    table = torch.full((case.B, max([1, *counts])), -1)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
    keep = torch.rand(case.B, max([1, *lens]), generator=g) < case.share
    for row, n in zip(keep, lens, strict=True):
        if family == "visual":
            row[: n // 4] = True
            row[n // 2 :] = True
    inputs: Inputs = {
        "block_table": table.int(),
        "seq_lens": torch.tensor(lens).long(),
        "keep": keep,
    }
    if case.moved:
        first = (
            (keep | (torch.arange(keep.shape[1]) >= inputs["seq_lens"][:, None]))
            .long()
            .cumprod(1)
            .sum(1)
        )
        target = table.clone()
        for b, count in enumerate(counts):
            for i in range(int(first[b]) // case.page, count):
                target[b, i] = order.pop()
        inputs["target_table"] = target
    shape = (case.layers, pages, case.page, case.H, case.d)
    inputs |= {n: torch.randn(shape, generator=g).to(dtype) for n in ("key_cache", "value_cache")}
    return {k: v.to(device) for k, v in inputs.items()}


CACHES = ("key_cache", "value_cache")


def run_in_place(inputs: Inputs) -> torch.Tensor:
    """The public op as it is timed: a second time it moves as much."""
    return compact_kv(**inputs).seq_lens


@inference_only
def run(inputs: Inputs) -> torch.Tensor:
    """The public op on copies of the caches; returns them, lengths, positions and table in one tensor."""
    inputs = {**inputs, **{n: inputs[n].clone() for n in CACHES}}
    return _told(inputs, compact_kv(**inputs))


@inference_only
def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return run(inputs)


@inference_only
def eager(inputs: Inputs) -> torch.Tensor:
    """As ``eager_in_place``, on copies."""
    inputs = {**inputs, **{n: inputs[n].clone() for n in CACHES}}
    lens = eager_in_place(inputs)
    table = inputs["target_table" if "target_table" in inputs else "block_table"].long()
    used = torch.arange(table.shape[1], device=table.device) * inputs["key_cache"].shape[2]
    table = table.where(used < lens[:, None], -1)
    return _told(inputs, CompactedKV(lens, inputs["seq_lens"], table))


def eager_in_place(inputs: Inputs) -> torch.Tensor:
    """Layer by layer, K and V: gather a sequence's kept tokens, write them where they go."""
    keys, values = (inputs[n] for n in CACHES)
    page, table, lens = keys.shape[2], inputs["block_table"].long(), inputs["seq_lens"].tolist()
    target = inputs["target_table"].long() if "target_table" in inputs else table
    new_lens = []
    for b, n in enumerate(lens):
        source = inputs["keep"][b, :n].nonzero()[:, 0]
        to = torch.arange(len(source), device=source.device)
        for layer in range(len(keys)):
            for cache in (keys[layer], values[layer]):
                rows = cache[table[b, source // page], source % page]
                cache[target[b, to // page], to % page] = rows
        new_lens.append(len(source))
    return torch.tensor(new_lens, dtype=torch.int64, device=keys.device)


library = eager
# Timed in place, without copies of the caches.
APART = {"ours": run_in_place, "eager": eager_in_place, "library": eager_in_place}


def _told(inputs: Inputs, found: CompactedKV) -> torch.Tensor:
    caches = [inputs[n].flatten() for n in CACHES]
    numbers = torch.cat([t.flatten() for t in found])
    digits = [(numbers // base % 128).to(caches[0].dtype) for base in (1, 128, 128**2)]  # exact
    return torch.cat([*caches, *digits])


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, reference: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """Bitwise."""
    return [compare("out", got["out"], reference["out"], torch.zeros_like(reference["out"]))]


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: kept tokens read and written in every layer."""
    key = inputs["key_cache"]
    kept = inputs["keep"] & (torch.arange(inputs["keep"].shape[1]) < inputs["seq_lens"][:, None])
    row = key[0, 0, 0].numel() * key.element_size()
    return 4 * int(kept.sum()) * row * len(key), 0


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _swapped(inputs: Inputs) -> Inputs:
    """Two sequences with one page, which the first must write."""
    table = inputs["block_table"].clone()
    table[1, 0] = table[0, 0]
    return {
        **inputs,
        "block_table": table,
        "keep": torch.zeros(3, 13).bool().index_fill(1, torch.tensor([2, 5, 6, 7]), True),
    }


def _page(page: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        table = inputs["block_table"].clone()
        table[0, 1] = page
        return {**inputs, "block_table": table}

    return change


INVALID = [
    Invalid("cache_4d", lambda i: {**i, "key_cache": i["key_cache"][0]}, r"key_cache must be \[layers, pages, page_size, H, d\], or a list"),
    Invalid("value_shape", lambda i: {**i, "value_cache": i["value_cache"][:1]}, "value_cache must be of one shape in K and V"),
    Invalid("value_dtype", lambda i: {**i, "value_cache": i["value_cache"].half()}, "value_cache must be of one dtype and device"),
    Invalid("keep_int", _set(keep=torch.ones(3, 13).long()), "keep must be bool", TypeError),
    Invalid("table_rows", lambda i: {**i, "block_table": i["block_table"][:2]}, r"block_table must be \[B, P\] with B = 3, as seq_lens, got \[2, "),
    Invalid("keep_short", _set(keep=torch.ones(3, 12).bool()), r"seq_lens\[0\] must be in \[0, 12\], what block_table and keep can hold, got 13"),
    Invalid("keep_rows", _set(keep=torch.ones(2, 13).bool()), r"keep must be \[B, L\] with B = 3"),
    Invalid("lens_negative", _set(seq_lens=torch.tensor([13, -1, 5])), r"seq_lens\[1\] must be in \[0, 13\].*got -1"),
    Invalid("lens_float", _set(seq_lens=torch.tensor([1.0, 2, 3])), "seq_lens must be int32 or int64", TypeError),
    Invalid("page_missing", _page(17), r"block_table\[0, 1\] must be a page in \[0, 17\), got 17"),
    Invalid("page_negative", _page(-1), r"block_table\[0, 1\] must be a page in \[0, 17\), got -1"),
    Invalid("target_page", lambda i: {**i, "target_table": i["block_table"] + 17}, r"target_table\[0, 0\] must be a page in \[0, 17\)"),
    Invalid("target_room", _set(target_table=torch.zeros(3, 0).long()), r"target_table\[0\] must be room for \d+ tokens, got room for 0"),
    Invalid("shared_page", _swapped, r"target_table\[0, 0\] must be a page of its own"),
    Invalid("next_positions", _set(next_positions=torch.zeros(2).long()), r"next_positions must be \[B\] with B = 3"),
]  # fmt: skip
