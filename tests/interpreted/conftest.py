# SPDX-License-Identifier: Apache-2.0
"""Triton kernels under Triton's interpreter, as the CPU kernels of the ops: autograd, checks and all.

``TRITON_INTERPRET=1 pytest tests/interpreted``. The variable must be set before Triton is imported, and
the kernels then run on CPU tensors only, so without it nothing here is collected.

The interpreter of Triton 3.7 differs from a GPU in three operations, put right here so that the bounds
need no slack: bf16 products multiply the bit patterns, fp32 → bf16 truncates, and fma rounds twice.
"""

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
_MESSAGE = "tests/interpreted: nothing collected; run it alone with TRITON_INTERPRET=1"

if INTERPRETED:
    os.environ["MMKERNELS_NATIVE"] = "0"  # leaves the CPU key of the ops free


def pytest_report_header(config: pytest.Config) -> str:
    return "Triton kernels run under the interpreter" if INTERPRETED else _MESSAGE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not INTERPRETED:
        terminalreporter.write_line(_MESSAGE)


def _faithful_interpreter() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    convert, dot = interpreter._convert_float, builder.create_dot

    def nearest_even(data, source, target, rounding_mode):  # type: ignore[no-untyped-def]
        if source != tl.float32 or target != tl.bfloat16:
            return convert(data, source, target, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(data), np.uint16(0x7FC0), rounded.astype(np.uint16))

    def dot_of_values(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        def widened(t):  # type: ignore[no-untyped-def]
            if t.dtype.scalar != tl.bfloat16:
                return t
            return handle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

        return dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def fma(self, x, y, z):  # type: ignore[no-untyped-def]
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return handle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter._convert_float = nearest_even
    builder.create_dot, builder.create_fma = dot_of_values, fma


def _triton_on_cpu() -> None:
    import importlib

    import torch

    import mmkernels  # noqa: F401
    from mmkernels import backends

    def launcher(op, name):  # type: ignore[no-untyped-def]
        module = importlib.import_module(f"mmkernels.ops.{op}.triton")
        reference = importlib.import_module(f"mmkernels.ops.{op}.reference")

        def launch(*args):  # type: ignore[no-untyped-def]
            wide = any(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in args)
            return getattr(reference if wide else module, name)(*args)

        return launch

    for name in sorted(backends.TRITON_OPS):
        backends.LIB.impl(name, launcher(name.removesuffix("_backward"), name), "CPU")


if INTERPRETED:
    _faithful_interpreter()
    _triton_on_cpu()
