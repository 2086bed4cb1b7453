# SPDX-License-Identifier: Apache-2.0
"""Everything together: pictures, clips, speech, text and drawing, in stages; then the exam and a page of pictures.

``vision`` encoder of pictures and frames: which digit covers each patch.     Then frozen.
``hearing`` encoder of speech: the digits said, by CTC.                        Then frozen.
``language`` decoder: questions about sketches and sequences made of characters, sums, when to draw.
``drawing`` generator: to draw a digit from its condition.                     Then frozen.
``pt``      the projectors: what frozen encoders see, so that the frozen decoder answers.
``it``      projectors, output projector and decoder: every task.
``signals`` the output projector: what the decoder's signal tokens say, so that the frozen generator draws it.

Frozen encoders see a pool of media once; questions about them are asked anew at every step. Dimensions: B recordings,
t times, D width.
"""

import functools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from mmkernels.models import MMLLM, AudioConfig, MMConfig, VisionConfig, answer, draw
from mmkernels.models.config import (
    FramePlaceConfig,
    GeneratorConfig,
    LinearConfig,
    OutputProjectorConfig,
    PlaceConfig,
    QFormerConfig,
)
from mmkernels.models.generator import ImageGenerator
from mmkernels.train import checkpoint, digits, mixture, speech, stages
from mmkernels.train.drawing import train_generator
from mmkernels.train.mixture import FRAMES, Mixture
from mmkernels.train.run import exact_match
from mmkernels.train.sample import AnswerLoss, Sample, encoded, features_of
from mmkernels.train.trainer import Schedule, Trainer, fast_bf16, fit

STEPS = {
    "vision": 2400, "hearing": 600, "language": 900, "drawing": 1600, "pt": 700, "it": 2100, "signals": 400,
}  # fmt: skip
POOL = 17000
EXAM = 600  # held-out samples a task; half of them without their media
MEDIA = {"image": 8.0, "two_images": 1.0, "video": 3.0, "audio": 3.0, "image_audio": 2.0}
# What learns together, by stage: tasks and their shares, parts, learning rate.
TOGETHER = {
    "pt": ({"caption": 1.0, "video": 1.0, "audio": 1.0}, ("projectors",), 2e-3),
    "it": (
        {"image": 4.0, "caption": 1.5, "two_images": 1.0, "video": 2.5, "audio": 2.5, "image_audio": 1.5, "text": 1.0,
         "draw": 0.5},
        ("projectors", "output_projector", "language_model"), 1e-3,
    ),
    "signals": ({"draw": 1.0}, ("output_projector",), 1e-3),
}  # fmt: skip
CONFIG = MMConfig(
    encoders={"image": VisionConfig(), "video": "image", "audio": AudioConfig(stride=8)},
    projectors={
        "image": (PlaceConfig(8), QFormerConfig(ordered_side=8), LinearConfig(128)),
        "video": (QFormerConfig(num_query_tokens=2, per="frame"), FramePlaceConfig(FRAMES), LinearConfig(128)),
        "audio": (PlaceConfig(0), QFormerConfig(), LinearConfig(128)),
    },
    output_projector=OutputProjectorConfig(128, 2, 2, 4, 256, 4, 64),
    generator=GeneratorConfig(),
)  # fmt: skip


class Pool:
    """Batches of questions, asked anew for every step, about media that are there already; tasks by their shares. What
    has no media is made for the step."""

    def __init__(self, seen: list[Sample], tasks: dict[str, float], batch: int, seed: int) -> None:
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


def train_hearing(model: MMLLM, spoken: speech.Spoken, steps: int, batch: int = 32) -> list[float]:
    """Connectionist temporal classification (Graves et al. 2006) over the mean of each time's bands."""
    encoder, rng = model.encoder("audio"), random.Random(10)
    stages.learn_only(model, encoder)
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


