# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of cross_attention: dropped probabilities, and keys that no query may attend to."""

import attention_calls as calls
import pytest
import torch

import mmkernels


@pytest.mark.parametrize(
    ("mask", "extra"), [("padding", "shared"), ("rows", "latents"), ("additive", "")]
)
def test_what_hidden_rows_hold_never_matters(mask: str, extra: str) -> None:
    kinds = ("nan",) if mask == "rows" else ("nan", "inf")
    calls.assert_hidden_rows_do_not_matter(mask, extra, "absorbed", torch.float32, kinds)


@pytest.mark.parametrize("packed", [False, True])
def test_a_dropped_probability_takes_its_share_of_the_bias(packed: bool) -> None:
    calls.assert_bias_is_dropped_with_its_probability(torch.float32, packed, 4e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tiles_of_keys_some_hidden_some_dropped(dtype: torch.dtype) -> None:
    """300 keys are 3 tiles at least; hidden ones, of NaN, lie in all of them."""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=g)
    q, x, w_k, w_v, bias = new(2, 3, 16), new(2, 300, 20), new(16, 20), new(16, 20), new(16)
    hidden = torch.rand(2, 300, generator=g) > 0.7
    mask, keep = (
        ~hidden[:, None, None].expand(2, 2, 3, 300),
        torch.rand(2, 2, 3, 300, generator=g) > 0.3,
    )
    call = {"q": q, "x": x, "latents": None, "w_k": w_k, "w_v": w_v, "key_bias": None, "bias": bias, "mask": mask,
            "keep": keep, "cu_seqlens": None}  # fmt: skip
    call = {
        n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in call.items()
    }
    wide = {
        n: t.double() if t is not None and t.is_floating_point() else t for n, t in call.items()
    }
    spoiled = {**call, "x": call["x"].masked_fill(hidden[..., None], torch.nan)}
    op = torch.ops.mmkernels.cross_attention
    got, expected = (calls.through(op, c, False) for c in (spoiled, wide))
    for name, tensor in expected.items():
        within = tensor.abs().max().item() * (4e-6 if dtype == torch.float32 else 2**-7)
        torch.testing.assert_close(got[name].double(), tensor, rtol=0, atol=within)
    assert not got["x"][hidden].any()


def test_a_packed_sample_spoils_no_other() -> None:
    torch.manual_seed(0)
    q, x, w = torch.randn(3, 2, 8), torch.randn(14, 6), torch.randn(2, 8, 6)
    offsets = torch.tensor([0, 4, 13, 14])
    spoiled = x.clone()
    spoiled[:4] = torch.nan
    run = lambda x: mmkernels.cross_attention(
        q, x, *w, num_heads=2, cu_seqlens=offsets, algorithm="absorbed"
    )
    torch.testing.assert_close(run(spoiled)[1:], run(x)[1:], rtol=0, atol=0)
