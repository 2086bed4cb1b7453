# SPDX-License-Identifier: Apache-2.0
"""Questions about pictures of digits, each with one right answer, and the captions that describe them."""

import random
from dataclasses import dataclass

CAPTION_PROMPTS = ("describe the picture.", "what is in the picture?", "caption:")
COLUMNS = 8  # of a sketch


@dataclass(frozen=True)
class Scene:
    """What a picture shows: digits from left to right, and their columns."""

    digits: tuple[int, ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question of a kind, its wording and its answer."""

    kind: str
    text: str
    answer: str


def random_scene(rng: random.Random) -> Scene:
    """A scene nobody drew, for training on text alone."""
    shown = tuple(rng.randrange(10) for _ in range(rng.randint(1, 3)))
    return Scene(shown, tuple(sorted(rng.sample(range(1, COLUMNS - 1), len(shown)))))


def sketch(scene: Scene) -> str:
    """The scene as one character a column, ``"..3..7.."``."""
    cells = ["."] * COLUMNS
    for digit, column in zip(scene.digits, scene.columns, strict=True):
        cells[column] = str(digit)
    return "".join(cells)


def caption(scene: Scene) -> str:
    """``"the digits are 3 7"``."""
    shown = " ".join(map(str, scene.digits))
    return f"the digit is {shown}" if len(scene.digits) == 1 else f"the digits are {shown}"


WORDINGS = {
    "list": ("which digits are shown?", "read the digits from left to right.", "what is written?"),
    "count": ("how many digits are there?", "count the digits.", "what is the number of digits?"),
    "first": ("which digit is leftmost?", "what is the first digit?", "name the digit on the left."),
    "last": ("which digit is rightmost?", "what is the last digit?", "name the digit on the right."),
    "parity": ("is the {side} digit odd or even?", "odd or even: the {side} digit?"),
    "compare": ("is the {side} digit larger than five?", "is the {side} digit above 5?"),
}  # fmt: skip
KINDS = tuple(WORDINGS)


def ask(scene: Scene, rng: random.Random) -> Question:
    """A random question about this scene; each kind is equally likely."""
    kind = rng.choice(KINDS)
    side, digit = rng.choice((("leftmost", scene.digits[0]), ("rightmost", scene.digits[-1])))
    answer = {
        "list": " ".join(map(str, scene.digits)),
        "count": str(len(scene.digits)),
        "first": str(scene.digits[0]),
        "last": str(scene.digits[-1]),
        "parity": ("even", "odd")[digit % 2],
        "compare": "yes" if digit > 5 else "no",
    }[kind]
    return Question(kind, rng.choice(WORDINGS[kind]).format(side=side), answer)
