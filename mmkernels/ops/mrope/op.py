# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as torch ops: schema, shapes, autograd. The contract every kernel keeps.

``mmkernels::mrope``, ``mmkernels::mrope_backward``; arguments are those of ``reference.py``. Saved for the backward:
positions and table alone. Kernels: ``csrc/rope/`` (C++ on CPU, CUDA C++ on CUDA).
"""

from typing import Any

import torch

from mmkernels import backends
from mmkernels.ops.mrope import reference

_TABLE = "Tensor position_ids, Tensor inv_freq, Tensor? axis, str pairing, float attention_scaling"


def _fake(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


FORWARD = backends.define(
    "mrope",
    f"(Tensor query, Tensor key, {_TABLE}) -> (Tensor, Tensor)",
    reference=reference.mrope,
    fake=_fake,
    autocast_skip=(3,),
)
BACKWARD = backends.define(
    "mrope_backward",
    f"(Tensor grad_query, Tensor grad_key, {_TABLE}) -> (Tensor, Tensor)",
    reference=reference.mrope_backward,
    fake=_fake,
    autocast_skip=(0, 1, 3),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, _, position_ids, inv_freq, axis, ctx.pairing, ctx.attention_scaling = inputs
    ctx.save_for_backward(position_ids, inv_freq, axis)


def _backward(
    ctx: Any, grad_query: torch.Tensor, grad_key: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    query, key = BACKWARD.overload(
        grad_query, grad_key, *ctx.saved_tensors, ctx.pairing, ctx.attention_scaling
    )
    return query, key, None, None, None, None, None


backends.differentiable("mrope", _backward, _save)


def _poll(device: int) -> None:
    """Of all rotary ops, whose kernel is one."""
    if not hasattr(torch.ops.mmkernels, "rope_poll"):
        return  # without the CUDA kernel the reference has checked already
    kind, where, value, limit = torch.ops.mmkernels.rope_poll(device)
    if kind == 1:
        expected = f"a slot in [0, {limit}) or -1 (skipped)"
        raise ValueError(f"rope_write_kv: slot_mapping[{where}] is {value}, expected {expected}")
    if kind == 2:
        expected = f"a row of position_ids in [0, {limit})"
        raise ValueError(f"mrope: axis[{where}] is {value}, expected {expected}")


backends.POLLS.append(_poll)
