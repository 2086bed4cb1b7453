# SPDX-License-Identifier: Apache-2.0
"""LLaVA's ``prepare_inputs_labels_for_multimodal`` by ``plan_pack`` and ``pack_embeddings``.

LLaVA's loop (``llava/model/llava_arch.py``) cuts every sample at its placeholders, looks up the pieces of text, puts
features between, pads the batch. Here the samples lie behind one another, and nothing is padded.
"""

import torch
from compare import assert_close

import mmkernels

IMAGE_TOKEN_INDEX, IGNORE_INDEX = -200, -100


def prepare(
    input_ids: list[torch.Tensor],
    labels: list[torch.Tensor],
    embed: torch.nn.Embedding,
    features: list[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """LLaVA's loop, without the padding: embeddings and labels of each sample."""
    found, told, at = [], [], 0
    for ids, label in zip(input_ids, labels, strict=True):
        places = [-1, *torch.where(ids == IMAGE_TOKEN_INDEX)[0].tolist(), len(ids)]
        rows, marks = [], []
        for i in range(len(places) - 1):
            piece = slice(places[i] + 1, places[i + 1])
            rows.append(embed(ids[piece]))
            marks.append(label[piece])
            if i < len(places) - 2:
                rows.append(features[at])
                marks.append(torch.full((len(features[at]),), IGNORE_INDEX))
                at += 1
        found.append(torch.cat(rows))
        told.append(torch.cat(marks))
    return found, told


torch.manual_seed(0)
embed = torch.nn.Embedding(100, 32)
features = [torch.randn(n, 32, requires_grad=True) for n in (6, 4, 9)]
input_ids = [torch.tensor([5, -200, 7, 8]), torch.tensor([3, 4]), torch.tensor([-200, 9, -200, 2])]
labels = [ids.masked_fill(ids < 0, IGNORE_INDEX) for ids in input_ids]
theirs, their_labels = prepare(input_ids, labels, embed, features)

plan = mmkernels.plan_pack(
    input_ids, feature_token_ids=[IMAGE_TOKEN_INDEX], feature_counts=[[len(f) for f in features]], labels=labels
)  # fmt: skip
ours = mmkernels.pack_embeddings(plan, embed.weight, [torch.cat(features)])
for told in their_labels:
    told[0] = (
        IGNORE_INDEX  # nobody predicts a sample's first row; in a padded batch the shift drops it
    )
assert torch.equal(ours, torch.cat(theirs)) and torch.equal(plan.labels, torch.cat(their_labels))
inputs = [embed.weight, *features]
weights = torch.randn(ours.shape)
grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, torch.cat(theirs))]
for mine, other in zip(*grads, strict=True):
    assert_close(mine, other, "gradient")
print(
    f"rows {list(ours.shape)}, cu_seqlens {plan.cu_seqlens.tolist()}: embeddings and labels equal, gradients agree"
)
