# SPDX-License-Identifier: Apache-2.0
"""The public ``mrope``: what it computes, and the checks before it does."""

import torch

from mmkernels import checks
from mmkernels.ops.mrope.arguments import check_heads, check_table, positions_of
from mmkernels.ops.mrope.op import FORWARD

_OP = "mrope"


def mrope(
    query: torch.Tensor,
    key: torch.Tensor,
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    axis: torch.Tensor | None = None,
    *,
    pairing: str = "half",
    attention_scaling: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query and key by their positions, RoPE or M-RoPE, in one pass; for training.

    ``out[c] = x[c] · cos(angle[c]) ± x[partner(c)] · sin(angle[c])``, the minus for the first channel of a pair,
    ``angle[c] = position_ids[axis[c]] · inv_freq[c]``, for the r rotary channels c; the others are copied.

    Args:
        query: ``[B, L, heads, d]``, or packed ``[T, heads, d]``. Any strides: heads of ``[B, heads, L, d]`` are
            ``query.transpose(1, 2)``, read without a copy.
        key: The same with its own number of heads.
        position_ids: int64 or int32 ``[B, L]`` (``[T]``), broadcast over B, or ``[A, B, L]`` (``[A, T]``) with
            ``axis``. Without A, a text's, all axes are alike.
        inv_freq: ``[r]``, one entry for each rotary **channel**, r even, r ≤ d; the same for all heads. transformers
            keeps one a pair: ``torch.cat([inv_freq, inv_freq])`` for "half", ``repeat_interleave(2)`` for "adjacent".
            On CPU eight entries or more that only fall are an error; on CUDA they are not read.
        axis: ``[r]``, the row of ``position_ids`` each channel follows; None: one axis. ``rope_table`` makes
            both from a rotary module of transformers.
        pairing: ``"half"``: c and c + r/2 turn together (``rotate_half``: Llama, Qwen); ``"adjacent"``: 2i and
            2i + 1 (GPT-J, GLM, Ernie).
        attention_scaling: Multiplies cos and sin (YaRN and others).

    Returns:
        Both rotated, contiguous, in their shape and dtype (the autocast dtype under autocast).

    Gradients: query, key; nothing but positions and table is saved.

    Raises:
        ValueError, TypeError: Names argument, got, expected; of an axis that is no row its channel. On CUDA axes are
            not read: a wrong one turns by 0 and is raised by the next ``poll_errors()``.

    Numerics: angles, cos, sin and the rotation in fp32 (fp64 inputs: fp64 but for the angle), rounded once.

    Source: ``apply_rotary_pos_emb`` and the rotary modules of transformers; Qwen2-VL (Wang et al. 2024), 2.1.
    """
    checks.floating(_OP, "query", query)
    if query.dim() not in (3, 4):
        checks.fail(_OP, "query", list(query.shape), "[B, L, heads, d] or [T, heads, d]")
    check_heads(_OP, "key", key, query)
    inv_freq, axis = check_table(_OP, query, inv_freq, axis, pairing)
    position_ids, axis = positions_of(_OP, position_ids, axis, query)
    packed = query.dim() == 3
    if packed:
        query, key = query.unsqueeze(0), key.unsqueeze(0)
        position_ids = position_ids.unsqueeze(1)
    try:
        turned: tuple[torch.Tensor, torch.Tensor] = FORWARD(
            query, key, position_ids, inv_freq, axis, pairing, float(attention_scaling)
        )
    except RuntimeError as error:
        raise checks.as_value_error(_OP, error) from None
    return (turned[0].squeeze(0), turned[1].squeeze(0)) if packed else turned
