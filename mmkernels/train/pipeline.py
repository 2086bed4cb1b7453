# SPDX-License-Identifier: Apache-2.0
"""Runs the stages in order and keeps a checkpoint after each."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmkernels.models import MMLLM, MMConfig
from mmkernels.train import checkpoint, digits, stages

POOL_SIZE = 6000
COMPONENTS = ("vision", "language")


@dataclass
class Run:
    """A model in training: the stages it has had and the loss of each step."""

    model: MMLLM
    stages: tuple[str, ...] = ()
    losses: dict[str, list[float]] = field(default_factory=dict)


def start(config: MMConfig | None = None) -> Run:
    """A new model; the same weights every time."""
    torch.manual_seed(0)
    return Run(MMLLM(config))


def resume(directory: Path, stage: str) -> Run:
    """The model in ``directory``, which must be ready for ``stage``."""
    loaded = checkpoint.load(directory)
    if stage == "it" and "pt" not in loaded.stages:
        raise checkpoint.CheckpointError(
            f"{directory}: stage it needs a checkpoint with stage pt, this one has {list(loaded.stages)}"
        )
    return Run(loaded.model, loaded.stages)


def train(run: Run, names: tuple[str, ...], directory: Path, scale: float = 1.0) -> None:
    """Trains the named stages, each for its steps times ``scale``; saves after each."""
    scans = digits.load_scans("train")
    pool: stages.Pool | None = None
    for name in names:
        steps = max(1, round(stages.STEPS[name] * scale))
        torch.manual_seed(0)
        if name == "vision":
            losses = stages.train_vision(run.model, scans, steps)
        elif name == "language":
            losses = stages.train_language(run.model, steps)
        else:
            pool = pool or stages.encode_pool(
                run.model, scans, max(64, round(POOL_SIZE * min(1.0, scale)))
            )
            train_stage = stages.train_pt if name == "pt" else stages.train_it
            losses = train_stage(run.model, pool, steps)
        run.losses[name] = losses
        run.stages = (*run.stages, name)
        run.model.requires_grad_(True)
        checkpoint.save(directory, run.model, run.stages)
