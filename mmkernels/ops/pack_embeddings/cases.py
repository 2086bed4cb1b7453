# SPDX-License-Identifier: Apache-2.0
"""Packing: batches of real models and odd ones, inputs, baselines, invalid calls.

Letters: S samples of about L text tokens, V vocabulary, D width, M modalities of media of up to ``rows`` rows.
"""

import random
from typing import Any

import torch
import torch.nn.functional as F

from mmkernels import backends
from mmkernels.ops.merge_embeddings.cases import magnitudes, rounded_before
from mmkernels.ops.pack_embeddings.api import pack_embeddings
from mmkernels.ops.pack_embeddings.plan import plan_pack
from mmkernels.testing.case import Case, Inputs, Invalid

__all__ = ["magnitudes", "rounded_before"]
ARGUMENTS = ("plan", "embed_weight", "features", "embed_scale", "padding_idx")
FAMILIES = ("random", "one_id", "spread")


def _case(name: str, tags: str = "test", **sizes: Any) -> Case:
    default = {"S": 3, "M": 1, "rows": 4, "media": 2, "scale": None, "padding": None, "unplaced": 0}
    return Case(name, {**default, **sizes}, frozenset(tags.split()))


CASES = [
    _case("small", "test gradcheck", L=5, V=11, D=6, M=2),
    _case("scaled", "test gradcheck", L=4, V=7, D=5, scale=2.449),
    _case("padding", L=9, V=5, D=6, padding=3),
    _case("unplaced", "test gradcheck", L=4, V=7, D=5, unplaced=3),
    _case("odd_width", S=7, L=30, V=100, D=33, M=3, rows=19),
    _case("text_only", L=40, V=64, D=16, M=0),
    _case("repeats", S=4, L=300, V=3, D=24),
    _case("no_samples", "empty", S=0, L=4, V=5, D=3),
    _case("no_media", "empty", L=4, V=5, D=3, M=2, media=0),
    _case("llava_7b", "bench", S=8, L=400, V=32000, D=4096, rows=576, media=1),
    _case("qwen2vl_2b", "bench", S=12, L=200, V=32000, D=1536, M=2, rows=400, media=1),
]


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0, family: str = "random"
) -> Inputs:
    """Keyword arguments of ``pack_embeddings``, and the samples they were planned from (for eager)."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    placeholders = [case.V + 3 + m for m in range(case.M)]
    counts: list[list[int]] = [[] for _ in placeholders]
    samples = []
    for _ in range(case.S):
        ids = torch.randint(0, case.V, (r.randint(1, 2 * case.L - 1),), generator=g).tolist()
        if family == "one_id":
            ids = [min(2, case.V - 1)] * len(ids)
        for m, token_id in enumerate(placeholders):
            for _ in range(case.media):
                ids.insert(r.randint(0, len(ids)), token_id)
                counts[m].append(r.randint(1, case.rows) if "bench" not in case.tags else case.rows)
        samples.append(torch.tensor(ids))

    def normal(*sizes: int) -> torch.Tensor:
        values = torch.randn(*sizes, generator=g)
        if family == "spread":
            values = values * torch.exp2(torch.randint(-6, 7, sizes, generator=g).float())
        return values.to(dtype).to(device)

    source = plan_pack(samples, feature_token_ids=placeholders, feature_counts=counts).row_source
    if case.unplaced:  # the first rows of the one modality have no place
        source = torch.where(source < 0, source - case.unplaced, source)
    return {
        "plan": source.to(device), "embed_weight": normal(case.V, case.D),
        "features": [normal(sum(c) + case.unplaced, case.D) for c in counts], "embed_scale": case.scale,
        "padding_idx": case.padding, "samples": samples, "feature_token_ids": placeholders, "feature_counts": counts,
    }  # fmt: skip


def _arguments(inputs: Inputs) -> Inputs:
    return {n: inputs[n] for n in ARGUMENTS}


def run(inputs: Inputs) -> torch.Tensor:
    """The public op."""
    return pack_embeddings(**_arguments(inputs))


def plain(inputs: Inputs) -> torch.Tensor:
    """The reference. Its autograd would sum the embedding gradient in the dtype, so: in fp64 only."""
    arguments, padding = _arguments(inputs), inputs.get("padding_idx")
    if padding is not None:
        weight = inputs["embed_weight"]
        kept = weight.clone()
        kept[padding] = weight[padding].detach()
        arguments["embed_weight"] = kept
    with backends.backend("reference"):
        return pack_embeddings(**arguments)


def eager(inputs: Inputs) -> torch.Tensor:
    """As LLaVA runs it: a loop over samples and their media, embeddings and features joined piece by piece."""
    weight, pieces = inputs["embed_weight"], []
    features = [
        f.split(c) for f, c in zip(inputs["features"], inputs["feature_counts"], strict=True)
    ]
    media = [iter(parts) for parts in features]
    of_id = {token: m for m, token in enumerate(inputs["feature_token_ids"])}
    for sample in inputs["samples"]:
        start, ids = 0, sample.tolist()
        for t, token in enumerate([*ids, None]):
            if token is None or token in of_id:
                text = F.embedding(sample[start:t].to(weight.device), weight, inputs["padding_idx"])
                pieces.append(
                    text if inputs["embed_scale"] is None else text * inputs["embed_scale"]
                )
                pieces += [] if token is None else [next(media[of_id[token]])]
                start = t + 1
    return torch.cat(pieces)


def library(inputs: Inputs) -> torch.Tensor:
    """One embedding and one index_copy of all features, the strongest plain way."""
    source, weight = inputs["plan"], inputs["embed_weight"]
    is_text = source >= 0
    rows = F.embedding(torch.where(is_text, source, 0), weight)
    places = (~is_text).nonzero().squeeze(1)
    return rows.index_copy(0, places, torch.cat(inputs["features"])[-1 - source[places]])


def traffic(inputs: Inputs) -> tuple[int, int]:
    """Bytes: every row read once and written once. FLOPs: none."""
    row = inputs["embed_weight"].shape[1] * inputs["embed_weight"].element_size()
    return inputs["plan"].numel() * (2 * row + 8), 0


def _set(**changes: Any) -> Any:
    return lambda inputs: {**inputs, **changes}


def _source(t: int, value: int) -> Any:
    def change(inputs: Inputs) -> Inputs:
        source = inputs["plan"].clone()
        source[t] = value
        return {**inputs, "plan": source}

    return change


INVALID = [
    Invalid("id_too_large", _source(2, 11), r"row_source\[2\] is 11, expected an id in \[0, 11\)"),
    Invalid("feature_too_far", _source(0, -1000), r"row_source\[0\] is -1000, expected .* in \[0, \d+\)"),
    Invalid("twice", lambda i: {**i, "plan": torch.tensor([-1, 3, -1])}, r"row_source\[2\] is -1, a feature row that already has a place"),
    Invalid("int32", lambda i: {**i, "plan": i["plan"].int()}, r"row_source must be int64 \[T\], got torch.int32"),
    Invalid("two_dims", lambda i: {**i, "plan": i["plan"][None]}, r"row_source must be int64 \[T\]"),
    Invalid("weight_3d", _set(embed_weight=torch.zeros(1, 11, 6)), r"embed_weight must be \[V, D\]"),
    Invalid("weight_int", _set(embed_weight=torch.zeros(11, 6, dtype=torch.int64)), "embed_weight must be float64", TypeError),
    Invalid("features_nested", lambda i: {**i, "features": [[f] for f in i["features"]]}, r"features\[0\] must be one tensor \[n, D\] \(torch.cat.*got a list of 1"),
    Invalid("feature_width", lambda i: {**i, "features": [f[:, :5] for f in i["features"]]}, r"features\[0\] must be \[n, D\] with D = 6"),
]  # fmt: skip
