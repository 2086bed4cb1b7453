# SPDX-License-Identifier: Apache-2.0
"""A case: a named shape of an op. ``ops/<op>/cases.py`` lists them; tests and benchmarks walk them.

Every ``cases.py`` exports:

- ``CASES``, and ``make_inputs(case, dtype, device, seed, family) -> Inputs``; ``FAMILIES`` of values.
- ``run(inputs)``: the public op. ``eager(inputs)``: what transformers runs. ``library(inputs)``: the
  strongest public way, for benchmarks.
- ``magnitudes(inputs, power)``: inputs whose reference output is Σ|t|^power over the terms t of each
  output (and, by autograd, of each gradient); None where the bound is not that of one reduction.
- ``rounded_before(inputs)``: with ``magnitudes``, the value the op rounds to 16 bits before the output,
  if its contract says it rounds twice.
- ``traffic(inputs) -> (bytes, flops)``: what the op must move and multiply, at least.
- ``INVALID``: calls that must raise.
- ``APART``, of an op with several outputs, which ``run``, ``eager`` and ``library`` join: the same by name ("ours",
  "eager", "library"), their outputs apart, for benchmarks.
- ``DTYPES``, names of the dtypes to benchmark where they are not fp32 and bf16.
- Of an op without a gradient: ``results(inputs, function) -> Tensors``, ``reference_results(inputs)`` in fp64, and
  ``compared(inputs, got) -> list[Comparison]``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

Inputs = dict[str, Any]
Run = Callable[[Inputs], torch.Tensor]
Function = Callable[[Inputs], torch.Tensor | tuple[torch.Tensor, ...]]
# Sizes a bound is checked on where a shape is timed: the reference in fp64 takes long.
CHECK_AT_MOST = {"B": 2, "L": 1024, "V": 2048}
CHECK_QUICKLY = {"B": 1, "L": 256, "V": 512, "n": 64, "S": 2, "layers": 2}


def inference_only(run: Run) -> Run:
    """Marks what has no backward: tests and benchmarks then ask for none."""
    run.inference_only = True  # type: ignore[attr-defined]
    return run


@dataclass(frozen=True)
class Case:
    """Sizes by letter, and where the case is used: test, gradcheck, empty, bench."""

    name: str
    sizes: dict[str, Any] = field(hash=False)
    tags: frozenset[str] = frozenset({"test"})

    def __getattr__(self, letter: str) -> Any:
        try:
            return self.sizes[letter]
        except KeyError:
            raise AttributeError(letter) from None


@dataclass(frozen=True)
class Invalid:
    """A call that must raise ``error`` with a message matching ``message``."""

    name: str
    change: Callable[[Inputs], Inputs] = field(hash=False)
    message: str
    error: type[Exception] = ValueError


def leaves(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Float tensors by name, lists flattened as ``name[i]``, named tuples as ``name.field``: what has a gradient."""
    found: dict[str, torch.Tensor] = {}
    for name, value in inputs.items():
        items = [(name, value)]
        if isinstance(value, list):
            items = [(f"{name}[{i}]", v) for i, v in enumerate(value)]
        elif isinstance(value, tuple) and hasattr(value, "_asdict"):
            items = [(f"{name}.{key}", v) for key, v in value._asdict().items()]
        for key, tensor in items:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                found[key] = tensor
    return found


def map_tensors(inputs: Inputs, change: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
    """The inputs with every tensor replaced."""

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(v) for v in value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(visit, value))
        return change(value) if isinstance(value, torch.Tensor) else value

    return {name: visit(value) for name, value in inputs.items()}


def smaller(case: Case, inputs: Inputs, limits: dict[str, int]) -> Case:
    """The case itself if it is small; else few samples, a short text, a small vocabulary."""
    numbers = sum(t.numel() for t in leaves(inputs).values())
    if numbers < 2**20:
        return case
    sizes = {k: min(v, limits[k]) if k in limits else v for k, v in case.sizes.items()}
    if "grids" in sizes:  # of a packed call, one image
        sizes["grids"] = sizes["grids"][:1]
    return replace(case, sizes=sizes)


def timed(cases: ModuleType) -> dict[str, Function]:
    """What is timed of an op: ours and the baselines that every ``cases.py`` has."""
    every = {"ours": cases.run, "eager": cases.eager, "library": cases.library}
    return {**every, **getattr(cases, "APART", {})}
