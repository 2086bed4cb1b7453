# SPDX-License-Identifier: Apache-2.0
"""Merging: shapes of real models and odd ones, inputs, baselines, invalid calls.

Letters: B samples, L tokens each, V vocabulary, D width, M modalities; ``by``: id or row.
"""

from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.merge_embeddings.api import merge_embeddings
from mmkernels.testing.case import Case, Inputs, Invalid

FAMILIES = ("random", "one_id", "spread")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {
        "B": 2,
        "M": 1,
        "by": "id",
        "embeds": False,
        "scale": None,
        "padding": None,
        "share": 0.5,
    }
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("small", "test gradcheck", L=7, V=11, D=6, M=2),
    _case("padding", L=17, V=5, D=6, padding=3),
    _case("by_row", "test gradcheck", L=6, V=9, D=5, M=2, by="row"),
    _case("inputs_embeds", "test gradcheck", L=6, V=9, D=4, M=1, embeds=True),
    _case("scaled", L=33, V=50, D=48, scale=6.928203, M=3),
    _case("odd_width", B=3, L=65, V=100, D=33),
    _case("text_only", L=40, V=64, D=16, M=0),
    _case("all_features", L=16, V=8, D=16, share=1.0),
    _case("repeats", B=4, L=300, V=3, D=24, share=0.1),
    _case("empty_batch", "empty", B=0, L=4, V=5, D=3),
    _case("empty_length", "empty", L=0, V=5, D=3),
    _case("no_features", "empty", L=4, V=5, D=3, share=0.0, M=2),
    _case("llava_7b", "bench", B=4, L=2048, V=32000, D=4096, share=0.28),
    _case("qwen2vl_2b", "bench", B=1, L=8192, V=32000, D=1536, M=2, share=0.8),
]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    family: str = "random",
) -> Inputs:
    """Keyword arguments of ``merge_embeddings``. ``one_id``: every text token is the same one;
    ``spread``: values over many orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, case.V, (case.B, case.L), generator=g)
    if family == "one_id":
        ids = torch.full_like(ids, min(2, case.V - 1))
    placeholders = [case.V + 3 + m for m in range(case.M)]  # outside the vocabulary, as is allowed
    which = torch.randint(0, max(case.M, 1), ids.shape, generator=g)
    chosen = torch.rand(ids.shape, generator=g) < case.share
    for m, token_id in enumerate(placeholders):
        ids[chosen & (which == m)] = token_id

    def normal(*sizes: int) -> torch.Tensor:
        values = torch.randn(*sizes, generator=g)
        if family == "spread":
            values = values * torch.exp2(torch.randint(-6, 7, sizes, generator=g).float())
        return values.to(dtype).to(device)

    counts = [(ids == token_id).sum(-1).tolist() for token_id in placeholders]
    inputs: Inputs = {
        "input_ids": ids.to(device),
        "embed_weight": None if case.embeds else normal(case.V, case.D),
        "features": [normal(sum(c), case.D) for c in counts],
    }
    if case.embeds:
        inputs["inputs_embeds"] = normal(case.B, case.L, case.D)
    if case.by == "id":
        inputs |= {"feature_token_ids": placeholders, "feature_counts": counts}
    else:
        flat = ids.flatten()
        inputs["feature_rows"] = [
            (flat == i).nonzero().squeeze(1).flip(0).to(device) for i in placeholders
        ]
    inputs |= {"embed_scale": case.scale, "padding_idx": case.padding}
    return inputs


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return merge_embeddings(**inputs)


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference. Its autograd would sum the embedding gradient in the dtype, so: in fp64 only."""
    with backends.backend("reference"):
        out = merge_embeddings(**inputs)
    padding, weight = inputs.get("padding_idx"), inputs["embed_weight"]
    if padding is None or weight is None or not out.requires_grad:
        return out
    kept = weight.clone()
    kept[padding] = weight[padding].detach()
    with backends.backend("reference"):
        return merge_embeddings(**{**inputs, "embed_weight": kept})


def eager(inputs: Inputs) -> torch.Tensor:
    """As transformers runs it: embedding, then one masked_scatter per modality."""
    ids, embeds = inputs["input_ids"], inputs.get("inputs_embeds")
    masks = [ids == i for i in inputs["feature_token_ids"]]
    if embeds is None:
        safe = ids.masked_fill(torch.stack(masks).any(0), 0) if masks else ids
        embeds = F.embedding(safe, inputs["embed_weight"], padding_idx=inputs.get("padding_idx"))
    if inputs.get("embed_scale") is not None:
        embeds = embeds * inputs["embed_scale"]
    for mask, feature in zip(masks, inputs["features"], strict=True):
        embeds = embeds.masked_scatter(mask[..., None].expand_as(embeds), feature)
    return embeds


