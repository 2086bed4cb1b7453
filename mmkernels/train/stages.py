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

import mmkernels
from mmkernels.models import MMLLM, Features, VisionConfig
from mmkernels.models.features import join, select
from mmkernels.models.tokenizer import place
from mmkernels.train import digits, questions
from mmkernels.train.trainer import fast_bf16, fit

STEPS = {"vision": 1300, "language": 350, "pt": 350, "it": 550}
IGNORE = -100
Row = tuple[torch.Tensor, list[int]]  # tokens given, tokens to be said


@dataclass(frozen=True)
class Pool:
    """Pictures as the frozen encoder sees them, computed once, with what they show."""

    features: Features  # of pictures of one size
    scenes: list[questions.Scene]


def learn_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freezes all of ``model`` but ``parts``."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def train_vision(
    model: MMLLM,
    scans: digits.Scans,
    steps: int,
    batch: int = 32,
    crowded_sizes: digits.Bands = digits.CROWDED,
    sizes: digits.Bands = digits.SIZE_PX,
) -> list[float]:
    """Patches learn which digit covers them, for most of the time on crowded pictures."""
    encoder, config = model.encoder("image"), model.config.encoders["image"]
    assert isinstance(config, VisionConfig)
    learn_only(model, encoder)
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(config.hidden_size, digits.BACKGROUND + 1)

    def loss_at(step: int) -> torch.Tensor:
        if step < 0.75 * steps:
            pictures = digits.draw_crowded(scans, batch, generator, crowded_sizes)
        else:
            pictures = digits.draw(scans, batch, generator, sizes)
        tokens = model.encode("image", list(pictures.pixel_values)).tokens
        logits = head(tokens.view(batch, -1, config.hidden_size)[:, 1:])
        labels = digits.patch_labels(pictures, config.patch_size)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return fit("vision", loss_at, (encoder, head), steps=steps, lr=1.5e-3)


def train_language(model: MMLLM, steps: int, batch: int = 32) -> list[float]:
    """The decoder reads a sketch in eight characters and a question, and answers: no picture anywhere."""
    learn_only(model, model.language_model)
    rng = random.Random(2)

    def loss_at(step: int) -> torch.Tensor:
        rows = [text_sample(model, rng) for _ in range(batch)]
        return answer_loss(model, rows, {})

    return fit("language", loss_at, (model.language_model,), steps=steps, lr=2e-3)


def encode_pool(model: MMLLM, scans: digits.Scans, size: int, seed: int = 3) -> Pool:
    """Draws ``size`` pictures and runs the encoder over them once."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Features] = []
    scenes: list[questions.Scene] = []
    for start in range(0, size, 64):
        pictures = digits.draw(scans, min(64, size - start), generator)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
            seen = model.encode("image", list(pictures.pixel_values))
        parts.append(seen._replace(tokens=seen.tokens.bfloat16()))
        scenes += questions.scenes(pictures)
    return Pool(join(parts), scenes)


def train_pt(model: MMLLM, pool: Pool, steps: int, batch: int = 48) -> list[float]:
    """The projector learns to make the frozen decoder say the caption."""
    learn_only(model, model.projectors)
    rng = random.Random(4)
    loss_at = picture_loss(model, pool, rng, batch, _caption_sample)
    return fit("pt", loss_at, (model.projectors,), steps=steps, lr=2e-3)


def train_it(model: MMLLM, pool: Pool, steps: int, batch: int = 48) -> list[float]:
    """Projector and decoder learn to answer questions about pictures."""
    learn_only(model, model.projectors, model.language_model)
    rng = random.Random(5)
    loss_at = picture_loss(model, pool, rng, batch, _question_sample)
    return fit("it", loss_at, (model.projectors, model.language_model), steps=steps, lr=1e-3)


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
        seen = select(pool.features, chosen)
        features = model.project("image", seen._replace(tokens=seen.tokens.float()))
        rows: list[Row] = []
        for i in chosen:
            prompt, answer = sample(pool.scenes[i], rng)
            rows.append(row_of(model, place(prompt, "image"), answer))
        return answer_loss(model, rows, {"image": features})

    return loss_at


def text_sample(model: MMLLM, rng: random.Random) -> Row:
    scene = questions.random_scene(rng)
    sample = _question_sample if rng.random() < 0.75 else _caption_sample
    prompt, answer = sample(scene, rng)
    return row_of(model, f"{questions.sketch(scene)}{prompt}", answer)


def _caption_sample(scene: questions.Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(questions.CAPTION_PROMPTS), questions.caption(scene)


def _question_sample(scene: questions.Scene, rng: random.Random) -> tuple[str, str]:
    question = questions.ask(scene, rng)
    return question.text, question.answer


def row_of(model: MMLLM, prompt: str, answer: str, drawn: bool = False) -> Row:
    """What is given and what is to be said; a picture is said by the signal tokens."""
    t = model.tokenizer
    signals = t.signals if drawn else ()
    return t.encode_prompt(prompt), [*t.encode(answer), *signals, t.eos]


def answer_loss(model: MMLLM, rows: Sequence[Row], features: dict[str, Features]) -> torch.Tensor:
    """Cross-entropy of the tokens to be said, given all before them."""
    total, count, _, _ = answer_total(model, rows, features)
    return total / max(1, count)


def answer_total(
    model: MMLLM, rows: Sequence[Row], features: dict[str, Features]
) -> tuple[torch.Tensor, int, mmkernels.PackPlan, torch.Tensor]:
    """Its sum over those tokens, and how many; the plan of the rows and their hidden states. Logits exist of those
    tokens alone."""
    answers = [torch.tensor(said) for _, said in rows]
    input_ids = [torch.cat((given, said)) for (given, _), said in zip(rows, answers, strict=True)]
    labels = [
        torch.cat((torch.full_like(given, IGNORE), said))
        for (given, _), said in zip(rows, answers, strict=True)
    ]
    plan = model.plan(input_ids, features, labels)
    assert plan.labels is not None
    said = (plan.labels != IGNORE).nonzero().squeeze(1)
    states = model(plan, features)
    logits = model.logits(states[said - 1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, plan.labels[said], reduction="sum"), len(said), plan, states
