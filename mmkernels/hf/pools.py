# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: attention pools of open_clip and timm, in which learned queries read all tokens of an image.

Dimensions: B images, n tokens, Q queries, X width of the tokens, D of the queries.
"""

from typing import Any

import torch
from torch import nn

from mmkernels import Norm, cross_attention
from mmkernels.hf.patch_embed import noise
from mmkernels.hf.projector import asks, has
from mmkernels.hf.row import Found
from mmkernels.nn.attention_pool import multihead_attention, projections

# open_clip -------------------------------------------------------------------------------------------------------


def attentional_pooler(module: Any) -> Found | str | None:
    """``query``, ``ln_q``, ``ln_k`` and a ``MultiheadAttention``: CoCa's pooler in open_clip's older releases."""
    attention = getattr(module, "attn", None)
    if not isinstance(attention, nn.MultiheadAttention) or not has(module, "ln_q ln_k", "query"):
        return None
    if attention.bias_k is not None or attention.add_zero_attn:
        return "its attention has keys of its own"
    # The norms are called, not read: open_clip's are subclasses of LayerNorm.
    return Found("cross_attention", _attentional_pooler, _context, ("attn", "attn.out_proj"))


def _context(module: Any) -> tuple[Any, ...]:
    return (noise(module, 2, 5, module.attn.kdim),)


def _attentional_pooler(
    module: Any, original: Any, x: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if x.dim() != 3 or any(a is not None for a in (*args, *kwargs.values())):
        return original(x, *args, **kwargs)
    return multihead_attention(module.attn, module.ln_q(module.query), module.ln_k(x))


def separate_inputs(module: Any) -> Found | str | None:
    """``Attention`` with ``k_x`` and ``v_x``, its parameters named as torch's: what open_clip's poolers have now."""
    if not has(module, "out_proj", "in_proj_bias", "num_heads", "attn_drop", "out_drop"):
        return None
    if isinstance(module, nn.MultiheadAttention) or not asks(module, "x", "k_x", "v_x"):
        return None
    norms = [getattr(module, n, None) for n in ("ln_q", "ln_k", "ln_inner")]
    scales = [getattr(module, n, None) for n in ("logit_scale", "head_scale")]
    if not all(isinstance(n, nn.Identity) for n in norms) or scales != [None, None]:
        return "norms or scales its heads"
    return Found("cross_attention", _separate_inputs, _queries_and_context)


def _queries_and_context(module: Any) -> tuple[Any, ...]:
    w_q, w_k, _ = projections(module)
    context = noise(module, 2, 5, w_k.shape[1]).double()  # the same tensor twice
    return noise(module, 2, 3, w_q.shape[1]), context, context


def _separate_inputs(
    module: Any, original: Any, x: torch.Tensor, k_x: torch.Tensor | None = None,
    v_x: torch.Tensor | None = None, attn_mask: torch.Tensor | None = None,
) -> Any:  # fmt: skip
    if k_x is None or k_x is not v_x or attn_mask is not None or x.dim() != 3:
        return original(x, k_x, v_x, attn_mask)
    shared = len(x) > 0 and x.stride(0) == 0  # learned queries, expanded: projected once
    out = multihead_attention(
        module, x[0] if shared else x, k_x, dropout=module.attn_drop.p if module.training else 0.0
    )
    return module.out_drop(out)


# timm ------------------------------------------------------------------------------------------------------------


def latent_pool(module: Any) -> Found | str | None:
    """``latent``, ``q``, ``kv`` in one layer, ``proj``, norm and MLP: timm's ``AttentionPoolLatent``."""
    parts = ("latent", "q", "q_norm", "k_norm", "proj", "proj_drop", "norm", "num_heads", "pool")
    if not has(module, "kv", *parts) or not isinstance(module.latent, nn.Parameter):
        return None
    plain = isinstance(module.k_norm, nn.Identity)
    layers = ("kv",) if plain else ("kv", "k_norm")
    return Found("cross_attention", _latent_pool, _tokens, layers)


def _tokens(module: Any) -> tuple[Any, ...]:
    position = getattr(module, "pos_embed", None)
    n = 5 if position is None else len(position)
    return (noise(module, 2, n, module.kv.in_features),)


def _latent_pool(
    module: Any, original: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None
) -> Any:
    if x.dim() != 3 or (attn_mask is not None and attn_mask.dim() != 4):
        return original(x, attn_mask)
    if getattr(module, "pos_embed", None) is not None:
        x = x + module.pos_embed.to(x.dtype)
    w_k, w_v = module.kv.weight.chunk(2)
    b_k, b_v = (None, None) if module.kv.bias is None else module.kv.bias.chunk(2)
    norm = module.k_norm
    heads = module.q(module.latent[0]).unflatten(-1, (module.num_heads, -1))
    out = cross_attention(
        module.q_norm(heads).flatten(-2), x, w_k, w_v, b_k, b_v, num_heads=module.num_heads, attention_mask=attn_mask,
        key_norm=None if isinstance(norm, nn.Identity) else Norm("layer", norm.weight, norm.bias, norm.eps),
    )  # fmt: skip
    return _pooled(module, module.proj_drop(module.proj(out)))


def _pooled(module: Any, x: torch.Tensor) -> torch.Tensor:
    """After the attention: the MLP, where there is one, and one row of the latents'."""
    if getattr(module, "mlp", None) is not None:
        x = x + module.mlp(module.norm(x))
    if module.pool == "token":
        return x[:, 0]
    return x.mean(1) if module.pool == "avg" else x
