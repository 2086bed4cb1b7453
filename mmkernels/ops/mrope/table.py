# SPDX-License-Identifier: Apache-2.0
"""The table of rotary channels, read off a rotary module by what it does.

transformers has many ways to lay out channels (sections, every third, h and w in turns, N axes), in a method here, in
``apply_rotary_pos_emb`` there. So nothing is known by name: the module and its function rotate unit vectors.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mmkernels.ops.mrope.reference import mrope


class RopeTable(NamedTuple):
    """What ``mrope`` and ``rope_write_kv`` ask for beside positions, in their order."""

    inv_freq: torch.Tensor  # [r] fp32
    axis: torch.Tensor | None  # [r] int64
    pairing: str
    attention_scaling: float


def rope_table(
    rotary_emb: torch.nn.Module,
    head_dim: int,
    *,
    layer_type: str | None = None,
    apply_rotary_pos_emb: Callable[..., Any] | None = None,
) -> RopeTable:
    """The table of a transformers model from its ``rotary_emb`` (``inv_freq``, ``forward(x, position_ids)``).

    Args:
        rotary_emb: ``model.model.rotary_emb`` or the like. Its frequencies as they are now: types that change them
            with the length of a text (dynamic, longrope) have no one table.
        head_dim: d.
        layer_type: Of a module with frequencies for each type of layer (Gemma3, Cohere Compass).
        apply_rotary_pos_emb: How cos and sin meet query and key; the one of ``rotary_emb``'s file if None.

    Raises:
        ValueError: The module does not turn pairs of channels, each with one of its frequencies and one axis.
    """
    module: Any = rotary_emb
    apply = (
        apply_rotary_pos_emb or vars(sys.modules[type(module).__module__])["apply_rotary_pos_emb"]
    )
    prefix = f"{layer_type}_" if layer_type else ""
    sections = getattr(module, "mrope_section", None) or (0,)
    known = getattr(module, f"{prefix}inv_freq").detach().float().cpu()
    A = len(sections[layer_type] if isinstance(sections, dict) else sections)
    r = 2 * len(known)
    unit = torch.eye(A, dtype=torch.int64)
    turns = torch.stack([_turn(module, apply, position, head_dim, layer_type) for position in unit])
    pairing = "adjacent" if r > 2 and turns[:, 0, 1].any() else "half"
    channel = torch.arange(r)
    partner = (channel + r // 2) % r if pairing == "half" else channel ^ 1
    # Row c of a turn holds cos at c and ∓sin at its partner, of the angle this axis gives channel c.
    sin = torch.where(channel < partner, -1, 1) * turns[:, channel, partner]
    angle = torch.atan2(sin, turns[:, channel, channel])
    axis = angle.abs().argmax(0)
    inv_freq = known[(angle[axis, channel, None] - known).abs().argmin(1)]
    scale = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    table = RopeTable(inv_freq, axis if A > 1 else None, pairing, scale)
    _check(
        module,
        table,
        torch.arange(2, 2 + A),
        _turn(module, apply, torch.arange(2, 2 + A), head_dim, layer_type),
    )
    return table


def _check(module: Any, table: RopeTable, position: torch.Tensor, turn: torch.Tensor) -> None:
    unit = torch.eye(len(turn))[None, None]
    found = mrope(unit, unit, position.view(-1, 1, 1), *table)[0][0, 0].T
    if not torch.allclose(found, turn, atol=1e-4):
        expected = "turn pairs of channels, each channel along one axis"
        raise ValueError(f"rope_table: rotary_emb must {expected}, got {type(module).__name__}")


def _turn(
    module: Any, apply: Callable[..., Any], position: torch.Tensor, d: int, layer_type: str | None
) -> torch.Tensor:
    """``[out, in]``: what a token at this position (one number an axis) makes of each channel."""
    device = next(module.buffers()).device
    ids = position.view(-1, 1, 1) if len(position) > 1 else position.view(1, 1)
    more = {"layer_type": layer_type} if layer_type else {}
    cos, sin = module(torch.zeros(1, device=device), ids.to(device), **more)
    heads = torch.eye(d, device=device).view(1, d, 1, d)
    turned: torch.Tensor = apply(heads, heads, cos, sin)[0]
    return turned.view(d, d).T.float().cpu()
