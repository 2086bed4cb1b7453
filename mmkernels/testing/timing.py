# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round runs each variant once, so a busy machine slows all of them alike.

Only ratios within a round are compared (``ratio``); absolute times are those of this machine, this hour.
"""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from mmkernels.testing.case import Inputs, map_tensors

Call = Callable[[], object]
SAMPLE_S, LONG_S = 0.005, 0.1
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**27, "cuda": 2**29}


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample a round."""

    samples_s: tuple[float, ...]

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.samples_s, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def p20(self) -> float:
        return self.quantile(0.2)

    @property
    def p80(self) -> float:
        return self.quantile(0.8)


def ratio(other: Timing, ours: Timing) -> float:
    """How many times longer ``other`` takes: the median over rounds of the ratio within a round."""
    pairs = zip(other.samples_s, ours.samples_s, strict=True)
    return float(np.median([a / b for a, b in pairs]))


def measure(variants: dict[str, Call], device: str, rounds: int) -> dict[str, Timing]:
    """Every round runs each variant once, in an order of its own (drawn, the same in every run): whoever follows the
    GEMM of a ceiling runs at the clock that left behind.

    A call before each sample leaves the caches to everybody as his own call leaves them, not as the neighbour does:
    whoever followed the copy of a ceiling read all his inputs from memory. A call that alone is a sample of ``LONG_S``
    fills them himself.
    """
    seconds = _cuda_seconds if device == "cuda" else _cpu_seconds
    once = {name: _once(call, seconds) for name, call in variants.items()}
    repeats = {name: max(1, round(SAMPLE_S / max(s, 1e-7))) for name, s in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    drawn = random.Random(0)
    for _ in range(rounds):
        for name in drawn.sample(list(variants), len(variants)):
            if once[name] < LONG_S:
                variants[name]()
            samples[name].append(seconds(variants[name], repeats[name]) / repeats[name])
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _once(call: Call, seconds: Callable[[Call, int], float]) -> float:
    call()  # compiles, tunes, fills the allocator
    return seconds(call, 1)


def _cpu_seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - start


def _cuda_seconds(call: Call, repeats: int) -> float:
    event: Any = torch.cuda.Event  # torch leaves it untyped
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def cold_copies(inputs: Inputs, cache_bytes: int) -> list[Inputs]:
    """The inputs and as many copies as it takes to exceed the cache five times; one if cache is 0."""
    size = sum(v.nbytes for v in inputs.values() if isinstance(v, torch.Tensor))
    count = min(64, 5 * cache_bytes // max(size, 1))
    copies = [map_tensors(inputs, _clone) for _ in range(count)]
    return [inputs, *copies]


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def rotating(step: Callable[[Inputs], object], copies: list[Inputs]) -> Call:
    """A call that takes the next copy each time."""
    turn = itertools.cycle(copies)
    return lambda: step(next(turn))


def ceilings(dtype: torch.dtype, device: str) -> dict[str, Call]:
    """What the machine can do at most, timed in the same rounds: a copy and a GEMM in this dtype."""
    side = GEMM_SIDE[device]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.ones_like(source)
    return {"copy": lambda: target.copy_(source), "gemm": lambda: F.linear(a, b)}


def copy_bytes_per_s(timing: Timing, device: str) -> float:
    """Bytes read plus bytes written."""
    return 2 * COPY_BYTES[device] / timing.median


def gemm_flops_per_s(timing: Timing, device: str) -> float:
    """Two for each multiply-add."""
    return 2 * GEMM_SIDE[device] ** 3 / timing.median


def peak_extra_bytes(call: Callable[[], tuple[torch.Tensor, ...]], device: str) -> int:
    """The most memory held during a call, in tensors from torch's allocator, without its results."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = sum(t.nbytes for t in call())
        return max(0, torch.cuda.max_memory_allocated() - before - results)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = profiler.profiler.kineto_results.events()
    steps = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(itertools.accumulate(size for _, size in steps), default=0)
    return max(0, peak - sum(t.nbytes for t in kept))
