# SPDX-License-Identifier: Apache-2.0
"""A batch without padding: samples behind one another, told apart by what transformers' attention reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

import mmkernels
from mmkernels.ops.mrope_positions.families import FAMILIES, family_of

OURS = ("input_ids", "labels", "attention_mask", "position_ids")  # made anew
BY_TOKEN = ("mm_token_type_ids", "token_type_ids")  # one value a token, as input_ids
OF_POSITIONS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class PackingCollator:
    """Samples of transformers' processors → one packed batch of keyword arguments for the model.

    ``input_ids`` ``[1, T]``, ``labels`` (-100 on placeholders, padding and each sample's first token; input_ids where a
    sample brings none), ``position_ids`` (``[1, T]``, from 0 in every sample; ``[4, 1, T]``, text, t, h, w, for M-RoPE
    models), ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32, ``max_length_q``, ``max_length_k``: those of
    ``FlashAttentionKwargs``. Attention by SDPA finds the samples by position_ids. Everything else a sample
    holds (pixel_values, image_grid_thw, …) is concatenated along its first dimension, in the order of the samples.

    Args:
        config: The model's transformers config; None for a text model. Its placeholder ids and, if its ``model_type``
            has M-RoPE, its rule are read from it.
        cu_seq_lens: Without: for attention by SDPA, which has no use for them.

    Raises:
        ValueError: A sample without tokens or of several rows; what ``plan_pack`` and ``mrope_positions`` raise.

    Source: transformers' ``DataCollatorWithFlattening``, which leaves media and M-RoPE to the caller. Batches by a
    budget of tokens: ``mmkernels.pack_bins(lengths, max_tokens)`` is their sampler.
    """

    def __init__(self, config: Any = None, cu_seq_lens: bool = True) -> None:
        names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
        ids = [getattr(config, name, None) for name in names]
        self.placeholders = list(dict.fromkeys(i for i in ids if isinstance(i, int)))
        has_axes = getattr(config, "model_type", None) in FAMILIES
        self.family = family_of(config) if has_axes else None
        self.cu_seq_lens = cu_seq_lens

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        kept = [_kept(sample, i) for i, sample in enumerate(samples)]
        rows = lambda name: [_row(s[name], k) for s, k in zip(samples, kept, strict=True)]
        ids = rows("input_ids")
        plan = mmkernels.plan_pack(
            ids, feature_token_ids=self.placeholders, expand=False,
            labels=rows("labels") if "labels" in samples[0] else ids,
        )  # fmt: skip
        assert plan.labels is not None
        batch: dict[str, Any] = {"input_ids": plan.input_ids[None], "labels": plan.labels[None]}
        for name in dict.fromkeys(n for s in samples for n in s if n not in OURS):
            if name in BY_TOKEN:
                batch[name] = torch.cat(rows(name))[None]
            else:
                batch[name] = _joined([s[name] for s in samples if s.get(name) is not None])
        batch["position_ids"] = self._positions(plan, batch)
        if self.cu_seq_lens:
            batch |= {"cu_seq_lens_q": plan.cu_seqlens, "cu_seq_lens_k": plan.cu_seqlens}
            batch |= {"max_length_q": plan.max_seqlen, "max_length_k": plan.max_seqlen}
        return batch

    def _positions(self, plan: mmkernels.PackPlan, batch: dict[str, Any]) -> torch.Tensor:
        if self.family is None:
            return plan.position_ids[None]
        media = {name: batch[name] for name in OF_POSITIONS if name in batch}
        return mmkernels.mrope_positions(
            batch["input_ids"], batch.get("mm_token_type_ids"), family=self.family, cu_seqlens=plan.cu_seqlens,
            **media,
        )[0]  # fmt: skip


def _kept(sample: Mapping[str, Any], i: int) -> torch.Tensor | None:
    """Which tokens are no padding; None: all."""
    ids = torch.as_tensor(sample["input_ids"])
    if ids.numel() == 0 or ids.numel() != ids.shape[-1]:
        raise ValueError(
            f"PackingCollator: input_ids of sample {i} must be [L] or [1, L], got {list(ids.shape)}"
        )
    mask = sample.get("attention_mask")
    return None if mask is None else torch.as_tensor(mask).flatten() != 0


def _row(values: Any, kept: torch.Tensor | None) -> torch.Tensor:
    row = torch.as_tensor(values).flatten()
    return row if kept is None else row[kept]


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return [v for value in values for v in value] if isinstance(values[0], list | tuple) else values
