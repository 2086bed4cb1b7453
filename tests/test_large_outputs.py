# SPDX-License-Identifier: Apache-2.0
"""Outputs of 1 MB and more lie in blocks of malloc's (``csrc/common/aten.h``): they behave as torch's own, and go."""

import io
from pathlib import Path

import pytest
import torch

import mmkernels

IDS = torch.randint(0, 100, (2000,), generator=torch.Generator().manual_seed(0))
TABLE = torch.randn(100, 512, generator=torch.Generator().manual_seed(1))


def made() -> torch.Tensor:
    """``[2000, 512]`` fp32, 4 MB."""
    with torch.no_grad():
        return mmkernels.merge_embeddings(IDS, TABLE, [], feature_token_ids=[])


def test_they_can_be_shared_saved_and_made_smaller() -> None:
    out = made()
    assert torch.equal(out, TABLE[IDS]) and out.data_ptr() % 64 == 0
    assert not out.untyped_storage().resizable(), "torch's allocator made it"
    out.share_memory_()
    buffer = io.BytesIO()
    torch.save(made(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), out) and torch.equal(out, TABLE[IDS])
    assert torch.equal(made().resize_(2, 512), TABLE[IDS[:2]])
    with torch.inference_mode():
        assert mmkernels.merge_embeddings(IDS, TABLE, [], feature_token_ids=[]).is_inference()


def test_an_outputs_view_keeps_it() -> None:
    row = made()[1999]
    for _ in range(5):
        made().fill_(7)
    assert torch.equal(row, TABLE[IDS[1999]])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_they_are_given_back() -> None:
    """300 outputs and 300 gradients of 4 MB, one after the other; nothing else of that size is made."""
    grad, backward = torch.ones(2000, 512), torch.ops.mmkernels.merge_embeddings_backward

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def step() -> None:
        made()
        backward(grad, IDS, 2000, [], None, None, [True])

    for _ in range(10):
        step()
    before = resident()
    for _ in range(300):
        step()
    assert resident() - before < 100 << 20
