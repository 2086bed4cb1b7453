# SPDX-License-Identifier: Apache-2.0
"""What the two demos train: a model, its stages and their steps, and what is asked in each."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from mmkernels.models import MMLLM, AudioConfig, MMConfig, VisionConfig
from mmkernels.models.config import (
    FramePlaceConfig,
    GeneratorConfig,
    LinearConfig,
    OutputProjectorConfig,
    PlaceConfig,
    QFormerConfig,
)
from mmkernels.train import mixture, stages


class Together(NamedTuple):
    """A stage in which parts learn to answer: tasks and their shares, the parts, the peak of the learning rate."""

    tasks: dict[str, float]
    parts: tuple[str, ...]
    lr: float


@dataclass(frozen=True)
class Recipe:
    """``steps``: by stage, in their order. ``pool`` samples of ``media``, tasks by their shares, are seen by the
    encoders once. ``row``: a training row of stage ``language``."""

    config: MMConfig
    steps: dict[str, int]
    media: dict[str, float]
    pool: int
    together: dict[str, Together]
    row: Callable[[MMLLM, random.Random], stages.Row]


def any_row(model: MMLLM, rng: random.Random) -> stages.Row:
    """Sketches of pictures, of clips and speech as sequences, sums, wishes for a drawing."""
    kind = rng.random()
    if kind < 0.4:
        return stages.sketch_row(model, rng)
    if kind < 0.7:
        shown = tuple(rng.randrange(10) for _ in range(rng.randint(1, 3)))
        appear, seen = rng.choice((("appear", "shown"), ("are spoken", "said")))
        _, text, answer = mixture.sequence(rng, shown, appear, seen)
        return stages.row_of(model, f"{' '.join(map(str, shown))}|{text}", answer)
    lot = rng.getrandbits(20)
    made = mixture.sample(mixture.source("train"), 12, lot, rng.choice(("text", "draw")))
    return stages.row_of(model, made.prompt, made.answer, made.draw is not None)


IMAGE = Recipe(
    config=MMConfig(),
    steps={"vision": 1300, "language": 350, "pt": 350, "it": 550},
    media={"image": 1.0},
    pool=6000,
    together={
        "pt": Together({"caption": 1.0}, ("projectors",), 2e-3),
        "it": Together({"image": 1.0}, ("projectors", "language_model"), 1e-3),
    },
    row=stages.sketch_row,
)

FULL = Recipe(
    config=MMConfig(
        encoders={"image": VisionConfig(), "video": "image", "audio": AudioConfig(stride=8)},
        projectors={
            "image": (PlaceConfig(8), QFormerConfig(ordered_side=8), LinearConfig(128)),
            "video": (
                QFormerConfig(num_query_tokens=2, per="frame"),
                FramePlaceConfig(mixture.FRAMES),
                LinearConfig(128),
            ),
            "audio": (PlaceConfig(0), QFormerConfig(), LinearConfig(128)),
        },
        output_projector=OutputProjectorConfig(128, 2, 2, 4, 256, 4, 64),
        generator=GeneratorConfig(),
    ),
    steps={
        "vision": 2400, "hearing": 600, "language": 900, "drawing": 1600, "pt": 700, "it": 2100, "signals": 400,
    },
    media={"image": 8.0, "two_images": 1.0, "video": 3.0, "audio": 3.0, "image_audio": 2.0},
    pool=17000,
    together={
        "pt": Together({"caption": 1.0, "video": 1.0, "audio": 1.0}, ("projectors",), 2e-3),
        "it": Together(
            {"image": 4.0, "caption": 1.5, "two_images": 1.0, "video": 2.5, "audio": 2.5, "image_audio": 1.5,
             "text": 1.0, "draw": 0.5},
            ("projectors", "output_projector", "language_model"), 1e-3,
        ),
        "signals": Together({"draw": 1.0}, ("output_projector",), 1e-3),
    },
    row=any_row,
)  # fmt: skip
