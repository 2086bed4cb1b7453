# SPDX-License-Identifier: Apache-2.0
"""``mmkernels doctor``: every op, forward and backward, against the fp64 reference on this machine."""

import argparse
import importlib

import torch

from mmkernels import OPS, info
from mmkernels.testing import which_kernel_ran, yardstick

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(args: argparse.Namespace) -> int:
    """0 if every kernel is within the bound (TOLERANCES.md); else 1, with what to do."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    failures = []
    for op in OPS:
        for device in devices:
            for dtype in DTYPES:
                problem, kernel = examine(op, device, dtype)
                name = f"{op:17} {device:5} {str(dtype).removeprefix('torch.'):9} {kernel:10}"
                print(f"{name} {'ok' if not problem else 'WRONG: ' + problem}", flush=True)
                if problem:
                    failures.append(name)
    print(info.verdict())
    if failures:
        print(
            f"{len(failures)} checks failed. Until this is understood, run with "
            "MMKERNELS_BACKEND=reference, and report the output of `mmkernels info --json`."
        )
    return 1 if failures else 0


def examine(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    """``(problem or "", kernel that ran)`` over the op's test cases."""
    cases = importlib.import_module(f"mmkernels.ops.{op}.cases")
    kernel = "?"
    for case in [c for c in cases.CASES if "test" in c.tags][:6]:
        inputs = cases.make_inputs(case, dtype, device)
        try:
            with which_kernel_ran() as ran:
                cases.run(inputs)
            kernel = ran.get(op, "?")
            for comparison in yardstick.examined(cases, inputs)[1]:
                if not comparison.ratio <= 1:
                    return f"case {case.name}, {comparison}", kernel
        except Exception as error:  # a doctor reports, whatever the illness
            return f"case {case.name}, {type(error).__name__}: {error}", kernel
    return "", kernel
