# SPDX-License-Identifier: Apache-2.0
"""Are the drawings what was asked for? A classifier of real scans judges, which no drawing has trained.

Dimensions: n drawings, H pixels a side.
"""

from dataclasses import dataclass
from typing import Any

import torch

from mmkernels.train.digits import Scans
from mmkernels.train.drawing import render


class Recogniser:
    """A support vector machine on pictures of the scans given; ``accuracy`` is that on scans it has not seen."""

    def __init__(self, train: Scans, heldout: Scans, side: int) -> None:
        from sklearn.svm import SVC

        self._classifier: Any = SVC(C=10)
        self._classifier.fit(_rows(render(train, side)), train.labels.numpy())
        found = self(render(heldout, side))
        self.accuracy = (found == heldout.labels).double().mean().item()

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``[n, 1, H, H]`` uint8 → digits int64 ``[n]``."""
        return torch.from_numpy(self._classifier.predict(_rows(pixel_values)))


@dataclass(frozen=True)
class Verdict:
    """What the drawings are worth.

    ``right``: of each digit, the share recognised as asked. ``spread``: the mean distance between two drawings of a
    digit over that between two held-out scans. ``nearest``: the median distance to the nearest training scan of the
    digit, of drawings, of held-out scans, and of training scans as the generator saw them (a copy would be there).
    """

    right: tuple[float, ...]
    heldout_accuracy: float
    spread: float
    nearest: tuple[float, float, float]

    @property
    def recognised(self) -> float:
        return sum(self.right) / len(self.right)

    def __str__(self) -> str:
        each = " ".join(f"{d}:{share:.0%}" for d, share in enumerate(self.right))
        drawn, heldout, copies = self.nearest
        return (
            f"drawings recognised as asked: {self.recognised:.1%} ({each})\n"
            f"  by a classifier with {self.heldout_accuracy:.1%} on held-out scans\n"
            f"  spread within a digit: {self.spread:.2f} of real writing's\n"
            f"  distance to the nearest training scan: {drawn:.2f}; held-out scans {heldout:.2f}, copies {copies:.2f}"
        )


def evaluate(
    pixel_values: torch.Tensor, digits: torch.Tensor, train: Scans, heldout: Scans
) -> Verdict:
    """Judges drawings ``[n, 1, H, H]`` of the ``digits`` ``[n]`` asked for, at least two of each of the ten.

    Raises:
        ValueError: Some digit was asked for less than twice.
    """
    if digits.bincount(minlength=10).min() < 2:
        raise ValueError(
            f"evaluate: digits must hold each of the ten twice, got {digits.bincount().tolist()}"
        )
    side = pixel_values.shape[-1]
    recogniser = Recogniser(train, heldout, side)
    right = (recogniser(pixel_values) == digits).double()
    seed = torch.Generator().manual_seed(9)
    drawn = _by_digit(pixel_values, digits)
    known = _by_digit(render(train, side), train.labels)
    unseen = _by_digit(render(heldout, side, seed), heldout.labels)
    copies = _by_digit(render(train, side, seed), train.labels)
    return Verdict(
        right=tuple(right[digits == d].mean().item() for d in range(10)),
        heldout_accuracy=recogniser.accuracy,
        spread=_spread(drawn) / _spread(unseen),
        nearest=(_nearest(drawn, known), _nearest(unseen, known), _nearest(copies, known)),
    )


def _spread(pictures: list[torch.Tensor]) -> float:
    return sum(torch.pdist(rows).mean().item() for rows in pictures) / len(pictures)


def _nearest(pictures: list[torch.Tensor], known: list[torch.Tensor]) -> float:
    apart = [torch.cdist(a, b).amin(1) for a, b in zip(pictures, known, strict=True)]
    return torch.cat(apart).median().item()


def _by_digit(pixel_values: torch.Tensor, digits: torch.Tensor) -> list[torch.Tensor]:
    """Rows of 0…1, one tensor a digit."""
    rows = torch.from_numpy(_rows(pixel_values))
    return [rows[digits == d] for d in range(10)]


def _rows(pixel_values: torch.Tensor) -> Any:
    return (pixel_values.flatten(1).float() / 255).numpy()
