# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: attention of few queries to many features, in the forms models write it.

Everywhere K and V of the features need not be formed (``mmkernels.cross_attention``). Dimensions: B images, n features,
Q queries, X width of the features.
"""

from typing import Any

import torch
from torch import nn

from mmkernels import Norm, cross_attention
from mmkernels.hf.patch_embed import noise
from mmkernels.hf.row import Found, class_of
from mmkernels.nn.attention_pool import hiding, multihead_attention


def has(module: nn.Module, linears: str, *others: str) -> bool:
    """Whether these names are linear layers (or what stands for one), and these exist."""
    found = (getattr(module, name, None) for name in linears.split())
    return all(isinstance(m, nn.Module) and hasattr(m, "weight") for m in found) and all(
        hasattr(module, name) for name in others
    )


def _eager(module: Any) -> bool:
    """Whether its attention returns probabilities, which ours never forms."""
    return getattr(getattr(module, "config", None), "_attn_implementation", "eager") == "eager"


def _flat(mask: torch.Tensor | None) -> bool:
    """Whether it is flash-attn's kind of mask, ``[B, n]``."""
    return mask is not None and mask.dim() != 4


# BERT's names: Q-Former ------------------------------------------------------------------------------------------

QKV = ("key", "value")


def qformer(module: Any) -> Found | str | None:
    """``query``, ``key``, ``value`` and ``encoder_hidden_states``: BLIP-2's cross-attention."""
    if not has(
        module, "query key value", "num_attention_heads", "attention_head_size", "attention_dropout"
    ):
        return None
    if _eager(module):
        return 'attn_implementation="eager" returns probabilities: set "sdpa"'
    return Found("cross_attention", _qformer, _queries_and_features, QKV)


def _queries_and_features(module: Any) -> tuple[Any, ...]:
    hidden_states = noise(module, 2, 3, module.query.in_features)
    return hidden_states, None, noise(module, 2, 5, module.key.in_features)


