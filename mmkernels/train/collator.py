# SPDX-License-Identifier: Apache-2.0
"""A batch without padding: samples behind one another, told apart by what transformers' attention reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.ops.mrope_positions.families import FAMILIES, family_of
from mmkernels.train.packable import decoder_of, why_not_packed

OURS = ("input_ids", "labels", "attention_mask", "position_ids")  # made anew
BY_TOKEN = ("mm_token_type_ids", "token_type_ids")  # one value a token, as input_ids
OF_POSITIONS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
MEDIA = ("image", "video", "audio")
# Where a sample brings one of these, its model knows real pixels and frames from padding.
SIZES = ("pixel_attention_mask", "image_sizes", "feature_attention_mask", "input_features_mask")

Sample = Mapping[str, Any]


class PackingCollator:
    """Samples of transformers' processors → one packed batch of keyword arguments for the model.

    ``input_ids`` ``[1, T]``; ``labels``, -100 on placeholders, padding and each sample's first token;
    ``position_ids``, ``[1, T]``, from 0 in every sample, or ``[4, 1, T]`` (text, t, h, w) for M-RoPE models;
    ``use_cache=False``: with a cache, transformers does not look for packed samples.
    ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32, ``max_length_q``, ``max_length_k`` are those of
    ``FlashAttentionKwargs``. Attention by SDPA finds the samples by position_ids.
    Everything else a sample holds (pixel_values, image_grid_thw, …) is concatenated along its first dimension.

    A sample may hold tensors, numpy arrays or lists, as ``datasets.Dataset`` gives them; None counts as absent.
    Labels are a sample's own, or its input_ids where it brings none. ``mm_token_type_ids`` of a text row are 0.
    Pictures in different numbers of tiles or sizes are padded with zeros, if the samples bring masks or sizes.

    Args:
        config: The model's transformers config; None for a decoder of text that transformers can pack.
            Its placeholder ids and, if its ``model_type`` has M-RoPE, its rule are read from it.
        cu_seq_lens: False leaves them out, for attention by SDPA, which has no use for them.

    Raises:
        ValueError: A model that is not known to keep packed samples apart, with the reason (docs/support.md);
            a sample without tokens, of several rows, or whose field does not fit its neighbours', by number and
            name; what ``plan_pack`` and ``mrope_positions`` raise.

    Source: transformers' ``DataCollatorWithFlattening``, which leaves media and M-RoPE to the caller. Batches by a
    budget of tokens: ``mmkernels.pack_bins(lengths, max_tokens)`` is their sampler.
    """

    def __init__(self, config: Any = None, cu_seq_lens: bool = True) -> None:
        config = decoder_of(config)
        if reason := why_not_packed(config):
            raise ValueError(f"PackingCollator: {reason}")
        names = [f"{medium}_token_{end}" for medium in MEDIA for end in ("id", "index")]
        ids = [getattr(config, name, None) for name in names]
        self.placeholders = list(dict.fromkeys(i for i in ids if isinstance(i, int)))
        has_axes = getattr(config, "model_type", None) in FAMILIES
        self.family = family_of(config) if has_axes else None
        self.cu_seq_lens = cu_seq_lens

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        found = [_read(sample, i) for i, sample in enumerate(samples)]
        kept = [_kept(sample, i) for i, sample in enumerate(found)]
        ids = [_row(s["input_ids"], k) for s, k in zip(found, kept, strict=True)]
        labels = [
            _row(s["labels"], k) if "labels" in s else row
            for s, k, row in zip(found, kept, ids, strict=True)
        ]
        plan = mmkernels.plan_pack(
            ids, feature_token_ids=self.placeholders, expand=False, labels=labels
        )
        assert plan.labels is not None
        batch: dict[str, Any] = {"input_ids": plan.input_ids[None], "labels": plan.labels[None]}
        for name in dict.fromkeys(n for s in found for n in s if n not in OURS):
            if name in BY_TOKEN:
                rows = zip(found, kept, ids, strict=True)
                types = [self._types(name, i, *row) for i, row in enumerate(rows)]
                batch[name] = torch.cat(types)[None]
            else:
                batch[name] = _joined(name, found)
        batch |= {"position_ids": self._positions(plan, batch), "use_cache": False}
        if self.cu_seq_lens:
            batch |= {"cu_seq_lens_q": plan.cu_seqlens, "cu_seq_lens_k": plan.cu_seqlens}
            batch |= {"max_length_q": plan.max_seqlen, "max_length_k": plan.max_seqlen}
        return batch

    def _types(
        self, name: str, i: int, sample: Sample, kept: torch.Tensor | None, ids: torch.Tensor
    ) -> torch.Tensor:
        """A value a token: the sample's own, or 0 where it is text."""
        if name in sample:
            return _row(sample[name], kept)
        if self.placeholders and torch.isin(ids, torch.tensor(self.placeholders)).any():
            raise ValueError(
                f"PackingCollator: sample {i} has placeholders and no {name}; its neighbours bring them"
            )
        return torch.zeros_like(ids)

    def _positions(self, plan: mmkernels.PackPlan, batch: dict[str, Any]) -> torch.Tensor:
        if self.family is None:
            return plan.position_ids[None]
        media = {name: batch[name] for name in OF_POSITIONS if name in batch}
        return mmkernels.mrope_positions(
            batch["input_ids"], batch.get("mm_token_type_ids"), family=self.family, cu_seqlens=plan.cu_seqlens,
            **media,
        )[0]  # fmt: skip


