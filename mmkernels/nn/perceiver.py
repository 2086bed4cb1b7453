# SPDX-License-Identifier: Apache-2.0
"""Perceiver resampler: latents read the context and themselves, layer after layer."""

import torch
import torch.nn.functional as F
from torch import nn

import mmkernels
from mmkernels import Norm

NORMS: dict[str, type[nn.RMSNorm] | type[nn.LayerNorm]] = {
    "rms": nn.RMSNorm, "layer": nn.LayerNorm,
}  # fmt: skip


class PerceiverResampler(nn.Module):
    """Turns n feature tokens into ``num_latents``; in each layer keys and values are the context and the latents.

    With the defaults submodules are named as in ``Idefics2PerceiverResampler``, so its state_dict loads.

    Args:
        hidden_size: Width of context and latents.
        num_latents, num_layers: How many latents, how many layers.
        num_heads, num_key_value_heads, head_dim: Of the attention.
        intermediate_size: Of the MLP, default 4·hidden_size.
        norm: ``"rms"``, or ``"layer"`` as in Flamingo.
        mlp: ``"swiglu"``, or ``"gelu"``, which is ``down(gelu(up(x)))``, as in Flamingo.
        eps: Of every RMSNorm.
        algorithm: As in ``mmkernels.cross_attention``.
    Source: Perceiver (Jaegle et al. 2021), Flamingo (Alayrac et al. 2022), Idefics2 (Laurençon et al. 2024).
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_latents: int = 64,
        num_layers: int = 3,
        num_heads: int = 16,
        num_key_value_heads: int = 4,
        head_dim: int = 96,
        intermediate_size: int | None = None,
        norm: str = "rms",
        mlp: str = "swiglu",
        eps: float = 1e-6,
        algorithm: str = "auto",
    ) -> None:
        super().__init__()
        for name, value, known in (("norm", norm, NORMS), ("mlp", mlp, ("swiglu", "gelu"))):
            if value not in known:
                raise ValueError(
                    f"PerceiverResampler: {name} must be one of {list(known)}, got {value!r}"
                )
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        heads = (num_heads, num_key_value_heads, head_dim)
        self.latents = nn.Parameter(torch.ones(num_latents, hidden_size))
        layers = [
            PerceiverLayer(hidden_size, heads, inner, (norm, mlp, eps), algorithm)
            for _ in range(num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.norm = NORMS[norm](hidden_size, eps=eps)

    def forward(
        self, context: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, n, D]`` → ``[B, num_latents, D]``. The mask is ``[B, n]``, non-zero = attend."""
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        latents = self.latents.expand(context.shape[0], *self.latents.shape)
        for layer in self.layers:
            latents = layer(latents, context, mask)
        out: torch.Tensor = self.norm(latents)
        return out


class PerceiverLayer(nn.Module):
    """Attention to context and latents, then an MLP; pre-norm, with residuals. ``kinds``: norm, MLP, eps."""

    def __init__(
        self,
        hidden_size: int,
        heads: tuple[int, int, int],
        inner: int,
        kinds: tuple[str, str, float],
        algorithm: str,
    ) -> None:
        super().__init__()
        self.norm_kind, mlp, eps = kinds
        new_norm = NORMS[self.norm_kind]
        self.num_heads, self.num_key_value_heads, d = heads
        self.algorithm = algorithm
        self.input_latents_norm = new_norm(hidden_size, eps=eps)
        self.input_context_norm = new_norm(hidden_size, eps=eps)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(hidden_size, self.num_heads * d, bias=False)
        self.self_attn.k_proj = nn.Linear(hidden_size, self.num_key_value_heads * d, bias=False)
        self.self_attn.v_proj = nn.Linear(hidden_size, self.num_key_value_heads * d, bias=False)
        self.self_attn.o_proj = nn.Linear(self.num_heads * d, hidden_size, bias=False)
        self.post_attention_layernorm = new_norm(hidden_size, eps=eps)
        self.mlp = nn.Module()
        if mlp == "swiglu":
            self.mlp.gate_proj = nn.Linear(hidden_size, inner, bias=False)
        self.mlp.up_proj = nn.Linear(hidden_size, inner, bias=False)
        self.mlp.down_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(
        self, latents: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        attn, mlp = self.self_attn, self.mlp
        normed = self.input_latents_norm(latents)
        out = mmkernels.cross_attention(
            attn.q_proj(normed), context, attn.k_proj.weight, attn.v_proj.weight,  # type: ignore[operator, union-attr, arg-type]
            num_heads=self.num_heads, num_key_value_heads=self.num_key_value_heads, attention_mask=mask,
            latents=normed, context_norm=self._context_norm(),
            algorithm=self.algorithm,
        )  # fmt: skip
        latents = latents + attn.o_proj(out)  # type: ignore[operator]
        normed = self.post_attention_layernorm(latents)
        inner = mlp.up_proj(normed)  # type: ignore[operator]
        if hasattr(mlp, "gate_proj"):
            inner = F.silu(mlp.gate_proj(normed)) * inner  # type: ignore[operator]
        else:
            inner = F.gelu(inner)
        result: torch.Tensor = latents + mlp.down_proj(inner)  # type: ignore[operator]
        return result

    def _context_norm(self) -> Norm:
        norm = self.input_context_norm
        return Norm(self.norm_kind, norm.weight, getattr(norm, "bias", None), norm.eps or 0.0)
