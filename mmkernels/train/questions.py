# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures of digits, each with one right answer, and the captions that describe them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mmkernels.train.digits import BACKGROUND, Pictures

CAPTION_PROMPTS = ("describe the picture.", "what is in the picture?", "caption:")
_PLAIN_RATIO = 1.15  # "largest" is asked only where the eye can tell


@dataclass(frozen=True)
class Scene:
    """What a picture shows: digits from left to right, and the one drawn largest where that is plain."""

    digits: tuple[int, ...]
    largest: int | None


@dataclass(frozen=True)
class Question:
    """A question of a kind, its wording and its answer."""

    kind: str
    text: str
    answer: str


def scenes(pictures: Pictures) -> list[Scene]:
    """One scene a picture."""
    return [
        _scene([d for d in digits if d != BACKGROUND], sizes)
        for digits, sizes in zip(pictures.digits.tolist(), pictures.sizes.tolist(), strict=True)
    ]


def _scene(digits: Sequence[int], sizes: Sequence[float]) -> Scene:
    order = sorted(range(len(digits)), key=lambda i: -sizes[i])
    plain = len(digits) > 1 and sizes[order[0]] > _PLAIN_RATIO * sizes[order[1]]
    return Scene(tuple(digits), digits[order[0]] if plain else None)


def random_scene(rng: random.Random) -> Scene:
    """A scene nobody drew, for training on text alone."""
    digits = [rng.randrange(10) for _ in range(rng.randint(1, 3))]
    return _scene(digits, [rng.uniform(30, 44) for _ in digits])


def caption(scene: Scene) -> str:
    """``"the digits are 3 7, 7 is largest"``."""
    shown = " ".join(map(str, scene.digits))
    text = f"the digit is {shown}" if len(scene.digits) == 1 else f"the digits are {shown}"
    return text if scene.largest is None else f"{text}, {scene.largest} is largest"


WORDINGS = {
    "list": ("which digits are shown?", "read the digits from left to right.", "what is written?"),
    "count": ("how many digits are there?", "count the digits.", "what is the number of digits?"),
    "first": ("which digit is leftmost?", "what is the first digit?", "name the digit on the left."),
    "last": ("which digit is rightmost?", "what is the last digit?", "name the digit on the right."),
    "largest": ("which digit is drawn largest?", "what is the biggest digit?", "name the largest one."),
    "parity": ("is the {side} digit odd or even?", "odd or even: the {side} digit?"),
    "compare": ("is the {side} digit larger than five?", "is the {side} digit above 5?"),
    "contains": ("is there a {digit}?", "do you see a {digit}?", "does it show a {digit}?"),
    "sum": ("what is the sum of the digits?", "add the digits.", "what do the digits add up to?"),
}  # fmt: skip
KINDS = tuple(WORDINGS)


def ask(scene: Scene, rng: random.Random) -> Question:
    """A random question that has one answer for this scene; each kind that fits is equally likely."""
    fitting = [k for k in KINDS if _fits(k, scene)]
    kind = rng.choice(fitting)
    side, digit = rng.choice((("leftmost", scene.digits[0]), ("rightmost", scene.digits[-1])))
    sought = rng.choice(scene.digits) if rng.random() < 0.5 else rng.choice(_absent(scene))
    answer = {
        "list": " ".join(map(str, scene.digits)),
        "count": str(len(scene.digits)),
        "first": str(scene.digits[0]),
        "last": str(scene.digits[-1]),
        "largest": str(scene.largest),
        "parity": ("even", "odd")[digit % 2],
        "compare": _yes(digit > 5),
        "contains": _yes(sought in scene.digits),
        "sum": str(sum(scene.digits)),
    }[kind]
    text = rng.choice(WORDINGS[kind]).format(side=side, digit=sought)
    return Question(kind, text, answer)


def _fits(kind: str, scene: Scene) -> bool:
    if kind == "largest":
        return scene.largest is not None
    return kind != "sum" or len(scene.digits) <= 2


def _absent(scene: Scene) -> list[int]:
    return [d for d in range(10) if d not in scene.digits]


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"
