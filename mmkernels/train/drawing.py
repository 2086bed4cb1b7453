# SPDX-License-Identifier: Apache-2.0
"""Learning to draw: first the generator, from real scans; then the output projector, against the frozen generator.

Dimensions: n drawings, r signal tokens, E backbone width, H pixels a side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmkernels.models.diffusers_adapter import DiffusersGenerator
from mmkernels.models.generator import ImageGenerator
from mmkernels.models.output_projector import OutputProjector
from mmkernels.train.digits import Scans
from mmkernels.train.trainer import fit

STEPS = 1600
MARGIN = 1.2  # of a picture's side to the scan's


def render(scans: Scans, side: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """The scans as grey pictures ``[n, 1, H, H]`` uint8, ink bright; with a generator turned, sheared, scaled and
    moved a little, as writing varies.
    """
    n = len(scans.labels)
    turn, shear, wide, high, x, y = (
        torch.zeros(6, n) if generator is None else 2 * torch.rand(6, n, generator=generator) - 1
    )
    turn, shear, wide, high = 0.12 * turn, 0.12 * shear, 1 + 0.08 * wide, 1 + 0.08 * high
    rows = (
        turn.cos() * wide,
        shear - turn.sin(),
        0.06 * x,
        turn.sin(),
        turn.cos() * high,
        0.06 * y,
    )
    theta = torch.stack(rows, -1).view(n, 2, 3) * MARGIN
    grid = F.affine_grid(theta, [n, 1, side, side], align_corners=False)
    ink = F.grid_sample(scans.images[:, None], grid, mode="bicubic", align_corners=False)
    return (ink * 255).round().clamp(0, 255).to(torch.uint8)


def train_generator(
    model: ImageGenerator, scans: Scans, steps: int = STEPS, batch: int = 48
) -> list[float]:
    """Generator and condition table learn together from the scans given: those of the training split."""
    generator = torch.Generator().manual_seed(8)
    side = model.config.image_size

    def loss_at(step: int) -> torch.Tensor:
        chosen = torch.randint(len(scans.labels), (batch,), generator=generator)
        drawn = Scans(scans.images[chosen], scans.labels[chosen])
        condition = model.conditions(drawn.labels)
        return model.flow_loss(render(drawn, side, generator), condition, generator)

    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused backward takes longer at these lengths
        return fit("generator", loss_at, (model,), steps=steps, lr=3e-3)


def image_loss(
    output_projector: OutputProjector,
    generator: ImageGenerator | DiffusersGenerator,
    hidden_states: torch.Tensor,
    subjects: Any,
) -> torch.Tensor:
    """Mean squared error to the generator's own conditions, as GILL and NExT-GPT learn; the generator is constant.

    Args:
        hidden_states: ``[n, r, E]`` of the signal tokens.
        subjects: What to draw, as ``generator.conditions`` takes it: digits int64 ``[n]``, or n prompts of a pipeline.
    Returns:
        A scalar, with gradients for the output projector and ``hidden_states``.
    """
    with torch.no_grad():
        target = generator.conditions(subjects)
    return F.mse_loss(output_projector(hidden_states).float(), target.float())
