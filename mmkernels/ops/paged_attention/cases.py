# SPDX-License-Identifier: Apache-2.0
"""Attention over pages: decodes and prefills of real models and odd ones, inputs, baselines, invalid calls.

Letters: B sequences, H key heads of G query heads each, d head width, ``page`` its slots; ``lens`` keys a sequence and
``chunk`` queries a sequence (0: a decode), both repeated over the batch; ``int8`` caches; ``prefix`` lengths, one a
group, of which sequence b belongs to b % (groups + 1) − 1, the first to none.
"""

from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.paged_attention import reference
from mmkernels.ops.paged_attention.api import paged_attention
from mmkernels.testing.case import Case, Inputs, Invalid, inference_only
from mmkernels.testing.yardstick import UNIT, Comparison, Tensors, compare, one_reduction, ulp

FAMILIES = ("random", "edge_heavy", "deep_negative", "ones", "growing_max")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 3, "H": 2, "G": 2, "d": 32, "page": 16, "lens": (40, 7, 16), "chunk": (), "causal": True,
        "int8": False, "prefix": (), "all_in_groups": False,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("decode"),
    _case("pages_of_1", page=1, G=1, d=64),
    _case("pages_of_3", page=3, G=5, H=1, d=80, lens=(1, 0, 100, 64, 65), B=5),
    _case("pages_of_256", page=256, G=7, H=4, d=128, lens=(300, 1, 255), chunk=()),
    _case("wide_heads", G=16, H=1, d=256, lens=(130, 63)),
    _case("prefill", chunk=(7, 1, 16), lens=(40, 7, 16)),
    _case("prefill_all", chunk=(40, 7, 0), lens=(40, 7, 16), G=3, d=72),
    _case("prefill_tiles", B=2, H=1, G=4, chunk=(90, 50), lens=(300, 50)),
    _case("more_queries_than_keys", chunk=(9, 5), lens=(4, 0), page=3),
    _case("not_causal", chunk=(9, 5, 0), lens=(33, 20, 4), causal=False),
    _case("spans", B=2, lens=(1500, 3000), page=64, d=40, G=1),
    _case("int8", int8=True, chunk=(3, 1, 2)),
    _case("prefix", B=5, prefix=(50, 20), lens=(40, 7, 16)),
    _case("prefix_alone", B=4, prefix=(33,), lens=(0, 0, 5), G=1),
    _case("prefix_prefill", B=5, prefix=(100, 0), chunk=(17, 2, 1), lens=(30, 2, 1), page=8, G=4),
    _case("prefix_spans", B=3, prefix=(1200,), lens=(2, 1), page=64, int8=True),
    _case("one_of_each", B=1, H=1, G=1, d=32, page=1, lens=(1,)),
    _case("empty_batch", "empty", B=0),
    _case("empty_queries", "empty", chunk=(0,)),
    _case("empty_keys", "empty", lens=(0,)),
    _case("decode_llama3_8b", "bench", B=8, H=8, G=4, d=128, lens=(2112, 1500, 700)),
    _case("decode_qwen2_7b_16_questions", "bench", B=16, H=4, G=7, d=128, lens=(64,), prefix=(2048,), all_in_groups=True),
    _case("prefill_qwen2_7b", "bench", B=1, H=4, G=7, d=128, lens=(1024,), chunk=(512,)),
]  # fmt: skip


def _repeated(values: tuple[int, ...], B: int) -> list[int]:
    return [values[b % len(values)] for b in range(B)]


