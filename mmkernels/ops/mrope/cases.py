# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: layouts of real models and odd ones, inputs, baselines, invalid calls.

Letters: B batch, L tokens (B = 0 in a packed case: L alone), Hq and Hk heads of d channels, r of them rotary;
``layout`` of the axes; ``theta`` base of the frequencies; ``pairing``; ``scale`` of cos and sin.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.mrope import reference
from mmkernels.ops.mrope.api import mrope
from mmkernels.testing.case import Case, Inputs, Invalid
from mmkernels.testing.yardstick import Comparison, Tensors, compare, ulp

FAMILIES = ("random", "far", "spread")
AXES = {"1d": 1, "sectioned": 3, "interleaved": 3, "alternating": 3, "axes": 4}


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 2, "L": 5, "Hq": 4, "Hk": 2, "d": 16, "r": 16, "layout": "1d", "theta": 1e4, "pairing": "half",
        "scale": 1.0, "packed": False,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("sectioned", "test gradcheck", layout="sectioned", Hq=3, Hk=1, L=3),
    _case("one_axis", "test gradcheck", d=8, r=8, L=4),
    _case("interleaved", layout="interleaved", d=32, r=32, L=33),
    _case("alternating", "test gradcheck", layout="alternating", pairing="adjacent", d=12, r=12),
    _case("axes", "test gradcheck", layout="axes", packed=True, L=4),
    _case("partial_adjacent", "test gradcheck", pairing="adjacent", d=10, r=6, B=1, L=3),
    _case("partial_half", layout="sectioned", d=80, r=50, scale=1.31),
    _case("odd_pairs", layout="axes", pairing="adjacent", d=33, r=14, Hq=5, Hk=5, L=17),
    _case("head_256", layout="interleaved", d=256, r=64, Hq=2, Hk=1, packed=True, L=70),
    _case("one_channel_pair", d=3, r=2, L=9),
    _case("nothing_turns", d=5, r=0),
    _case("many_tokens", layout="sectioned", d=64, r=64, B=3, L=130, theta=1e6),
    _case("empty", "empty", B=0),
    _case("empty_packed", "empty", packed=True, L=0, layout="sectioned"),
    _case("no_heads", "empty", Hq=0, Hk=0),
    _case(
        "qwen2_5_vl_7b",
        "bench",
        B=1,
        L=2048,
        Hq=28,
        Hk=4,
        d=128,
        r=128,
        layout="sectioned",
        theta=1e6,
    ),
    _case(
        "qwen3_vl_8b",
        "bench",
        B=1,
        L=2048,
        Hq=32,
        Hk=8,
        d=128,
        r=128,
        layout="interleaved",
        theta=5e6,
    ),
    _case(
        "glm4v_9b",
        "bench",
        B=1,
        L=2048,
        Hq=32,
        Hk=2,
        d=128,
        r=64,
        layout="sectioned",
        pairing="adjacent",
    ),
]


