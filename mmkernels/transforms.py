# SPDX-License-Identifier: Apache-2.0
"""Forward-mode AD and ``torch.func``: what of them the kernels can serve, and what the reference must.

A kernel has a forward and a backward, but no rule for tangents. Under ``torch.func.vmap`` an op runs once a sample.
Wherever a tangent flows (``jvp``, ``jacfwd``, ``hessian``, ``forward_ad``), and under ``torch.func.grad`` and
``vjp``, the public ops run their reference: plain PyTorch, which every transform can follow.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._C._functorch as functorch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

_stack = functorch.get_interpreter_stack  # None outside torch.func
_VMAP = functorch.TransformType.Vmap


def without_kernel(args: tuple[Any, ...]) -> str:
    """What the kernels do not follow in this call; empty where they can serve it."""
    active = _stack()
    if active is None and forward_ad._current_level < 0:
        return ""
    if active is None or all(level.key() == _VMAP for level in active):
        return "forward-mode AD" if has_tangent(args) else ""
    if not any(_tracked(t) for t in _tensors(args) if t.is_floating_point()):
        return ""
    return "forward-mode AD" if forward_ad._current_level >= 0 else "torch.func.grad or vjp"


def _tracked(tensor: torch.Tensor) -> bool:
    """Whether a ``jvp`` or ``grad`` around the call follows it."""
    while is_wrapped(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def plain_attention(args: tuple[Any, ...]) -> AbstractContextManager[None]:
    """torch's SDPA in plain products where a kernel of torch's own could not be followed either."""
    if torch.compiler.is_compiling() or not without_kernel(args):
        return contextlib.nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether ``torch.func`` stands around it, so that its values may not be read."""
    return bool(functorch.is_functorch_wrapped_tensor(tensor))


def has_tangent(args: Any) -> bool:
    """Whether a tensor among ``args`` (lists too) carries a tangent of the current dual level."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in _tensors(args))


def refuse_tangents(op: str, **tensors: torch.Tensor | None) -> None:
    """RuntimeError naming ``op`` where one of its arguments has a tangent, which would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if tensor is not None and has_tangent((tensor,)):
            raise RuntimeError(f"{op}: {name} has a tangent, but the op has no forward-mode AD")


def guarded(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The autograd kernel of a raw op, with an error where a derivative would be lost or cannot be had."""
    public = name.removesuffix("_backward")
    remedy = f"call mmkernels.{public}, uncompiled"

    def run(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and has_tangent(args):
            raise RuntimeError(f"{name}: the raw op has no forward-mode AD; {remedy}")
        if _stack() is not None and any(t.requires_grad for t in _tensors(args)):
            raise RuntimeError(f"{name}: the raw op has no torch.func.grad or vjp; {remedy}")
        return kernel(keyset, *args)

    return run


def looped(op: str, overload: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for ``torch.func.vmap``: one call a sample, whose results are stacked."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"{op}: vmap must have at least one sample, got 0")
        each = [overload(*_sample(args, in_dims, i)) for i in range(info.batch_size)]
        return _stacked(each)

    return rule


def _sample(args: Any, in_dims: Any, i: int) -> list[Any]:
    found = []
    for value, dim in zip(args, in_dims, strict=True):
        if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
            found.append(_sample(value, dim, i))
        else:
            found.append(value if dim is None else value.select(dim, i))
    return found


def _stacked(each: list[Any]) -> tuple[Any, Any]:
    """Of tensors, and of lists and tuples of them: all samples, and their dimension, 0."""
    if isinstance(each[0], torch.Tensor):
        return torch.stack(each), 0
    pairs = [_stacked(list(values)) for values in zip(*each, strict=True)]
    kind = type(each[0])
    return kind(p[0] for p in pairs), kind(p[1] for p in pairs)


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for value in args:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
