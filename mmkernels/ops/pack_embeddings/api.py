# SPDX-License-Identifier: Apache-2.0
"""The public ``pack_embeddings``."""

from collections.abc import Sequence

import torch

from mmkernels import checks
from mmkernels.ops.merge_embeddings.api import checked_features
from mmkernels.ops.pack_embeddings.op import FORWARD
from mmkernels.ops.pack_embeddings.plan import PackPlan

_OP = "pack_embeddings"


def pack_embeddings(
    plan: PackPlan | torch.Tensor,
    embed_weight: torch.Tensor,
    features: Sequence[torch.Tensor] = (),
    *,
    embed_scale: float | None = None,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """The packed sequence of a plan: each row is read once and written once.

    ``out[t] = embed_scale · embed_weight[s]`` where s = ``plan.row_source[t]`` ≥ 0, else row ``-1 - s`` of the
    features, counted through the modalities.

    Args:
        plan: Of ``plan_pack``, or its ``row_source`` ``[T]`` int64; on the device of the embeddings.
        embed_weight: ``[V, D]``.
        features: At most 8 of ``[n_m, D]`` (or ``[..., D]``), one a modality, over the samples as given to
            ``plan_pack``, of any float dtype; cast to that of embed_weight as rows are copied. Rows without a place (in
            another bin): gradient 0.
        embed_scale: Multiplies looked-up rows, not features (Gemma).
        padding_idx: This row of ``embed_weight`` gets no gradient.

    Returns:
        ``[T, D]`` in the dtype of embed_weight.

    Gradients: embed_weight, features.

    Raises:
        ValueError, TypeError: Names argument, got, expected; on CPU before anything is written. On CUDA a source out of
            range becomes a row of zeros and an error at the next ``poll_errors()``; there is no host sync. That no
            feature row has two places is checked on CPU only (``plan_pack`` never gives it any): on CUDA its gradient
            would be that of either.

    Numerics: rows are copied bit by bit; the embedding gradient is summed in row order, in fp32 (fp64 of
        fp32 ones).

    Source: ``LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal`` (LLaVA), one pass instead of a loop.
    """
    source = plan.row_source if isinstance(plan, PackPlan) else plan
    if source.dtype != torch.int64 or source.dim() != 1:
        checks.fail(_OP, "row_source", f"{source.dtype} {list(source.shape)}", "int64 [T]")
    checks.floating(_OP, "embed_weight", embed_weight)
    if embed_weight.dim() != 2:
        checks.fail(_OP, "embed_weight", list(embed_weight.shape), "[V, D]")
    if source.device != embed_weight.device:
        checks.fail(_OP, "row_source", source.device, f"on {embed_weight.device}")
    flat = checked_features(_OP, features, embed_weight)
    try:
        packed: torch.Tensor = FORWARD(source, embed_weight, flat, embed_scale, padding_idx)
    except RuntimeError as error:
        raise checks.as_value_error(_OP, error) from None
    return packed
