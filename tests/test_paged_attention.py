# SPDX-License-Identifier: Apache-2.0
"""Attention over pages: any table, page, group and chunk; prefixes shared or not; nothing unused is read."""

import random
import tempfile
from typing import Any

import pytest
import torch

import mmkernels
from mmkernels.ops.paged_attention import cases
from mmkernels.testing import Case, which_kernel_ran, yardstick
from mmkernels.testing.case import Inputs

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def case_of(**sizes: Any) -> Case:
    return Case("drawn", {**cases.CASES[0].sizes, **sizes})


def assert_bound(inputs: Inputs, out: torch.Tensor, told: object = "") -> None:
    found = yardstick.check(cases, inputs, {"out": out}, torch.ones_like(out))
    assert found[0].ratio <= 1, f"{told}: {found[0]}"


def drawn(r: random.Random) -> dict[str, Any]:
    """The letters of a random call."""
    B, page = r.randint(1, 5), r.choice((1, 2, 3, 7, 16, 64, 256))
    lens = tuple(r.choice((0, 1, page, 63, 64, 65, r.randint(1, 300))) for _ in range(B))
    letters = {
        "B": B, "H": r.choice((1, 2, 3)), "G": r.randint(1, 16), "d": r.choice((5, 32, 33, 64, 72, 80, 100, 128, 256)),
        "page": page, "lens": lens, "int8": r.random() < 0.2, "causal": r.random() < 0.8,
    }  # fmt: skip
    if r.random() < 0.5:
        letters["chunk"] = tuple(r.choice((0, 1, 2, 16, r.randint(1, 40))) for _ in range(B))
    if r.random() < 0.4:
        letters["prefix"] = tuple(
            r.choice((0, 1, 64, 100, 257)) for _ in range(r.choice((1, 1, 2)))
        )
        letters["all_in_groups"] = r.random() < 0.5
    return letters


def hold_random_calls(first: int, count: int) -> None:
    for seed in range(first, first + count):
        r = random.Random(seed)
        letters, family = drawn(r), r.choice(cases.FAMILIES)
        name = r.choice(list(DTYPES))
        inputs = cases.make_inputs(case_of(**letters), DTYPES[name], seed=seed, family=family)
        torch.set_num_threads(r.choice((1, 2, 3)))
        assert_bound(inputs, cases.run(inputs), (seed, name, family, letters))


def test_random_calls_hold_the_bound() -> None:
    hold_random_calls(0, 200)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_many_random_calls_hold_the_bound() -> None:
    hold_random_calls(1000, 10_000)


@pytest.mark.parametrize("G", range(1, 17))
def test_every_number_of_heads_a_key_head_serves(G: int) -> None:
    inputs = cases.make_inputs(
        case_of(G=G, H=2, d=64, lens=(130, 9), chunk=(5, 1)), torch.float32, seed=G
    )
    assert_bound(inputs, cases.run(inputs))


def with_starts(inputs: Inputs, starts: list[int]) -> Inputs:
    return {**inputs, "cu_seqlens_q": torch.tensor(starts)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_chunks_give_what_one_prefill_gives(dtype: str) -> None:
    """Every chunk sees what the whole sees: all hold the bound of the same sums."""
    n = 150
    case = case_of(B=1, lens=(n,), chunk=(n,), page=16, G=3)
    whole = cases.make_inputs(case, DTYPES[dtype])
    reference = cases.plain(yardstick.in_fp64(whole))
    for size in (1, 7, 16, 64, n):
        parts = []
        for first in range(0, n, size):
            count = min(size, n - first)
            call = with_starts(
                {**whole, "query": whole["query"][first : first + count]}, [0, count]
            )
            parts.append(cases.run({**call, "seq_lens": torch.tensor([first + count])}))
        assert_bound(whole, torch.cat(parts), size)
    assert reference.std() > 0


def alone(inputs: Inputs, b: int) -> Inputs:
    """Sequence b by itself, with its pages where they are."""
    starts = inputs["cu_seqlens_q"].tolist() if "cu_seqlens_q" in inputs else None
    rows = slice(starts[b], starts[b + 1]) if starts else slice(b, b + 1)
    mine = {k: inputs[k][b : b + 1] for k in ("block_table", "seq_lens")}
    call = {**inputs, **mine, "query": inputs["query"][rows]}
    return with_starts(call, [0, rows.stop - rows.start]) if starts else call


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["decode", "pages_of_3", "prefill", "prefill_tiles", "spans", "int8"]
)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(name: str, dtype: str) -> None:
    case = next(c for c in cases.CASES if c.name == name)
    case = Case(name, {**case.sizes, "B": 2 * case.B + 1})
    inputs = cases.make_inputs(case, DTYPES[dtype])
    together = cases.run(inputs)
    apart = torch.cat([cases.run(alone(inputs, b)) for b in range(case.B)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"prefix": (2048,), "lens": (64, 1, 30), "B": 16, "G": 7, "H": 1, "all_in_groups": True},
        {"prefix": (64, 16), "lens": (5, 40, 50), "B": 7, "chunk": (3, 1, 40)},
    ],
    ids=["questions", "groups"],
)
def test_a_shared_prefix_is_the_prefix_of_each(sizes: dict[str, Any], dtype: str) -> None:
    inputs = cases.make_inputs(case_of(**sizes), DTYPES[dtype])
    assert_bound(inputs, cases.run(inputs), "shared")
    assert_bound(inputs, cases.run(cases.unshared(inputs)), "unshared")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["spans", "prefix_spans", "prefill_tiles", "prefix_prefill"])
