# SPDX-License-Identifier: Apache-2.0
"""``mrope_positions`` against ``get_rope_index`` of transformers, family by family: equal, positions and deltas."""

import random
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from mrope_families import CLASSES, draw, media, model_of, padded, row_of, theirs

from mmkernels import backends, mrope_positions


def ours(name: str, tokens: dict[str, Any], given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return mrope_positions(**tokens, **given, family=row_of(name))


@pytest.mark.parametrize("name", CLASSES)
def test_equal_to_transformers(name: str, count: int = 20) -> None:
    for seed in range(count):
        rng = random.Random(f"{name} {seed}")
        batch = draw(rng, name)
        tokens = padded(rng, batch, rng.choice(("left", "right", "holes")))
        expected = theirs(name, tokens, batch)
        for how in ("auto", "reference"):
            with backends.backend(how):
                got = ours(name, tokens, media(batch))
            for a, b in zip(got, expected, strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b), (seed, how, a, b, tokens, media(batch))
