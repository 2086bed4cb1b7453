# SPDX-License-Identifier: Apache-2.0
"""What tests, benchmarks, ``doctor`` and ``bench`` share: cases, the error bound, which kernel ran, and timing."""

from mmkernels.testing.case import Case, Inputs, Invalid
from mmkernels.testing.watch import captured_calls, which_kernel_ran
from mmkernels.testing.yardstick import Comparison, compare, gradients, in_fp64

__all__ = [
    "Case",
    "Comparison",
    "Inputs",
    "Invalid",
    "captured_calls",
    "compare",
    "gradients",
    "in_fp64",
    "which_kernel_ran",
]