def table_of(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``inv_freq`` and ``axis``, as the families of transformers lay them out."""
    n = case.r // 2
    pair = torch.arange(n)
    freq = 1.0 / (case.theta ** (2 * pair.float() / max(case.r, 1)))
    both = lambda t: t.repeat(2) if case.pairing == "half" else t.repeat_interleave(2)
    if case.layout == "1d":
        return both(freq), None
    if case.layout == "axes":  # Hunyuan: sections of channels, across pairs
        return both(freq), torch.arange(case.r) * 4 // case.r
    third = n * 3 // 8
    if case.layout == "sectioned":  # Qwen2-VL: t, then h, then w
        axis = (pair >= n - 2 * third).long() + (pair >= n - third).long()
    elif case.layout == "interleaved":  # Qwen3-VL: t, h, w, t, h, w … and t
        axis = torch.where(pair < 3 * (n // 3 - 1), pair % 3, 0)
    else:  # Ernie: h, w, h, w … and t
        axis = torch.where(pair < 2 * third, 1 + pair % 2, 0)
    return both(freq), both(axis)


@dataclass(frozen=True)
class Rotation:
    """cos and sin in the dtype of the call: transformers makes them once for all layers, outside."""

    cos: torch.Tensor
    sin: torch.Tensor


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``mrope``, but ``inv_freq``: its bits, as a float without a gradient would be asked for one.

    ``far``: positions up to 2¹⁸. ``spread``: values over many orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    tokens = (case.L,) if case.packed else (case.B, case.L)

    def heads(n: int) -> torch.Tensor:
        x = torch.randn(*tokens, n, case.d, generator=g)
        if family == "spread":
            x = x * torch.exp2(torch.randint(-6, 7, x.shape, generator=g).float())
        return x.to(dtype).to(device)

    inv_freq, axis = (None if t is None else t.to(device) for t in table_of(case))
    A = AXES[case.layout]
    reach = 2**18 if family == "far" else 300
    position_ids = torch.randint(0, reach, (A, *tokens), generator=g).to(device)
    assert inv_freq is not None
    cos, sin = reference.rotation("mrope", dtype, position_ids, inv_freq, axis, case.scale)
    return {
        "query": heads(case.Hq),
        "key": heads(case.Hk),
        "position_ids": position_ids if axis is not None else position_ids[0],
        "inv_freq": inv_freq.view(torch.int32),
        "axis": axis,
        "pairing": case.pairing,
        "attention_scaling": case.scale,
        "rotation": Rotation(cos.to(dtype), sin.to(dtype)),
    }


def arguments(inputs: Inputs) -> Inputs:
    """Of the op."""
    changed = {k: v for k, v in inputs.items() if k != "rotation"}
    return changed | {"inv_freq": inputs["inv_freq"].view(torch.float32)}


def joined(turned: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """All outputs as one, for checks: ``[tokens, heads · d]``."""
    return torch.cat([t.flatten(-2) for t in turned], -1)


def _ours(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return mrope(**arguments(inputs))


def _eager(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    rotation = inputs["rotation"]
    return tuple(
        eager_rotated(inputs[n], rotation.cos, rotation.sin, inputs["pairing"])
        for n in ("query", "key")
    )


def _library(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    rotation = inputs["rotation"]
    return tuple(
        library_rotated(inputs[n], rotation.cos, rotation.sin, inputs["pairing"])
        for n in ("query", "key")
    )


APART = {"ours": _ours, "eager": _eager, "library": _library}  # what benchmarks time


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return joined(_ours(inputs))


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return joined(_ours(inputs))


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers runs it: ``apply_rotary_pos_emb`` with cos and sin in the dtype."""
    return joined(_eager(inputs))


def library(inputs: Inputs) -> torch.Tensor:
    """As vLLM's native path: the two halves apart, nothing negated or copied before the product."""
    return joined(_library(inputs))


def eager_rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str
) -> torch.Tensor:
    """transformers' ``apply_rotary_pos_emb``, of one tensor."""
    r, d = cos.shape[-1], x.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = x if r == d else x[..., :r]
    if pairing == "half":
        half = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), dim=-1)
    else:
        half = torch.stack((-turned[..., 1::2], turned[..., 0::2]), dim=-1).flatten(-2)
    turned = (turned * cos) + (half * sin)
    return turned if r == d else torch.cat([turned, x[..., r:]], dim=-1)


def library_rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str
) -> torch.Tensor:
    """vLLM's ``ApplyRotaryEmb.forward_native``."""
    r, d = cos.shape[-1], x.shape[-1]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = x if r == d else x[..., :r]
    at = (
        (slice(0, r // 2), slice(r // 2, r))
        if pairing == "half"
        else (slice(0, r, 2), slice(1, r, 2))
    )
    (a, b), (cos_a, cos_b), (sin_a, sin_b) = ([t[..., i] for i in at] for t in (turned, cos, sin))
    first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    if pairing == "half":
        turned = torch.cat((first, second), dim=-1)
    else:
        turned = torch.stack((first, second), dim=-1).flatten(-2)
    return turned if r == d else torch.cat([turned, x[..., r:]], dim=-1)


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, reference: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """A rotation is a sum of two terms (TOLERANCES.md); what does not turn is copied bit by bit."""
    axis, pairing = wide["axis"], wide["pairing"]
    position_ids = wide["position_ids"] if axis is not None else wide["position_ids"][None]
    cos, sin = rotation_of(wide, position_ids)
    widths = [wide[n].shape[-2:].numel() for n in ("query", "key")]
    parts = grad.double().split(widths, -1)
    bounds: Tensors = {
        "out": joined(tuple(terms(wide[n], cos, sin, pairing) for n in ("query", "key")))
    }
    sin = partners_of(sin, pairing)
    for name, part in zip(("query", "key"), parts, strict=True):
        bounds[name] = terms(part.reshape(wide[name].shape), cos, sin, pairing)
    return [within(n, value, reference[n], bounds[n], 2) for n, value in got.items()]


partners_of = reference.partners


def rotation_of(wide: Inputs, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inv_freq = wide["inv_freq"].view(torch.float32)
    scale = wide["attention_scaling"]
    return reference.rotation("mrope", torch.float64, position_ids, inv_freq, wide["axis"], scale)


def terms(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairing: str) -> torch.Tensor:
    """Σ|t| of each rotated value; 0 where it is a copy."""
    r = cos.shape[-1]
    turned = x[..., :r].abs()
    found = torch.zeros_like(x)
    found[..., :r] = (
        turned * cos.abs()[..., None, :] + partners_of(turned, pairing) * sin.abs()[..., None, :]
    )
    return found


def within(
    name: str, got: torch.Tensor, reference: torch.Tensor, terms: torch.Tensor, K: int
) -> Comparison:
    """1 ulp in fp32, 0.505 in 16 bits, and 2·2⁻²⁴·√K·Σ|t|: sums run in fp32 in either."""
    own = ulp(reference, got.dtype) * (1.0 if got.dtype == torch.float32 else 0.505)
    bound = torch.where(terms > 0, own + 2 * 2.0**-24 * K**0.5 * terms, 0.0)
    return compare(name, got, reference, bound)


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: query and key read and written. FLOPs: three a value."""
    heads = inputs["query"], inputs["key"]
    return sum(2 * t.nbytes for t in heads), sum(3 * t.numel() for t in heads)


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def bits(*sizes: int) -> torch.Tensor:
    """An ``inv_freq`` of zeros."""
    return torch.zeros(sizes, dtype=torch.int32)


PAIRS = torch.logspace(0, -4, 8).view(torch.int32)  # as transformers keeps it


def _axis(channel: int, value: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        axis = inputs["axis"].clone()
        axis[channel] = value
        return {**inputs, "axis": axis}

    return change


INVALID = [
    Invalid("rank", _set(query=torch.zeros(2, 3)), r"query must be \[B, L, heads, d\] or \[T, heads, d\], got \[2, 3\]"),
    Invalid("int", _set(query=torch.zeros(2, 3, 3, 16, dtype=torch.int64)), "query must be float64", TypeError),
    Invalid("key_width", _set(key=torch.zeros(2, 3, 1, 15)), r"key must be \[2, 3, 'heads', 16\] beside query, got \[2, 3, 1, 15\]"),
    Invalid("key_length", _set(key=torch.zeros(2, 4, 1, 16)), r"key must be .*got \[2, 4, 1, 16\]"),
    Invalid("key_dtype", _set(key=torch.zeros(2, 3, 1, 16).half()), "key must be of the dtype of query"),
    Invalid("pairing", _set(pairing="neox"), "pairing must be .*got 'neox'"),
    Invalid("odd_table", _set(inv_freq=bits(15), axis=None), r"inv_freq must be \[r\], an even number .*got \[15\]"),
    Invalid("wide_table", _set(inv_freq=bits(18), axis=None), r"inv_freq must be .*at most 16.*got \[18\]"),
    Invalid("table_rank", _set(inv_freq=bits(2, 8), axis=None), r"inv_freq must be .*got \[2, 8\]"),
    Invalid("table_of_pairs", _set(inv_freq=PAIRS, axis=None), r"inv_freq must be of an entry a channel.*torch.cat\(\[inv_freq, inv_freq\]\).*got 8 falling entries"),
    Invalid("table_of_pairs_adjacent", _set(inv_freq=PAIRS, axis=None, pairing="adjacent"), r"inv_freq must be .*inv_freq.repeat_interleave\(2\)"),
    Invalid("axis_length", _set(axis=torch.zeros(8, dtype=torch.int64)), r"axis must be \[r\] = \[16\], got \[8\]"),
    Invalid("axis_float", _set(axis=torch.zeros(16)), "axis must be int64 or int32, got torch.float32", TypeError),
    Invalid("axis_too_large", _axis(7, 3), r"axis\[7\] is 3, expected a row of position_ids in \[0, 3\)"),
    Invalid("axis_negative", _axis(0, -1), r"axis\[0\] is -1, expected"),
    Invalid("positions_float", _set(position_ids=torch.zeros(3, 2, 3)), "position_ids must be int64 or int32", TypeError),
    Invalid("positions_length", _set(position_ids=torch.zeros(3, 2, 4, dtype=torch.int64)), r"position_ids must be .*got \[3, 2, 4\]"),
    Invalid("positions_batch", _set(position_ids=torch.zeros(3, 5, 3, dtype=torch.int64)), r"position_ids must be .*got \[3, 5, 3\]"),
    Invalid("no_axes", _set(position_ids=torch.zeros(0, 2, 3, dtype=torch.int64)), r"position_ids must be .*got \[0, 2, 3\]"),
    Invalid("axes_without_axis", _set(axis=None), r"position_ids must be .*no rows of axes without axis, got \[3, 2, 3\]"),
]  # fmt: skip