def library(inputs: Inputs) -> torch.Tensor:
    """One index_copy of the features' rows, the strongest plain way."""
    ids, embeds = inputs["input_ids"], inputs.get("inputs_embeds")
    masks = [(ids == i).flatten() for i in inputs["feature_token_ids"]]
    if embeds is None:
        embeds = F.embedding(
            ids.masked_fill(torch.stack(masks).any(0).view_as(ids), 0), inputs["embed_weight"]
        )
    rows = torch.cat([mask.nonzero().squeeze(1) for mask in masks])
    return embeds.flatten(0, 1).index_copy(0, rows, torch.cat(inputs["features"])).view_as(embeds)


def magnitudes(wide: Inputs, power: int) -> Inputs:
    """Each output has one term; an embedding gradient has one for each token of the id."""

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [change(v) for v in value]
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.abs() ** power if is_float else value

    found = {k: change(v) for k, v in wide.items()}
    if wide.get("embed_scale") is not None:
        found["embed_scale"] = abs(wide["embed_scale"]) ** power
    return found


def rounded_before(wide: Inputs) -> None:
    """Rows are rounded at most once."""


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: every row read once and written once. FLOPs: none."""
    text = inputs["embed_weight"] if inputs["embed_weight"] is not None else inputs["inputs_embeds"]
    row = text.shape[-1] * text.element_size()
    return inputs["input_ids"].numel() * (2 * row + inputs["input_ids"].element_size()), 0


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _without_feature(inputs: Inputs) -> Inputs:
    return {
        **inputs,
        "features": [inputs["features"][0][1:], inputs["features"][1]],
        "feature_counts": None,
    }


def _wrong_count(inputs: Inputs) -> Inputs:
    counts = [list(c) for c in inputs["feature_counts"]]
    counts[1][0] += 1
    return {**inputs, "feature_counts": counts}


def _id(value: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        ids = inputs["input_ids"].clone()
        text = (ids < 11).nonzero()[0]
        ids[tuple(text)] = value
        return {**inputs, "input_ids": ids}

    return change


def _by_row(*rows: list[int]) -> Any:
    def change(inputs: Inputs) -> Inputs:
        features = [torch.zeros(len(r), 6) for r in rows]
        tensors = [torch.tensor(r) for r in rows]
        ids = torch.zeros(2, 7, dtype=torch.int64)
        return {
            "input_ids": ids,
            "embed_weight": inputs["embed_weight"],
            "features": features,
            "feature_rows": tensors,
        }

    return change


INVALID = [
    Invalid("too_few_features", _without_feature, r"features\[0\] has \d+ rows, but input_ids has \d+ placeholders of token id 14"),
    Invalid("sample_count", _wrong_count, r"sample 0 has \d+ placeholders of features\[1\] \(token id 15\), expected \d+"),
    Invalid("id_too_large", _id(11), r"input_ids\[\d, \d\] is 11, expected an id in \[0, 11\)"),
    Invalid("id_negative", _id(-1), r"input_ids\[\d, \d\] is -1, expected"),
    Invalid("id_huge", _id(2**40), r"input_ids\[\d, \d\] is 1099511627776"),
    Invalid("row_too_large", _by_row([0, 14]), r"feature_rows\[0\]\[1\] is 14, expected a token index in \[0, 14\)"),
    Invalid("row_negative", _by_row([3], [-1]), r"feature_rows\[1\]\[0\] is -1"),
    Invalid("row_twice", _by_row([3], [3]), r"feature_rows\[1\]\[0\] is 3, a token that already has a feature"),
    Invalid("float_ids", _set(input_ids=torch.zeros(2, 7)), "input_ids must be int64 or int32, got torch.float32", TypeError),
    Invalid("scalar_ids", _set(input_ids=torch.tensor(1)), "input_ids must be .*got a scalar"),
    Invalid("no_text", _set(embed_weight=None), "embed_weight must be a tensor unless inputs_embeds is given"),
    Invalid("weight_3d", _set(embed_weight=torch.zeros(1, 11, 6)), r"embed_weight must be \[V, D\]"),
    Invalid("embeds_shape", _set(inputs_embeds=torch.zeros(2, 6, 6)), r"inputs_embeds must be .*got \[2, 6, 6\]"),
    Invalid("features_nested", lambda i: {**i, "features": [[f] for f in i["features"]]}, r"features\[0\] must be one tensor \[n, D\] \(torch.cat.*got a list of 1"),
    Invalid("feature_width", lambda i: {**i, "features": [f[:, :5] for f in i["features"]]}, r"features\[0\] must be \[n, D\] with D = 6"),
    Invalid("same_ids", _set(feature_token_ids=[14, 14]), "feature_token_ids must be all different"),
    Invalid("ids_missing", _set(feature_token_ids=[14]), "feature_token_ids must be one id for each of 2 features"),
    Invalid("count_lists", _set(feature_counts=[[1, 2]]), "feature_counts must be 2 lists of 2 numbers"),
    Invalid("check", _set(check="never"), "check must be .*got 'never'"),
]  # fmt: skip
