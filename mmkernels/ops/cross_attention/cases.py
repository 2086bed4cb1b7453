# SPDX-License-Identifier: Apache-2.0
"""Cross-attention: shapes of real projectors and odd ones, inputs, baselines, invalid calls.

Letters: B batch, Q queries, n context tokens, X context width, A heads, d head width; G heads a key head serves;
L latents; ``norm`` of the context; ``position`` of its keys ("table" or "grid", rows × columns); ``lengths`` of the
samples of a packed context.
"""

from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.cross_attention.api import cross_attention
from mmkernels.ops.cross_attention.bounds import gradient_bounds, heads, output_bound
from mmkernels.ops.norm import Norm
from mmkernels.testing.case import Case, Inputs, Invalid, map_tensors
from mmkernels.testing.yardstick import (
    Comparison,
    Tensors,
    compare,
    gradients,
    in_fp64,
    largest,
    ulp,
)

FAMILIES = ("random", "edge_heavy", "deep_negative", "ones", "growing_max")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 2, "A": 2, "d": 8, "shared": False, "bias": True, "mask": None, "G": 1, "L": 0, "norm": "",
        "position": "", "lengths": (), "n": 0,
    }  # fmt: skip
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("small", "test gradcheck", Q=3, n=5, X=6),
    _case("shared_bool_mask", "test gradcheck", Q=2, n=7, X=5, d=3, shared=True, mask="rows"),
    _case("additive_mask", "test gradcheck", Q=3, n=4, X=8, mask="additive", bias=False),
    _case("one_of_each", B=1, Q=1, n=1, X=1, A=1, d=1),
    _case("key_padding", B=3, Q=7, n=33, X=40, A=4, mask="padding"),
    _case("long", Q=5, n=729, X=96, A=3, d=24),
    _case("many_samples", B=19, Q=3, n=15, X=64, A=4, d=16, shared=True),
    _case("two_chunks", B=7, Q=4, n=3, X=60_000, A=2, d=2),  # of samples, in the CPU backward
    _case("a_chunk_of_one", B=6, Q=4, n=3, X=60_000, A=2, d=2, shared=True),
    _case(
        "few_queries_in_chunks", B=7, Q=3, n=3, X=60_000, A=2, d=2
    ),  # of the CPU forward, 5 and 2
    _case("grouped", "test gradcheck", Q=3, n=5, X=6, A=4, G=2, mask="rows"),
    _case("grouped_shared", Q=5, n=9, X=24, A=6, G=3, d=16, shared=True, mask="padding"),
    _case("latents", "test gradcheck", Q=3, n=5, X=6, L=4, mask="rows", bias=False),
    _case("perceiver", Q=4, n=37, X=48, A=4, G=4, d=12, L=4, norm="rms", mask="padding", B=3),
    _case("layer_norm", "test gradcheck", Q=2, n=5, X=7, norm="layer", shared=True),
    _case("key_table", "test gradcheck", Q=2, n=6, X=8, position="table", mask="rows"),
    _case(
        "key_grid",
        Q=3,
        n=12,
        X=16,
        A=4,
        G=2,
        d=6,
        position="grid",
        norm="layer",
        shared=True,
        mask="additive",
    ),
    _case("packed", "test gradcheck", B=3, Q=2, X=6, lengths=(4, 0, 7), G=2),
    _case("packed_perceiver", B=4, Q=3, X=40, A=4, d=16, lengths=(9, 30, 1, 17), L=3, norm="layer"),
    _case("empty_batch", "empty", B=0, Q=3, n=5, X=6),
    _case("empty_queries", "empty", Q=0, n=5, X=6),
    _case("empty_context", "empty", Q=3, n=0, X=6),
    _case("siglip_map_head", "bench", B=8, Q=1, n=729, X=1152, A=16, d=72, shared=True),
    _case("blip2_layer", "bench", B=8, Q=32, n=257, X=1408, A=12, d=64),
    _case("video_qformer", "bench", B=1, Q=32, n=2056, X=1408, A=12, d=64),
    _case("granite_window", "bench", B=256, Q=3, n=15, X=1024, A=16, d=64),
    _case("flamingo_frame", "bench", B=8, Q=64, n=320, X=1024, A=8, d=64),
]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``cross_attention``; families as in TOLERANCES.md."""
    g = torch.Generator().manual_seed(seed)
    width, kv_width = case.A * case.d, case.A // case.G * case.d

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*sizes, generator=g) * scale

    n = sum(case.lengths) or case.n
    query = normal(*(() if case.shared else (case.B,)), case.Q, width)
    context = normal(*(() if case.lengths else (case.B,)), n, case.X)
    value_weight = normal(kv_width, case.X, scale=case.X**-0.5)
    value_bias, mask = normal(kv_width), _mask(case, g)
    if family == "edge_heavy":  # first and last key dominate: an index off by one shows
        context[..., :1, :] *= 6
        context[..., -1:, :] *= 6
    elif family == "deep_negative" and not (case.lengths or case.L):
        # every logit far below 0: a zero-padded key would win
        mask = torch.full((case.B, 1, case.Q, n), -64.0) - torch.rand(n, generator=g)
    elif family == "ones":  # every value is 1, so the output is the sum of the probabilities
        value_weight, value_bias = value_weight * 0, value_bias * 0 + 1
    elif family == "growing_max":  # the running maximum rises with every key
        context = context * torch.linspace(0.1, 3, max(n, 1))[:n, None]
    inputs: Inputs = {
        "query": query,
        "context": context,
        "key_weight": normal(kv_width, case.X, scale=case.X**-0.5),
        "value_weight": value_weight,
    }
    if case.bias or family == "ones":
        inputs |= {"key_bias": normal(kv_width), "value_bias": value_bias}
    inputs |= _more(case, normal)
    inputs = map_tensors(inputs, lambda t: t.to(dtype).to(device))
    if mask is not None:
        inputs["attention_mask"] = (
            mask.to(device) if mask.dtype == torch.bool else mask.to(dtype).to(device)
        )
    if case.lengths:
        inputs["cu_seqlens"] = F.pad(torch.tensor(case.lengths).cumsum(0), (1, 0)).to(device)
        inputs["max_seqlen"] = max(case.lengths)
    if case.G > 1:
        inputs["num_key_value_heads"] = case.A // case.G
    return {**inputs, "num_heads": case.A, "algorithm": "absorbed"}


def _more(case: Case, normal: Any) -> Inputs:
    """Latents, norm and key positions."""
    found: Inputs = {}
    if case.L:
        found["latents"] = normal(case.B, case.L, case.X)
    if case.norm:
        bias = normal(case.X) if case.norm == "layer" else None
        found["context_norm"] = Norm(case.norm, normal(case.X), bias, 1e-5)
    if case.position == "table":
        found["key_position"] = normal(case.n, case.X)
    if case.position == "grid":
        found["key_position"] = [normal(3, case.X), normal(case.n // 3, case.X)]
    return found


def _mask(case: Case, g: torch.Generator) -> torch.Tensor | None:
    full = (case.B, case.A, case.Q, case.n)
    if case.mask == "rows":  # bool, with a row that may attend to nothing
        mask = torch.rand(full, generator=g) > 0.4
        mask[0, 0, 0] = False
        return mask
    if case.mask == "padding":  # bool [B, 1, 1, n]; one sample is all padding
        lengths = torch.tensor([case.n, case.n // 2, 0])[: case.B]
        return (torch.arange(case.n) < lengths[:, None])[:, None, None]
    if case.mask == "additive":
        mask = torch.randn(case.Q, case.n, generator=g)
        mask[0, 1:] = -torch.inf
        return mask
    return None


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return cross_attention(**inputs)


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference."""
    with backends.backend("reference"):
        return cross_attention(**inputs)


