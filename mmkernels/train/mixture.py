# SPDX-License-Identifier: Apache-2.0
"""The tasks of the reference MM-LLM, mixed: pictures, clips, speech, text, drawing, each in several wordings.

Sample i of a stream is a function of its seed and i, so a stream goes on anywhere. Held-out samples are made of scans
and speakers that no training sample has. Words are not held out: tasks without media, ``text`` and ``draw``, have few
prompts (ten digits, some wordings), and nearly all of an exam occur in training too.
"""

import functools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mmkernels.train import digits, questions, speech
from mmkernels.train.digits import BACKGROUND, SIZES, Bands, Scans
from mmkernels.train.sample import Ask, Asked, Sample
from mmkernels.train.speech import Spoken

FRAMES = 4
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SEED = 1_000_003


@dataclass(frozen=True)
class Source:
    """What samples are made of."""

    scans: Scans
    spoken: Spoken
    sizes: Bands = SIZES


@dataclass
class Draw:
    """One sample's own randomness."""

    source: Source
    rng: random.Random
    generator: torch.Generator

    def picture(self, count: int | None = None) -> tuple[torch.Tensor, tuple[int, ...]]:
        """uint8 ``[3, H, W]`` and the digits from left to right."""
        number = self.rng.randint(1, 3) if count is None else count
        drawn = digits.draw_counts(
            self.source.scans, torch.tensor([number]), self.generator, self.source.sizes
        )
        shown = [d for d in drawn.digits[0].tolist() if d != BACKGROUND]
        return drawn.pixel_values[0], tuple(shown)


def image(d: Draw) -> Sample:
    """The questions of the image demo."""
    pixels, shown = d.picture()
    scene = questions.Scene(shown, ())

    def ask(rng: random.Random) -> Asked:
        asked = questions.ask(scene, rng)
        return f"image {asked.kind}", f"<image>{asked.text}", asked.answer

    def describe(rng: random.Random) -> Asked:
        prompt = rng.choice(questions.CAPTION_PROMPTS)
        return "caption", f"<image>{prompt}", questions.caption(scene)

    return _asked(d, {"image": ask, "caption": describe}, (("image", pixels),))


def caption(d: Draw) -> Sample:
    made = image(d)
    kind, prompt, answer = made.again["caption"](d.rng)
    return replace(made, kind=kind, prompt=prompt, answer=answer)


def two_images(d: Draw) -> Sample:
    (a, left), (b, right) = d.picture(1), d.picture(1)
    answer = "same" if left == right else "first" if left > right else "second"

    def ask(rng: random.Random) -> Asked:
        text = rng.choice(
            ("which picture has the larger digit?", "where is the larger digit, first or second?")
        )
        return "two images", f"<image> and <image> {text}", answer

    return _asked(d, {"two_images": ask}, (("image", a), ("image", b)))


def video(d: Draw) -> Sample:
    """One digit at a time, at one to three of four moments, nothing at the others."""
    moments = sorted(d.rng.sample(range(FRAMES), d.rng.randint(1, 3)))
    drawn = digits.draw_counts(
        d.source.scans, torch.tensor([int(t in moments) for t in range(FRAMES)]), d.generator, d.source.sizes
    )  # fmt: skip
    shown = tuple(drawn.digits[moments, 0].tolist())

    def ask(rng: random.Random) -> Asked:
        kind, text, answer = sequence(rng, shown, "appear", "shown")
        return f"video {kind}", f"<video>{text}", answer

    return _asked(d, {"video": ask}, (("video", drawn.pixel_values),))


def audio(d: Draw) -> Sample:
    """One to three digits said."""
    said = tuple(d.rng.randrange(10) for _ in range(d.rng.randint(1, 3)))
    waveform = speech.say(d.source.spoken, said, d.rng)

    def ask(rng: random.Random) -> Asked:
        kind, text, answer = sequence(rng, said, "are spoken", "said")
        return f"audio {kind}", f"<audio>{text}", answer

    return _asked(d, {"audio": ask}, (("audio", waveform),))


def image_audio(d: Draw) -> Sample:
    pixels, shown = d.picture()
    others = [x for x in range(10) if x not in shown]
    there = d.rng.random() < 0.5
    said = d.rng.choice(shown if there else others)
    media = (("image", pixels), ("audio", speech.say(d.source.spoken, (said,), d.rng)))

    def ask(rng: random.Random) -> Asked:
        text = rng.choice(
            ("is the spoken digit in the picture?", "does the picture show the digit that is said?")
        )
        return "image and audio", f"<image><audio>{text}", "yes" if there else "no"

    return _asked(d, {"image_audio": ask}, media)


