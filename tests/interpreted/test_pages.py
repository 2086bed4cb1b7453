# SPDX-License-Identifier: Apache-2.0
"""Attention over pages and compaction on CUDA: bits, chunks, tables that are wrong. Values there are not checked."""

import pytest
import torch
from test_cases import cases_of

from mmkernels.testing import Case

CASES = cases_of("paged_attention")


def inputs_of(dtype: torch.dtype = torch.float32, **sizes: object) -> dict[str, torch.Tensor]:
    return CASES.make_inputs(Case("pages", {**CASES.CASES[0].sizes, **sizes}), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype) -> None:
    inputs = inputs_of(dtype, lens=(40, 1100, 7), page=64)
    together = CASES.run(inputs)
    for b in range(3):
        alone = {k: inputs[k][b : b + 1] for k in ("query", "seq_lens", "block_table")}
        pages = -(-int(inputs["seq_lens"][b]) // 64)
        alone["block_table"] = alone["block_table"][
            :, :pages
        ]  # fewer parts, the others being empty
        assert torch.equal(CASES.run({**inputs, **alone})[0], together[b])


def test_a_page_that_does_not_exist_is_no_key() -> None:
    inputs = inputs_of(B=1, lens=(48,), page=16)
    fewer = {"block_table": inputs["block_table"][:, [0, 2]], "seq_lens": torch.tensor([32])}
    expected = CASES.run({**inputs, **fewer})
    for page in (-1, inputs["key_cache"].shape[0], 2**31 - 1, -(2**31)):
        table = inputs["block_table"].clone()
        table[0, 1] = page
        torch.testing.assert_close(CASES.run({**inputs, "block_table": table}), expected)


def test_lengths_are_clamped_to_their_table() -> None:
    inputs = inputs_of(B=2, lens=(32, 16), page=16)
    inputs["key_cache"], inputs["value_cache"] = (
        inputs[n].nan_to_num(0.5) for n in ("key_cache", "value_cache")
    )
    expected = CASES.run({**inputs, "seq_lens": torch.tensor([32, 16])})
    got = CASES.run({**inputs, "seq_lens": torch.tensor([10**6, 16])})
    assert torch.equal(got, expected)


def test_chunks_of_a_prefill() -> None:
    inputs = inputs_of(B=1, lens=(50,), chunk=(50,), G=3)
    whole = CASES.run(inputs)
    for first, last in ((0, 1), (1, 17), (17, 50)):
        part = {"query": inputs["query"][first:last], "seq_lens": torch.tensor([last])}
        part["cu_seqlens_q"] = torch.tensor([0, last - first])
        torch.testing.assert_close(CASES.run({**inputs, **part}), whole[first:last])
