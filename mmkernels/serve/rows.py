# SPDX-License-Identifier: Apache-2.0
"""Rows of a request: of its prompt, encoded or after a kept prefix, and of its last token."""

import torch

from mmkernels.models import MMLLM
from mmkernels.models.features import Features, join
from mmkernels.ops import pack_embeddings
from mmkernels.serve.prefixes import Kept
from mmkernels.serve.request import Request, RequestError, text_behind


def rows_of(request: Request) -> int:
    """Of its prompt, without those of a kept prefix."""
    assert request.embeds is not None
    return len(request.embeds)


def encode(model: MMLLM, request: Request) -> None:
    """Rows and positions of all its prompt.

    Raises:
        ValueError: The model has no such modality, or a medium does not fit its encoder.
    """
    features: dict[str, list[Features]] = {}
    for modality, medium in request.media:
        if modality not in model.config.projectors:
            raise RequestError(f"media: the model has no {modality}")
        seen = model.encode(modality, [medium])
        features.setdefault(modality, []).append(model.project(modality, seen))
    joined = {m: join(parts) for m, parts in features.items()}
    plan = model.plan([request.input_ids], joined)
    weight = model.language_model.model.embed_tokens.weight
    embeds = pack_embeddings(plan, weight, [f.tokens for f in joined.values()])
    request.position_ids = model.positions(plan, joined)
    request.embeds, request.prefix_rows = embeds, 0


def go_on_from(model: MMLLM, request: Request, kept: Kept) -> None:
    """Rows and positions of what follows a kept prefix: text."""
    text = text_behind(request)
    at = kept.next_position + torch.arange(len(text))
    axes = (3,) if model.config.decoder.mrope_section else ()
    request.embeds = model.language_model.model.embed_tokens.weight[text]
    request.position_ids = at.expand(*axes, -1)
    request.prefix_rows = kept.rows


def next_rows(
    model: MMLLM, request: Request, count: int, next_position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and positions of its next rows: of the prompt, then of the last token."""
    assert request.embeds is not None and request.position_ids is not None
    if request.done < len(request.embeds):
        at = slice(request.done, request.done + count)
        return request.embeds[at], request.position_ids[..., at]
    weight = model.language_model.model.embed_tokens.weight
    return weight[request.tokens[-1:]], next_position.expand(*request.position_ids.shape[:-1], 1)
