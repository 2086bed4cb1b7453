# SPDX-License-Identifier: Apache-2.0
"""The rows under pytest-benchmark: ``pytest benchmarks -k "patch_embed and bf16"``.

One group a row, one test a variant; ``compile`` only with ``-m full``. ``benchmarks.run`` interleaves the
variants and is what the published table comes from; this is for looking at one row closely.
"""

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import rows
from benchmarks.rows import Checked, Job, Options

VARIANTS = ("ours", "eager", "library", "compile")


def _parameters() -> list[Any]:
    return [
        pytest.param(job, variant, id=f"{job.name}-{variant}".replace(" ", "-"), marks=marks)
        for job in rows.jobs()
        for variant in VARIANTS
        if variant not in rows.too_slow(job)
        for marks in [_marks(job, variant)]
    ]


def _marks(job: Job, variant: str) -> list[pytest.MarkDecorator]:
    gpu = [pytest.mark.gpu] if job.device == "cuda" else []
    full = [pytest.mark.full] if variant == "compile" else []
    return [pytest.mark.benchmark(group=job.name), *gpu, *full]


@pytest.fixture(scope="session")
def known() -> dict[Job, Checked]:
    return {}


@pytest.mark.parametrize(("job", "variant"), _parameters())
def test_row(
    job: Job, variant: str, known: dict[Job, Checked], benchmark: Callable[..., Any]
) -> None:
    if variant == "ours":
        worst = rows.checked(job, Options(), known).worst(job.direction)
        assert worst.ratio <= 1, str(worst)
    inputs = rows.timed_inputs(job)
    step = rows.variants(job, inputs, "", compiled=variant == "compile")[variant]
    benchmark(step, inputs)