def text(d: Draw) -> Sample:
    a, b = d.rng.randrange(10), d.rng.randrange(10)
    three = [d.rng.randrange(10) for _ in range(3)]
    prompt, answer = d.rng.choice((
        (d.rng.choice((f"what is {a} plus {b}?", f"{a} + {b} =")), str(a + b)),
        (f"what comes after {a}?", str(a + 1)),
        (f"sort {' '.join(map(str, three))}.", " ".join(map(str, sorted(three)))),
        (f"write {NAMES[a]} as a digit.", str(a)),
    ))  # fmt: skip
    return Sample("text", prompt, answer)


def drawing(d: Draw) -> Sample:
    digit = d.rng.randrange(10)
    word = d.rng.choice((NAMES[digit], str(digit)))
    prompt = d.rng.choice(("draw a {}.", "please paint the digit {}.", "show me a handwritten {}!"))
    return Sample(
        "draw", prompt.format(word), d.rng.choice(("here it is.", "as you wish.")), draw=digit
    )


def _asked(d: Draw, asks: dict[str, Ask], media: tuple[tuple[str, torch.Tensor], ...]) -> Sample:
    """The first question about media, with the way to ask again."""
    kind, prompt, answer = next(iter(asks.values()))(d.rng)
    return Sample(kind, prompt, answer, media, again=asks)


TASKS: dict[str, Callable[[Draw], Sample]] = {
    "image": image, "caption": caption, "two_images": two_images, "video": video, "audio": audio,
    "image_audio": image_audio, "text": text, "draw": drawing,
}  # fmt: skip


def sequence(
    rng: random.Random, shown: Sequence[int], appear: str, seen: str
) -> tuple[str, str, str]:
    """Kind, wording and answer of a question about digits one after another."""
    kinds = ["list", "first", "last", "count"] + (
        ["after"] if len(set(shown)) == len(shown) > 1 else []
    )
    kind, i = rng.choice(kinds), rng.randrange(max(1, len(shown) - 1))
    wordings = {
        "list": (f"which digits {appear}, in order?", f"what was {seen}?"),
        "first": ("which digit comes first?", f"what is {seen} first?"),
        "last": ("which digit comes last?", f"what is {seen} last?"),
        "count": (f"how many digits {appear}?", "count the digits."),
        "after": (f"which digit comes after {shown[i]}?", f"what follows {shown[i]}?"),
    }  # fmt: skip
    answer = {
        "list": " ".join(map(str, shown)), "first": str(shown[0]), "last": str(shown[-1]), "count": str(len(shown)),
        "after": str(shown[min(i + 1, len(shown) - 1)]),
    }[kind]  # fmt: skip
    return kind, rng.choice(wordings[kind]), answer


@functools.cache
def source(split: str, sizes: Bands = SIZES) -> Source:
    """The ``"train"`` or ``"heldout"`` scans and speakers."""
    return Source(digits.load_scans(split), speech.load_spoken(split), sizes)


def sample(made_of: Source, seed: int, i: int, task: str) -> Sample:
    """Sample i of a stream."""
    lot = seed * _SEED + i
    return TASKS[task](Draw(made_of, random.Random(lot), torch.Generator().manual_seed(lot)))


class Mixture:
    """Batches of training samples without end, tasks drawn by their shares (all alike if none are given)."""

    def __init__(self, batch: int, tasks: dict[str, float] | None = None, seed: int = 0) -> None:
        self.shares = {t: s for t, s in (tasks or dict.fromkeys(TASKS, 1.0)).items() if s > 0}
        _check(self.shares)
        self.source, self.batch, self.seed, self.at = source("train"), batch, seed, 0

    def __next__(self) -> list[Sample]:
        made = [self._sample(i) for i in range(self.at, self.at + self.batch)]
        self.at += self.batch
        return made

    def _sample(self, i: int) -> Sample:
        (task,) = random.Random(f"{self.seed} {i}").choices(
            list(self.shares), list(self.shares.values())
        )
        return sample(self.source, self.seed, i, task)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.at = state["seed"], state["at"]


def _check(tasks: Iterable[str]) -> None:
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not list(tasks):
        raise ValueError(f"tasks must be among {list(TASKS)}, got {unknown or 'none'}")


def exam(tasks: Sequence[str], each: int, seed: int = 6, sizes: Bands = SIZES) -> list[Sample]:
    """``each`` held-out samples of every task (of ``text`` and ``draw`` other draws of the prompts of training); the
    same for the same seed."""
    _check(tasks)
    made_of = source("heldout", sizes)
    return [sample(made_of, seed, i, task) for task in tasks for i in range(each)]
