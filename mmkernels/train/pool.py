# SPDX-License-Identifier: Apache-2.0
"""Learning to answer together: frozen encoders see a pool of media once, questions about them are asked anew at every
step."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from mmkernels.models import MMLLM
from mmkernels.train import mixture, stages
from mmkernels.train.mixture import Mixture
from mmkernels.train.sample import AnswerLoss, Sample, encoded
from mmkernels.train.trainer import Mean, Schedule, Trainer, fast_bf16


class Pool:
    """Batches of questions about media that are there already; tasks by their shares. What has no media is made for
    the step."""

    def __init__(self, seen: Sequence[Sample], tasks: dict[str, float], batch: int, seed: int):
        self.tasks, self.batch, self.seed, self.at = tasks, batch, seed, 0
        self.about = {t: [s for s in seen if t in s.again] for t in tasks}
        self.source = mixture.source("train")

    def __next__(self) -> list[Sample]:
        self.at += 1
        rng = random.Random(f"{self.seed} {self.at}")
        chosen = rng.choices(list(self.tasks), list(self.tasks.values()), k=self.batch)
        return [self._asked(task, rng) for task in chosen]

    def _asked(self, task: str, rng: random.Random) -> Sample:
        if not self.about[task]:
            return mixture.sample(self.source, self.seed, rng.getrandbits(30), task)
        about = rng.choice(self.about[task])
        kind, prompt, answer = about.again[task](rng)
        return replace(about, kind=kind, prompt=prompt, answer=answer)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.at = state["seed"], state["at"]


def seen_once(model: MMLLM, tasks: dict[str, float], size: int, seed: int = 1) -> list[Sample]:
    """Training samples with what the frozen encoders make of their media."""
    stream = Mixture(min(64, size), tasks, seed)
    made: list[Sample] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        for _ in tqdm(range(-(-size // stream.batch)), desc="   media", mininterval=0.5):
            made += encoded(model, next(stream))
    return made


def train_together(
    name: str, model: MMLLM, pool: Pool, parts: Sequence[str], steps: int, lr: float
) -> list[float]:
    """The parts named learn to answer."""
    stages.learn_only(model, *(model.get_submodule(p) for p in parts))
    step = AnswerLoss(model)
    return Trainer(step, pool, lambda drawn: Mean(*step(drawn)), Schedule(steps, lr)).run(name)
