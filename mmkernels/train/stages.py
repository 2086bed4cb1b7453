# SPDX-License-Identifier: Apache-2.0
"""Each part learns its own small task first: encoders to see and hear, the decoder to answer about sketches in
characters. Then parts learn together (``pool.py``), by the loss of the answers that is here.

Dimensions: B pictures or recordings, t times, n patches, D width, L tokens.
"""

import random
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

import mmkernels
from mmkernels.models import MMLLM, Features, VisionConfig
from mmkernels.train import digits, questions, speech
from mmkernels.train.trainer import fit

IGNORE = -100
Row = tuple[torch.Tensor, list[int]]  # tokens given, tokens to be said


def learn_only(model: nn.Module, *parts: nn.Module) -> None:
    """Freezes all of ``model`` but ``parts``."""
    model.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)


def train_vision(model: MMLLM, scans: digits.Scans, steps: int, batch: int = 32) -> list[float]:
    """Patches learn which digit covers them, for most of the time on crowded pictures."""
    encoder, config = model.encoder("image"), model.config.encoders["image"]
    assert isinstance(config, VisionConfig)
    learn_only(model, encoder)
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(config.hidden_size, digits.BACKGROUND + 1)

    def loss_at(step: int) -> torch.Tensor:
        drawn = digits.draw_crowded if step < 0.75 * steps else digits.draw
        pictures = drawn(scans, batch, generator)
        tokens = model.encode("image", list(pictures.pixel_values)).tokens
        logits = head(tokens.view(batch, -1, config.hidden_size)[:, 1:])
        labels = digits.patch_labels(pictures, config.patch_size)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return fit("vision", loss_at, (encoder, head), steps=steps, lr=1.5e-3)


def train_hearing(model: MMLLM, spoken: speech.Spoken, steps: int, batch: int = 32) -> list[float]:
    """Connectionist temporal classification (Graves et al. 2006) over the mean of each time's bands."""
    encoder, rng = model.encoder("audio"), random.Random(10)
    learn_only(model, encoder)
    head = nn.Linear(encoder.width, 11)

    def loss_at(step: int) -> torch.Tensor:
        said = [tuple(rng.randrange(10) for _ in range(rng.randint(1, 3))) for _ in range(batch)]
        seen = model.encode("audio", [speech.say(spoken, d, rng) for d in said])
        parts = zip(seen.tokens.split(seen.counts), seen.grids, strict=True)
        times = [part.view(rows, columns, -1).mean(0) for part, (_, rows, columns) in parts]
        scores = nn.utils.rnn.pad_sequence([head(t).float() for t in times]).log_softmax(-1)
        targets = torch.tensor([1 + d for digits_said in said for d in digits_said])
        lengths, said_lengths = (torch.tensor([len(x) for x in xs]) for xs in (times, said))
        return F.ctc_loss(scores, targets, lengths, said_lengths, zero_infinity=True)

    return fit("hearing", loss_at, (encoder, head), steps=steps, lr=1e-3)


def train_language(
    model: MMLLM, row: Callable[[MMLLM, random.Random], Row], steps: int, batch: int = 32
) -> list[float]:
    """The decoder learns from rows of text alone: no picture or sound anywhere."""
    learn_only(model, model.language_model)
    rng = random.Random(11)

    def loss_at(step: int) -> torch.Tensor:
        return answer_loss(model, [row(model, rng) for _ in range(batch)], {})

    return fit("language", loss_at, (model.language_model,), steps=steps, lr=2e-3)


def sketch_row(model: MMLLM, rng: random.Random) -> Row:
    """A picture as a sketch in eight characters, with a question about it or, once in four, its caption."""
    scene = questions.random_scene(rng)
    if rng.random() < 0.75:
        asked = questions.ask(scene, rng)
        prompt, answer = asked.text, asked.answer
    else:
        prompt, answer = rng.choice(questions.CAPTION_PROMPTS), questions.caption(scene)
    return row_of(model, f"{questions.sketch(scene)}{prompt}", answer)


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
    answers = [torch.tensor(said, dtype=torch.int64) for _, said in rows]
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
