# SPDX-License-Identifier: Apache-2.0
"""``spoil`` of an op whose ways to spoil a call are a dict of them."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from mmkernels.testing.case import Inputs

Way = Callable[[random.Random, Inputs, dict[str, Any]], Inputs | None]  # None: not this call


def by_one_of(ways: Mapping[str, Way]) -> Callable[..., tuple[str, Inputs]]:
    """Spoils a call by the first of them, in random order, that applies; says which. Some must always apply."""

    def spoil(r: random.Random, inputs: Inputs, x: dict[str, Any]) -> tuple[str, Inputs]:
        for name in r.sample(sorted(ways), len(ways)):
            changed = ways[name](r, inputs, x)
            if changed is not None:
                return name, {**inputs, **changed}
        raise AssertionError("no way to spoil this call")

    return spoil
