# SPDX-License-Identifier: Apache-2.0
"""The public ``cross_attention``: what it computes, and the choice of algorithm."""

import functools

import torch

from mmkernels import checks
from mmkernels.ops.cross_attention import arguments
from mmkernels.ops.cross_attention.absorbed import absorbed
from mmkernels.ops.cross_attention.arguments import OP, Position
from mmkernels.ops.cross_attention.cost import absorbs
from mmkernels.ops.cross_attention.projected import projected
from mmkernels.ops.cross_attention.ragged import padded
from mmkernels.ops.norm import Norm, check_norm
from mmkernels.ops.patch_merge.api import normed


def cross_attention(
    query: torch.Tensor,
    context: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    key_bias: torch.Tensor | None = None,
    value_bias: torch.Tensor | None = None,
    *,
    num_heads: int,
    num_key_value_heads: int | None = None,
    attention_mask: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    context_norm: Norm | None = None,
    key_position: Position | None = None,
    key_norm: Norm | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    algorithm: str = "auto",
) -> torch.Tensor:
    """Few learned queries attend to many feature tokens; the K and V projections are part of the op.

    ``out_h = softmax(scale · q_h (x W_k,hᵀ + b_k,h)ᵀ + mask) (x W_v,hᵀ + b_v,h)`` with x = ``context``, before the
    output projection. Absorbed, K and V are never formed: ``q'_h = q_h W_k,h``, ``S_h = q'_h xᵀ``,
    ``out_h = (P x) W_v,hᵀ + (ΣP) b_v,h`` with P = softmax(S_h), dropped or not; ``b_k`` cancels in the softmax.

    Args:
        query: Already projected, ``[B, Q, A·d]``, or ``[Q, A·d]`` shared by the batch (then projected once).
        context: ``[B, n, X]``, or packed ``[tokens, X]`` with ``cu_seqlens``; one dtype for all float arguments.
        key_weight, value_weight: ``[A·d, X]`` (A_kv·d), the layout of ``nn.Linear.weight``.
        key_bias, value_bias: ``[A·d]`` (A_kv·d).
        num_heads: A.
        num_key_value_heads: A_kv, a divisor of A: query head h reads key head ⌊h·A_kv/A⌋. Default A.
        attention_mask: As in SDPA: bool (True = attend) or additive, broadcastable to
            ``[B, A, Q, n]``. A row that may attend to nothing gives 0 and no gradient. A key that no query
            may attend to (False, or -inf) counts for nothing, even if it holds NaN. Not with cu_seqlens.
        latents: ``[B, L, X]``, a second source of keys and values, of which every query sees all: the Perceiver's
            ``cat(context, latents)`` in either order, not concatenated. Its norm is the caller's.
        context_norm: ``Norm("layer" or "rms", weight, bias, eps)`` of the context before K and V.
        key_position: Added to the context for K, not for V: ``[n, X]``, or a grid's ``([rows, X],
            [columns, X])``, whose sum it is; n = rows·columns. Not with cu_seqlens.
        key_norm: Of each key head, ``[d]`` (Mllama, Idefics' ``qk_layer_norms``): it cannot be absorbed.
        cu_seqlens: Offsets of the samples in a packed context, ``[B + 1]`` int32 or int64; max_seqlen: the longest
            of them, needed on a GPU (read from cu_seqlens on CPU).
        scale: Default ``1/√d``.
        dropout_p: Of the attention probabilities, where it is not 0. A dropped one takes its share of
            value_bias along.
        algorithm: ``"projected"`` (torch's own GEMM and SDPA), ``"absorbed"`` (ours), or ``"auto"``: the
            rule of ``cost.py`` on Q, n, d, X, dtype, device and whether a backward will follow.

    Returns:
        ``[B, Q, A·d]`` in the query's dtype (the autocast dtype under autocast).

    Gradients: all float arguments, an additive mask too (``key_bias``: exactly 0 when absorbed).

    Raises:
        ValueError, TypeError: Names argument, got, expected.

    Numerics: absorbed, q' and P·X stay in fp32 (a forward in bf16 on AMX: in two bf16 halves, 2⁻¹⁷), the softmax is
        fp32; one rounding at the end. ``context_norm`` rounds to the dtype, as the module does.

    Source: BLIP-2 (Li et al. 2023) ``Blip2QFormerMultiHeadAttention`` with ``encoder_hidden_states``;
        ``Idefics2PerceiverAttention``, ``AriaCrossAttention``; Flamingo (Alayrac et al. 2022); absorption as in
        DeepSeek-V2's MLA.
    """
    kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
    packed = cu_seqlens is not None
    arguments.check(query, context, key_weight, value_weight, num_heads, kv_heads, packed)
    arguments.check_biases(key_bias, value_bias, key_weight)
    check_norm(OP, "context_norm", context_norm, context.shape[-1], context, "context")
    if algorithm not in ("auto", "projected", "absorbed"):
        checks.fail(OP, "algorithm", repr(algorithm), '"auto", "projected" or "absorbed"')
    d = query.shape[-1] // num_heads
    check_norm(OP, "key_norm", key_norm, d, context, "context")
    if key_norm is not None and algorithm == "absorbed":
        checks.fail(OP, "key_norm", "given", 'None with algorithm="absorbed"')
    if not 0 <= dropout_p < 1:
        checks.fail(OP, "dropout_p", dropout_p, "from 0 to below 1")
    if cu_seqlens is None:
        (B, n, X), longest = context.shape, 0
    else:
        _check_packed(attention_mask, key_position)
        n = longest = arguments.longest_of(cu_seqlens, max_seqlen, context.shape[0])
        B, X = len(cu_seqlens) - 1, context.shape[1]
    if query.dim() == 3 and query.shape[0] != B:
        checks.fail(OP, "query", list(query.shape), f"[{B}, Q, A·d] for this context")
    Q = query.shape[-2]
    mask = arguments.expanded_mask(attention_mask, B, num_heads, Q, n, query.device)
    seen = None if attention_mask is None else arguments.seen_keys(attention_mask)
    if context_norm is not None:
        context, of_context = normed(arguments.seen_rows(context, seen), context_norm), None
    else:
        of_context = seen
    arguments.check_latents(latents, B, context)
    position = arguments.position_of(key_position, n, context)
    position = arguments.seen_positions(position, seen)
    if algorithm == "auto":
        keys, rows = n + (0 if latents is None else latents.shape[1]), Q * (num_heads // kv_heads)
        tensors = (query, context, key_weight, value_weight, latents)
        training = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in tensors
        )
        dtype, device = checks.dtype_of(query), query.device.type
        pays = key_norm is None and absorbs(rows, keys, d, X, dtype, device, training)
        algorithm = "absorbed" if pays else "projected"
    if algorithm == "absorbed":
        run = functools.partial(absorbed, cu_seqlens=cu_seqlens, max_seqlen=longest)
    else:
        run = functools.partial(projected, key_norm=key_norm)
        context = arguments.seen_rows(context, of_context)  # absorbed, the kernel does so
        if cu_seqlens is not None:  # SDPA wants a batch
            context, inside = padded(context, cu_seqlens, longest)
            mask = inside.expand(B, num_heads, Q, n)
    out = run(
        arguments.grouped(query, num_heads, kv_heads), context, latents,
        (key_weight, value_weight, key_bias, value_bias), arguments.grouped_mask(mask, kv_heads), position,
        kv_heads, d**-0.5 if scale is None else float(scale), dropout_p,
    )  # fmt: skip
    return arguments.ungrouped(out, num_heads, kv_heads)


def _check_packed(attention_mask: torch.Tensor | None, key_position: Position | None) -> None:
    for name, value in (("attention_mask", attention_mask), ("key_position", key_position)):
        if value is not None:
            checks.fail(OP, name, "given", "None with cu_seqlens")
