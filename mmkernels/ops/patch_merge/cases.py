# SPDX-License-Identifier: Apache-2.0
"""Patch merging: layouts of real projectors and odd ones, inputs, baselines, invalid calls.

Letters: B batch, H×W tokens, C features, m what is merged (high, wide); ``grids`` of a packed call; ``norm`` "layer",
"rms" or "", ``after`` the merge or before; ``affine``: with weight (and bias).
"""

from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.norm import Norm
from mmkernels.ops.patch_merge.api import patch_merge
from mmkernels.testing.case import Case, Inputs, Invalid, map_tensors
from mmkernels.testing.yardstick import Comparison, Tensors, compare, ulp

FAMILIES = ("random", "beside_a_mean", "tiny")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 2, "H": 4, "W": 6, "C": 8, "m": (2, 2), "grids": (), "blocks": False, "order": "kkc",
        "transposed": False, "pad": False, "norm": "", "after": False, "affine": True,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("plain", "test gradcheck"),
    _case("layer_before", "test gradcheck", norm="layer"),
    _case("rms_after_ckk", "test gradcheck", norm="rms", after=True, order="ckk", C=5),
    _case("padded", "test gradcheck", H=3, W=5, pad=True, norm="layer", C=6),
    _case("padded_after", H=3, W=5, pad=True, norm="layer", after=True, m=(2, 3), order="ckk"),
    _case("packed", "test gradcheck", grids=((1, 2, 4), (2, 4, 2)), norm="rms", affine=False),
    _case(
        "packed_padded", grids=((1, 3, 5), (2, 1, 1), (1, 4, 7)), pad=True, norm="layer", after=True
    ),
    _case("packed_transposed", grids=((1, 4, 2), (3, 2, 6)), transposed=True, order="ckk"),
    _case("blocks", grids=((1, 4, 6),), blocks=True, norm="rms", C=33),
    _case("blocks_ckk", grids=((2, 4, 2),), blocks=True, order="ckk", norm="layer"),
    _case("transposed", transposed=True, norm="layer", affine=False),
    _case("one_by_four", m=(1, 4), W=8, norm="layer", after=True),
    _case("norm_alone", m=(1, 1), C=130, norm="layer"),
    _case("wide", B=1, H=2, W=2, C=1111, norm="rms", after=True),
    _case("many_rows", B=3, H=40, W=30, C=16, norm="layer"),
    _case("one_value", B=1, H=1, W=1, C=1, m=(1, 1), norm="rms"),
    _case("empty_batch", "empty", B=0, norm="layer"),
    _case("empty_packed", "empty", grids=((0, 0, 0),), norm="rms"),
    _case("qwen2_vl", "bench", grids=((1, 36, 52), (1, 24, 24)), blocks=True, C=1280, norm="layer"),
    _case("internvl", "bench", B=8, H=32, W=32, C=1024, norm="layer", after=True),
    _case("mistral3", "bench", grids=((1, 44, 62), (1, 30, 30)), C=1024, norm="rms", order="ckk"),
    _case("vila", "bench", B=8, H=27, W=27, C=1152, pad=True, norm="layer", after=True),
    _case("idefics3", "bench", B=8, H=26, W=26, C=1152),
]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``patch_merge``."""
    g = torch.Generator().manual_seed(seed)
    tokens = sum(t * h * w for t, h, w in case.grids)
    shape = (tokens, case.C) if case.grids else (case.B, case.H, case.W, case.C)
    features = torch.randn(shape, generator=g)
    if family == "beside_a_mean":  # where x − mean cancels
        features = features * 0.25 + torch.randn(*shape[:-1], 1, generator=g) * 8
    elif family == "tiny":  # eps counts
        features = features * 1e-3
    inputs: Inputs = {"features": features, "merge_size": case.m}
    if case.grids and not case.blocks:
        inputs["grid_thw"] = torch.tensor([g for g in case.grids if min(g)]).view(-1, 3).long()
    if case.norm:
        width = case.C * (case.m[0] * case.m[1] if case.after else 1)
        weight = torch.randn(width, generator=g) if case.affine else None
        bias = torch.randn(width, generator=g) if case.affine and case.norm == "layer" else None
        inputs |= {"norm": Norm(case.norm, weight, bias, 1e-6), "norm_after": case.after}
    flags = {"blocks": case.blocks, "transposed": case.transposed, "pad": case.pad}
    inputs |= {k: v for k, v in flags.items() if v}
    if case.order != "kkc":
        inputs["order"] = case.order
    change = lambda t: t.to(dtype).to(device) if t.is_floating_point() else t.to(device)
    return map_tensors(inputs, change)


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return patch_merge(**inputs)


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return patch_merge(**inputs)


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers runs it: the norm as a module, image by image a view, a permutation and a copy."""
    norm, after = inputs.get("norm"), inputs.get("norm_after", False)
    x = inputs["features"]
    x = _norm(norm, x) if norm and not after else x
    if x.dim() == 4:
        x = _image(x, inputs).flatten(1, 2)
    elif inputs.get("blocks"):
        J = inputs["merge_size"][0] * inputs["merge_size"][1]
        x = x.view(-1, J, x.shape[1])
        x = (x.transpose(1, 2) if inputs.get("order") == "ckk" else x).flatten(1)
    else:
        grids = inputs["grid_thw"].tolist()
        images = x.split([t * h * w for t, h, w in grids])
        done = [
            _image(i.view(t, h, w, -1), inputs) for i, (t, h, w) in zip(images, grids, strict=True)
        ]
        J = inputs["merge_size"][0] * inputs["merge_size"][1]
        x = torch.cat([d.flatten(0, 2) for d in done]) if done else x.new_empty(0, J * x.shape[1])
    return _norm(norm, x) if norm and after else x