def _tables(lens: list[int], page: int, order: list[int]) -> torch.Tensor:
    """Pages in random order, taken from the end of ``order``; what is past a length is no page."""
    counts = [-(-n // page) for n in lens]
    table = torch.full((len(lens), max([1, *counts])), 2**31 - 1)
    for row, count in zip(table, counts, strict=True):
        row[:count] = torch.tensor([order.pop() for _ in range(count)])
    return table


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``paged_attention``; families as in TOLERANCES.md. Unused slots hold NaN."""
    g = torch.Generator().manual_seed(seed)
    lens = _repeated(case.lens, case.B)
    chunks = _repeated(case.chunk, case.B) if case.chunk else [1] * case.B
    pages = sum(-(-n // case.page) for n in [*lens, *case.prefix]) + 3
    order = torch.randperm(pages, generator=g).tolist()
    table, prefix_table = (_tables(x, case.page, order) for x in (lens, list(case.prefix)))
    q = torch.randn(sum(chunks), case.H * case.G, case.d, generator=g)
    key, value = torch.full((2, pages, case.page, case.H, case.d), torch.nan)
    for row, n in [*zip(table, lens, strict=True), *zip(prefix_table, case.prefix, strict=True)]:
        k, v = torch.randn(2, n, case.H, case.d, generator=g)
        k, v = _of_family(family, k, v)
        at = row[torch.arange(n) // case.page], torch.arange(n) % case.page
        key[at], value[at] = k, v
    if family == "deep_negative":  # every logit far below 0: a key of zeros would win
        q = q.abs() * 4
    cast = lambda t: t.to(dtype).to(device)
    inputs: Inputs = {"query": cast(q), "causal": case.causal}
    if case.int8:
        inputs |= {"k_scale": torch.linspace(0.01, 0.02, case.H), "v_scale": 0.015}
        key, value = (
            (t.nan_to_num(9.0) / 0.015).round().clamp(-127, 127).to(torch.int8)
            for t in (key, value)
        )
        inputs |= {"key_cache": key.to(device), "value_cache": value.to(device)}
    else:
        inputs |= {"key_cache": cast(key), "value_cache": cast(value)}
    inputs |= {
        "block_table": table.int().to(device),
        "seq_lens": torch.tensor(lens, dtype=torch.int32).to(device),
    }
    if case.chunk:
        inputs["cu_seqlens_q"] = F.pad(torch.tensor(chunks).cumsum(0), (1, 0)).int().to(device)
    if case.prefix:
        own = 0 if case.all_in_groups else 1
        groups = torch.arange(case.B) % (len(case.prefix) + own) - own
        prefix = groups, prefix_table, torch.tensor(case.prefix)
        inputs["shared_prefix"] = tuple(t.to(device) for t in prefix)
    return inputs


def _of_family(family: str, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if family == "edge_heavy":  # first and last key dominate: an index off by one shows
        k[:1] *= 6
        k[-1:] *= 6
    elif family == "deep_negative":
        k = -k.abs()
    elif family == "ones":  # the output is the sum of the probabilities
        v = torch.ones_like(v)
    elif family == "growing_max":
        k = k * torch.linspace(0.1, 3, max(len(k), 1))[: len(k), None, None]
    return k, v


@inference_only
def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return paged_attention(**inputs)


@inference_only
def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return paged_attention(**inputs)


def _sequences(inputs: Inputs) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Of each sequence q [m, Hq, d], keys and values [n, H, d] made contiguous, and keys of its prefix."""
    x, dtype = inputs, inputs["query"].dtype
    groups, prefix_table, prefix_lens = x.get("shared_prefix", (None, None, None))
    lens = x["seq_lens"].tolist()
    starts = x["cu_seqlens_q"].tolist() if "cu_seqlens_q" in x else list(range(len(lens) + 1))
    scales = [
        torch.as_tensor(x.get(s, 1.0), dtype=torch.float32).to(x["query"].device)
        for s in ("k_scale", "v_scale")
    ]
    found = []
    for b, n in enumerate(lens):
        pages, shared = [(x["block_table"][b], n)], 0
        if groups is not None and (group := int(groups[b])) >= 0:
            shared = int(prefix_lens[group])
            pages.insert(0, (prefix_table[group], shared))
        both = []
        for cache, scale in zip((x["key_cache"], x["value_cache"]), scales, strict=True):
            rows = torch.cat(
                [reference.rows(cache, p, length, None, cache.dtype) for p, length in pages]
            )
            scaled = "k_scale" in x
            both.append(
                (rows * scale.view(-1, 1).to(torch.promote_types(dtype, torch.float32))).to(dtype)
                if scaled
                else rows
            )
        found.append((x["query"][starts[b] : starts[b + 1]], *both, shared))
    return found


@inference_only
def eager(inputs: Inputs) -> torch.Tensor:
    """Gather a sequence's pages, then SDPA: what runs without an attention over pages."""
    out = torch.zeros_like(inputs["query"])
    at = 0
    for q, k, v, shared in _sequences(inputs):
        m, n = len(q), len(k)
        mask = _visible(m, n, shared, inputs["causal"], q.device) if m > 1 else None
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        if n:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            out[at : at + m] = attended[0].transpose(0, 1)
        at += m
    return out


@inference_only
def library(inputs: Inputs) -> torch.Tensor:
    """Our own kernel without sharing: the prefix's pages before each sequence's own."""
    if "shared_prefix" not in inputs:
        return eager(inputs)
    return run(unshared(inputs))


def unshared(inputs: Inputs) -> Inputs:
    """The same call without a shared prefix, where prefixes fill their pages."""
    groups, pages, lens = inputs["shared_prefix"]
    page = inputs["key_cache"].shape[1]
    shared = torch.where(groups >= 0, F.pad(lens, (0, 1))[groups], 0)
    if (shared % page).any():
        raise ValueError("prefixes that do not fill their pages cannot lie in front of others")
    own, table = inputs["block_table"], []
    for b, group in enumerate(groups.tolist()):
        front = pages[group, : int(shared[b]) // page] if group >= 0 else pages[0, :0]
        table.append(torch.cat([front.to(own.dtype), own[b]]))
    padded = torch.nn.utils.rnn.pad_sequence(table, batch_first=True)
    rest = {k: v for k, v in inputs.items() if k != "shared_prefix"}
    return {**rest, "block_table": padded, "seq_lens": inputs["seq_lens"] + shared.to(own.dtype)}


def _visible(
    m: int, n: int, shared: int, causal: bool, device: torch.device
) -> torch.Tensor | None:
    if not causal:
        return None
    i, j = torch.arange(m, device=device)[:, None], torch.arange(n, device=device)
    return (j < shared) | (j <= n - m + i)


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, expected: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """The chain bound of TOLERANCES.md, with no projections before it."""
    out, dtype = expected["out"], got["out"].dtype
    bound, at = torch.zeros_like(out), 0
    for q, k, v, shared in _sequences(wide):
        m, n = len(q), len(k)
        if m and n:
            part = _bound(q, k, v, _visible(m, n, shared, wide["causal"], q.device), dtype)
            bound[at : at + m] = part
        at += m
    if dtype == torch.float32:
        bound = bound + ulp(out, dtype)
    else:
        bound = one_reduction(out, dtype, bound, bound, bound)
    return [compare("out", got["out"], out, bound)]


def _bound(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """fp32: the bound but its ulp; 16 bits: Σ(p v)²."""
    d, n, H = q.shape[-1], len(k), k.shape[1]
    q = q.unflatten(1, (H, -1))
    product = lambda a, b: torch.einsum("mhgd,nhd->hgmn", a, b) * d**-0.5
    scores, sizes = product(q, k), product(q.abs(), k.abs())
    if visible is not None:
        scores, sizes = scores.masked_fill(~visible, -torch.inf), sizes.masked_fill(~visible, 0.0)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    sums = lambda a, b: torch.einsum("hgmn,nhd->mhgd", a, b).flatten(1, 2)
    if dtype != torch.float32:
        return sums(p.square(), v.square())
    s_bar = sizes.amax(-1, keepdim=True)
    return 2 * UNIT[dtype] * (d + n) ** 0.5 * sums(p * (1 + 2 * s_bar), v.abs())


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: query, output, keys and values once, a shared prefix's once a group. FLOPs: every visible pair."""
    q, key = inputs["query"], inputs["key_cache"]
    slot = key[0, 0].numel() * key.element_size() * 2
    slots, flops = int(inputs["seq_lens"].sum()), 0
    if "shared_prefix" in inputs:
        slots += int(inputs["shared_prefix"][2].sum())
    for rows, k, *_ in _sequences(inputs):
        m, n = len(rows), len(k)
        pairs = m * n - (m * (m - 1) // 2 if inputs["causal"] else 0)
        flops += 4 * pairs * q.shape[1] * q.shape[2]
    return 2 * q.nbytes + slots * slot, flops


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _prefix(groups: Any = (0, -1, 0), pages: Any = ((0, 1),), lens: Any = (20,)) -> Any:
    return _set(shared_prefix=tuple(torch.tensor(x) for x in (groups, pages, lens)))


def _table(b: int, i: int, page: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        table = inputs["block_table"].clone()
        table[b, i] = page
        return {**inputs, "block_table": table}

    return change


_BYTES = {
    "key_cache": torch.zeros(8, 16, 2, 32, dtype=torch.int8),
    "value_cache": torch.zeros(8, 16, 2, 32, dtype=torch.int8),
}
INVALID = [
    Invalid("query_2d", _set(query=torch.zeros(3, 128)), r"query must be \[B, Hq, 32\].*got \[3, 128\]"),
    Invalid("query_heads", _set(query=torch.zeros(3, 5, 32)), "Hq a multiple of 2, got"),
    Invalid("query_width", _set(query=torch.zeros(3, 4, 64)), r"query must be \[B, Hq, 32\]"),
    Invalid("query_dtype", _set(query=torch.zeros(3, 4, 32).half()), "query must be of the dtype of the caches"),
    Invalid("query_int", _set(query=torch.zeros(3, 4, 32).int()), "query must be float64", TypeError),
    Invalid("query_grad", _set(query=torch.zeros(3, 4, 32, requires_grad=True)), r"query must be called under torch.no_grad\(\)"),
    Invalid("cache_3d", _set(key_cache=torch.zeros(8, 16, 64)), r"key_cache must be \[pages, page_size, H, d\]"),
    Invalid("value_shape", _set(value_cache=torch.zeros(8, 16, 2, 16)), "value_cache must be as key_cache"),
    Invalid("value_dtype", lambda i: {**i, "value_cache": i["value_cache"].double()}, "value_cache must be of the dtype of key_cache"),
    Invalid("bytes_without_scale", _set(**_BYTES), "k_scale must be given with an int8 cache, None with a float one, got None"),
    Invalid("scale_of_floats", _set(v_scale=1.0), "v_scale must be given with an int8 cache, None with a float one, got a scale"),
    Invalid("scale_shape", _set(**_BYTES, k_scale=torch.ones(3), v_scale=1.0), r"k_scale must be one number or \[H\] = \[2\], got \[3\]"),
    Invalid("table_rows", _set(block_table=torch.zeros(2, 3).long()), r"block_table must be \[B, P\] = \[3, P\], got \[2, 3\]"),
    Invalid("table_float", _set(block_table=torch.zeros(3, 3)), "block_table must be int32 or int64", TypeError),
    Invalid("lens_shape", _set(seq_lens=torch.zeros(3, 1).long()), r"seq_lens must be \[B\] = \[3\], got \[3, 1\]"),
    Invalid("lens_negative", _set(seq_lens=torch.tensor([1, -1, 2])), r"seq_lens\[1\] must be in \[0, 48\], what block_table can hold, got -1"),
    Invalid("lens_capacity", _set(seq_lens=torch.tensor([1, 2, 49])), r"seq_lens\[2\] must be in \[0, 48\].*got 49"),
    Invalid("page_negative", _table(0, 2, -1), r"block_table\[0, 2\] must be a page in \[0, 8\), got -1"),
    Invalid("page_too_large", _table(1, 0, 8), r"block_table\[1, 0\] must be a page in \[0, 8\), got 8"),
    Invalid("cu_empty", _set(cu_seqlens_q=torch.zeros(0).long()), r"cu_seqlens_q must be \[B \+ 1\]"),
    Invalid("cu_falls", _set(cu_seqlens_q=torch.tensor([0, 2, 1, 3])), r"cu_seqlens_q\[2\] must be at least 2, the one before, got 1"),
    Invalid("cu_end", _set(cu_seqlens_q=torch.tensor([0, 1, 2, 4])), "cu_seqlens_q must be 0 … 3, the queries given, got 0 … 4"),
    Invalid("cu_start", _set(cu_seqlens_q=torch.tensor([1, 1, 2, 3])), "cu_seqlens_q must be 0 … 3"),
    Invalid("group_too_large", _prefix((0, 1, 0)), r"shared_prefix group_of_seq\[1\] must be in \[-1, 1\), got 1"),
    Invalid("group_below", _prefix((0, -2, 0)), r"shared_prefix group_of_seq\[1\] must be in \[-1, 1\), got -2"),
    Invalid("prefix_length", _prefix(lens=(33,)), r"shared_prefix lens\[0\] must be in \[0, 32\], what shared_prefix pages can hold, got 33"),
    Invalid("prefix_page", _prefix(pages=((0, 9),)), r"shared_prefix pages\[0, 1\] must be a page in \[0, 8\), got 9"),
    Invalid("prefix_shape", _prefix((0, 0)), r"shared_prefix group_of_seq must be \[B\] = \[3\], got \[2\]"),
]  # fmt: skip
