# SPDX-License-Identifier: Apache-2.0
"""The training loop of every stage: AdamW, warm-up and cosine, gradient clipping, progress with loss."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from tqdm import tqdm


def fit(
    name: str,
    loss_at: Callable[[int], torch.Tensor],
    modules: Iterable[nn.Module],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.02,
    clip: float = 1.0,
) -> list[float]:
    """Minimises ``loss_at(step)`` over the parameters of ``modules`` only; returns every step's loss.

    Matrix maths runs under bf16 autocast where the CPU multiplies bf16 natively; weights stay fp32.
    """
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps))
    losses: list[float] = []
    with tqdm(range(steps), desc=f"{name:>8}", mininterval=0.5) as progress:
        for step in progress:
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
                loss = loss_at(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively (avx512_bf16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _cosine(step: int, steps: int) -> float:
    """Share of the peak learning rate: a twentieth of the steps up, then down to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
