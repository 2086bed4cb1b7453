# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a batch over pages: every prompt in one step, then a token a step for those that go on."""

from collections.abc import Sequence

import torch

from mmkernels.cache import PagedKVCache, PagePool
from mmkernels.models.attention import Paged
from mmkernels.models.features import Features
from mmkernels.models.gated import Media
from mmkernels.models.mmllm import MMLLM

PAGE_SIZE = 16


def new_pool(model: MMLLM, num_pages: int, page_size: int = PAGE_SIZE) -> PagePool:
    """Pages for the model's decoder."""
    c, weight = model.config.decoder, model.language_model.lm_head.weight
    return PagePool(
        num_pages, page_size, c.num_hidden_layers, c.num_key_value_heads, c.head_width, weight.dtype, weight.device
    )  # fmt: skip


@torch.no_grad()
def generate(
    model: MMLLM,
    input_ids: Sequence[torch.Tensor],
    features: dict[str, Features],
    max_new_tokens: int = 48,
) -> list[list[int]]:
    """New tokens of each prompt, without the end token; placeholders and features as in ``MMLLM.plan``."""
    plan = model.plan(input_ids, features)
    lengths = plan.cu_seqlens.diff().tolist()
    _check_room(model, max(lengths, default=0) + max_new_tokens)
    pages = sum(-(-(n + max_new_tokens) // PAGE_SIZE) for n in lengths)
    cache = PagedKVCache(new_pool(model, max(1, pages)))
    sequences = [cache.add() for _ in lengths]
    hidden_states = model(plan, features, Paged(cache, sequences, lengths))
    _continue_at(cache, sequences, model.positions(plan, features), plan.cu_seqlens)
    last = plan.cu_seqlens[1:].long() - 1
    media = model.beside(plan, features)
    tokens = model.logits(hidden_states[last]).argmax(-1).tolist()
    answers: list[list[int]] = [[] for _ in lengths]
    alive = list(range(len(lengths)))
    for step in range(max_new_tokens):
        for i, token in zip(alive, tokens, strict=True):
            answers[i].append(token)
        alive = [i for i in alive if answers[i][-1] != model.tokenizer.eos]
        if not alive or step + 1 == max_new_tokens:
            break
        tokens = _step(
            model, cache, [sequences[i] for i in alive], [answers[i][-1] for i in alive],
            media and media._replace(visible=media.visible[last[alive]]),
        )  # fmt: skip
    return [model.tokenizer.until_end(a) for a in answers]


def _step(
    model: MMLLM,
    cache: PagedKVCache,
    sequences: list[int],
    tokens: list[int],
    media: Media | None,
) -> list[int]:
    """The next token of each sequence after one more, which sees the medium that the prompt's end saw."""
    attend = Paged(cache, sequences, [1] * len(sequences))
    weight = model.language_model.model.embed_tokens.weight
    embeds = weight[torch.tensor(tokens, device=weight.device)]
    hidden_states = model.language_model(embeds, attend.position_ids, attend, media)
    found: list[int] = model.logits(hidden_states).argmax(-1).tolist()
    return found


def _check_room(model: MMLLM, positions: int) -> None:
    most = model.config.decoder.max_position_embeddings
    if positions > most:
        raise ValueError(
            f"decoder: prompt and answer need {positions} positions, the model has {most}"
        )


def _continue_at(
    cache: PagedKVCache, sequences: list[int], position_ids: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    """M-RoPE: the next token comes after the largest position, whichever axis has it."""
    if position_ids.dim() == 2:
        parts = position_ids.amax(0).split(cu_seqlens.diff().tolist())
        for sequence, part in zip(sequences, parts, strict=True):
            cache.set_next_position(sequence, int(part.max()) + 1)


@torch.no_grad()
def draw(
    model: MMLLM,
    input_ids: Sequence[torch.Tensor],
    features: dict[str, Features],
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Pictures ``[n, c, H, H]`` uint8 of the signal tokens in ``input_ids``, prompts with their answers."""
    if model.output_projector is None or model.generator is None:
        raise ValueError("draw: the model has no output projector and generator")
    plan = model.plan(input_ids, features)
    states = model.signal_states(plan, model(plan, features))
    return model.generator.generate(model.output_projector(states), generator=generator)


def answer(
    model: MMLLM, prompts: Sequence[str], features: dict[str, Features], max_new_tokens: int = 48
) -> list[str]:
    """Greedy answers, one a prompt, generated as one batch."""
    ids = [model.tokenizer.encode_prompt(p) for p in prompts]
    found = generate(model, ids, features, max_new_tokens)
    return [model.tokenizer.decode(row) for row in found]
