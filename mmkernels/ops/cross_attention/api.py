# SPDX-License-Identifier: Apache-2.0
"""The public ``cross_attention``: what it computes, the checks, and the choice of algorithm."""

import torch
import torch.nn.functional as F

from mmkernels import checks
from mmkernels.ops.cross_attention.cost import absorbs
from mmkernels.ops.cross_attention.op import FORWARD

_OP = "cross_attention"


def cross_attention(
    query: torch.Tensor,
    context: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None = None,
    value_bias: torch.Tensor | None = None,
    *,
    num_heads: int,
    attention_mask: torch.Tensor | None = None,
    scale: float | None = None,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Few learned queries attend to many feature tokens; the K and V projections are part of the op.

    ``out_h = softmax(scale · q_h (context W_k,hᵀ + b_k,h)ᵀ + mask) (context W_v,hᵀ + b_v,h)``, before the output
    projection. Absorbed, K and V are never formed: ``q'_h = q_h W_k,h``, ``S_h = q'_h contextᵀ``,
    ``out_h = (softmax(S_h) context) W_v,hᵀ + b_v,h``; ``b_k`` cancels in the softmax.

    Args:
        query: Already projected, ``[B, Q, A·d]``, or ``[Q, A·d]`` shared by the batch.
        context: ``[B, n, X]``; one dtype for all float arguments.
        key_weight, value_weight: ``[A·d, X]``, the layout of ``nn.Linear.weight``.
        key_bias, value_bias: ``[A·d]``.
        num_heads: A.
        attention_mask: As in SDPA: bool (True = attend) or additive, broadcastable to
            ``[B, A, Q, n]``. A row that may attend to nothing gives 0 and no gradient.
        scale: Default ``1/√d``.
        algorithm: ``"projected"`` (torch's own GEMM and SDPA), ``"absorbed"`` (ours), or ``"auto"``: the
            rule of ``cost.py`` on Q, n, d, X and dtype.

    Returns:
        ``[B, Q, A·d]`` in the query's dtype (the autocast dtype under autocast).

    Gradients: query, context, weights, biases (``key_bias``: exactly 0 when absorbed). An additive mask
        gets one from ``projected`` only.

    Raises:
        ValueError, TypeError: Names argument, got, expected.

    Numerics: absorbed, q' and P·X stay in fp32, the softmax is fp32; one rounding at the end.

    Source: BLIP-2 (Li et al. 2023) ``Blip2QFormerMultiHeadAttention`` with ``encoder_hidden_states``;
        absorption as in DeepSeek-V2's MLA.
    """
    _check(query, context, key_weight, value_weight, num_heads)
    _check_biases(key_bias, value_bias, key_weight)
    mask = _mask(attention_mask, query, context, num_heads)
    if algorithm not in ("auto", "projected", "absorbed"):
        checks.fail(_OP, "algorithm", repr(algorithm), '"auto", "projected" or "absorbed"')
    d = key_weight.shape[0] // num_heads
    scale = d**-0.5 if scale is None else float(scale)
    if algorithm == "auto":
        Q, (n, X) = query.shape[-2], context.shape[1:]
        algorithm = "absorbed" if absorbs(Q, n, d, X, _dtype(query)) else "projected"
    weights = (key_weight, value_weight, key_bias, value_bias)
    if algorithm == "projected":
        return _projected(query, context, *weights, mask, num_heads, scale)
    out: torch.Tensor = FORWARD(query, context, *weights, mask, num_heads, scale)[0]
    return out


def _projected(
    query: torch.Tensor,
    context: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    A: int,
    scale: float,
) -> torch.Tensor:
    """torch's own path: two GEMMs and SDPA, where forming K and V is the cheaper way."""
    B = context.shape[0]
    key = F.linear(context, key_weight, key_bias).unflatten(-1, (A, -1)).transpose(1, 2)
    value = F.linear(context, value_weight, value_bias).unflatten(-1, (A, -1)).transpose(1, 2)
    q = query.expand(B, *query.shape[-2:]).unflatten(-1, (A, -1)).transpose(1, 2)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(key.dtype)
    out = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def _check(
    query: torch.Tensor,
    context: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    num_heads: int,
) -> None:
    checks.floating(_OP, "query", query)
    for name, tensor in (
        ("context", context),
        ("key_weight", key_weight),
        ("value_weight", value_weight),
    ):
        checks.like(_OP, name, tensor, query, "query")
    if context.dim() != 3:
        checks.fail(_OP, "context", list(context.shape), "[B, n, X]")
    if query.dim() not in (2, 3):
        checks.fail(_OP, "query", list(query.shape), "[B, Q, A·d] or [Q, A·d]")
    if query.dim() == 3 and query.shape[0] != context.shape[0]:
        checks.fail(
            _OP, "query", list(query.shape), f"[{context.shape[0]}, Q, A·d] for this context"
        )
    width, X = query.shape[-1], context.shape[-1]
    if num_heads <= 0 or width % num_heads or width == 0:
        checks.fail(_OP, "num_heads", num_heads, f"a divisor of the query width {width}")
    checks.shape(_OP, "key_weight", key_weight, (width, X), "[A·d, X]")
    checks.shape(_OP, "value_weight", value_weight, (width, X), "[A·d, X]")


def _check_biases(
    key_bias: torch.Tensor | None, value_bias: torch.Tensor | None, key_weight: torch.Tensor
) -> None:
    for name, bias in (("key_bias", key_bias), ("value_bias", value_bias)):
        if bias is not None:
            checks.like(_OP, name, bias, key_weight, "key_weight")
            checks.shape(_OP, name, bias, (key_weight.shape[0],), "[A·d]")


def _mask(
    attention_mask: torch.Tensor | None, query: torch.Tensor, context: torch.Tensor, A: int
) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    if attention_mask.dtype != torch.bool:
        checks.floating(_OP, "attention_mask (unless bool)", attention_mask)
    if attention_mask.device != query.device:
        checks.fail(_OP, "attention_mask", attention_mask.device, f"on {query.device}")
    full = (context.shape[0], A, query.shape[-2], context.shape[1])
    shape = attention_mask.shape
    padded = (1,) * (4 - len(shape)) + tuple(shape)
    if len(shape) > 4 or any(s not in (1, f) for s, f in zip(padded, full, strict=True)):
        checks.fail(
            _OP, "attention_mask", list(shape), f"broadcastable to [B, A, Q, n] = {list(full)}"
        )
    return attention_mask.expand(full)
