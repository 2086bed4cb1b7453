# SPDX-License-Identifier: Apache-2.0
"""patch_embed holds its results and a few panels, never an image or all patches: scratch does not grow with B.

What a float image's own gradient takes is a result. Scratch is what torch's allocator holds at most beside
results (``mmkernels.testing.timing.peak_extra_bytes``); memory from elsewhere shows in the resident set of a process.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkernels.ops.patch_embed import cases
from mmkernels.testing.case import Case, Inputs, leaves, map_tensors
from mmkernels.testing.timing import peak_extra_bytes
from mmkernels.train.trainer import fast_bf16

ROOT = Path(__file__).parents[1]
VIT = {**cases.DEFAULTS, "H": 224, "W": 224, "P": 16, "D": 96, "R": 1, "S": 1}
SLACK = 64 * 2**10  # indices of panels and the like; one 224 px image is 150 KB in uint8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
STEPS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


def batch(count: int, dtype: torch.dtype, **letters: Any) -> Inputs:
    return cases.make_inputs(Case("memory", {**VIT, "B": count, **letters}), dtype)


def packed(count: int, dtype: torch.dtype, **letters: Any) -> Inputs:
    """Images of five sizes, positions resampled for each."""
    grids = tuple((0, 10 + i % 5, 14 - i % 5) for i in range(count))
    sizes = {**VIT, "grids": grids, "table": (16, 16), **letters}
    return cases.make_inputs(Case("memory", sizes), dtype)


def scratch(inputs: Inputs, backward: bool) -> int:
    """The most bytes held beside inputs, output and gradients."""
    inputs = map_tensors(inputs, lambda t: t.requires_grad_(backward and t.is_floating_point()))
    wanted = list(leaves(inputs).values())
    grad = torch.ones_like(cases.run(inputs))

    def call() -> tuple[torch.Tensor, ...]:
        out = cases.run(inputs)
        return (out, *torch.autograd.grad(out, wanted, grad)) if backward else (out,)

    call()
    return peak_extra_bytes(call, "cpu")


@DTYPES
@STEPS
def test_scratch_does_not_grow_with_the_batch(dtype: torch.dtype, backward: bool) -> None:
    # Panels are whole from 8 images (of 196 patches) on: more images, no more scratch.
    small, large = (scratch(batch(n, dtype), backward) for n in (8, 16))
    assert large <= small + SLACK, (small, large)
    fewest = scratch(batch(2, dtype), backward)
    assert large <= fewest + panels(dtype, backward), (fewest, large)


def panels(dtype: torch.dtype, backward: bool) -> int:
    """What two images may lack to whole panels: rows of K and D, packed and not, for each of two threads."""
    K, D, rows = 768, VIT["D"], 1024 if backward else 2 * 384
    narrow = dtype == torch.bfloat16 and fast_bf16()  # other CPUs multiply bf16 as fp32
    return rows * (2 * K + 4 * D) * (2 if narrow else 4)


@DTYPES
@STEPS
def test_scratch_does_not_grow_with_a_packed_list(dtype: torch.dtype, backward: bool) -> None:
    small, large = (scratch(packed(n, dtype), backward) for n in (8, 32))
    assert large <= small + SLACK, (small, large)
    assert large <= scratch(packed(4, dtype), backward) + panels(dtype, backward)


@DTYPES
@pytest.mark.parametrize("stride", [None, (8, 8)], ids=["patches", "overlapping"])
def test_gradients_of_float_images_take_no_more_than_themselves(
    dtype: torch.dtype, stride: tuple[int, int] | None
) -> None:
    float_image = {"u8": False, "stride": stride}
    small, large = (scratch(batch(n, dtype, **float_image), True) for n in (8, 16))
    assert large <= small + SLACK, (small, large)


def resident_growth(count: int, backward: bool, run: str) -> int:
    """Bytes by which the resident set's peak grows over ``count`` images that share one image's memory."""
    program = f"""
import torch
from mmkernels.ops.patch_embed import cases
from mmkernels.testing.case import Case, leaves, map_tensors

sizes = {{**cases.DEFAULTS, "B": 1, "H": 224, "W": 224, "P": 16, "D": 32, "R": 1}}
inputs = cases.make_inputs(Case("memory", sizes), torch.bfloat16)
one = inputs["pixel_values"]
torch.set_num_threads(2)

def step(count):
    call = {{**inputs, "pixel_values": one.expand(count, -1, -1, -1)}}
    call = map_tensors(call, lambda t: t.requires_grad_({backward} and t.is_floating_point()))
    out = {run}(call)
    if {backward}:
        out.backward(out.detach())

def high_water():  # of this program; ru_maxrss starts at what the parent held
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])

step(16)
before = high_water()
step({count})
print(high_water() - before)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@STEPS
def test_the_process_holds_nothing_of_the_size_of_the_images(backward: bool) -> None:
    """512 images: 77 MB of pixels, 154 MB of patches in bf16; tokens are 6 MB, with their gradient 13 MB."""
    results = 512 * 197 * 32 * 2 * (2 if backward else 1)
    assert resident_growth(512, backward, "cases.run") < results + 32 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_process_check_sees_a_library_that_holds_images() -> None:
    assert resident_growth(512, False, "cases.library") > 154 * 10**6
