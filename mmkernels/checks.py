# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by the ops, so that every error reads alike: op, argument, got, expected."""

from collections.abc import Sequence
from typing import NoReturn

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def fail(op: str, argument: str, got: object, expected: str) -> NoReturn:
    """Raises the one error every shape fault becomes."""
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def tensor(op: str, argument: str, value: object) -> None:
    """A tensor, not a list or a number."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(value).__name__}")


def grid(op: str, argument: str, value: torch.Tensor | Sequence[Sequence[int]]) -> torch.Tensor:
    """A grid given as lists as a tensor, ``[images, 3]`` if it is empty."""
    if isinstance(value, torch.Tensor):
        return value
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        fail(op, argument, value, "a tensor, or as many numbers for every image")
    return found if found.numel() else found.long().view(0, 3)


def floating(op: str, argument: str, value: torch.Tensor) -> None:
    """Float tensors of the four supported dtypes."""
    tensor(op, argument, value)
    if value.dtype not in FLOATS:
        names = "float64, float32, float16 or bfloat16"
        raise TypeError(f"{op}: {argument} must be {names}, got {value.dtype}")


def shape(
    op: str, argument: str, tensor: torch.Tensor, expected: tuple[int, ...], letters: str
) -> None:
    """``tensor`` has exactly this shape; ``letters`` says what the numbers are."""
    if tuple(tensor.shape) != expected:
        fail(op, argument, list(tensor.shape), f"{letters} = {list(expected)}")


def like(op: str, argument: str, value: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """``value`` shares dtype and device with ``other``. Under autocast the op casts, so dtypes may differ."""
    tensor(op, argument, value)
    if value.device != other.device:
        fail(op, argument, value.device, f"on the device of {name}, {other.device}")
    if value.dtype not in FLOATS:
        floating(op, argument, value)
    if value.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
        fail(op, argument, value.dtype, f"of the dtype of {name}, {other.dtype}")


def dtype_of(tensor: torch.Tensor) -> torch.dtype:
    """What an op makes of it: the autocast dtype under autocast, but of float64."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def as_value_error(op: str, error: RuntimeError) -> Exception:
    """What the stable ABI, which can only throw RuntimeError, says of a wrong value: a ValueError, as elsewhere."""
    text = str(error)
    return ValueError(text.splitlines()[0]) if text.startswith(f"{op}: ") else error