def train_language(model: MMLLM, steps: int, batch: int = 32) -> list[float]:
    """The decoder reads sketches in characters in place of media."""
    stages.learn_only(model, model.language_model)
    rng = random.Random(11)
    blind = mixture.Source(digits.load_scans("train"), speech.load_spoken("train"))

    def loss_at(step: int) -> torch.Tensor:
        rows = [_text_row(model, blind, rng) for _ in range(batch)]
        return stages.answer_loss(model, rows, {})

    return fit("language", loss_at, (model.language_model,), steps=steps, lr=2e-3)


def _text_row(model: MMLLM, source: mixture.Source, rng: random.Random) -> stages.Row:
    kind = rng.random()
    if kind < 0.4:
        return stages.text_sample(model, rng)
    if kind < 0.7:
        shown = tuple(rng.randrange(10) for _ in range(rng.randint(1, 3)))
        appear, seen = rng.choice((("appear", "shown"), ("are spoken", "said")))
        _, text, answer = mixture.sequence(rng, shown, appear, seen)
        return stages.row_of(model, f"{' '.join(map(str, shown))}|{text}", answer)
    made = mixture.sample(source, 12, rng.getrandbits(20), rng.choice(("text", "draw")))
    return stages.row_of(model, made.prompt, made.answer, made.draw is not None)


