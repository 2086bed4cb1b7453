# SPDX-License-Identifier: Apache-2.0
"""The training loop of every stage: AdamW, warm-up and cosine, clipping, accumulation; stops and goes on to the bit."""

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import nn
from tqdm import tqdm

Batch = TypeVar("Batch", covariant=True)


class Stream(Protocol[Batch]):
    """Batches without end; where it is, as numbers and strings."""

    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Mean(NamedTuple):
    """``total / tokens``: a loss summed over tokens, and how many they are. Of no tokens it is the total, 0."""

    total: torch.Tensor
    tokens: int


@dataclass(frozen=True)
class Schedule:
    """``steps`` updates of ``accumulate`` batches each; ``lr`` at its peak; gradients clipped to norm ``clip``."""

    steps: int
    lr: float
    accumulate: int = 1
    weight_decay: float = 0.02
    clip: float = 1.0


@dataclass(frozen=True)
class Training:
    """Everything a stopped training needs beside the model: tensors by name, and what JSON can hold."""

    tensors: dict[str, torch.Tensor]
    state: dict[str, Any] = field(default_factory=dict)


class Trainer(Generic[Batch]):
    """Minimises ``loss_of(batch)`` over the parameters of ``module`` that ask for a gradient.

    Of several batches a step the loss is one mean over all their tokens, where ``loss_of`` gives a ``Mean``. Losses
    that are tensors count alike.

    Matrix maths runs under bf16 autocast where the CPU multiplies bf16 natively; weights stay fp32. A step whose
    gradient is not finite changes nothing and is counted in ``skipped``.
    """

    def __init__(
        self,
        module: nn.Module,
        stream: Stream[Batch],
        loss_of: Callable[[Batch], torch.Tensor | Mean],
        schedule: Schedule,
    ) -> None:
        self.stream, self.loss_of, self.schedule = stream, loss_of, schedule
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        decayed = [p for p in self.parameters.values() if p.dim() > 1]
        others = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [
            {"params": decayed, "weight_decay": schedule.weight_decay}, {"params": others, "weight_decay": 0.0},
        ]  # fmt: skip
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=schedule.lr, betas=(0.9, 0.98), fused=True
        )
        self.losses: list[float] = []
        self.skipped = 0

    def step(self) -> float:
        """One update; returns the loss of its batches."""
        self.optimizer.zero_grad()
        mean, tokens = 0.0, 0
        for _ in range(self.schedule.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
                loss = self.loss_of(next(self.stream))
                total, count = loss if isinstance(loss, Mean) else Mean(loss, 1)
                share = total / max(1, tokens + count)
            if tokens and count:  # what is there already was a mean over fewer
                kept = tokens / (tokens + count)
                mean *= kept
                torch._foreach_mul_(
                    [p.grad for p in self.parameters.values() if p.grad is not None], kept
                )
            share.backward()
            mean, tokens = mean + share.item(), tokens + count
        norm: Any = nn.utils.clip_grad_norm_(self.parameters.values(), self.schedule.clip)
        norm = (
            norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        )  # of shards: all of them
        if bool(norm.isfinite()):
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.lr * _cosine(len(self.losses), self.schedule.steps)
            self.optimizer.step()
        else:
            self.skipped += 1
        self.losses.append(mean)
        return mean

    def run(
        self, name: str, after: Callable[["Trainer[Batch]"], None] | None = None
    ) -> list[float]:
        """All steps that are left, with progress; ``after`` is called after each."""
        left = range(len(self.losses), self.schedule.steps)
        with tqdm(left, desc=f"{name:>8}", mininterval=0.5) as progress:
            for _ in progress:
                progress.set_postfix(loss=f"{self.step():.3f}", refresh=False)
                if after is not None:
                    after(self)
        return self.losses

    def save(self) -> Training:
        """Optimizer, data order, random numbers and losses, between two steps."""
        tensors = {"rng.torch": torch.get_rng_state()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer.{name}.{k}": v.detach().clone() for k, v in moments.items()}
        version, words, gauss = random.getstate()
        state = {
            "losses": list(self.losses), "skipped": self.skipped, "stream": self.stream.state_dict(),
            "rng.python": [version, list(words), gauss],
        }  # fmt: skip
        return Training(tensors, state)

    def load(self, training: Training) -> None:
        """Goes on where ``save`` was called.

        Raises:
            ValueError: Moments of other parameters than those that learn here.
        """
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in training.tensors.items():
            if name.startswith("optimizer."):
                parameter, _, kind = name.removeprefix("optimizer.").rpartition(".")
                moments.setdefault(parameter, {})[kind] = tensor.clone()
        wrong = sorted(set(moments) - set(self.parameters))
        if wrong:
            raise ValueError(f"training state of parameters that do not learn here: {wrong[:3]}")
        for parameter, kinds in moments.items():
            self.optimizer.state[self.parameters[parameter]] = dict(kinds)
        self.losses, self.skipped = list(training.state["losses"]), training.state["skipped"]
        self.stream.load_state_dict(training.state["stream"])
        torch.set_rng_state(training.tensors["rng.torch"])
        version, words, gauss = training.state["rng.python"]
        random.setstate((version, tuple(words), gauss))


class _Steps:
    """The numbers of the steps, for losses that draw their own batches."""

    def __init__(self) -> None:
        self.step = -1

    def __next__(self) -> int:
        self.step += 1
        return self.step

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def fit(
    name: str,
    loss_at: Callable[[int], torch.Tensor],
    modules: Iterable[nn.Module],
    *,
    steps: int,
    lr: float,
) -> list[float]:
    """Minimises ``loss_at(step)`` over the parameters of ``modules``; returns every step's loss."""
    return Trainer(nn.ModuleList(modules), _Steps(), loss_at, Schedule(steps, lr)).run(name)


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
