# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe in order, with a checkpoint after each.

``vision`` encoder of pictures and frames: which digit covers each patch.     Then frozen.
``hearing`` encoder of speech: the digits said.                               Then frozen.
``language`` decoder: questions about sketches and sequences made of characters, sums, when to draw.
``drawing`` generator: to draw a digit from its condition.                     Then frozen.
``pt``      the projectors: what frozen encoders see, so that the frozen decoder answers.
``it``      projectors, output projector and decoder: every task.
``signals`` the output projector: what the decoder's signal tokens say, so that the frozen generator draws it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmkernels.models import MMLLM
from mmkernels.train import checkpoint, digits, mixture, speech, stages
from mmkernels.train.drawing import train_generator
from mmkernels.train.evaluate import EXAM, exact_match
from mmkernels.train.pool import Pool, seen_once, train_together
from mmkernels.train.recipes import IMAGE, Recipe
from mmkernels.train.sample import Sample


@dataclass
class Run:
    """A model in training: the stages it has had, the loss of each step, and exact match on questions without media
    before stage ``it``, if the recipe has any."""

    model: MMLLM
    recipe: Recipe = IMAGE
    stages: tuple[str, ...] = ()
    losses: dict[str, list[float]] = field(default_factory=dict)
    text_before: float | None = None


def start(recipe: Recipe = IMAGE) -> Run:
    """A new model; the same weights every time."""
    torch.manual_seed(0)
    return Run(MMLLM(recipe.config), recipe)


def resume(directory: Path, stage: str) -> Run:
    """The model in ``directory``, which must be ready for ``stage``."""
    loaded = checkpoint.load(directory)
    if stage == "it" and "pt" not in loaded.stages:
        raise checkpoint.CheckpointError(
            f"{directory}: stage it needs a checkpoint with stage pt, this one has {list(loaded.stages)}"
        )
    return Run(loaded.model, stages=loaded.stages)


def train(run: Run, names: Sequence[str], directory: Path, scale: float = 1.0) -> None:
    """Trains the named stages, each for its steps times ``scale``; saves after each."""
    run_stage = _stages(run, scale)
    for name in names:
        if name == "it" and "text" in run.recipe.together[name].tasks:
            run.text_before = exact_match(run.model, mixture.exam(["text"], EXAM))
        torch.manual_seed(0)
        run.losses[name] = run_stage[name](max(1, round(run.recipe.steps[name] * scale)))
        run.stages = (*run.stages, name)
        run.model.requires_grad_(True)
        checkpoint.save(directory, run.model, run.stages)


def _stages(run: Run, scale: float) -> dict[str, Callable[[int], list[float]]]:
    """By name what trains a stage for so many steps; those that learn together share a pool."""
    model, recipe, scans = run.model, run.recipe, digits.load_scans("train")
    seen: list[Sample] = []

    def drawing(steps: int) -> list[float]:
        assert model.generator is not None
        return train_generator(model.generator, scans, steps)

    def together(name: str) -> Callable[[int], list[float]]:
        def train_stage(steps: int) -> list[float]:
            size = max(64, round(recipe.pool * min(1.0, scale)))
            seen.extend([] if seen else seen_once(model, recipe.media, size))
            tasks, parts, lr = recipe.together[name]
            return train_together(name, model, Pool(seen, tasks, 48, 13), parts, steps, lr)

        return train_stage

    return {
        "vision": lambda n: stages.train_vision(model, scans, n),
        "hearing": lambda n: stages.train_hearing(model, speech.load_spoken("train"), n),
        "language": lambda n: stages.train_language(model, recipe.row, n),
        "drawing": drawing,
        **{name: together(name) for name in recipe.together},
    }