def test_same_bits_for_any_number_of_threads(name: str, dtype: str) -> None:
    inputs = cases.make_inputs(next(c for c in cases.CASES if c.name == name), DTYPES[dtype])
    torch.set_num_threads(1)
    expected = cases.run(inputs)
    for threads in (2, 3, 5, 16):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(cases.run(inputs), expected), threads


@pytest.mark.parametrize("poison", [float("nan"), 3e38, -3e38])
@pytest.mark.parametrize("name", ["pages_of_3", "prefill", "prefix_prefill", "wide_heads"])
def test_what_lies_in_unused_slots_changes_nothing(name: str, poison: float) -> None:
    """NaN there is what cases.py puts; zeros, NaN and huge numbers give the same bits."""
    inputs = cases.make_inputs(next(c for c in cases.CASES if c.name == name), torch.float32)
    expected = cases.run(inputs)
    assert expected.isfinite().all()
    for value in (0.0, poison):
        caches = {k: inputs[k].nan_to_num(value) for k in ("key_cache", "value_cache")}
        assert torch.equal(cases.run({**inputs, **caches}), expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"lens": (0,)},
        {"lens": (0, 9), "chunk": (2, 3)},
        {"lens": (4,), "chunk": (7,)},
        {"lens": (0,), "prefix": (0,)},
    ],
    ids=["no_keys", "one_without", "before_its_keys", "empty_prefix"],
)  # fmt: skip
def test_queries_without_keys_give_zero(sizes: dict[str, Any]) -> None:
    inputs = cases.make_inputs(case_of(B=2, **sizes), torch.float32)
    out, visible = cases.run(inputs), cases.plain(inputs)
    assert torch.equal(out == 0, visible == 0) and (out == 0).any()


def test_caches_may_be_views_of_one_buffer() -> None:
    inputs = cases.make_inputs(cases.CASES[0], torch.float32)
    both = torch.stack([inputs["key_cache"], inputs["value_cache"]], 2)  # [pages, page, 2, H, d]
    views = {"key_cache": both[:, :, 0], "value_cache": both[:, :, 1]}
    assert torch.equal(cases.run({**inputs, **views}), cases.run(inputs))


def test_pages_beyond_32_bits() -> None:
    """Pages 1.2e9 elements apart, in a sparse file: offsets are 64-bit."""
    stride, slots = 1_200_000_000, 16 * 2 * 32
    numbers = 3 * stride + slots
    with tempfile.TemporaryFile() as file:
        file.truncate(numbers * 4)
        name = f"/proc/self/fd/{file.fileno()}"
        memory = torch.from_file(name, shared=True, size=numbers, dtype=torch.float32)
        cache = memory.as_strided((4, 16, 2, 32), (stride, 64, 32, 1))
        g = torch.Generator().manual_seed(0)
        cache[3] = torch.randn(16, 2, 32, generator=g)
        near = cache[3:].clone()
        query, lens = torch.randn(1, 4, 32, generator=g), torch.tensor([11])
        far = mmkernels.paged_attention(query, cache, cache, torch.tensor([[3]]), lens)
        assert torch.equal(
            far, mmkernels.paged_attention(query, near, near, torch.tensor([[0]]), lens)
        )


def test_autocast_takes_the_dtype_of_the_caches() -> None:
    inputs = cases.make_inputs(cases.CASES[0], torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = cases.run({**inputs, "query": inputs["query"].float()})
    assert out.dtype == torch.bfloat16 and torch.equal(out, cases.run(inputs))


def test_inference_only() -> None:
    inputs = cases.make_inputs(cases.CASES[0], torch.float32)
    wanting = {**inputs, "query": inputs["query"].requires_grad_()}
    with pytest.raises(ValueError, match="inference only"):
        cases.run(wanting)
    with torch.no_grad(), which_kernel_ran() as ran:
        assert not cases.run(wanting).requires_grad
    assert ran == {"paged_attention": "native"}


def test_the_op_itself_refuses_what_would_leave_its_memory() -> None:
    x = cases.make_inputs(cases.CASES[0], torch.float32)
    op = torch.ops.mmkernels.paged_attention
    none = [None] * 6
    good = [x[k] for k in ("query", "key_cache", "value_cache", "block_table", "seq_lens")]
    assert torch.equal(op(*good, *none, True, 32**-0.5), cases.run(x))
    wrong = {
        0: x["query"][:2], 1: x["key_cache"][..., :16], 2: x["value_cache"][:3], 3: x["block_table"][:2],
        4: x["seq_lens"] + 100,
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="paged_attention: "):
            op(*[value if i == place else v for i, v in enumerate(good)], *none, True, 1.0)
