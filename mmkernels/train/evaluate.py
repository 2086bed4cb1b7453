# SPDX-License-Identifier: Apache-2.0
"""Held-out exact match, and what it would be without the media, with a neighbour's, through the reference."""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

import mmkernels
from mmkernels.models import MMLLM, draw
from mmkernels.models import answer as greedy
from mmkernels.train import digits, mixture, questions, stages
from mmkernels.train.sample import Sample, features_of

EXAM = 600  # held-out samples a task; half of them without their media
BATCH = 64
Scores = dict[str, dict[str, float]]  # exact match of a column's rows


@dataclass(frozen=True)
class Answered:
    """An exam and the answers to it."""

    samples: Sequence[Sample]
    said: list[str]
    seconds: float

    @property
    def right(self) -> list[bool]:
        return [a == s.answer for a, s in zip(self.said, self.samples, strict=True)]


def answer(model: MMLLM, samples: Sequence[Sample]) -> list[str]:
    """Greedy answers."""
    said: list[str] = []
    for at in range(0, len(samples), BATCH):
        batch = samples[at : at + BATCH]
        with torch.no_grad():
            features = features_of(model, batch)
        said += greedy(model, [s.prompt for s in batch], features)
    return said


def exact_match(model: MMLLM, samples: Sequence[Sample]) -> float:
    """Share of greedy answers that are the right text."""
    said = answer(model, samples)
    return sum(a == s.answer for a, s in zip(said, samples, strict=True)) / max(1, len(said))


def blind(samples: Sequence[Sample]) -> list[Sample]:
    """Media of nothing: grey, or silence."""
    gone = {"image": lambda t: torch.full_like(t, 128), "video": lambda t: torch.full_like(t, 128)}
    return [
        replace(s, media=tuple((m, gone.get(m, torch.zeros_like)(t)) for m, t in s.media)) for s in samples
    ]  # fmt: skip


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """Everybody gets a neighbour's media."""
    others = [*samples[1:], *samples[:1]]
    return [replace(s, media=o.media) for s, o in zip(samples, others, strict=True)]


def answer_pictures(model: MMLLM, samples: Sequence[Sample]) -> dict[str, Answered]:
    """Through the kernels, through the reference, without the picture, with a wrong one."""
    found: dict[str, Answered] = {}

    def run(name: str, asked: Sequence[Sample]) -> None:
        start = time.perf_counter()
        found[name] = Answered(asked, answer(model, asked), time.perf_counter() - start)
        progress.update(len(asked))

    with tqdm(total=4 * len(samples), desc="held-out", mininterval=0.5) as progress:
        run("kernels", samples)
        with mmkernels.backend("reference"):
            run("reference", samples)
        run("text only", blind(samples))
        run("shuffled", shuffled(samples))
    return found


def by_kind(found: dict[str, Answered]) -> Scores:
    """Exact match of every kind of question, the commonest first, and of all."""
    scores: Scores = {}
    for name, a in found.items():
        kinds = Counter(s.kind for s in a.samples)
        column = scores.setdefault(name, {})
        for kind, count in kinds.most_common():
            right = sum(r for r, s in zip(a.right, a.samples, strict=True) if s.kind == kind)
            column[f"{kind} ({count})"] = right / count
        column[f"all {len(a.samples)} questions"] = sum(a.right) / len(a.samples)
    return scores


def examine(model: MMLLM, each: int = EXAM) -> Scores:
    """Exact match of every task on held-out scans and speakers, of pictures at held-out scales, without media, and with
    a neighbour's media."""
    tasks = [t for t in mixture.TASKS if t != "draw"]
    asked = {t: mixture.exam([t], each) for t in tasks}
    scores = {"held out": {t: exact_match(model, s) for t, s in asked.items()}, "other scales": {}}
    for low, high in digits.OTHER_SIZES:
        row = f"image {low:.0f}-{high:.0f} px"
        exam = mixture.exam(["image"], each, sizes=((low, high),))
        scores["other scales"][row] = exact_match(model, exam)
    fewer = {t: s[: len(s) // 2] for t, s in asked.items() if s[0].media}
    scores["blind"] = {t: exact_match(model, blind(s)) for t, s in fewer.items()}
    scores["shuffled"] = {t: exact_match(model, shuffled(s)) for t, s in fewer.items()}
    return scores


def table(scores: Scores) -> str:
    """Exact match, a column an exam."""
    rows = list(dict.fromkeys(row for column in scores.values() for row in column))
    lines = [f"{'exact match':<22}" + "".join(f"{name:>14}" for name in scores)]
    for row in rows:
        cells = (f"{column[row]:.1%}" if row in column else "" for column in scores.values())
        lines.append(f"{row:<22}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def majority(samples: Sequence[Sample], seed: int = 7, size: int = 20000) -> float:
    """Exact match of always giving the commonest answer to each wording: what the text alone is worth."""
    rng = random.Random(seed)
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(size):
        question = questions.ask(questions.random_scene(rng), rng)
        seen[f"<image>{question.text}"][question.answer] += 1
    guesses = [seen[s.prompt].most_common(1)[0][0] for s in samples]
    return sum(g == s.answer for g, s in zip(guesses, samples, strict=True)) / len(guesses)


def some_of_each(model: MMLLM, each: int = 3) -> Answered:
    """Held-out samples of every task with media, and the model's answers."""
    tasks = [t for t in mixture.TASKS if t not in ("draw", "text")]
    samples = mixture.exam(tasks, each, seed=15)
    start = time.perf_counter()
    return Answered(samples, answer(model, samples), time.perf_counter() - start)


def draw_digits(model: MMLLM, each: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of every digit, asked for in words, and the digits."""
    made = [s for s in mixture.exam(["draw"], 40 * each) if s.draw is not None]
    chosen = [s for d in range(10) for s in [m for m in made if m.draw == d][:each]]
    rows = [stages.row_of(model, s.prompt, s.answer, True) for s in chosen]
    ids = [torch.cat((given, torch.tensor(said))) for given, said in rows]
    generator = torch.Generator().manual_seed(14)
    return draw(model, ids, {}, generator), torch.tensor([s.draw for s in chosen])
