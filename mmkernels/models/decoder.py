# SPDX-License-Identifier: Apache-2.0
"""Llama-style decoder over packed tokens: RMSNorm, RoPE or M-RoPE, grouped-query attention, SwiGLU.

Parameters are named as in transformers' ``LlamaForCausalLM``, ``Qwen2ForCausalLM`` and ``Qwen3ForCausalLM``, so their
state_dicts load. Samples lie behind one another without padding; what a token sees is ``attend``'s business
(``attention.py``): its own sample in training, its pages in generation.

Dimensions: T tokens, E width, A heads, G key-value heads, K head width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models.attention import Norms, Packed, Paged, Rotary, rms_norm
from mmkernels.models.config import DecoderConfig
from mmkernels.models.gated import GatedCrossAttention, Media

Attend = Packed | Paged


class Decoder(nn.Module):
    """Token logits from input embeddings.

    Source: LLaMA (Touvron et al. 2023); GQA (Ainslie et al. 2023); M-RoPE (Qwen2-VL, Wang et al. 2024).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "gated" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if config.lora_rank:
            _adapt(self, config.lora_rank, config.lora_targets)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        media: Media | None = None,
    ) -> torch.Tensor:
        """``[T, E]``, positions ``[T]`` (or ``[axes, T]``) → hidden states ``[T, E]``."""
        hidden_states: torch.Tensor = self.model(inputs_embeds, position_ids, attend, media)
        return hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., E]`` → ``[..., V]``."""
        logits: torch.Tensor = self.lm_head(hidden_states)
        return logits


class DecoderModel(nn.Module):
    """Embedding table, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, gated=i in config.gated_layers)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.inv_freq: torch.Tensor
        self.axis: torch.Tensor | None
        self.register_buffer("inv_freq", inv_freq(config), persistent=False)
        axes = [i for i, channels in enumerate(config.mrope_section) for _ in range(channels)]
        axis = torch.tensor(axes, dtype=torch.int32).repeat(2) if axes else None
        self.register_buffer("axis", axis, persistent=False)

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "DecoderModel":
        """Moves all, casts all but the frequencies: in bf16 an angle at position 1,000 would be off by radians."""
        super()._apply(fn, recurse)
        self.inv_freq = inv_freq(self.config).to(self.norm.weight.device)
        return self

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        media: Media | None,
    ) -> torch.Tensor:
        axis = self.axis if position_ids.dim() == 2 else None
        rotary = Rotary(position_ids, self.inv_freq, axis)
        for i, layer in enumerate(self.layers):
            hidden_states = layer(i, hidden_states, rotary, attend, media)
        output: torch.Tensor = self.norm(hidden_states)
        return output


def inv_freq(config: DecoderConfig) -> torch.Tensor:
    """``[K]`` fp32: ``theta^(−2i/K)`` of pair i, for both its channels."""
    K = config.head_width
    return (config.rope_theta ** -(torch.arange(0, K, 2) / K)).repeat(2)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each on an RMS-normalised copy of the residual stream."""

    def __init__(self, config: DecoderConfig, gated: bool) -> None:
        super().__init__()
        E, eps = config.hidden_size, config.rms_norm_eps
        self.gated = GatedCrossAttention(config) if gated else None
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(E, config.intermediate_size)
        self.input_layernorm = RMSNorm(E, eps)
        self.post_attention_layernorm = RMSNorm(E, eps)

    def forward(
        self,
        index: int,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        attend: Attend,
        media: Media | None,
    ) -> torch.Tensor:
        if self.gated is not None and media is not None:
            hidden_states = self.gated(hidden_states, media)
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(index, normed, rotary, attend)
        output: torch.Tensor = hidden_states + self.mlp(
            self.post_attention_layernorm(hidden_states)
        )
        return output


class RMSNorm(nn.Module):
    """``x / rms(x) · weight``."""

    def __init__(self, E: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention; Qwen2's biases and Qwen3's norms of query and key by configuration."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        E, A, G = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        K, bias = config.head_width, config.attention_bias
        self.q_proj = nn.Linear(E, A * K, bias=bias)
        self.k_proj = nn.Linear(E, G * K, bias=bias)
        self.v_proj = nn.Linear(E, G * K, bias=bias)
        self.o_proj = nn.Linear(A * K, E, bias=False)
        self.head_width = K
        if config.qk_norm:
            self.q_norm = RMSNorm(K, config.rms_norm_eps)
            self.k_norm = RMSNorm(K, config.rms_norm_eps)

    def forward(
        self, index: int, hidden_states: torch.Tensor, rotary: Rotary, attend: Attend
    ) -> torch.Tensor:
        query, key, value = (
            proj(hidden_states).unflatten(-1, (-1, self.head_width))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attend(index, query, key, value, rotary, self._norms())
        output: torch.Tensor = self.o_proj(mixed.flatten(1))
        return output

    def _norms(self) -> Norms | None:
        if not hasattr(self, "q_norm"):
            return None
        return self.q_norm.weight, self.k_norm.weight, self.q_norm.eps


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    def __init__(self, E: int, intermediate_size: int, out_features: int | None = None) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(E, intermediate_size, bias=False)
        self.up_proj = nn.Linear(E, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, out_features or E, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(
            F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        )
        return output


def _adapt(decoder: nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """Puts fresh low-rank adapters in, B = 0."""
    try:
        import peft
    except ImportError:
        raise ImportError("lora: peft is not installed; pip install mmkernels[train]") from None
    layers = {name.rpartition(".")[2] for name, _ in decoder.named_modules()}
    missing = sorted(set(targets) - layers)
    if missing:
        raise ValueError(f"lora: the decoder has no layers named {missing}")
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)), decoder
    )
