# SPDX-License-Identifier: Apache-2.0
"""One instruction: what is shown and asked, and what is to be said."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mmkernels.models import MMLLM, Features
from mmkernels.train.drawing import image_loss
from mmkernels.train.stages import answer_total, row_of


@dataclass(frozen=True)
class Sample:
    """``prompt`` holds a placeholder for each medium, in order: image uint8 ``[3, H, W]``, video uint8
    ``[T, 3, H, W]``, audio float ``[n]`` in -1…1. ``draw``: the digit to be drawn, if the answer is a picture."""

    kind: str
    prompt: str
    answer: str
    media: tuple[tuple[str, torch.Tensor], ...] = ()
    draw: int | None = None


def features_of(model: MMLLM, samples: Sequence[Sample]) -> dict[str, Features]:
    """Projected features of every modality the model has, also of those nobody brought: under FSDP every rank takes
    part in every layer."""
    found = {}
    for modality in model.projectors:
        items = [tensor for s in samples for m, tensor in s.media if m == modality]
        learns = any(p.requires_grad for p in model.encoder(modality).parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            seen = model.encode(modality, items)
        found[modality] = model.project(modality, seen)
    return found


class AnswerLoss(nn.Module):
    """Everything from samples to the loss in one forward, as FSDP wants it."""

    def __init__(self, model: MMLLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, int]:
        """Cross-entropy of the answers' tokens, summed, and their number; samples packed, each token alike. Every
        signal token adds the error of its drawing's condition."""
        rows = [row_of(self.model, s.prompt, s.answer, s.draw is not None) for s in samples]
        total, count, plan, states = answer_total(
            self.model, rows, features_of(self.model, samples)
        )
        subjects = torch.tensor([s.draw for s in samples if s.draw is not None])
        if not len(subjects):
            return total, count
        read, generator = self.model.output_projector, self.model.generator
        if read is None or generator is None:
            raise ValueError(
                "samples are to be drawn, the model has no output projector and generator"
            )
        signals = self.model.signal_states(plan, states)
        drawn = len(subjects) * signals.shape[1]
        return total + drawn * image_loss(read, generator, signals, subjects), count