def seen_once(model: MMLLM, tasks: dict[str, float], size: int, seed: int) -> list[Sample]:
    """Training samples with what the frozen encoders make of their media."""
    stream = Mixture(min(64, size), tasks, seed)
    made: list[Sample] = []
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16()):
        for _ in tqdm(range(-(-size // stream.batch)), desc="   media", mininterval=0.5):
            made += encoded(model, next(stream))
    return made


def train_together(
    name: str,
    model: MMLLM,
    pool: Pool,
    parts: tuple[str, ...],
    steps: int,
    lr: float,
) -> list[float]:
    """The parts named learn to answer."""
    stages.learn_only(model, *(model.get_submodule(p) for p in parts))
    step = AnswerLoss(model)

    def mean(drawn: list[Sample]) -> torch.Tensor:
        total, count = step(drawn)
        return total / count

    return Trainer(step, pool, mean, Schedule(steps, lr)).run(name)


class Trained(NamedTuple):
    """``text_before``: exact match on questions without media before stage ``it``."""

    model: MMLLM
    losses: dict[str, list[float]]
    text_before: float


def train(out: Path, scale: float = 1.0) -> Trained:
    """Every stage for its steps times ``scale``; a checkpoint after each."""
    torch.manual_seed(0)
    model, losses, text_before = MMLLM(CONFIG), {}, 0.0
    done: tuple[str, ...] = ()
    scans, size = digits.load_scans("train"), max(64, round(POOL * min(1.0, scale)))
    seen: list[Sample] = []

    def together(name: str, steps: int) -> list[float]:
        seen.extend([] if seen else seen_once(model, MEDIA, size, 1))
        tasks, parts, lr = TOGETHER[name]
        return train_together(name, model, Pool(seen, tasks, 48, 13), parts, steps, lr)

    run: dict[str, Callable[[int], list[float]]] = {
        "vision": lambda n: stages.train_vision(
            model, scans, n, crowded_sizes=mixture.SIZES, sizes=mixture.SIZES
        ),
        "hearing": lambda n: train_hearing(model, speech.load_spoken("train"), n),
        "language": lambda n: train_language(model, n),
        "drawing": lambda n: train_generator(_there(model.generator), scans, n),
        **{name: functools.partial(together, name) for name in TOGETHER},
    }
    for name, stage in run.items():
        if name == "it":
            text_before = exact_match(model, mixture.exam(["text"], EXAM))
        torch.manual_seed(0)
        losses[name] = stage(max(1, round(STEPS[name] * scale)))
        model.requires_grad_(True)
        done = (*done, name)
        checkpoint.save(out, model, done)
    return Trained(model, losses, text_before)


def examine(model: MMLLM, each: int = EXAM) -> dict[str, dict[str, float]]:
    """Exact match of every task on held-out scans and speakers, of pictures at held-out scales, without media, and with
    a neighbour's media."""
    tasks = [t for t in mixture.TASKS if t != "draw"]
    asked = {t: mixture.exam([t], each) for t in tasks}
    found = {"held out": {t: exact_match(model, s) for t, s in asked.items()}}
    for low, high in mixture.OTHER_SIZES:
        exam = mixture.exam(["image"], each, sizes=((low, high),))
        found.setdefault("other scales", {})[f"image {low:.0f}-{high:.0f} px"] = exact_match(
            model, exam
        )
    fewer = {t: s[: len(s) // 2] for t, s in asked.items() if s[0].media}
    found["blind"] = {t: exact_match(model, _blind(s)) for t, s in fewer.items()}
    found["shuffled"] = {t: exact_match(model, _shuffled(s)) for t, s in fewer.items()}
    return found


def draw_digits(model: MMLLM, each: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of every digit, asked for in words, and the digits."""
    made = [s for s in mixture.exam(["draw"], 40 * each) if s.draw is not None]
    chosen = [s for d in range(10) for s in [m for m in made if m.draw == d][:each]]
    rows = [stages.row_of(model, s.prompt, s.answer, True) for s in chosen]
    ids = [torch.cat((given, torch.tensor(said))) for given, said in rows]
    generator = torch.Generator().manual_seed(14)
    return draw(model, ids, {}, generator), torch.tensor([s.draw for s in chosen])


def _blind(samples: list[Sample]) -> list[Sample]:
    """Media of nothing: grey, or silence."""
    gone = {"image": lambda t: torch.full_like(t, 128), "video": lambda t: torch.full_like(t, 128)}
    return [
        replace(s, media=tuple((m, gone.get(m, torch.zeros_like)(t)) for m, t in s.media)) for s in samples
    ]  # fmt: skip


def _shuffled(samples: list[Sample]) -> list[Sample]:
    return [
        replace(s, media=other.media)
        for s, other in zip(samples, samples[1:] + samples[:1], strict=True)
    ]


def _there(generator: ImageGenerator | None) -> ImageGenerator:
    assert generator is not None
    return generator


def table(found: dict[str, dict[str, float]]) -> str:
    """Exact match, a column an exam."""
    rows = list(dict.fromkeys(task for scores in found.values() for task in scores))
    lines = [f"{'exact match':<18}" + "".join(f"{name:>14}" for name in found)]
    for task in rows:
        cells = (f"{scores[task]:.1%}" if task in scores else "" for scores in found.values())
        lines.append(f"{task:<18}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def answered(model: MMLLM, each: int = 3) -> list[tuple[Sample, str]]:
    """Held-out samples of every task with media, and the model's answers."""
    tasks = [t for t in mixture.TASKS if t not in ("draw", "text")]
    samples = [s for t in tasks for s in mixture.exam([t], each, seed=15)]
    with torch.no_grad():
        features = features_of(model, samples)
    return list(zip(samples, answer(model, [s.prompt for s in samples], features), strict=True))


def throughput(path: Path) -> str:
    """What ``benchmarks.end_to_end`` has measured, if it has: packed through the kernels beside padded eager."""
    if not path.exists():
        return ""
    lines = []
    for row in json.loads(path.read_text())["rows"]:
        unit = next(k for k in row["ours"] if k.endswith("_per_s"))
        each = ", ".join(
            f"{name} {row[name][unit]:.2f} (ours {times:.2f} x)"
            for name, times in row["speedup"].items()
        )
        what = unit.removesuffix("_per_s")
        lines.append(f"{row['row']}, {row['dtype']}: {row['ours'][unit]:.2f} {what}/s; {each}")
    return "\n".join(lines)
