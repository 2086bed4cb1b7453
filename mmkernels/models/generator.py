# SPDX-License-Identifier: Apache-2.0
"""Modality generator: a small transformer that turns noise into a picture of what its condition says.

Trained by flow matching: on the straight way ``x_t = (1-t)·x_0 + t·x_1`` from noise to picture it learns the velocity
``v = x_1 - x_0``; drawing follows the velocity from t = 0 to 1.

Dimensions: n pictures, c channels, H pixels a side, N patches of P pixels, D width, m condition tokens, C their width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models.config import GeneratorConfig
from mmkernels.models.vision import sincos
from mmkernels.nn import CrossAttention, PatchEmbed
from mmkernels.nn.qformer import SelfAttention


class ImageGenerator(nn.Module):
    """Velocity of a noisy picture, given its time and its condition; ``generate`` draws.

    Source: flow matching (Lipman et al. 2023), rectified flow (Liu et al. 2022); DiT (Peebles and Xie 2023) with
        PixArt-α's cross-attention (Chen et al. 2023); classifier-free guidance (Ho and Salimans 2022).
    """

    def __init__(self, config: GeneratorConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or GeneratorConfig()
        side, D = c.image_size // c.patch_size, c.hidden_size
        if side * c.patch_size != c.image_size:
            raise ValueError(
                f"generator: image_size must be a multiple of patch_size, got {c.image_size}, {c.patch_size}"
            )
        self.conditions = ConditionTable(c)
        self.null_condition = nn.Parameter(torch.zeros(c.num_condition_tokens, c.condition_size))
        self.patch_embed = PatchEmbed(c.num_channels, D, c.patch_size)
        at = torch.arange(side)
        self.position_embed = nn.Parameter(sincos(at.repeat_interleave(side), at.repeat(side), D))
        self.time_embed = TimeEmbed(D)
        self.layers = nn.ModuleList(GeneratorBlock(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.modulation = _zero(nn.Linear(D, 2 * D))
        self.proj = _zero(nn.Linear(D, c.num_channels * c.patch_size**2))

    def forward(
        self, images: torch.Tensor, time: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """Noisy ``[n, c, H, H]``, ``[n]`` in 0…1, ``[n, m, C]`` → velocity ``[n, c, H, H]``."""
        time_embeds = self.time_embed(time)
        hidden_states = self.patch_embed(images, self.position_embed)
        for layer in self.layers:
            hidden_states = layer(hidden_states, time_embeds, condition)
        shift, scale = self.modulation(time_embeds)[:, None].chunk(2, -1)
        rows = self.proj(self.norm(hidden_states) * (1 + scale) + shift)
        c, H, P = self.config.num_channels, self.config.image_size, self.config.patch_size
        tiles = rows.view(-1, H // P, H // P, c, P, P).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(-1, c, H, H)

    def flow_loss(
        self,
        pixel_values: torch.Tensor,
        condition: torch.Tensor,
        generator: torch.Generator | None = None,
        condition_dropout: float = 0.1,
    ) -> torch.Tensor:
        """Mean squared error of the velocity at a random time; uint8 ``[n, c, H, H]``, ``[n, m, C]`` → scalar.

        A share ``condition_dropout`` of the pictures is learned without condition, which guidance needs.
        """
        x1 = pixel_values.float() / 127.5 - 1
        x0 = torch.randn(x1.shape, generator=generator).to(x1.device)
        time, lot = torch.rand(2, len(x1), generator=generator).to(x1.device)
        t = time[:, None, None, None]
        dropped = (lot < condition_dropout)[:, None, None]
        condition = torch.where(dropped, self.null_condition, condition)
        velocity = self((1 - t) * x0 + t * x1, time, condition)
        return F.mse_loss(velocity.float(), x1 - x0)

    @torch.no_grad()
    def generate(
        self,
        condition: torch.Tensor,
        *,
        num_inference_steps: int = 10,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """``[n, m, C]`` → pictures uint8 ``[n, c, H, H]``; the same generator state draws the same pictures.

        Args:
            condition: Of ``conditions`` or of an output projector.
            num_inference_steps: Each costs two velocities, four with guidance.
            guidance_scale: w of ``v_null + w·(v_condition - v_null)``; 1 is no guidance.
            generator: On the CPU, whatever the device.
        Raises:
            ValueError: Wrong shape of the condition, or no steps.
        """
        c = self.config
        _check_condition(condition, c)
        if num_inference_steps < 1:
            raise ValueError(
                f"generator: num_inference_steps must be at least 1, got {num_inference_steps}"
            )
        noise = torch.randn(
            len(condition), c.num_channels, c.image_size, c.image_size, generator=generator
        )
        images = integrate(
            lambda images, time: self._guided(images, time, condition, guidance_scale),
            noise.to(condition.device), num_inference_steps,
        )  # fmt: skip
        return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _guided(
        self, images: torch.Tensor, time: float, condition: torch.Tensor, guidance_scale: float
    ) -> torch.Tensor:
        n = len(images)
        times = images.new_full((n,), time)
        if guidance_scale == 1:
            return self(images, times, condition).float()
        both = torch.cat((self.null_condition.expand_as(condition), condition))
        null, told = self(images.repeat(2, 1, 1, 1), times.repeat(2), both).float().chunk(2)
        return null + guidance_scale * (told - null)


def integrate(
    velocity: Callable[[torch.Tensor, float], torch.Tensor], images: torch.Tensor, steps: int
) -> torch.Tensor:
    """``x_1`` of ``dx/dt = velocity(x, t)`` from ``x_0`` = ``images`` by Heun's method."""
    for i in range(steps):
        now = velocity(images, i / steps)
        then = velocity(images + now / steps, (i + 1) / steps)
        images = images + (now + then) / (2 * steps)
    return images