def _read(sample: Sample, i: int) -> dict[str, Any]:
    """The sample's fields as tensors; what is None or empty is left out."""
    if sample.get("input_ids") is None:
        raise ValueError(f"PackingCollator: sample {i} has no input_ids, got {sorted(sample)}")
    found = {name: _tensor(name, value, i) for name, value in sample.items() if value is not None}
    empty = lambda v: torch.is_tensor(v) and v.numel() == 0
    return {n: v for n, v in found.items() if n == "input_ids" or not empty(v)}


def _tensor(name: str, value: Any, i: int) -> Any:
    """Of lists and arrays of numbers; floats are in torch's default dtype, as a processor's tensors are."""
    if torch.is_tensor(value) or isinstance(value, str | bytes):
        return value
    if isinstance(value, list | tuple) and any(map(torch.is_tensor, value)):
        shapes = {tuple(v.shape) for v in value}
        return torch.stack(list(value)) if len(shapes) == 1 else list(value)
    try:
        made = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return value
        raise ValueError(f"PackingCollator: {name} of sample {i}: {error}") from None
    return made.to(torch.get_default_dtype()) if made.is_floating_point() else made


def _kept(sample: Sample, i: int) -> torch.Tensor | None:
    """Which tokens are no padding; None: all."""
    ids = sample["input_ids"]
    if ids.numel() == 0 or ids.numel() != ids.shape[-1]:
        raise ValueError(
            f"PackingCollator: input_ids of sample {i} must be [L] or [1, L], got {list(ids.shape)}"
        )
    for name in ("attention_mask", "labels", *BY_TOKEN):
        if name in sample and sample[name].numel() != ids.numel():
            raise ValueError(
                f"PackingCollator: {name} of sample {i} must have a value for each of its {ids.numel()} "
                f"tokens, got {list(sample[name].shape)}"
            )
    return sample["attention_mask"].flatten() != 0 if "attention_mask" in sample else None


def _row(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    row = values.flatten()
    return row if kept is None else row[kept]


def _joined(name: str, samples: Sequence[Sample]) -> Any:
    """The field of all samples that bring it, in their order."""
    holders = [i for i, sample in enumerate(samples) if name in sample]
    values = [samples[i][name] for i in holders]
    if not all(map(torch.is_tensor, values)):
        return [v for value in values for v in (value if isinstance(value, list) else [value])]
    if len({tuple(v.shape[1:]) for v in values}) > 1:
        padded = any(size in sample for sample in samples for size in SIZES)
        values = _padded(values) if padded else values
    odd = next((i for i, v in enumerate(values) if v.shape[1:] != values[0].shape[1:]), None)
    if odd is not None:
        told = [f"{list(values[k].shape)} of sample {holders[k]}" for k in (0, odd)]
        raise ValueError(
            f"PackingCollator: {name} must be alike but in the first dimension, got {' and '.join(told)}"
        )
    return torch.cat(values)


def _padded(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros after tiles (the second of five dimensions), rows and columns, as processors pad a batch."""
    if len({v.dim() for v in values}) > 1 or values[0].dim() < 2:
        return list(values)
    ranks = range(1, values[0].dim())
    sides = [d for d in ranks if d >= values[0].dim() - 2 or (d == 1 and values[0].dim() > 3)]
    longest = {d: max(v.shape[d] for v in values) for d in sides}
    pads = [
        [n for d in reversed(ranks) for n in (0, longest.get(d, v.shape[d]) - v.shape[d])]
        for v in values
    ]
    return [F.pad(v, pad) for v, pad in zip(values, pads, strict=True)]
