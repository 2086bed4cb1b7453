# SPDX-License-Identifier: Apache-2.0
"""The paged write: layouts of real models and odd ones, inputs, baselines, invalid calls.

Letters as in ``mrope/cases.py``, and: T tokens, ``page`` its size, ``norm`` with QK-norm, ``cache`` dtype ("" the
key's), ``skip`` share of tokens without a slot, ``decode``: tokens of as many sequences, else pages one after another.
"""

from collections.abc import Callable
from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.mrope.cases import (
    AXES,
    PAIRS,
    Rotation,
    bits,
    eager_rotated,
    joined,
    library_rotated,
    rotation_of,
    table_of,
    terms,
    within,
)
from mmkernels.ops.mrope.reference import rotation
from mmkernels.ops.rope_write_kv.api import rope_write_kv
from mmkernels.testing.case import Case, Inputs, Invalid
from mmkernels.testing.yardstick import Comparison, Tensors, compare, in_fp64, ulp

FAMILIES = ("random", "far", "spread")
CACHE_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}  # fmt: skip


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "T": 7, "Hq": 4, "Hk": 2, "d": 16, "r": 16, "layout": "1d", "theta": 1e4, "pairing": "half", "scale": 1.0,
        "page": 4, "norm": False, "cache": "", "skip": 0.0, "decode": False, "per_head": False,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