def _qformer(
    module: Any, original: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None, encoder_attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:  # fmt: skip
    if encoder_hidden_states is None or _eager(module) or _flat(encoder_attention_mask):
        return original(
            hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
        )
    query = module.query(hidden_states)
    key, value = module.key, module.value
    out = cross_attention(
        query[0] if len(query) == 1 else query, encoder_hidden_states, key.weight, value.weight, key.bias, value.bias,
        num_heads=module.num_attention_heads, attention_mask=encoder_attention_mask,
        dropout_p=module.attention_dropout if module.training else 0.0,
    )  # fmt: skip
    return out, None


# SigLIP's head ---------------------------------------------------------------------------------------------------


def attention_pool(module: nn.Module) -> Found | str | None:
    """``probe``, ``attention``, ``layernorm``, ``mlp``: SigLIP's MAP head."""
    parts = [getattr(module, n, None) for n in ("probe", "attention", "layernorm", "mlp")]
    if not isinstance(parts[0], nn.Parameter) or not isinstance(parts[1], nn.MultiheadAttention):
        return None
    if not all(isinstance(p, nn.Module) for p in parts[2:]):
        return None
    if not parts[1].batch_first or not parts[1]._qkv_same_embed_dim or parts[1].bias_k is not None:
        return "its attention is not of one width, batch first"
    return Found("cross_attention", _pool, _tokens, ("attention", "attention.out_proj"))


def _tokens(module: Any) -> tuple[Any, ...]:
    return (noise(module, 2, 5, module.probe.shape[-1]),)


def _pool(
    module: Any, original: Any, hidden_state: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:  # fmt: skip
    given = () if attention_mask is None else (attention_mask,)
    if any(m.dim() != 2 for m in given):
        return original(hidden_state, *given)
    mask = None if attention_mask is None else hiding(attention_mask, hidden_state)
    hidden_state = multihead_attention(module.attention, module.probe[0], hidden_state, mask=mask)
    out: torch.Tensor = hidden_state + module.mlp(module.layernorm(hidden_state))
    return out[:, 0]


# Perceivers ------------------------------------------------------------------------------------------------------


def perceiver(module: nn.Module) -> Found | str | None:
    """``q_proj`` of latents, ``k_proj`` and ``v_proj`` of context and latents: Idefics2."""
    if not has(
        module, "q_proj k_proj v_proj o_proj", "num_heads", "num_key_value_heads", "scaling"
    ):
        return None
    if not asks(module, "latents", "context"):
        return None
    if _eager(module):
        return 'attn_implementation="eager" returns probabilities: set "sdpa"'
    return Found("cross_attention", _perceiver, _latents_and_context, ("k_proj", "v_proj"))


def asks(module: nn.Module, *names: str) -> bool:
    forward = class_of(module).forward
    code = getattr(forward, "__wrapped__", forward).__code__
    return code.co_varnames[1 : 1 + len(names)] == names


def _latents_and_context(module: Any) -> tuple[Any, ...]:
    width = module.k_proj.in_features
    return noise(module, 2, 3, width), noise(module, 2, 5, width)


def _perceiver(
    module: Any, original: Any, latents: torch.Tensor, context: torch.Tensor,
    attention_mask: torch.Tensor | None = None, position_ids: Any = None, cache: Any = None, **kwargs: Any,
) -> Any:  # fmt: skip
    bound = cache is None and getattr(module, "cache", None) is None and position_ids is None
    if not bound or _eager(module) or _flat(attention_mask):
        return original(latents, context, attention_mask, position_ids, cache, **kwargs)
    n, mask = context.shape[1], attention_mask
    if mask is not None and mask.shape[-1] != n:
        mask = mask[..., :n]
        if not _all_latents(attention_mask, n):
            return original(latents, context, attention_mask, position_ids, cache, **kwargs)
    out = cross_attention(
        module.q_proj(latents), context, module.k_proj.weight, module.v_proj.weight, num_heads=module.num_heads,
        num_key_value_heads=module.num_key_value_heads, attention_mask=mask, latents=latents, scale=module.scaling,
        dropout_p=module.attention_dropout if module.training else 0.0,
    )  # fmt: skip
    return module.o_proj(out), None


def _all_latents(mask: torch.Tensor | None, n: int) -> bool:
    """The op lets every query see every latent: so must the mask. Not read on a GPU, where it would be a sync."""
    if mask is None or mask.is_cuda or torch.compiler.is_compiling():
        return mask is None
    rest = mask[..., n:]
    return bool(rest.all()) if rest.dtype == torch.bool else not bool(rest.any())


def flamingo(module: nn.Module) -> Found | str | None:
    """Idefics' ``IdeficsPerceiverAttention``: its own norms, scores by einsum."""
    if not has(
        module, "context_layer_norm latents_layer_norm q_proj k_proj v_proj output_proj", "n_heads"
    ):
        return None
    layers = ("context_layer_norm", "k_proj", "v_proj") + (
        ("k_layer_norm",) if module.qk_layer_norms else ()
    )
    return Found("cross_attention", _flamingo, lambda m: _latents_and_context(m)[::-1], layers)


def _layer(norm: nn.LayerNorm) -> Norm:
    return Norm("layer", norm.weight, norm.bias, norm.eps)


def _flamingo(
    module: Any, original: Any, context: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    latents = module.latents_layer_norm(latents)
    query, key_norm = module.q_proj(latents), None
    if module.qk_layer_norms:
        query = module.q_layer_norm(query.unflatten(-1, (module.n_heads, -1))).flatten(-2)
        key_norm = _layer(module.k_layer_norm)
    out = cross_attention(
        query, context, module.k_proj.weight, module.v_proj.weight, num_heads=module.n_heads, latents=latents,
        context_norm=_layer(module.context_layer_norm), key_norm=key_norm,
    )  # fmt: skip
    result: torch.Tensor = module.output_proj(out)
    return result


def open_flamingo(module: nn.Module) -> Found | str | None:
    """open_flamingo's ``PerceiverAttention``: ``[B, T, n, X]``, K and V from one layer."""
    if not has(module, "norm_media norm_latents to_q to_kv to_out", "heads", "scale"):
        return None
    return Found("cross_attention", _open_flamingo, _media_and_latents, ("norm_media", "to_kv"))


def _media_and_latents(module: Any) -> tuple[Any, ...]:
    width = module.to_q.in_features
    return noise(module, 2, 2, 5, width), noise(module, 2, 2, 3, width)


def _open_flamingo(
    module: Any, original: Any, x: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    latents = module.norm_latents(latents)
    w_k, w_v = module.to_kv.weight.chunk(2)
    out = cross_attention(
        module.to_q(latents).flatten(0, 1), x.flatten(0, 1), w_k, w_v, num_heads=module.heads, scale=module.scale,
        latents=latents.flatten(0, 1), context_norm=_layer(module.norm_media),
    )  # fmt: skip
    result: torch.Tensor = module.to_out(out.unflatten(0, x.shape[:2]))
    return result


# A MultiheadAttention after linear layers ------------------------------------------------------------------------


def aria(module: nn.Module) -> Found | str | None:
    """Aria's ``AriaCrossAttention``: two linear layers in a row are one."""
    attention = getattr(module, "multihead_attn", None)
    names = "q_proj k_proj v_proj linear layer_norm layer_norm_kv"
    if not isinstance(attention, nn.MultiheadAttention) or not has(module, names, "dropout"):
        return None
    return Found(
        "cross_attention",
        _aria,
        _features_and_queries,
        ("multihead_attn", "multihead_attn.out_proj", "k_proj", "v_proj", "layer_norm_kv"),
    )


def _features_and_queries(module: Any) -> tuple[Any, ...]:
    width = module.q_proj.in_features
    return noise(module, 2, 5, width), noise(module, 2, 3, width)


def _aria(
    module: Any, original: Any, key_value_states: torch.Tensor, hidden_states: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    a = module.multihead_attn
    w_q, w_k, w_v = a.in_proj_weight.chunk(3)
    b_q, b_k, b_v = a.in_proj_bias.chunk(3)
    query = nn.functional.linear(module.q_proj(module.layer_norm(hidden_states)), w_q, b_q)
    mask = None
    if attn_mask is not None:  # [B·heads, Q, n], True = not attended
        mask = attn_mask.unflatten(0, (-1, a.num_heads))
        mask = ~mask if mask.dtype == torch.bool else mask
    out = cross_attention(
        query, key_value_states, w_k @ module.k_proj.weight, w_v @ module.v_proj.weight, b_k, b_v,
        num_heads=a.num_heads, context_norm=_layer(module.layer_norm_kv), attention_mask=mask,
        dropout_p=a.dropout if a.training else 0.0,
    )  # fmt: skip
    result: torch.Tensor = module.dropout(module.linear(a.out_proj(out)))
    return result
