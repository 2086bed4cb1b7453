# SPDX-License-Identifier: Apache-2.0
"""plan_pack against a loop over samples and tokens; bins; what must raise."""

import itertools
import random
from typing import Any

import pytest
import torch

import mmkernels
from mmkernels.ops.pack_embeddings.plan import PackPlan
from mmkernels.testing import which_kernel_ran

MARKS = (1001, 1002)  # placeholder ids of two modalities


def batch(r: random.Random, expand: bool) -> dict[str, Any]:
    """Samples of text and media; some of no tokens or no media, media of no rows where they expand."""
    samples, counts = [], [[], []]  # type: ignore[var-annotated]
    for _ in range(r.choice((0, 1, 2, 5, 9))):
        ids: list[int] = []
        for _ in range(r.choice((0, 1, 3, 6))):
            if r.random() < 0.5:
                m, n = r.randrange(2), r.randint(0 if expand else 1, 5)
                counts[m].append(n)
                ids += [MARKS[m]] * (1 if expand else n)
            ids += [r.randrange(1000) for _ in range(r.randint(0, 4))]
        samples.append(ids)
    dtype = r.choice((torch.int64, torch.int32))
    tensors = [torch.tensor(ids, dtype=dtype) for ids in samples]
    labels = [torch.where(t % 3 == 0, -100, t + 1).long() for t in tensors]
    return {
        "input_ids": tensors, "feature_token_ids": MARKS, "feature_counts": counts, "expand": expand,
        "labels": r.choice((None, labels)), "max_tokens": r.choice((None, None, 40)),
    }  # fmt: skip


def by_loop(call: dict[str, Any], order: tuple[int, ...]) -> dict[str, Any]:
    """The packed rows of these samples, one token after the other."""
    ids, source, labels, positions = [], [], [], []
    cu, media = [0], [[0, 0]]
    rows_before = [0, sum(call["feature_counts"][0])]  # of the features of a modality
    next_medium, next_row = [0, 0], list(rows_before)
    found = {}
    for i, sample in enumerate(call["input_ids"]):
        rows, had = [], list(next_medium)
        for t, token in enumerate(sample.tolist()):
            label = -100 if call["labels"] is None else int(call["labels"][i][t])
            if token not in MARKS:
                rows.append((token, token, label))
                continue
            m = MARKS.index(token)
            for _ in range(call["feature_counts"][m][next_medium[m]] if call["expand"] else 1):
                rows.append((token, -1 - next_row[m], -100))
                next_row[m] += 1
            next_medium[m] += call["expand"]
        if not call["expand"]:
            for m, token in enumerate(MARKS):
                left = int((sample == token).sum())
                while left:
                    left -= call["feature_counts"][m][next_medium[m]]
                    next_medium[m] += 1
        found[i] = rows, [n - h for n, h in zip(next_medium, had, strict=True)]
    for i in order:
        rows, of_media = found[i]
        for t, (token, s, label) in enumerate(rows):
            ids.append(token)
            source.append(s)
            labels.append(-100 if t == 0 else label)
            positions.append(t)
        cu.append(len(ids))
        media.append([a + b for a, b in zip(media[-1], of_media, strict=True)])
    return {
        "input_ids": ids, "row_source": source, "labels": None if call["labels"] is None else labels,
        "position_ids": positions, "cu_seqlens": cu, "media_offsets": media,
        "max_seqlen": max([b - a for a, b in itertools.pairwise(cu)], default=0),
    }  # fmt: skip


@pytest.mark.parametrize("expand", [True, False], ids=["expand", "expanded"])
def test_a_plan_is_what_a_loop_finds(expand: bool) -> None:
    r = random.Random(7)
    several = 0
    for _ in range(300):
        call = batch(r, expand)
        plan = mmkernels.plan_pack(**call)
        for name, expected in by_loop(call, plan.order).items():
            value = getattr(plan, name)
            value = value.tolist() if isinstance(value, torch.Tensor) else value
            assert value == expected, (name, call)
        assert sorted(plan.order) == list(range(len(call["input_ids"])))
        check_bins(plan, call["max_tokens"])
        several += len(plan.bin_offsets) > 2
    assert several > 20


def check_bins(plan: PackPlan, max_tokens: int | None) -> None:
    cu, ends = plan.cu_seqlens.tolist(), plan.bin_offsets
    assert ends[-1] == len(plan.order)
    for first, last in itertools.pairwise(ends):
        assert list(plan.order[first:last]) == sorted(plan.order[first:last])
        assert max_tokens is None or cu[last] - cu[first] <= max_tokens


def test_bins_are_those_of_first_fit_decreasing() -> None:
    r = random.Random(3)
    for _ in range(200):
        limit = r.randint(1, 60)
        lengths = [r.randint(0, limit) for _ in range(r.randint(0, 40))]
        bins: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            fits = (b for b in bins if sum(lengths[j] for j in b) + lengths[i] <= limit)
            place = next(fits, None)
            if place is None:
                bins.append([i])
            else:
                place.append(i)
        assert mmkernels.pack_bins(lengths, limit) == [sorted(b) for b in bins]


def test_no_samples_and_no_modalities() -> None:
    plan = mmkernels.plan_pack([])
    assert plan.cu_seqlens.tolist() == [0] and plan.max_seqlen == 0
    assert plan.row_source.shape == plan.position_ids.shape == (0,)
    plan = mmkernels.plan_pack([torch.tensor([5, 6])], labels=[torch.tensor([5, 6])])
    assert plan.labels is not None
    assert plan.labels.tolist() == [-100, 6] and plan.row_source.tolist() == [5, 6]


