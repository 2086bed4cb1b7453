# SPDX-License-Identifier: Apache-2.0
"""Held-out exact match: through the kernels, through the reference, without the picture, with a wrong one."""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

import mmkernels
from mmkernels import models
from mmkernels.models import MMLLM
from mmkernels.models.tokenizer import place
from mmkernels.train import digits, questions
from mmkernels.train.questions import Question

BATCH = 200


@dataclass(frozen=True)
class Exam:
    """Pictures made of held-out scans, one question each."""

    pixel_values: torch.Tensor
    questions: list[Question]


@dataclass(frozen=True)
class Score:
    """Exact match and the answers behind it."""

    name: str
    answers: list[str]
    right: list[bool]
    seconds: float

    @property
    def exact_match(self) -> float:
        return sum(self.right) / len(self.right)


def draw_exam(scans: digits.Scans, size: int, seed: int = 6) -> Exam:
    """The same exam for the same seed."""
    pictures = digits.draw(scans, size, torch.Generator().manual_seed(seed))
    rng = random.Random(seed)
    return Exam(pictures.pixel_values, [questions.ask(s, rng) for s in questions.scenes(pictures)])


def run_all(model: MMLLM, exam: Exam) -> list[Score]:
    """Kernels, reference, text only (features zero), shuffled (everybody gets a neighbour's picture)."""
    size = len(exam.questions)
    asked = [q.text for q in exam.questions]
    with tqdm(total=4 * size, desc="held-out", mininterval=0.5) as progress:

        def run(name: str, pixel_values: torch.Tensor, blind: bool = False) -> Score:
            start = time.perf_counter()
            answers: list[str] = []
            for i in range(0, size, BATCH):
                batch = asked[i : i + BATCH]
                answers += answer(model, pixel_values[i : i + BATCH], batch, blind=blind)
                progress.update(len(batch))
            right = [a == q.answer for a, q in zip(answers, exam.questions, strict=True)]
            return Score(name, answers, right, time.perf_counter() - start)

        scores = [run("kernels", exam.pixel_values)]
        with mmkernels.backend("reference"):
            scores.append(run("reference", exam.pixel_values))
        scores.append(run("text only", exam.pixel_values, blind=True))
        scores.append(run("shuffled", exam.pixel_values.roll(1, 0)))
    return scores


@torch.no_grad()
def answer(
    model: MMLLM, pixel_values: torch.Tensor, prompts: Sequence[str], *, blind: bool = False
) -> list[str]:
    """Answers in fp32; ``blind`` puts zeros in place of the image features."""
    features = model.project("image", model.encode("image", list(pixel_values)))
    if blind:
        features = features._replace(tokens=torch.zeros_like(features.tokens))
    return models.answer(model, [place(p, "image") for p in prompts], {"image": features})


def majority(exam: Exam, seed: int = 7, samples: int = 20000) -> float:
    """Exact match of always giving the commonest answer to each wording: what the text alone is worth."""
    rng = random.Random(seed)
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for _ in range(samples):
        question = questions.ask(questions.random_scene(rng), rng)
        seen[question.text][question.answer] += 1
    guesses = [seen[q.text].most_common(1)[0][0] for q in exam.questions]
    right = sum(g == q.answer for g, q in zip(guesses, exam.questions, strict=True))
    return right / len(guesses)


def table(scores: Sequence[Score], exam: Exam) -> str:
    """Exact match by kind of question, one column a run, with times and the majority guess."""
    kinds = Counter(q.kind for q in exam.questions)
    lines = [f"{'held-out exact match':<22}" + "".join(f"{s.name:>11}" for s in scores)]
    for kind, count in kinds.most_common():
        mine = [i for i, q in enumerate(exam.questions) if q.kind == kind]
        cells = (sum(s.right[i] for i in mine) / count for s in scores)
        lines.append(f"{f'  {kind} ({count})':<22}" + "".join(f"{c:>11.1%}" for c in cells))
    total = f"all {len(exam.questions)} questions"
    lines.append(f"{total:<22}" + "".join(f"{s.exact_match:>11.1%}" for s in scores))
    lines.append(f"{'seconds':<22}" + "".join(f"{s.seconds:>11.1f}" for s in scores))
    lines.append(f"commonest answer to each wording: {majority(exam):.1%}")
    same = scores[0].answers == scores[1].answers
    lines.append(f"kernels and reference answers: {'identical' if same else 'DIFFERENT'}")
    return "\n".join(lines)
