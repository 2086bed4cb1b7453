# SPDX-License-Identifier: Apache-2.0
"""What ``mrope`` and ``rope_write_kv`` both check: positions and the table of rotary channels."""

import itertools
import weakref
from typing import Any

import torch

from mmkernels import checks, transforms

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # not a tensor without values
# The last table of channels and its version: a decoder gives the same one at every layer.
_known: list[Any] = [lambda: None, 0]


def check_heads(op: str, name: str, heads: torch.Tensor, query: torch.Tensor) -> None:
    """Like ``query`` in all but the number of heads."""
    checks.like(op, name, heads, query, "query")
    given, expected = heads.shape, query.shape
    if len(given) != len(expected) or given[:-2] != expected[:-2] or given[-1] != expected[-1]:
        shape = [*expected[:-2], "heads", expected[-1]]
        checks.fail(op, name, list(given), f"{shape} beside query")


def check_table(
    op: str,
    query: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None,
    pairing: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``inv_freq`` in fp32, as transformers multiplies by it, and ``axis`` in int64."""
    if pairing not in ("half", "adjacent"):
        checks.fail(op, "pairing", repr(pairing), '"half" or "adjacent"')
    checks.floating(op, "inv_freq", inv_freq)
    d = query.shape[-1]
    if inv_freq.dim() != 1 or inv_freq.shape[0] > d or inv_freq.shape[0] % 2:
        expected = (
            f"[r], an even number of channels of at most {d} (one entry a channel, not a pair)"
        )
        checks.fail(op, "inv_freq", list(inv_freq.shape), expected)
    _on_device(op, "inv_freq", inv_freq, query)
    _check_channels(op, inv_freq, pairing)
    inv_freq = inv_freq if inv_freq.dtype == torch.float32 else inv_freq.float()
    if axis is None:
        return inv_freq, None
    _integer(op, "axis", axis)
    checks.shape(op, "axis", axis, tuple(inv_freq.shape), "[r]")
    _on_device(op, "axis", axis, query)
    return inv_freq, axis if axis.dtype == torch.int64 else axis.long()


def _check_channels(op: str, inv_freq: torch.Tensor, pairing: str) -> None:
    """Not transformers' table, of an entry a pair: both channels of a pair have one entry, so entries never only fall.

    Told from 8 entries on, on CPU alone: reading a GPU's would wait for it.
    """
    if torch.compiler.is_compiling():
        return
    if _known[0]() is inv_freq and _known[1] == inv_freq._version:
        return
    if type(inv_freq) not in _PLAIN or transforms.is_wrapped(inv_freq):
        return
    if inv_freq.device.type != "cpu" or inv_freq.shape[0] < 8:
        return
    values = inv_freq.tolist()
    if all(a > b for a, b in itertools.pairwise(values)):
        table = "torch.cat([inv_freq, inv_freq])"
        table = table if pairing == "half" else "inv_freq.repeat_interleave(2)"
        expected = (
            f"of an entry a channel, the same for both of a pair: {table} (or use rope_table)"
        )
        checks.fail(op, "inv_freq", f"{len(values)} falling entries, one a pair", expected)
    if not inv_freq.is_inference():  # such a tensor has no version
        _known[:] = weakref.ref(inv_freq), inv_freq._version


def positions_of(
    op: str, position_ids: torch.Tensor, axis: torch.Tensor | None, query: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[A, tokens…]`` in int64, and the axis; None where all axes are at one position."""
    _integer(op, "position_ids", position_ids)
    _on_device(op, "position_ids", position_ids, query)
    tokens = query.shape[:-2]
    if axis is not None and position_ids.dtype == torch.int64 and position_ids.shape[1:] == tokens:
        if position_ids.shape[0] > 0:
            return position_ids, axis
    given, dims = position_ids.dim(), len(tokens)
    if given > dims + (axis is not None) or given == 0:
        more = "[A, ...] with axis" if axis is not None else "no rows of axes without axis"
        checks.fail(op, "position_ids", list(position_ids.shape), f"{list(tokens)}, {more}")
    if given <= dims:  # text: one position for every axis
        position_ids, axis = position_ids.unsqueeze(0), None
    rows, last = position_ids.shape[0], position_ids.shape[1:]
    fits = last[-1] == tokens[-1] and all(
        n in (1, t) for n, t in zip(reversed(last[:-1]), reversed(tokens[:-1]), strict=False)
    )
    if not fits or (axis is not None and rows == 0):
        checks.fail(
            op, "position_ids", list(position_ids.shape), f"{list(tokens)} or [A, ...] of it"
        )
    return position_ids.long().expand(rows, *tokens), axis


def _integer(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, got {tensor.dtype}")


def _on_device(op: str, name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        checks.fail(op, name, tensor.device, f"on the device of query, {query.device}")
