# SPDX-License-Identifier: Apache-2.0
"""Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, KV cache, greedy generation.

Parameters are named as in transformers' ``LlamaForCausalLM``, so its state_dict loads.

Dimensions: B sequences, L tokens now, T cache slots, E width, A heads, G key-value heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models.config import DecoderConfig

Rotary = tuple[torch.Tensor, torch.Tensor]


class LayerCache:
    """Keys and values of one layer, ``[B, G, T, K]``; a token's slot is its position."""

    def __init__(self, B: int, G: int, T: int, K: int, dtype: torch.dtype) -> None:
        self.keys = torch.zeros(B, G, T, K, dtype=dtype)
        self.values = torch.zeros(B, G, T, K, dtype=dtype)

    def write(
        self, key: torch.Tensor, value: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts ``[B, G, L, K]`` at ``position_ids`` ``[B, L]``; returns all slots."""
        slots = position_ids[:, None, :, None].expand_as(key)
        self.keys.scatter_(2, slots, key)
        self.values.scatter_(2, slots, value)
        return self.keys, self.values


class Decoder(nn.Module):
    """Token logits from input embeddings; the output weight is its own.

    Source: LLaMA (Touvron et al. 2023); GQA (Ainslie et al. 2023).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cache: list[LayerCache] | None = None,
    ) -> torch.Tensor:
        """``[B, L, E]`` → logits ``[B, L, V]``; positions are ``0…L-1`` unless given as ``[B, L]``.

        Without a cache a row may hold several samples behind one another: each starts where positions start again.
        """
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1])[None]
        logits: torch.Tensor = self.lm_head(self.model(inputs_embeds, position_ids, cache))
        return logits

    @torch.no_grad()
    def generate(
        self, inputs_embeds: torch.Tensor, lengths: torch.Tensor, max_new_tokens: int, eos: int
    ) -> torch.Tensor:
        """Greedy continuation ``[B, ≤ max_new_tokens]`` of right-padded prompts; ``eos`` repeats after the end.

        Prompt b's next token takes position ``lengths[b]``: it overwrites padding in the cache.
        """
        B, L, _ = inputs_embeds.shape
        cache = self._new_cache(B, L + max_new_tokens, inputs_embeds.dtype)
        logits = self(inputs_embeds, torch.arange(L).expand(B, L), cache)
        token = logits[torch.arange(B), lengths - 1].argmax(-1)
        new_ids = [token]
        for position in range(max_new_tokens - 1):
            if (token == eos).all():
                break
            embeds = self.model.embed_tokens(token)[:, None]
            logits = self(embeds, (lengths + position)[:, None], cache)
            token = logits[:, 0].argmax(-1).masked_fill(token == eos, eos)
            new_ids.append(token)
        return torch.stack(new_ids, 1)

    def _new_cache(self, B: int, T: int, dtype: torch.dtype) -> list[LayerCache]:
        c = self.config
        if T > c.max_position_embeddings:
            raise ValueError(
                f"decoder: prompt and answer need {T} positions, the model has {c.max_position_embeddings}"
            )
        K = c.hidden_size // c.num_attention_heads
        return [
            LayerCache(B, c.num_key_value_heads, T, K, dtype) for _ in range(c.num_hidden_layers)
        ]


class DecoderModel(nn.Module):
    """Embedding table, layers and final norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        K = config.hidden_size // config.num_attention_heads
        self.inv_freq: torch.Tensor
        inv_freq = config.rope_theta ** -(torch.arange(0, K, 2) / K)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        cache: list[LayerCache] | None,
    ) -> torch.Tensor:
        rotary = self._rotary(position_ids, hidden_states.dtype)
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache[i]
            hidden_states = layer(hidden_states, rotary, position_ids, layer_cache)
        output: torch.Tensor = self.norm(hidden_states)
        return output

    def _rotary(self, position_ids: torch.Tensor, dtype: torch.dtype) -> Rotary:
        """Cosines and sines ``[B or 1, 1, L, K]``; channel k turns with k + K/2."""
        angle = position_ids[:, None, :, None] * self.inv_freq
        angle = torch.cat((angle, angle), -1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


class DecoderLayer(nn.Module):
    """Attention and SwiGLU, each on an RMS-normalised copy of the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        position_ids: torch.Tensor,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, rotary, position_ids, cache)
        output: torch.Tensor = hidden_states + self.mlp(
            self.post_attention_layernorm(hidden_states)
        )
        return output


class RMSNorm(nn.Module):
    """``x / rms(x) · weight`` in x's dtype, also under autocast, where torch's own leaves its fused path."""

    def __init__(self, E: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(hidden_states.dtype)
        return F.rms_norm(hidden_states, weight.shape, weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention: a token attends to its sample's slots up to its own position."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        E, self.A, self.G = (
            config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
        )  # fmt: skip
        K = E // self.A
        self.q_proj = nn.Linear(E, self.A * K, bias=False)
        self.k_proj = nn.Linear(E, self.G * K, bias=False)
        self.v_proj = nn.Linear(E, self.G * K, bias=False)
        self.o_proj = nn.Linear(self.A * K, E, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary: Rotary,
        position_ids: torch.Tensor,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        query = _rotate(_heads(self.q_proj(hidden_states), self.A), rotary)
        key = _rotate(_heads(self.k_proj(hidden_states), self.G), rotary)
        value = _heads(self.v_proj(hidden_states), self.G)
        if cache is not None:
            key, value = cache.write(key, value, position_ids)
        key, value = (x.repeat_interleave(self.A // self.G, 1) for x in (key, value))
        # Written out: SDPA's CPU backward takes longer than the GEMMs at these lengths.
        hidden = _hidden(position_ids, key.shape[2], packed=cache is None)[:, None]
        scores = query * query.shape[-1] ** -0.5 @ key.mT
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        output: torch.Tensor = self.o_proj((weights @ value).transpose(1, 2).flatten(2))
        return output


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    def __init__(self, E: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(E, intermediate_size, bias=False)
        self.up_proj = nn.Linear(E, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, E, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(
            F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        )
        return output


def _hidden(position_ids: torch.Tensor, slots: int, packed: bool) -> torch.Tensor:
    """``[B, L, slots]``: what no token may see. In a cache a token's slot is its position, else its place in the row,
    whose sample began as many places before."""
    slot = torch.arange(slots)
    if not packed:
        return slot > position_ids[..., None]
    place = torch.arange(position_ids.shape[1])
    return (slot > place[:, None]) | (slot < (place - position_ids)[..., None])


def _heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, L, A·K]`` → ``[B, A, L, K]``."""
    B, L, _ = states.shape
    return states.view(B, L, heads, -1).transpose(1, 2)


def _rotate(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    cos, sin = rotary
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin
