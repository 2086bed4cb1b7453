# SPDX-License-Identifier: Apache-2.0
"""Cross-attention: shapes of real projectors and odd ones, inputs, baselines, invalid calls.

Letters: B batch, Q queries, n context tokens, X context width, A heads, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.cross_attention.api import cross_attention
from mmkernels.testing.case import Case, Inputs, Invalid, leaves
from mmkernels.testing.yardstick import (
    UNIT,
    Comparison,
    Tensors,
    compare,
    gradients,
    in_fp64,
    largest,
    one_reduction,
    ulp,
)

FAMILIES = ("random", "edge_heavy", "deep_negative", "ones", "growing_max")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {"B": 2, "A": 2, "d": 8, "shared": False, "bias": True, "mask": None}
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
    width = case.A * case.d

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*sizes, generator=g) * scale

    query = normal(*(() if case.shared else (case.B,)), case.Q, width)
    context = normal(case.B, case.n, case.X)
    value_weight = normal(width, case.X, scale=case.X**-0.5)
    value_bias, mask = normal(width), _mask(case, g)
    if family == "edge_heavy":  # first and last key dominate: an index off by one shows
        context[:, :1] *= 6
        context[:, -1:] *= 6
    elif family == "deep_negative":  # every logit far below 0: a zero-padded key would win
        mask = torch.full((case.B, 1, case.Q, case.n), -64.0) - torch.rand(case.n, generator=g)
    elif family == "ones":  # every value is 1, so the output is the sum of the probabilities
        value_weight, value_bias = value_weight * 0, value_bias * 0 + 1
    elif family == "growing_max":  # the running maximum rises with every key
        context = context * torch.linspace(0.1, 3, max(case.n, 1))[: case.n, None]
    inputs: Inputs = {
        "query": query,
        "context": context,
        "key_weight": normal(width, case.X, scale=case.X**-0.5),
        "value_weight": value_weight,
    }
    if case.bias or family == "ones":
        inputs |= {"key_bias": normal(width), "value_bias": value_bias}
    inputs = {k: v.to(dtype).to(device) for k, v in inputs.items()}
    if mask is not None:
        inputs["attention_mask"] = (
            mask.to(device) if mask.dtype == torch.bool else mask.to(dtype).to(device)
        )
    return {**inputs, "num_heads": case.A, "algorithm": "absorbed"}


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


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers runs it: two Linear layers, then attention by SDPA."""
    A, query, context = inputs["num_heads"], inputs["query"], inputs["context"]
    q = query.expand(context.shape[0], *query.shape[-2:])
    key = F.linear(context, inputs["key_weight"], inputs.get("key_bias"))
    value = F.linear(context, inputs["value_weight"], inputs.get("value_bias"))
    q, key, value = (t.view(*t.shape[:2], A, -1).transpose(1, 2) for t in (q, key, value))
    mask = inputs.get("attention_mask")
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def library(inputs: Inputs) -> torch.Tensor:
    """K and V by one GEMM over their stacked weights, then SDPA."""
    A, query, context = inputs["num_heads"], inputs["query"], inputs["context"]
    weight = torch.cat([inputs["key_weight"], inputs["value_weight"]])
    bias = torch.cat([inputs["key_bias"], inputs["value_bias"]]) if "key_bias" in inputs else None
    both = F.linear(context, weight, bias).unflatten(-1, (2, A, -1))
    key, value = both.permute(2, 0, 3, 1, 4)
    q = query.expand(context.shape[0], *query.shape[-2:])
    q = q.view(*q.shape[:2], A, -1).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=inputs.get("attention_mask"))
    return out.transpose(1, 2).flatten(2)


def check(
    inputs: Inputs, wide: Inputs, got: Tensors, reference: Tensors, grad: torch.Tensor
) -> list[Comparison]:
    """The chain bound of TOLERANCES.md for the output; gradients against eager's own error."""
    dtype = got["out"].dtype
    found = [
        compare("out", got["out"], reference["out"], _output_bound(wide, reference["out"], dtype))
    ]
    theirs = _eager_errors(inputs, grad)
    for name in [n for n in got if n != "out"]:
        size = largest(reference[name])
        bound = torch.maximum(1.25 * theirs[name], ulp(size, dtype))
        found.append(compare(name, got[name], reference[name], bound))
    return found


def _eager_errors(inputs: Inputs, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Eager's largest gradient error over these inputs and the
    same scaled by up to 6 %, which rounds otherwise: one small tensor alone is a lottery."""
    draws = 16 if inputs["context"].numel() < 10_000 else 4
    worst: dict[str, torch.Tensor] = {}
    for draw in range(draws):
        scaled = {n: t * (1 + draw / 256) for n, t in leaves(inputs).items()}
        changed = {**inputs, **scaled}
        exact = gradients(plain, in_fp64(changed), grad=grad.double())
        for name, value in gradients(eager, changed, grad=grad).items():
            error = largest((value.double() - exact[name]).nan_to_num(0.0))
            worst[name] = torch.maximum(worst.get(name, error), error)
    return worst


def _output_bound(wide: Inputs, reference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    A, query, context = wide["num_heads"], wide["query"], wide["context"]
    B, n, X = context.shape

    def heads(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(*t.shape[:-1], A, -1).transpose(-2, -3)

    absolute = {k: v.abs() for k, v in wide.items() if k in leaves(wide)}
    q = heads(query.expand(B, *query.shape[-2:]))
    key = heads(F.linear(context, wide["key_weight"]))
    key_abs = heads(F.linear(absolute["context"], absolute["key_weight"], absolute.get("key_bias")))
    value = heads(F.linear(context, wide["value_weight"], wide.get("value_bias")))
    value_abs = heads(
        F.linear(absolute["context"], absolute["value_weight"], absolute.get("value_bias"))
    )
    d = q.shape[-1]
    from mmkernels.ops.cross_attention.reference import scores_with_mask

    mask = wide.get("attention_mask")
    full = (B, A, q.shape[2], n)
    scores = scores_with_mask(q, key, None if mask is None else mask.expand(full), d**-0.5)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    flat = lambda t: t.transpose(1, 2).flatten(2)
    if dtype == torch.float32:
        s_bar = (
            (q.abs() @ key_abs.transpose(-1, -2) * d**-0.5).amax(-1, keepdim=True)
            if n
            else q[..., :1]
        )
        terms = p @ value_abs * (1 + 2 * s_bar)
        return ulp(reference, dtype) + 2 * UNIT[dtype] * (X + d + n) ** 0.5 * flat(terms)
    squares = flat(p.square() @ value.square())
    return one_reduction(reference, dtype, squares, squares, squares)


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
    Invalid("device", _set(context=torch.zeros(2, 5, 6, device="meta")), "context must be on the device of query"),
]  # fmt: skip
