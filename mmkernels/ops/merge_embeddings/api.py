# SPDX-License-Identifier: Apache-2.0
"""The public ``merge_embeddings``: what it computes, and the checks before it does."""

import math
from collections.abc import Sequence

import torch

from mmkernels import backends, checks, transforms
from mmkernels.ops.merge_embeddings.op import FORWARD, OUT

_OP = "merge_embeddings"
MOST_MODALITIES = 8  # of a call: a kernel takes their pointers by value


def merge_embeddings(
    input_ids: torch.Tensor,
    embed_weight: torch.Tensor | None,
    features: Sequence[torch.Tensor],
    *,
    feature_token_ids: Sequence[int] = (),
    feature_rows: Sequence[torch.Tensor] | None = None,
    inputs_embeds: torch.Tensor | None = None,
    embed_scale: float | None = None,
    padding_idx: int | None = None,
    feature_counts: Sequence[Sequence[int]] | None = None,
    check: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Looks up token embeddings and puts features in the placeholders' rows, in one pass.

    ``out[t] = features[m][k]`` where token t is the k-th placeholder of modality m (in memory order
    over the batch), else ``embed_scale · embed_weight[input_ids[t]]``. Equals ``embedding`` +
    ``masked_scatter`` once per modality; each row is read once and written once.

    Args:
        input_ids: ``[..., L]`` int64 or int32. Placeholder ids may lie outside the vocabulary.
        embed_weight: ``[V, D]``; None with ``inputs_embeds``.
        features: At most 8 tensors ``[n_m, D]`` (or ``[..., D]``), one a modality, of any float dtype; cast to the
            text's as rows are copied (on CUDA before), their gradients back.
        feature_token_ids: One placeholder id a modality.
        feature_rows: Instead of by id, places feature k of modality m at token
            ``feature_rows[m][k]`` of the flattened batch: for models that may emit the id themselves.
        inputs_embeds: ``[..., L, D]``, replaces the lookup.
        embed_scale: Multiplies looked-up rows, not features (Gemma).
        padding_idx: This row of ``embed_weight`` gets no gradient, as in ``nn.Embedding``.
        feature_counts: For each modality, the placeholders expected in each sample; checked (on CUDA only their totals,
            which are the features' rows).
        check: On CPU values are always checked first. On CUDA ``"sync"`` (eager default) checks with
            one small copy, ``"async"`` (default under compile and capture) never syncs: a bad row
            is zero and the error is raised at the next ``poll_errors()``.
        out: Contiguous ``[..., L, D]`` of the result's dtype to write to, without autograd: page faults of fresh
            memory cost more than copying on CPU, and a CUDA graph wants the same address.

    Returns:
        ``[..., L, D]`` in the text's dtype (the autocast dtype under autocast); ``out`` if given.

    Gradients: embed_weight, inputs_embeds, features.

    Raises:
        ValueError, TypeError: Names argument, got, expected; for counts also sample and modality.

    Numerics: rows are copied bit by bit, those of another dtype cast as ``Tensor.to`` does; the embedding gradient is
        summed in token order, in fp32 (fp64 of fp32 ones).

    Source: ``LlavaModel.forward``, ``Qwen2VLModel.forward`` of transformers (``masked_scatter``).
    """
    text = _check_text(input_ids, embed_weight, inputs_embeds)
    flat = checked_features(_OP, features, text)
    _check_places(flat, feature_token_ids, feature_rows)
    counts = _counts(feature_counts, len(flat), input_ids)
    if inputs_embeds is not None and embed_scale is not None:
        checks.fail(_OP, "embed_scale", embed_scale, "None with inputs_embeds (scale them first)")
    _check_mode(check)
    arguments = (
        input_ids, embed_weight if inputs_embeds is None else None, inputs_embeds, flat, list(feature_token_ids),
        list(feature_rows or ()), counts, embed_scale,
    )  # fmt: skip
    try:
        if out is None:
            merged: torch.Tensor = FORWARD(*arguments, padding_idx)[0]
        else:
            _check_out(out, input_ids, text, flat)
            OUT(out, *arguments)
            merged = out
    except RuntimeError as error:
        raise checks.as_value_error(_OP, error) from None
    if input_ids.is_cuda and check != "async" and not _must_not_sync():
        poll_errors(input_ids.device)
    return merged


def poll_errors(device: torch.device | str = "cuda") -> None:
    """Raises the first value error a CUDA kernel latched since the last call (one small copy); without CUDA, none."""
    if not torch.cuda.is_available():
        return
    index = torch.device(device).index
    index = torch.cuda.current_device() if index is None else index
    for poll in backends.POLLS:
        poll(index)
    if not hasattr(torch.ops.mmkernels, "merge_embeddings_poll"):
        return  # without the CUDA kernel the reference has checked already
    kind, where, value, limit = torch.ops.mmkernels.merge_embeddings_poll(index)
    if kind == 1:
        raise ValueError(
            f"{_OP}: input_ids (flat index {where}) is {value}, expected an id in [0, {limit}) or a feature token id"
        )
    if kind == 2:
        raise ValueError(
            f"{_OP}: features[{where}] has {limit} rows, but input_ids has {value} placeholders"
        )
    if kind == 4:
        raise ValueError(
            f"pack_embeddings: row_source[{where}] is {value}, expected an id in [0, {limit}) or a feature row"
        )
    if kind == 3:
        raise ValueError(
            f"{_OP}: feature_rows (entry {where}) is {value}, expected a free token index in [0, {limit})"
        )


def _check_out(
    out: torch.Tensor, input_ids: torch.Tensor, text: torch.Tensor, features: list[torch.Tensor]
) -> None:
    if out.device != text.device:
        checks.fail(_OP, "out", out.device, f"on the device of the embeddings, {text.device}")
    if out.dtype != checks.dtype_of(text):
        checks.fail(_OP, "out", out.dtype, f"of the dtype of the result, {checks.dtype_of(text)}")
    checks.shape(_OP, "out", out, (*input_ids.shape, text.shape[-1]), "[*input_ids.shape, D]")
    if not out.is_contiguous():
        checks.fail(_OP, "out", f"strides {list(out.stride())}", "contiguous")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, text, *features)):
        checks.fail(_OP, "out", "given", "None where a gradient is needed")
    if any(map(transforms.has_tangent, ((out,), (text,), features))):
        checks.fail(_OP, "out", "given", "None under forward-mode AD")


def _must_not_sync() -> bool:
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def _check_mode(check: str | None) -> None:
    if check not in (None, "sync", "async"):
        checks.fail(_OP, "check", repr(check), '"sync", "async" or None')


def _check_text(
    input_ids: torch.Tensor, embed_weight: torch.Tensor | None, inputs_embeds: torch.Tensor | None
) -> torch.Tensor:
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_OP}: input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.dim() == 0:
        checks.fail(_OP, "input_ids", "a scalar", "[..., L]")
    if inputs_embeds is not None:
        checks.floating(_OP, "inputs_embeds", inputs_embeds)
        expected = (*input_ids.shape, inputs_embeds.shape[-1])
        checks.shape(_OP, "inputs_embeds", inputs_embeds, expected, "[*input_ids.shape, D]")
        text = inputs_embeds
    elif embed_weight is not None:
        if embed_weight.dim() != 2 or embed_weight.shape[0] == 0:
            checks.fail(_OP, "embed_weight", list(embed_weight.shape), "[V, D] with V > 0")
        checks.floating(_OP, "embed_weight", embed_weight)
        text = embed_weight
    else:
        checks.fail(_OP, "embed_weight", None, "a tensor unless inputs_embeds is given")
    if text.device != input_ids.device:
        checks.fail(
            _OP, "input_ids", input_ids.device, f"on the device of the embeddings, {text.device}"
        )
    return text


def checked_features(
    op: str, features: Sequence[torch.Tensor], text: torch.Tensor
) -> list[torch.Tensor]:
    """Of each modality as rows ``[n, D]``, checked against the embeddings."""
    if len(features) > MOST_MODALITIES:
        checks.fail(op, "features", f"{len(features)} tensors", f"at most {MOST_MODALITIES}")
    return [_checked_feature(op, f, m, text) for m, f in enumerate(features)]


def _checked_feature(op: str, feature: torch.Tensor, m: int, text: torch.Tensor) -> torch.Tensor:
    name = f"features[{m}]"
    if isinstance(feature, list | tuple):
        expected = "one tensor [n, D] (torch.cat joins the images of a modality)"
        checks.fail(op, name, f"a {type(feature).__name__} of {len(feature)}", expected)
    checks.floating(op, name, feature)
    if feature.device != text.device:
        checks.fail(op, name, feature.device, f"on the device of the embeddings, {text.device}")
    if feature.dim() < 2 or feature.shape[-1] != text.shape[-1]:
        checks.fail(op, name, list(feature.shape), f"[n, D] with D = {text.shape[-1]}")
    return feature.reshape(-1, feature.shape[-1])


def _check_places(
    features: list[torch.Tensor],
    feature_token_ids: Sequence[int],
    feature_rows: Sequence[torch.Tensor] | None,
) -> None:
    M = len(features)
    if feature_rows is None:
        if len(feature_token_ids) != M:
            checks.fail(
                _OP,
                "feature_token_ids",
                list(feature_token_ids),
                f"one id for each of {M} features",
            )
        if len(set(feature_token_ids)) != M:
            checks.fail(_OP, "feature_token_ids", list(feature_token_ids), "all different")
        return
    if len(feature_rows) != M:
        checks.fail(
            _OP, "feature_rows", f"{len(feature_rows)} tensors", f"one for each of {M} features"
        )
    for m, (rows, feature) in enumerate(zip(feature_rows, features, strict=True)):
        checks.tensor(_OP, f"feature_rows[{m}]", rows)
        if rows.dtype != torch.int64:
            raise TypeError(f"{_OP}: feature_rows[{m}] must be int64, got {rows.dtype}")
        checks.shape(
            _OP, f"feature_rows[{m}]", rows, (feature.shape[0],), f"[rows of features[{m}]]"
        )
        if rows.device != feature.device:
            checks.fail(_OP, f"feature_rows[{m}]", rows.device, f"on {feature.device}")


def _counts(
    feature_counts: Sequence[Sequence[int]] | None, M: int, input_ids: torch.Tensor
) -> list[int] | None:
    if feature_counts is None:
        return None
    samples = math.prod(input_ids.shape[:-1])
    if len(feature_counts) != M or any(len(c) != samples for c in feature_counts):
        got = [len(c) for c in feature_counts]
        checks.fail(
            _OP,
            "feature_counts",
            f"lengths {got}",
            f"{M} lists of {samples} numbers (one a sample)",
        )
    return [int(n) for counts in feature_counts for n in counts]
