# SPDX-License-Identifier: Apache-2.0
"""The training stages: each part learns its own small task, then the parts learn to work together.

``vision``   encoder: which digit covers each patch.            Then frozen.
``language`` decoder: captions, questions and answers about sketches made of characters.
``pt``       projector only: captions of pictures.              Encoder and decoder frozen.
``it``       projector and decoder: questions about pictures.   Encoder frozen.

Dimensions: N pictures, S digit slots, n patches, L tokens.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models import MMLLM
from mmkernels.models.tokenizer import BOS, EOS, encode, encode_prompt, pad
from mmkernels.train import digits, questions
from mmkernels.train.trainer import fast_bf16, fit

STEPS = {"vision": 1300, "language": 350, "pt": 350, "it": 550}
IGNORE = -100
Row = tuple[list[int], list[int]]  # tokens given, tokens to be said


@dataclass(frozen=True)
class Pool:
    """Pictures as the frozen encoder sees them, computed once, with what they show."""

    image_embeds: torch.Tensor
    scenes: list[questions.Scene]


def learn_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freezes all of ``model`` but ``parts``."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def train_vision(model: MMLLM, scans: digits.Scans, steps: int, batch: int = 32) -> list[float]:
    """Patches learn which digit covers them, for most of the time on crowded pictures."""
    learn_only(model, model.vision)
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(model.config.vision.hidden_size, digits.BACKGROUND + 1)

    def loss_at(step: int) -> torch.Tensor:
        draw = digits.draw_crowded if step < 0.75 * steps else digits.draw
        pictures = draw(scans, batch, generator)
        logits = head(model.encode(pictures.pixel_values)[:, 1:])
        labels = digits.patch_labels(pictures, model.config.vision.patch_size)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return fit("vision", loss_at, (model.vision, head), steps=steps, lr=1.5e-3)


def train_language(model: MMLLM, steps: int, batch: int = 32) -> list[float]:
    """The decoder reads a sketch in eight characters and a question, and answers: no picture anywhere."""
    learn_only(model, model.language_model)
    rng = random.Random(2)

    def loss_at(step: int) -> torch.Tensor:
        rows = [_text_sample(rng) for _ in range(batch)]
        return answer_loss(model, rows, None)

    return fit("language", loss_at, (model.language_model,), steps=steps, lr=2e-3)


def encode_pool(model: MMLLM, scans: digits.Scans, size: int, seed: int = 3) -> Pool:
    """Draws ``size`` pictures and runs the encoder over them once."""
    generator = torch.Generator().manual_seed(seed)
    embeds: list[torch.Tensor] = []
    scenes: list[questions.Scene] = []
    for start in range(0, size, 64):
        pictures = digits.draw(scans, min(64, size - start), generator)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            embeds.append(model.encode(pictures.pixel_values).bfloat16())
        scenes += questions.scenes(pictures)
    return Pool(torch.cat(embeds), scenes)


def train_pt(model: MMLLM, pool: Pool, steps: int, batch: int = 48) -> list[float]:
    """The projector learns to make the frozen decoder say the caption."""
    learn_only(model, model.projector)
    rng = random.Random(4)
    loss_at = picture_loss(model, pool, rng, batch, _caption_sample)
    return fit("pt", loss_at, (model.projector,), steps=steps, lr=2e-3)


def train_it(model: MMLLM, pool: Pool, steps: int, batch: int = 48) -> list[float]:
    """Projector and decoder learn to answer questions about pictures."""
    learn_only(model, model.projector, model.language_model)
    rng = random.Random(5)
    loss_at = picture_loss(model, pool, rng, batch, _question_sample)
    return fit("it", loss_at, (model.projector, model.language_model), steps=steps, lr=1e-3)


def picture_loss(
    model: MMLLM,
    pool: Pool,
    rng: random.Random,
    batch: int,
    sample: Callable[[questions.Scene, random.Random], tuple[str, str]],
) -> Callable[[int], torch.Tensor]:
    """The loss of random pictures of the pool, with the prompt and answer ``sample`` gives for each."""

    def loss_at(step: int) -> torch.Tensor:
        chosen = [rng.randrange(len(pool.scenes)) for _ in range(batch)]
        image_features = model.project(pool.image_embeds[chosen].float())
        rows: list[Row] = []
        for i in chosen:
            prompt, answer = sample(pool.scenes[i], rng)
            given = encode_prompt(prompt, image_features.shape[1])
            rows.append((given, [*encode(answer), EOS]))
        return answer_loss(model, rows, image_features)

    return loss_at


def _text_sample(rng: random.Random) -> Row:
    scene = questions.random_scene(rng)
    sample = _question_sample if rng.random() < 0.75 else _caption_sample
    prompt, answer = sample(scene, rng)
    given = f"{questions.sketch(scene)}{prompt}\n"
    return [BOS, *encode(given)], [*encode(answer), EOS]


def _caption_sample(scene: questions.Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(questions.CAPTION_PROMPTS), questions.caption(scene)


def _question_sample(scene: questions.Scene, rng: random.Random) -> tuple[str, str]:
    question = questions.ask(scene, rng)
    return question.text, question.answer


def answer_loss(
    model: MMLLM, rows: Sequence[Row], image_features: torch.Tensor | None
) -> torch.Tensor:
    """Cross-entropy of the tokens to be said, given all before them."""
    input_ids = pad([given + said for given, said in rows])
    labels = pad([[IGNORE] * len(given) + said for given, said in rows], IGNORE)
    logits = model(input_ids, image_features)[:, :-1]
    said = labels[:, 1:] != IGNORE
    return F.cross_entropy(logits[said].float(), labels[:, 1:][said])