QWEN2_5_VL: Inputs = {
    "Hq": 28, "Hk": 4, "d": 128, "r": 128, "layout": "sectioned", "theta": 1e6, "page": 16,
}  # fmt: skip
QWEN3_VL: Inputs = {
    "Hq": 32, "Hk": 8, "d": 128, "r": 128, "layout": "interleaved", "theta": 5e6, "page": 16, "norm": True,
}  # fmt: skip
CASES = [
    _case("sectioned", layout="sectioned", skip=0.3),
    _case("page_of_one", page=1, T=9, Hq=3, Hk=3),
    _case("page_256", page=256, T=300, layout="interleaved", d=32, r=32, norm=True),
    _case("page_16_partial", page=16, T=33, d=80, r=50, pairing="adjacent", layout="sectioned"),
    _case("axes", layout="axes", d=24, r=24, T=40, page=16, norm=True, skip=0.2),
    _case("head_256", d=256, r=64, Hq=2, Hk=1, T=20, layout="interleaved", norm=True),
    _case("odd_width", d=33, r=14, Hq=5, Hk=5, T=17, pairing="adjacent", norm=True),
    _case("decode", d=64, r=64, T=11, decode=True, layout="sectioned", scale=1.2),
    _case("nothing_turns", d=5, r=0, norm=True),
    _case("to_bf16", cache="bf16", d=32, r=32, T=21),
    _case("to_fp16", cache="fp16", d=32, r=20, T=21, norm=True),
    _case("to_fp32", cache="fp32", d=32, r=32, T=21, pairing="adjacent"),
    _case("to_int8", cache="int8", d=64, r=64, T=50, norm=True, layout="interleaved"),
    _case("to_int8_heads", cache="int8", per_head=True, d=40, r=40, T=30, skip=0.2),
    _case("to_fp8", cache="fp8", d=64, r=64, T=50, norm=True),
    _case("to_fp8_heads", cache="fp8", per_head=True, d=33, r=32, T=30, pairing="adjacent"),
    _case("all_skipped", skip=1.0),
    _case("no_tokens", "test empty", T=0, layout="sectioned"),
    _case("no_heads", "test empty", Hq=0, Hk=0),
    _case("qwen2_5_vl_7b_prefill", "bench", T=2048, **QWEN2_5_VL),
    _case("qwen2_5_vl_7b_decode", "bench", T=64, decode=True, **QWEN2_5_VL),
    _case("qwen3_vl_8b_prefill", "bench", T=2048, **QWEN3_VL),
    _case("qwen3_vl_8b_decode", "bench", T=64, decode=True, **QWEN3_VL),
    _case("qwen2_5_vl_7b_prefill_int8", "bench", T=2048, cache="int8", **QWEN2_5_VL),
]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``rope_write_kv``, ``inv_freq`` as bits (see ``mrope/cases.py``)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        x = torch.randn(*sizes, generator=g)
        if family == "spread":
            x = x * torch.exp2(torch.randint(-6, 7, x.shape, generator=g).float())
        return x.to(dtype).to(device)

    inv_freq, axis = (None if t is None else t.to(device) for t in table_of(case))
    assert inv_freq is not None
    reach = 2**18 if family == "far" else 300
    position_ids = torch.randint(0, reach, (AXES[case.layout], case.T), generator=g).to(device)
    cos, sin = rotation("", dtype, position_ids, inv_freq, axis, case.scale)
    pages = -(-case.T // case.page) + 2
    if case.decode:
        pages *= 16
    shape = (pages, case.page, case.Hk, case.d)
    cache_dtype = CACHE_DTYPES.get(case.cache, dtype)
    caches = [torch.randn(shape, generator=g).to(cache_dtype).to(device) for _ in "kv"]
    inputs: Inputs = {
        "query": normal(case.T, case.Hq, case.d),
        "key": normal(case.T, case.Hk, case.d),
        "value": normal(case.T, case.Hk, case.d),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "slot_mapping": _slots(case, pages, g).to(device),
        "position_ids": position_ids if axis is not None else position_ids[0],
        "inv_freq": inv_freq.view(torch.int32),
        "axis": axis,
        "pairing": case.pairing,
        "attention_scaling": case.scale,
        "rotation": Rotation(cos.to(dtype), sin.to(dtype)),
    }
    if case.norm:
        inputs |= {"q_norm": normal(case.d), "k_norm": normal(case.d), "eps": 1e-5}
    if case.cache in ("int8", "fp8"):
        unit = (0.03 if case.cache == "int8" else 0.01) * (64 if family == "spread" else 1)
        sizes = case.Hk if case.per_head else 1
        for name in ("k_scale", "v_scale"):
            inputs[name] = (unit * (1 + torch.rand(sizes, generator=g))).to(device)
    return inputs


def _slots(case: Case, pages: int, g: torch.Generator) -> torch.Tensor:
    if case.decode:
        slots = torch.randperm(pages * case.page, generator=g)[: case.T]
    else:
        token = torch.arange(case.T)
        page = torch.randperm(pages, generator=g)[token // case.page]
        slots = page * case.page + token % case.page
    return torch.where(torch.rand(case.T, generator=g) < case.skip, -1, slots)


def _ours(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    arguments = {k: v for k, v in inputs.items() if k != "rotation"}
    return rope_write_kv(**arguments | {"inv_freq": inputs["inv_freq"].view(torch.float32)})


def _eager(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    rotation = inputs["rotation"]
    query, key = (
        eager_rotated(_norm(inputs, n), rotation.cos, rotation.sin, inputs["pairing"])
        for n in ("query", "key")
    )
    page_size, slots = inputs["key_cache"].shape[1], inputs["slot_mapping"]
    for name, rows, scale in (("key", key, "k_scale"), ("value", inputs["value"], "v_scale")):
        cache = inputs[f"{name}_cache"]
        cache[slots // page_size, slots % page_size] = _stored(rows, cache, inputs.get(scale))
    return query, key


def _library(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    rotation = inputs["rotation"]
    query, key = (
        library_rotated(_norm(inputs, n), rotation.cos, rotation.sin, inputs["pairing"])
        for n in ("query", "key")
    )
    for name, rows, scale in (("key", key, "k_scale"), ("value", inputs["value"], "v_scale")):
        cache = inputs[f"{name}_cache"]
        rows = _stored(rows, cache, inputs.get(scale))
        cache.flatten(0, 1).index_copy_(0, inputs["slot_mapping"], rows)
    return query, key


def _norm(inputs: Inputs, name: str) -> torch.Tensor:
    """``Qwen3RMSNorm``."""
    x, weight = inputs[name], inputs.get(f"{name[0]}_norm")
    if weight is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + inputs["eps"])
    return weight * wide.to(x.dtype)


def _stored(rows: torch.Tensor, cache: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return rows.to(cache.dtype)
    rows = rows.float() / scale[:, None]
    if cache.dtype == torch.int8:
        rows = rows.round().clamp(-127, 127)
    return rows.to(cache.dtype)


APART = {"ours": _ours, "eager": _eager, "library": _library}  # what benchmarks time


def run(inputs: Inputs) -> torch.Tensor:
    """The public op; writes the caches of ``inputs``."""
    return joined(_ours(inputs))


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers runs it, with cos and sin in the dtype, then an indexed write."""
    return joined(_eager(inputs))


def library(inputs: Inputs) -> torch.Tensor:
    """As vLLM's native path: the halves apart, rows written by ``index_copy_``."""
    return joined(_library(inputs))


def results(
    inputs: Inputs, function: Callable[[Inputs], tuple[torch.Tensor, ...]] = _ours
) -> Tensors:
    """Query and key, and copies of the caches after the write."""
    caches = {n: inputs[n].clone() for n in ("key_cache", "value_cache")}
    query, key = function({**inputs, **caches})
    return {"query": query, "key": key, **caches}


def reference_results(inputs: Inputs) -> Tensors:
    """In fp64; of the caches what they should hold, unrounded."""
    wide = in_fp64(inputs) | {"k_scale": None, "v_scale": None}
    wide |= {n: inputs[n].double() for n in ("key_cache", "value_cache")}
    with backends.backend("reference"):
        found = results(wide)
    at = _written(inputs)
    for name, scale in (
        ("key_cache", inputs.get("k_scale")),
        ("value_cache", inputs.get("v_scale")),
    ):
        if scale is not None:
            limit = 127.0 if inputs[name].dtype == torch.int8 else 448.0
            quotient = found[name][at] / scale.double()[:, None]
            found[name][at] = quotient.clamp(-limit, limit)
    return found


def _written(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    slots = inputs["slot_mapping"][inputs["slot_mapping"] >= 0]
    page_size = inputs["key_cache"].shape[1]
    return slots // page_size, slots % page_size


def compared(inputs: Inputs, got: Tensors) -> list[Comparison]:
    """Query, key and caches against the reference, by the bounds of TOLERANCES.md."""
    wide, reference = in_fp64(inputs), reference_results(inputs)
    position_ids = wide["position_ids"] if wide["axis"] is not None else wide["position_ids"][None]
    cos, sin = rotation_of(wide, position_ids)
    sizes = {"value": torch.zeros_like(wide["value"])}  # Σ|t|; 0 of a copy
    K = {"value": 0}
    for name in ("query", "key"):
        normed, has_norm = _norm(wide, name), wide.get(f"{name[0]}_norm") is not None
        turned = terms(normed, cos, sin, wide["pairing"])
        sizes[name] = torch.where(turned > 0, turned, normed.abs()) if has_norm else turned
        K[name] = 8 + normed.shape[-1] if has_norm else 2
    found = [within(n, got[n], reference[n], sizes[n], K[n]) for n in ("query", "key")]
    for name in ("key", "value"):
        cache, at = f"{name}_cache", _written(inputs)
        bounds = torch.zeros_like(reference[cache])  # what is not written keeps its bits
        errors = 2 * 2.0**-24 * K[name] ** 0.5 * sizes[name][inputs["slot_mapping"] >= 0]
        copied = (errors == 0) & (got[cache].dtype in (wide_of(inputs), inputs["key"].dtype))
        rounding = _rounding(
            reference[cache][at], got[cache].dtype, inputs.get(f"{name[0]}_scale"), errors
        )
        bounds[at] = torch.where(copied, 0.0, rounding)
        found.append(compare(cache, got[cache], reference[cache], bounds))
    return found


def wide_of(inputs: Inputs) -> torch.dtype:
    return torch.promote_types(inputs["key"].dtype, torch.float32)


def _rounding(
    wanted: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, errors: torch.Tensor
) -> torch.Tensor:
    """How far a cache may be: one rounding, after these errors; of a quotient also that of the division."""
    if scale is None:
        return ulp(wanted, dtype) * (1.0 if dtype == torch.float32 else 0.505) + errors
    quotient = errors / scale.double()[:, None] + 2.0**-23 * wanted.abs()
    if dtype == torch.int8:
        return 0.5 + quotient
    exponent = (torch.frexp(wanted.abs())[1] - 4).clamp(
        min=-9
    )  # float8_e4m3fn: 3 bits, from 2⁻⁹ on
    return 0.505 * torch.ldexp(torch.ones_like(wanted), exponent) + quotient


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: query, key and value read; query and key written, and the caches' rows. FLOPs: few a value."""
    query, key, value = (inputs[n] for n in ("query", "key", "value"))
    rows = value.numel() * (
        inputs["key_cache"].element_size() + inputs["value_cache"].element_size()
    )
    return 2 * (query.nbytes + key.nbytes) + value.nbytes + rows, 3 * (query.numel() + key.numel())


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _slot(token: int, value: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        slots = torch.arange(inputs["slot_mapping"].shape[0])
        slots[token] = value
        return {**inputs, "slot_mapping": slots}

    return change


def _axis(channel: int, value: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        axis = inputs["axis"].clone()
        axis[channel] = value
        return {**inputs, "axis": axis}

    return change


_TRANSPOSED = torch.zeros(4, 4, 16, 2).transpose(2, 3)
_INT8 = {n: torch.zeros(4, 4, 2, 16, dtype=torch.int8) for n in ("key_cache", "value_cache")}
_ONES = {"k_scale": torch.ones(1), "v_scale": torch.ones(2)}

INVALID = [
    Invalid("slot_too_large", _slot(5, 16), r"slot_mapping\[5\] is 16, expected a slot in \[0, 16\) or -1"),
    Invalid("slot_negative", _slot(6, -2), r"slot_mapping\[6\] is -2, expected a slot"),
    Invalid("slot_huge", _slot(0, 2**40), r"slot_mapping\[0\] is 1099511627776"),
    Invalid("slot_twice", _slot(4, 2), r"slot_mapping\[4\] is 2, expected a slot of its own \(slot_mapping\[2\] has it\)"),
    Invalid("slots_length", _set(slot_mapping=torch.arange(6)), r"slot_mapping must be \[T\] = \[7\], got \[6\]"),
    Invalid("slots_float", _set(slot_mapping=torch.zeros(7)), "slot_mapping must be int64 or int32", TypeError),
    Invalid("axis_too_large", _axis(3, 3), r"axis\[3\] is 3, expected a row of position_ids in \[0, 3\)"),
    Invalid("rank", _set(query=torch.zeros(1, 7, 4, 16)), r"query must be \[T, heads, d\], got \[1, 7, 4, 16\]"),
    Invalid("key_width", _set(key=torch.zeros(7, 2, 15)), r"key must be .*got \[7, 2, 15\]"),
    Invalid("value_heads", _set(value=torch.zeros(7, 3, 16)), r"value must be \[T, kv_heads, d\] of key = \[7, 2, 16\], got \[7, 3, 16\]"),
    Invalid("value_dtype", _set(value=torch.zeros(7, 2, 16).half()), "value must be of the dtype of query"),
    Invalid("cache_rank", _set(key_cache=torch.zeros(16, 2, 16)), r"key_cache must be \[pages, page_size, 2, 16\].*got \[16, 2, 16\]"),
    Invalid("cache_heads", _set(value_cache=torch.zeros(4, 4, 3, 16)), r"value_cache must be .*got \[4, 4, 3, 16\]"),
    Invalid("cache_shapes", _set(value_cache=torch.zeros(5, 4, 2, 16)), r"value_cache must be of the shape of key_cache, \[4, 4, 2, 16\], got \[5, 4, 2, 16\]"),
    Invalid("no_page_size", _set(key_cache=torch.zeros(4, 0, 2, 16)), "key_cache must be .*with page_size > 0"),
    Invalid("cache_strides", _set(key_cache=_TRANSPOSED), "key_cache must be with its last dimension contiguous"),
    Invalid("cache_overlaps", _set(value_cache=torch.zeros(1, 4, 2, 16).expand(4, 4, 2, 16)), "value_cache must be without overlap"),
    Invalid("cache_dtype", _set(key_cache=torch.zeros(4, 4, 2, 16, dtype=torch.int32)), "key_cache must be a float, int8 or float8_e4m3fn tensor", TypeError),
    Invalid("no_scale", _set(**_INT8), "k_scale must be a scale with key_cache in torch.int8, got None"),
    Invalid("needless_scale", _set(v_scale=torch.ones(1)), "v_scale must be None with value_cache in torch.float32, got a scale"),
    Invalid("scale_shape", _set(**_INT8, **_ONES | {"v_scale": torch.ones(3)}), r"v_scale must be one element or \[kv_heads\] = \[2\], got \[3\]"),
    Invalid("scale_dtype", _set(**_INT8, **_ONES | {"k_scale": torch.ones(1).half()}), "k_scale must be float32"),
    Invalid("cache_dtypes", _set(value_cache=torch.zeros(4, 4, 2, 16).half()), "value_cache must be of the dtype of key_cache, torch.float32, got torch.float16"),
    Invalid("norm_width", _set(q_norm=torch.ones(15)), r"q_norm must be \[d\] = \[16\], got \[15\]"),
    Invalid("norm_dtype", _set(k_norm=torch.ones(16).half()), "k_norm must be of the dtype of query"),
    Invalid("eps", _set(q_norm=torch.ones(16), eps=-1.0), "eps must be at least 0, got -1.0"),
    Invalid("odd_table", _set(inv_freq=bits(15), axis=None), "inv_freq must be .*an even number"),
    Invalid("table_of_pairs", _set(inv_freq=PAIRS, axis=None), r"inv_freq must be of an entry a channel.*torch.cat\(\[inv_freq, inv_freq\]\)"),
    Invalid("table_of_pairs_adjacent", _set(inv_freq=PAIRS, axis=None, pairing="adjacent"), r"repeat_interleave\(2\)"),
    Invalid("gradient", lambda i: {**i, "query": i["query"].clone().requires_grad_()}, "query must be without a gradient"),
    Invalid("positions", _set(position_ids=torch.zeros(3, 8, dtype=torch.int64)), r"position_ids must be .*got \[3, 8\]"),
]  # fmt: skip
