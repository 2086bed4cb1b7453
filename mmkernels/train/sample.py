# SPDX-License-Identifier: Apache-2.0
"""One instruction: what is shown and asked, and what is to be said."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from mmkernels.models import MMLLM, Features
from mmkernels.models.features import join, select, take_part
from mmkernels.train.drawing import image_loss
from mmkernels.train.stages import answer_total, row_of

Asked = tuple[str, str, str]  # kind, prompt, answer
Ask = Callable[[random.Random], Asked]


@dataclass(frozen=True)
class Sample:
    """``prompt`` holds a placeholder for each medium, in order: image uint8 ``[3, H, W]``, video uint8
    ``[T, 3, H, W]``, audio float ``[n]`` in -1…1, or what the encoder has made of it. ``draw``: the digit to be drawn,
    if the answer is a picture. ``again``: by task, another question about the same media."""

    kind: str
    prompt: str
    answer: str
    media: tuple[tuple[str, torch.Tensor | Features], ...] = ()
    draw: int | None = None
    again: Mapping[str, Ask] = field(default_factory=dict, compare=False, repr=False)


def features_of(model: MMLLM, samples: Sequence[Sample]) -> dict[str, Features]:
    """Projected features of every modality the model has, also of those nobody brought: under FSDP every rank takes
    part in every layer."""
    found = {}
    for modality in model.config.projectors:
        items = [medium for s in samples for m, medium in s.media if m == modality]
        found[modality] = model.project(modality, _seen(model, modality, items))
    return found


def _seen(model: MMLLM, modality: str, items: Sequence[torch.Tensor | Features]) -> Features:
    """Of media as they are, and of what an encoder has seen of others, in their order."""
    parts = [x for x in items if isinstance(x, Features)]
    new = [x for x in items if isinstance(x, torch.Tensor)]
    if new or not parts:
        learns = any(p.requires_grad for p in model.encoder(modality).parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            fresh = model.encode(modality, new)
        if not parts:
            return fresh
        rows = iter(range(len(new)))
        parts = [x if isinstance(x, Features) else select(fresh, [next(rows)]) for x in items]
    seen = join(parts)
    return seen._replace(tokens=seen.tokens.to(model.language_model.lm_head.weight.dtype))


@torch.no_grad()
def encoded(model: MMLLM, samples: Sequence[Sample]) -> list[Sample]:
    """The same with what the encoders make of their media, in bf16: a frozen encoder need not see them twice."""
    made: dict[str, Iterator[Features]] = {}
    for modality in model.config.projectors:
        items = [
            t for s in samples for m, t in s.media if m == modality and isinstance(t, torch.Tensor)
        ]
        seen = model.encode(modality, items)
        seen = seen._replace(tokens=seen.tokens.bfloat16())
        made[modality] = iter([select(seen, [i]) for i in range(len(items))])
    return [replace(s, media=tuple((m, next(made[m])) for m, _ in s.media)) for s in samples]


class AnswerLoss(nn.Module):
    """Everything from samples to the loss in one forward, as FSDP wants it."""

    def __init__(self, model: MMLLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, int]:
        """Cross-entropy of the answers' tokens, summed, and their number; samples packed, each token alike. Every
        signal token adds the error of its drawing's condition. Every part that may learn from such samples has a
        gradient afterwards, of zeros where they have no media or drawings."""
        rows = [row_of(self.model, s.prompt, s.answer, s.draw is not None) for s in samples]
        total, count, plan, states = answer_total(
            self.model, rows, features_of(self.model, samples)
        )
        subjects = torch.tensor([s.draw for s in samples if s.draw is not None])
        read, generator = self.model.output_projector, self.model.generator
        if not len(subjects):
            return take_part(total, *(read.parameters() if read is not None else ())), count
        if read is None or generator is None:
            raise ValueError(
                "samples are to be drawn, the model has no output projector and generator"
            )
        signals = self.model.signal_states(plan, states)
        drawn = len(subjects) * signals.shape[1]
        return total + drawn * image_loss(read, generator, signals, subjects), count