class ConditionTable(nn.Module):
    """What to draw as condition tokens, learned with the generator: the text encoder of a model of ten words."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        shape = config.num_subjects, config.num_condition_tokens, config.condition_size
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, subjects: torch.Tensor) -> torch.Tensor:
        """int64 ``[n]`` → ``[n, m, C]``. ValueError: there is no such subject."""
        known = len(self.weight)
        if ((subjects < 0) | (subjects >= known)).any():
            raise ValueError(
                f"generator: subjects must be 0 to {known - 1}, got {subjects.tolist()}"
            )
        return self.weight[subjects]


class TimeEmbed(nn.Module):
    """Sines and cosines of the time through an MLP, ``[n]`` → ``[n, D]``; SiLU at the end serves every modulation."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, D)
        self.fc2 = nn.Linear(D, D)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        D = self.fc1.in_features
        frequency = 1000 * 1e4 ** -(torch.arange(D // 2, device=time.device) / (D // 2))
        angle = time[:, None] * frequency
        waves = torch.cat((angle.sin(), angle.cos()), -1).to(self.fc1.weight.dtype)
        return F.silu(self.fc2(F.silu(self.fc1(waves))))


class GeneratorBlock(nn.Module):
    """Self-attention, cross-attention to the condition, MLP; time shifts, scales and gates the first and the last.

    Gates and the cross-attention's output start at zero: a new block passes its input on (adaLN-Zero).
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        D, A = config.hidden_size, config.num_heads
        self.modulation = _zero(nn.Linear(D, 6 * D))
        self.norm1 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(D, A)
        self.attention_proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.crossattention = CrossAttention(D, A, config.condition_size)
        self.crossattention_proj = _zero(nn.Linear(D, D))
        self.norm3 = nn.LayerNorm(D, eps=1e-6, elementwise_affine=False)
        self.fc1 = nn.Linear(D, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, D)

    def forward(
        self, hidden_states: torch.Tensor, time_embeds: torch.Tensor, condition: torch.Tensor
    ) -> torch.Tensor:
        """``[n, N, D]``, ``[n, D]``, ``[n, m, C]`` → ``[n, N, D]``."""
        shift1, scale1, gate1, shift3, scale3, gate3 = (
            self.modulation(time_embeds)[:, None].chunk(6, -1)
        )  # fmt: skip
        normed = self.norm1(hidden_states) * (1 + scale1) + shift1
        hidden_states = hidden_states + gate1 * self.attention_proj(self.attention(normed))
        read = self.crossattention(self.norm2(hidden_states), condition)
        hidden_states = hidden_states + self.crossattention_proj(read)
        normed = self.norm3(hidden_states) * (1 + scale3) + shift3
        return hidden_states + gate3 * self.fc2(F.gelu(self.fc1(normed), approximate="tanh"))


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def _check_condition(condition: torch.Tensor, config: GeneratorConfig) -> None:
    expected = [config.num_condition_tokens, config.condition_size]
    if condition.dim() != 3 or list(condition.shape[1:]) != expected:
        raise ValueError(
            f"generator: condition must be [n, {expected[0]}, {expected[1]}], got {list(condition.shape)}"
        )