library = eager


def _norm(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    wide = torch.promote_types(x.dtype, torch.float32)  # as LlamaRMSNorm
    y = x.to(wide)
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
    return y if norm.weight is None else norm.weight * y


def _image(x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """``[t, h, w, C]`` → ``[t, h', w', J·C]``."""
    m_h, m_w = inputs["merge_size"]
    t, h, w, C = x.shape
    if inputs.get("pad"):
        x = F.pad(x, (0, 0, 0, -w % m_w, 0, -h % m_h))
    x = (
        x.unflatten(2, (-1, m_w)).unflatten(1, (-1, m_h)).transpose(2, 3)
    )  # [t, h', w', m_h, m_w, C]
    x = x.movedim(-1, 3) if inputs.get("order") == "ckk" else x
    x = x.flatten(3)
    return x.transpose(1, 2) if inputs.get("transposed") else x


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, reference: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """Without a norm bitwise; with one, TOLERANCES.md's bound of a norm."""
    norm = wide.get("norm")
    if norm is None:
        bounds = {n: torch.zeros_like(r) for n, r in reference.items()}
    else:
        bounds = _bounds(wide, norm, grad.double())
    found = []
    for name, value in got.items():
        rounding = 0.505 if value.dtype != torch.float32 else 1.0
        own = ulp(reference[name], value.dtype) * rounding if norm else 0.0
        found.append(compare(name, value, reference[name], bounds[name] + own))
    return found


def _bounds(wide: Inputs, norm: Norm, grad: torch.Tensor) -> Tensors:
    """2u√K·Σ|t| in fp32 (K values of a norm, and rows of a sum), of the terms of each sum of the norm."""
    bare = {k: v for k, v in wide.items() if k not in ("norm", "norm_after")}
    places = torch.arange(1, wide["features"].numel() + 1, dtype=torch.float64)
    index = run({**bare, "features": places.view(wide["features"].shape)}).long() - 1  # −1: padding
    J = wide["merge_size"][0] * wide["merge_size"][1]
    C, after = wide["features"].shape[-1], wide.get("norm_after", False)
    index, g = index.reshape(-1, J * C), grad.reshape(-1, J * C)
    if not after:
        turn = lambda t: t.view(-1, C, J).transpose(1, 2) if wide.get("order") == "ckk" else t
        index, g = turn(index).reshape(-1, C), turn(g).reshape(-1, C)
    x = wide["features"].flatten()[index.clamp(min=0)] * (index >= 0)
    mean = x.mean(-1, keepdim=True) if norm.kind == "layer" else x[:, :1] * 0
    r = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + norm.eps)
    around = x.abs().mean(-1, keepdim=True) if norm.kind == "layer" else 0.0
    size = (x.abs() + around) * r  # of y, its cancellation in
    weight = x[:1] * 0 + 1 if norm.weight is None else norm.weight.abs()
    a = g.abs() * weight
    along = (a * size).mean(-1, keepdim=True)
    flat = a.mean(-1, keepdim=True) if norm.kind == "layer" else 0.0
    kept = 1.0 if after else (index[:, :1] >= 0)
    bias = 0.0 if norm.bias is None else norm.bias.abs()
    terms = {
        "out": (size * weight + bias) * kept, "features": (a + flat + 2 * size * along) * r,
        "norm.weight": (g.abs() * size * kept).sum(0), "norm.bias": (g.abs() * kept).sum(0),
    }  # fmt: skip
    per_value, per_sum = (
        2 * 2.0**-24 * x.shape[-1] ** 0.5,
        2 * 2.0**-24 * (x.shape[-1] + len(x)) ** 0.5,
    )
    scales = {"out": per_value, "features": per_value}
    found = {n: t * scales.get(n, per_sum) for n, t in terms.items()}
    found["out"] = _merged_again(found["out"], wide, after, J, C).reshape(grad.shape)
    at = torch.where(index < 0, wide["features"].numel(), index)
    back = x.new_zeros(wide["features"].numel() + 1).scatter(
        0, at.flatten(), found["features"].flatten()
    )
    found["features"] = back[:-1].view(wide["features"].shape)
    return found


def _merged_again(rows: torch.Tensor, wide: Inputs, after: bool, J: int, C: int) -> torch.Tensor:
    if after or wide.get("order") != "ckk":
        return rows
    return rows.reshape(-1, J, C).transpose(1, 2).reshape(-1, J * C)


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: features read, merged features written. FLOPs: a norm's few a value."""
    x = inputs["features"]
    return 2 * x.nbytes, 8 * x.numel() if "norm" in inputs else 0


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _packed(**changes: Any) -> Any:
    base = {"features": torch.zeros(8, 8), "grid_thw": torch.tensor([[1, 2, 4]])}
    return lambda inputs: {"merge_size": (2, 2), **base, **changes}


INVALID = [
    Invalid("rank", _set(features=torch.zeros(3, 4, 5)), r"features must be \[B, H, W, C\].*got \[3, 4, 5\]"),
    Invalid("int", _set(features=torch.zeros(2, 4, 6, 8, dtype=torch.int64)), "features must be float64", TypeError),
    Invalid("odd", _set(features=torch.zeros(2, 3, 6, 8)), r"features must be multiples of 2 and 2 \(or choose pad\), got 3×6"),
    Invalid("merge_0", _set(merge_size=0), "merge_size must be one number or two, of at least 1, got 0"),
    Invalid("merge_3", _set(merge_size=(1, 2, 3)), "merge_size must be one number or two"),
    Invalid("order", _set(order="ckc"), "order must be .*got 'ckc'"),
    Invalid("norm_kind", _set(norm=Norm("batch")), "norm must be .*got 'batch'"),
    Invalid("norm_width", _set(norm=Norm("rms", torch.zeros(7))), r"norm.weight must be \[8\].*got \[7\]"),
    Invalid("norm_after_width", _set(norm=Norm("rms", torch.zeros(8)), norm_after=True), r"norm.weight must be \[32\]"),
    Invalid("norm_dtype", _set(norm=Norm("rms", torch.zeros(8).half())), "norm.weight must be of the dtype of features"),
    Invalid("rms_bias", _set(norm=Norm("rms", None, torch.zeros(8))), "norm must be without a bias"),
    Invalid("eps", _set(norm=Norm("rms", eps=-1.0)), "norm.eps must be at least 0, got -1.0"),
    Invalid("dense_grid", _set(grid_thw=torch.tensor([[1, 4, 6]])), "grid_thw must be None with features"),
    Invalid("dense_blocks", _set(blocks=True), "blocks must be False with features"),
    Invalid("no_grid", _packed(grid_thw=None), "with grid_thw or blocks"),
    Invalid("grid_shape", _packed(grid_thw=torch.tensor([1, 2, 4])), r"grid_thw must be int32 or int64 \[images, 3\]"),
    Invalid("grid_float", _packed(grid_thw=torch.tensor([[1.0, 2, 4]])), "grid_thw must be int32 or int64"),
    Invalid("grid_ragged", _packed(grid_thw=[[1, 2, 4], [1]]), "grid_thw must be a tensor, or as many numbers"),
    Invalid("grid_zero", _packed(grid_thw=torch.tensor([[1, 0, 4]])), r"grid_thw must be at least 1 .*got \[1, 0, 4\] in row 0"),
    Invalid("grid_odd", _packed(features=torch.zeros(6, 8), grid_thw=torch.tensor([[1, 3, 2]])), r"or choose pad.*got \[1, 3, 2\] in row 0"),
    Invalid("grid_total", _packed(features=torch.zeros(9, 8)), "grid_thw must be grids of the 9 tokens given, got 8 tokens"),
    Invalid("blocks_rest", _packed(features=torch.zeros(7, 8), blocks=True, grid_thw=None), "features must be a multiple of 4, got 7 tokens"),
    Invalid("blocks_pad", _packed(blocks=True, pad=True), "blocks must be False with transposed or pad"),
]  # fmt: skip