def spelled(inputs: Inputs) -> Inputs:
    """The same attention in full: keys and values of all sources, one head for each query head, one mask."""
    A, context = inputs["num_heads"], inputs["context"]
    if norm := inputs.get("context_norm"):
        width = context.shape[-1:]
        if norm.kind == "layer":
            context = F.layer_norm(context, width, norm.weight, norm.bias, norm.eps)
        else:
            context = F.rms_norm(context, width, norm.weight, norm.eps)
    mask, query = inputs.get("attention_mask"), inputs["query"]
    if "cu_seqlens" in inputs:
        pieces = context.split(inputs["cu_seqlens"].diff().tolist())
        context = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        lengths = torch.tensor([len(p) for p in pieces], device=context.device)
        mask = (torch.arange(context.shape[1], device=context.device) < lengths[:, None])[
            :, None, None
        ]
    B, n, _ = context.shape
    of_keys = context
    if (position := inputs.get("key_position")) is not None:
        if isinstance(position, list):
            position = (position[0][:, None] + position[1][None]).flatten(0, 1)
        of_keys = context + position
    if (latents := inputs.get("latents")) is not None:
        of_keys, context = (torch.cat([t, latents], 1) for t in (of_keys, context))
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], n) if mask.shape[-1] == 1 else mask
            mask = F.pad(
                mask, (0, latents.shape[1]), value=True if mask.dtype == torch.bool else 0.0
            )
    G = A // inputs.get("num_key_value_heads", A)
    repeated: Inputs = {
        name: inputs[name].unflatten(0, (A // G, -1)).repeat_interleave(G, 0).flatten(0, 1)
        for name in ("key_weight", "value_weight", "key_bias", "value_bias")
        if name in inputs
    }
    return {
        "query": query.expand(B, *query.shape[-2:]), "of_keys": of_keys, "of_values": context, "mask": mask,
        "A": A, **repeated,
    }  # fmt: skip


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers runs it: two Linear layers, then attention by SDPA."""
    x = spelled(inputs)
    key = F.linear(x["of_keys"], x["key_weight"], x.get("key_bias"))
    value = F.linear(x["of_values"], x["value_weight"], x.get("value_bias"))
    q, k, v = (heads(t, x["A"]) for t in (x["query"], key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=x["mask"])
    return out.transpose(1, 2).flatten(2)


def library(inputs: Inputs) -> torch.Tensor:
    """K and V by one GEMM over their stacked weights, then SDPA."""
    x = spelled(inputs)
    weight = torch.cat([x["key_weight"], x["value_weight"]])
    bias = torch.cat([x["key_bias"], x["value_bias"]]) if "key_bias" in x else None
    both = F.linear(x["of_values"], weight, bias).unflatten(-1, (2, x["A"], -1))
    key, value = both.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(heads(x["query"], x["A"]), key, value, attn_mask=x["mask"])
    return out.transpose(1, 2).flatten(2)


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, reference: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """The chain bounds of TOLERANCES.md, by terms; against eager's own error where more than the op rounds.

    That is: a norm before it, and torch's own algorithm.
    """
    dtype = got["out"].dtype
    bounds = {"out": output_bound(spelled(wide), reference["out"], dtype)}
    if inputs["algorithm"] == "absorbed" and "context_norm" not in inputs:
        bounds |= gradient_bounds(spelled, wide, reference, grad.double(), dtype)
    else:
        theirs = _eager_errors(inputs, grad)
        if dtype != torch.float32 and "context_norm" in inputs:
            bounds["out"] = bounds["out"].clamp(min=1.5 * theirs["out"])
        for name in [n for n in got if n != "out"]:
            bounds[name] = torch.maximum(1.25 * theirs[name], ulp(largest(reference[name]), dtype))
    return [compare(name, got[name], reference[name], bounds[name]) for name in got]


def _eager_errors(inputs: Inputs, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eager's largest error over these inputs and the same scaled by up to 6 %, which rounds otherwise: one small
    tensor alone is a lottery. In fp32 too: where 16 bits happen to be exact, fp32 is not."""
    size = inputs["context"].numel()
    draws = 32 if size < 1000 else 16 if size < 10_000 else 4
    worst: dict[str, torch.Tensor] = {}
    for draw in range(draws):
        changed = _scaled(inputs, 1 + draw / 256)
        exact = gradients(plain, in_fp64(changed), grad=grad.double())
        in_fp32 = map_tensors(changed, lambda t: t.float() if t.is_floating_point() else t)
        for dtyped in (changed, in_fp32):
            for name, value in gradients(eager, dtyped, grad=grad).items():
                error = largest((value.double() - exact[name]).nan_to_num(0.0))
                worst[name] = torch.maximum(worst.get(name, error), error)
    return worst


def _scaled(inputs: Inputs, scale: float) -> Inputs:
    return map_tensors(inputs, lambda t: t * scale if t.is_floating_point() else t)


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: inputs and output once. FLOPs: of the absorbed algorithm."""
    context, A = inputs["context"], inputs["num_heads"]
    B, n, X = context.shape
    Q, width = inputs["query"].shape[-2:]
    tensors = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    out = B * Q * width * context.element_size()
    q_absorb = 2 * Q * width * X * (1 if inputs["query"].dim() == 2 else B)
    return sum(t.nbytes for t in tensors) + out, q_absorb + B * (
        4 * A * Q * n * X + 2 * Q * width * X
    )


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _packed(**changes: Any) -> Any:
    base = {"context": torch.zeros(10, 6), "cu_seqlens": torch.tensor([0, 5, 10])}
    return lambda inputs: {**inputs, **base, **changes}


INVALID = [
    Invalid("context_2d", _set(context=torch.zeros(5, 6)), r"context must be \[B, n, X\], got \[5, 6\]"),
    Invalid("query_4d", _set(query=torch.zeros(2, 2, 3, 8)), r"query must be \[B, Q, A·d\]"),
    Invalid("batch", _set(query=torch.zeros(3, 3, 16)), r"query must be \[2, Q, A·d\].*got \[3, 3, 16\]"),
    Invalid("heads", _set(num_heads=3), "num_heads must be a divisor of the query width 16, got 3"),
    Invalid("heads_0", _set(num_heads=0), "num_heads must be .*got 0"),
    Invalid("key_weight", _set(key_weight=torch.zeros(16, 7)), r"key_weight must be \[A·d, X\] = \[16, 6\], got \[16, 7\]"),
    Invalid("value_weight", _set(value_weight=torch.zeros(15, 6)), r"value_weight must be \[A·d, X\]"),
    Invalid("key_bias", _set(key_bias=torch.zeros(3)), r"key_bias must be \[A·d\] = \[16\], got \[3\]"),
    Invalid("dtype", _set(context=torch.zeros(2, 5, 6).half()), "context must be of the dtype of query"),
    Invalid("int", _set(query=torch.zeros(2, 3, 16, dtype=torch.int64)), "query must be float64", TypeError),
    Invalid("mask_shape", _set(attention_mask=torch.zeros(2, 4)), "attention_mask must be broadcastable"),
    Invalid("mask_dtype", _set(attention_mask=torch.zeros(3, 5, dtype=torch.int32)), "attention_mask", TypeError),
    Invalid("algorithm", _set(algorithm="fast"), "algorithm must be .*got 'fast'"),
    Invalid("kv_heads", _set(num_key_value_heads=3), "num_key_value_heads must be a divisor of num_heads 2, got 3"),
    Invalid("grouped_weight", _set(num_key_value_heads=1), r"key_weight must be \[A·d, X\] = \[8, 6\], got \[16, 6\]"),
    Invalid("latents", _set(latents=torch.zeros(2, 3, 7)), r"latents must be \[B, L, X\] = \[2, L, 6\], got \[2, 3, 7\]"),
    Invalid("latents_dtype", _set(latents=torch.zeros(2, 3, 6).half()), "latents must be of the dtype of context"),
    Invalid("norm_width", _set(context_norm=Norm("rms", torch.zeros(7))), r"context_norm.weight must be \[6\].*got \[7\]"),
    Invalid("norm_dtype", _set(context_norm=Norm("rms", torch.zeros(6).half())), "context_norm.weight must be of the dtype of context"),
    Invalid("norm_kind", _set(context_norm=Norm("batch")), "context_norm must be .*got 'batch'"),
    Invalid("key_norm", _set(key_norm=Norm("rms"), algorithm="absorbed"), 'key_norm must be None with algorithm="absorbed"'),
    Invalid("key_norm_width", _set(key_norm=Norm("rms", torch.zeros(6)), algorithm="auto"), r"key_norm.weight must be \[8\].*got \[6\]"),
    Invalid("position", _set(key_position=torch.zeros(4, 6)), r"key_position must be \[n, X\] = \[5, 6\]"),
    Invalid("position_grid", _set(key_position=(torch.zeros(2, 6), torch.zeros(2, 6))), "with rows·columns = 5"),
    Invalid("dropout", _set(dropout_p=1.0), "dropout_p must be from 0 to below 1, got 1.0"),
    Invalid("packed_rank", _set(cu_seqlens=torch.tensor([0, 5])), r"context must be \[tokens, X\] with cu_seqlens"),
    Invalid("packed_last", _packed(cu_seqlens=torch.tensor([0, 4, 9])), "cu_seqlens must be of 10 context tokens, got 9 last"),
    Invalid("packed_falls", _packed(cu_seqlens=torch.tensor([0, 12, 10])), "cu_seqlens must be from 0 on and never falling, got 10 at 2"),
    Invalid("packed_first", _packed(cu_seqlens=torch.tensor([1, 5, 10])), "cu_seqlens must be from 0 on .*got 1 at 0"),
    Invalid("packed_float", _packed(cu_seqlens=torch.tensor([0.0, 5, 10])), "cu_seqlens must be int32 or int64"),
    Invalid("packed_longest", _packed(max_seqlen=4), "max_seqlen must be at least 5, the longest sequence, got 4"),
    Invalid("packed_mask", _packed(attention_mask=torch.ones(5).bool()), "attention_mask must be None with cu_seqlens"),
    Invalid("packed_batch", _packed(cu_seqlens=torch.tensor([0, 5, 6, 10])), r"query must be \[3, Q, A·d\]"),
    Invalid("device", _set(context=torch.zeros(2, 5, 6, device="meta")), "context must be on the device of query"),
]  # fmt: skip
