# SPDX-License-Identifier: Apache-2.0
"""Cross-attention with its K and V projections, in plain PyTorch: the definition of correct.

Dimensions: B batch, Q queries, n context tokens, X context width, A heads, d head width.

``K = context · W_k + b_k``, ``V = context · W_v + b_v``, ``out = softmax(scale · q K + mask) V``; with dropout the
probabilities are multiplied by ``dropout_mask / (1 − p)``. A row whose mask forbids every key gives 0. A key that is
forbidden to every query is read as 0, and its gradient is 0.

What rounds where: in 16-bit dtypes K, V and the probabilities round to the dtype, as in eager models. The softmax runs
in fp32. The kernel forms neither K nor V.
"""

import math

import torch
import torch.nn.functional as F

from mmkernels.ops.cross_attention.arguments import over_latents, seen_keys
from mmkernels.ops.cross_attention.ragged import packed, padded


def cross_attention(
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out [B, Q, A·d], lse [B, A, Q])``; lse is that of the scores without ``q · b_k``.

    ``query`` is ``[B, Q, A·d]`` or ``[Q, A·d]`` shared by the batch; ``attention_mask`` broadcasts to
    ``[B, A, Q, n]``, bool (True = attend) or added to the scores; ``dropout_mask`` is that shape, True = kept.
    ``latents`` [B, L, X] are more context: n counts them, after the others. With ``cu_seqlens`` [B + 1] the context is
    packed, [T, X], without mask; n is ``max_seqlen`` then, to which samples are padded.
    """
    if cu_seqlens is not None:
        context, inside = padded(context, cu_seqlens, max_seqlen)
        attention_mask = over_latents(inside, latents)
    if latents is not None:
        context = torch.cat([context, latents], 1)
    if attention_mask is not None:
        context = torch.where(seen_keys(attention_mask)[..., None], context, 0)
    key = _heads(F.linear(context, key_weight), num_heads)  # b_k adds a constant to each score row
    value = _heads(F.linear(context, value_weight, value_bias), num_heads)
    q = _heads(query.expand(context.shape[0], *query.shape[-2:]), num_heads)
    scores = scores_with_mask(q, key, attention_mask, scale)
    nothing = (scores == -math.inf).all(-1)  # such a row has no gradient, not even NaN
    scores = scores.masked_fill(nothing[..., None], 0.0)
    lse = torch.logsumexp(scores, -1)
    probabilities = torch.exp(scores - lse[..., None]).masked_fill(nothing[..., None], 0.0)
    lse = lse.masked_fill(nothing, -math.inf)
    if dropout_mask is not None:
        probabilities = probabilities * dropout_mask / (1 - dropout_p)
    out = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    if key_bias is not None:  # it has a gradient, and that is exactly 0
        out = out + key_bias.mul(0).sum()
    return out, lse.detach()


def scores_with_mask(
    query_BAQd: torch.Tensor,
    key_BAnd: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Scores in at least fp32; a forbidden key has -inf."""
    acc = torch.promote_types(query_BAQd.dtype, torch.float32)
    scores = (query_BAQd.to(acc) @ key_BAnd.to(acc).transpose(-1, -2)) * scale
    if attention_mask is None:
        return scores
    if attention_mask.dtype == torch.bool:
        return scores.masked_fill(~attention_mask, -math.inf)
    return scores + attention_mask.to(acc)


def _heads(rows_BTD: torch.Tensor, A: int) -> torch.Tensor:
    return rows_BTD.unflatten(-1, (A, -1)).transpose(1, 2)


def cross_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    context: torch.Tensor,
    latents: torch.Tensor | None,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    max_seqlen: int,
    num_heads: int,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """Gradients of (query, context, latents, key_weight, value_weight, value_bias, attention_mask); empty if not
    ``needs``.

    Everything is recomputed in at least fp32 and rounded once at the end.
    """
    dtype, acc = query.dtype, torch.promote_types(query.dtype, torch.float32)
    total = context.shape[0]
    if cu_seqlens is not None:
        context, inside = padded(context, cu_seqlens, max_seqlen)
        attention_mask = over_latents(inside, latents)
    own = context.shape[1]
    if latents is not None:
        context = torch.cat([context, latents], 1)
    if attention_mask is not None:
        context = torch.where(seen_keys(attention_mask)[..., None], context, 0)
    B, n, X = context.shape
    x, w_k, w_v = context.to(acc), key_weight.to(acc), value_weight.to(acc)
    q = _heads(query.to(acc).expand(B, *query.shape[-2:]), num_heads)
    key = _heads(x @ w_k.t(), num_heads)
    value = _heads(F.linear(x, w_v, None if value_bias is None else value_bias.to(acc)), num_heads)
    d_out = _heads(grad.to(acc), num_heads)
    scores = scores_with_mask(q, key, attention_mask, scale)
    p = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    d_p = d_out @ value.transpose(-1, -2)
    kept = p
    if dropout_mask is not None:
        kept, d_p = (t * dropout_mask / (1 - dropout_p) for t in (p, d_p))
    delta = (p * d_p).sum(-1, keepdim=True)
    d_scores = p * (d_p - delta)
    d_query = (d_scores @ key * scale).transpose(1, 2).flatten(2)
    d_key = (d_scores.transpose(-1, -2) @ q * scale).transpose(1, 2).flatten(2)
    d_value = (kept.transpose(-1, -2) @ d_out).transpose(1, 2).flatten(2)
    if query.dim() == 2:
        d_query = d_query.sum(0)
    as_given = lambda d: d if cu_seqlens is None else packed(d, cu_seqlens, total)
    grads = (
        lambda: d_query,
        lambda: as_given((d_key @ w_k + d_value @ w_v)[:, :own]),
        lambda: (d_key @ w_k + d_value @ w_v)[:, own:],
        lambda: d_key.flatten(0, 1).t() @ x.flatten(0, 1),
        lambda: d_value.flatten(0, 1).t() @ x.flatten(0, 1),
        lambda: d_value.sum((0, 1)),
    )
    empty = query.new_empty(0)
    found = [g().to(dtype) if need else empty for g, need in zip(grads, needs, strict=False)]
    return (*found, d_scores if needs[6] else query.new_empty(0, dtype=acc))
