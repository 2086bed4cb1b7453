# SPDX-License-Identifier: Apache-2.0
"""LLaVA's ``prepare_inputs_labels_for_multimodal`` by ``plan_pack`` and ``pack_embeddings``.

LLaVA's loop (``llava/model/llava_arch.py``) cuts every sample at its placeholders, looks up the pieces of text, puts
features between, pads the batch. Here the samples lie behind one another, and nothing is padded. With LLaVA installed
its own method runs, on a stand-in for the model; otherwise the loop below.
"""

import types
from typing import Any

import torch
from compare import same_op, show
from torch import nn

import mmkernels

IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100


def loop(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, embed: nn.Embedding,
    features: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """LLaVA's: embeddings, labels and mask of the padded batch. A sample without an image takes one and drops it."""
    found, told, media = [], [], iter(features)
    for padded_ids, padded_labels, mask in zip(
        input_ids, labels, attention_mask.bool(), strict=True
    ):
        ids, label = padded_ids[mask], padded_labels[mask]
        places = torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist()
        rows, marks = [embed(ids[:0])], [label[:0]]
        for start, end in zip([-1, *places], [*places, len(ids)], strict=True):
            rows.append(embed(ids[start + 1 : end]))
            marks.append(label[start + 1 : end])
            if end < len(ids):
                rows.append(next(media))
                marks.append(torch.full((len(rows[-1]),), IGNORE_INDEX))
        if not places:
            rows.append(next(media)[:0])
        found.append(torch.cat(rows))
        told.append(torch.cat(marks))
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(t), dtype=torch.bool) for t in told], True)
    return pad(found, True), pad(told, True, IGNORE_INDEX), mask


def of_llava(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor, embed: nn.Embedding,
    features: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """LLaVA's own method, where the package is; its images are the features already."""
    from llava.model.llava_arch import LlavaMetaForCausalLM

    class Model(LlavaMetaForCausalLM):  # type: ignore[misc]
        config, device = types.SimpleNamespace(), torch.device("cpu")

        def get_model(self) -> Any:
            return types.SimpleNamespace(embed_tokens=embed, get_vision_tower=lambda: True)

        def encode_images(self, images: torch.Tensor) -> list[torch.Tensor]:
            return features

    images = torch.zeros(len(features), 3, 1, 1)
    _, _, mask, _, rows, told = Model().prepare_inputs_labels_for_multimodal(
        input_ids, None, attention_mask, None, labels, images
    )
    return rows, told, mask.bool()


def main() -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(100, 32)
    features = [torch.randn(n, 32, requires_grad=True) for n in (6, 5, 4, 9)]
    samples = [[5, -200, 7, 8], [3, 4], [-200, 9, -200, 2]]  # the second has no image
    samples_ids = [torch.tensor(s) for s in samples]
    ids = nn.utils.rnn.pad_sequence(samples_ids, True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in samples_ids], True)
    labels = ids.masked_fill((ids < 0) | (mask == 0), IGNORE_INDEX)
    try:
        rows, told, inside = of_llava(ids, mask, labels, embed, features)
    except ImportError:
        rows, told, inside = loop(ids, mask, labels, embed, features)

    media = [features[0], *features[2:]]  # those that have a placeholder
    plan = mmkernels.plan_pack(
        samples_ids, feature_token_ids=[IMAGE_TOKEN_INDEX], feature_counts=[[len(f) for f in media]],
        labels=[row[: len(s)] for row, s in zip(labels, samples_ids, strict=True)],
    )  # fmt: skip
    ours = mmkernels.pack_embeddings(plan, embed.weight, [torch.cat(media)])
    told[:, 0] = IGNORE_INDEX  # nobody predicts a sample's first row; the model's shift drops it
    assert torch.equal(ours, rows[inside]) and torch.equal(plan.labels, told[inside])
    print(
        f"{inside.numel()} rows padded, {len(ours)} packed, cu_seqlens {plan.cu_seqlens.tolist()}\n"
    )
    inputs = [embed.weight, *media]
    what = "prepare_inputs_labels_for_multimodal"
    show(same_op(what, "plan_pack, pack_embeddings", ours, rows[inside], inputs))


if __name__ == "__main__":
    main()
