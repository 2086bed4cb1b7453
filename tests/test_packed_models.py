# SPDX-License-Identifier: Apache-2.0
"""A packed batch gives a VLM of transformers what a padded one does: logits and all gradients, in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from against_transformers import InFp64
from packed_models import MODELS, Model, Sample, samples

from mmkernels.train.collator import PackingCollator

Result = tuple[list[torch.Tensor], dict[str, torch.Tensor]]


def padded(batch: list[Sample]) -> dict[str, Any]:
    """As processors give it: to the right, with a mask."""
    longest = max(len(s["input_ids"]) for s in batch)
    pad = lambda t: F.pad(t, (0, longest - len(t)))
    found: dict[str, Any] = {
        "attention_mask": torch.stack([pad(torch.ones_like(s["input_ids"])) for s in batch])
    }
    for name in {n for s in batch for n in s}:
        parts = [s[name] for s in batch if name in s]
        by_token = name in ("input_ids", "mm_token_type_ids")
        found[name] = torch.stack([pad(p) for p in parts]) if by_token else torch.cat(parts)
    return found


def ran(model: Any, inputs: dict[str, Any], rows: Any) -> Result:
    """Logits of every sample and gradients of the summed loss of what each predicts of itself."""
    inputs = {
        k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    inputs.pop("labels", None)
    model.zero_grad()
    with InFp64():
        logits = rows(model(**inputs).logits)
    ids = rows(inputs["input_ids"])
    pairs = zip(logits, ids, strict=True)
    sum(F.cross_entropy(x[:-1], i[1:], reduction="sum") for x, i in pairs).backward()  # type: ignore[union-attr]
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in logits], grads


@pytest.mark.parametrize(
    "entry", MODELS, ids=lambda m: m.kind.removesuffix("ForConditionalGeneration")
)
def test_packed_equals_padded(entry: Model) -> None:
    model = entry.build().double().eval()
    batch = samples(entry)
    lengths = [len(s["input_ids"]) for s in batch]
    theirs = ran(
        model, padded(batch), lambda t: [row[:n] for row, n in zip(t, lengths, strict=True)]
    )
    packed = PackingCollator(model.config, cu_seq_lens=False)(batch)
    assert packed["input_ids"].shape == (1, sum(lengths))
    ours = ran(model, packed, lambda t: t[0].split(lengths))
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    assert ours[1].keys() == theirs[1].keys() and any("vis" in n for n in ours[1])
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).abs().max() <= 1e-9 * grad.abs().max().clamp(min=1e-3), name


def test_wrong_positions_are_seen() -> None:
    """One position on for all samples but the first: without the samples' starts they attend to each other."""
    entry = MODELS[0]
    model = entry.build().double().eval()
    batch = samples(entry)
    lengths = [len(s["input_ids"]) for s in batch]
    theirs = ran(
        model, padded(batch), lambda t: [row[:n] for row, n in zip(t, lengths, strict=True)]
    )
    packed = PackingCollator(model.config, cu_seq_lens=False)(batch)
    packed["position_ids"] = torch.arange(sum(lengths))[None]
    ours = ran(model, packed, lambda t: t[0].split(lengths))
    assert (ours[0][2] - theirs[0][2]).abs().max() > 1e-6 * theirs[0][2].abs().max()


def test_text_is_what_transformers_collates() -> None:
    from transformers import DataCollatorWithFlattening

    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 90, (n,), generator=g) for n in (3, 1, 8)]
    batch = [{"input_ids": r, "labels": torch.where(r % 2 == 0, r, -100)} for r in rows]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(batch)
    ours = PackingCollator()(batch)
    assert ours.keys() - theirs.keys() == {"use_cache"} and ours["use_cache"] is False
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value) and ours[name].dtype == value.dtype, name
        else:
            assert ours[name] == value, name


def test_padding_is_dropped_and_media_keep_their_order() -> None:
    batch = [
        {"input_ids": torch.tensor([[0, 0, 5, 6]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])},
        {
            "input_ids": torch.tensor([[7]]),
            "attention_mask": torch.tensor([[1]]),
            "pixel_values": torch.ones(1, 2),
        },
        {
            "input_ids": torch.tensor([[8]]),
            "attention_mask": torch.tensor([[1]]),
            "pixel_values": torch.zeros(2, 2),
        },
    ]
    packed = PackingCollator()(batch)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8]]
    assert packed["labels"].tolist() == [[-100, 6, -100, -100]]
    assert packed["pixel_values"][:, 0].tolist() == [1, 0, 0] and "attention_mask" not in packed
    assert packed["cu_seq_lens_q"].tolist() == [0, 2, 3, 4] and packed["max_length_k"] == 2
    with pytest.raises(ValueError, match="input_ids of sample 0 must be"):
        PackingCollator()([{"input_ids": torch.zeros(2, 3, dtype=torch.int64)}])