ONE = torch.tensor([4, MARKS[0], 5])
INVALID = {
    "float": ([ONE.float()], {}, TypeError, r"input_ids\[0\] must be int64 or int32"),
    "matrix": ([ONE[None]], {}, ValueError, r"input_ids\[0\] must be \[L\] on CPU, got \[1, 3\]"),
    "labels_missing": ([ONE], {"labels": []}, ValueError, "labels must be 1 samples, got 0"),
    "labels_short": ([ONE], {"labels": [ONE[:2]]}, ValueError, r"labels\[0\] must be of input_ids\[0\]"),
    "same_ids": ([ONE], {"feature_token_ids": (1, 1)}, ValueError, "feature_token_ids must be all different"),
    "no_counts": ([ONE], {"feature_counts": None}, ValueError, "feature_counts must be given with expand=True"),
    "lists": ([ONE], {"feature_counts": [[1], [1]]}, ValueError, "feature_counts must be one for each of 1 modalities"),
    "media": ([ONE], {"feature_counts": [[1, 2]]}, ValueError, r"got 2 media, but .* \[1\] placeholders"),
    "negative": ([ONE], {"feature_counts": [[-1]]}, ValueError, r"feature_counts\[0\]\[0\] must be at least 0, got -1"),
    "rows": ([ONE], {"feature_counts": [[2]], "expand": False}, ValueError, r"got 2 rows, but the samples have 1"),
    "across": (
        [ONE, ONE], {"feature_counts": [[2]], "expand": False}, ValueError, "a medium across the end of sample 0",
    ),
    "too_long": ([ONE], {"max_tokens": 2}, ValueError, r"the length of sample 0 must be in \[0, 2\], got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_what_must_raise(name: str) -> None:
    samples, changes, error, message = INVALID[name]
    call: dict[str, Any] = {"feature_token_ids": MARKS[:1], "feature_counts": [[1]], **changes}
    with pytest.raises(error, match=f"plan_pack: .*{message}|{message}"):
        mmkernels.plan_pack(samples, **call)


def test_out_takes_the_merged_rows() -> None:
    ids = torch.tensor([[3, MARKS[0], 1], [MARKS[0], 0, 2]])
    weight, feature = torch.randn(5, 8), torch.randn(2, 8)
    call = {"feature_token_ids": MARKS[:1]}
    out = torch.empty(2, 3, 8)
    with which_kernel_ran() as ran:
        found = mmkernels.merge_embeddings(ids, weight, [feature], **call, out=out)
    assert found is out and ran == {"merge_embeddings_out": "native"}
    assert torch.equal(out, mmkernels.merge_embeddings(ids, weight, [feature], **call))
    before = out.clone()
    with pytest.raises(ValueError, match=r"features\[0\] has 1 rows"):
        mmkernels.merge_embeddings(ids, weight, [feature[:1]], **call, out=out)
    assert torch.equal(out, before)
    for bad, message in (
        (torch.empty(2, 3, 7), r"out must be \[\*input_ids.shape, D\]"),
        (torch.empty(2, 3, 16)[..., ::2], "out must be contiguous"),
        (torch.empty(2, 3, 8).half(), "out must be of the dtype of the result"),
    ):
        with pytest.raises(ValueError, match=message):
            mmkernels.merge_embeddings(ids, weight, [feature], **call, out=bad)
    with pytest.raises(ValueError, match="out must be None where a gradient is needed"):
        mmkernels.merge_embeddings(ids, weight.requires_grad_(), [feature], **call, out=out)


@pytest.mark.parametrize("name", ["merge_embeddings", "pack_embeddings"])
def test_one_id_many_times_has_an_exact_gradient(name: str) -> None:
    """4,096 ones in bf16, which counts to 256 only: summed in fp32."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.full((4096,), 1)
    if name == "merge_embeddings":
        out = mmkernels.merge_embeddings(ids, weight, [])
    else:
        out = mmkernels.pack_embeddings(mmkernels.plan_pack([ids]), weight)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [0, 4096, 0]


def test_features_without_a_place_still_have_a_path() -> None:
    """A rank with no image: zero rows, and zero gradients through an encoder that ran on a dummy."""
    weight = torch.randn(5, 4, requires_grad=True)
    encoder = torch.nn.Linear(4, 4)
    dummy = encoder(torch.randn(3, 4))
    out = mmkernels.pack_embeddings(mmkernels.plan_pack([torch.tensor([1, 2])]), weight, [dummy])
    out.sum().backward()
    assert encoder.weight.grad is not None and not encoder.weight.grad.any()
    none = mmkernels.merge_embeddings(
        torch.tensor([1, 2]), weight, [encoder(torch.randn(3, 4))[:0]], feature_token_ids=[9]
    )
    encoder.zero_grad(set_to_none=False)
    none.sum().backward()
    assert not encoder.weight.grad.any()


def test_more_modalities_than_the_kernel_knows_are_named_by_their_op() -> None:
    weight, features = torch.randn(5, 4), [torch.randn(0, 4)] * 9
    with pytest.raises(ValueError, match=r"^pack_embeddings: features must be at most 8"):
        mmkernels.pack_embeddings(torch.tensor([1, 2]), weight, features)
    with pytest.raises(ValueError, match=r"^merge_embeddings: features must be at most 8"):
        mmkernels.merge_embeddings(
            torch.tensor([1]), weight, features, feature_token_ids=range(9, 18)
        )
