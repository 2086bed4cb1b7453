# SPDX-License-Identifier: Apache-2.0
"""What cases of cross_attention cannot ask: dropped probabilities, and keys that no query may attend to."""

import attention_calls as calls
import pytest
import torch

import mmkernels
from mmkernels import backends


@pytest.mark.parametrize("extra", calls.EXTRAS)
@pytest.mark.parametrize("mask", calls.MASKS)
@pytest.mark.parametrize("algorithm", ["projected", "absorbed", "reference"])
def test_what_hidden_rows_hold_never_matters(algorithm: str, mask: str, extra: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if algorithm == "reference":
            with backends.backend("reference"):
                calls.assert_hidden_rows_do_not_matter(mask, extra, "absorbed", dtype)
        else:
            calls.assert_hidden_rows_do_not_matter(mask, extra, algorithm, dtype)


@pytest.mark.parametrize("algorithm", ["projected", "absorbed", "reference"])
def test_a_packed_sample_spoils_no_other(algorithm: str) -> None:
    """Shorter samples are padded where a batch is needed: never with rows that hold something."""
    torch.manual_seed(0)
    q, x, w = torch.randn(3, 2, 8), torch.randn(14, 6), torch.randn(2, 8, 6)
    offsets, name = torch.tensor([0, 4, 13, 14]), algorithm.replace("reference", "absorbed")

    def run(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        with backends.backend("reference" if algorithm == "reference" else "auto"):
            out = mmkernels.cross_attention(
                q, x, *w, num_heads=2, cu_seqlens=offsets, algorithm=name
            )
            return out.detach(), torch.autograd.grad(out[1:].sum(), x)[0]

    spoiled = x.clone()
    spoiled[:4] = torch.nan
    (out, grad), (got, got_grad) = run(x), run(spoiled)
    torch.testing.assert_close(got[1:], out[1:], rtol=0, atol=0)
    torch.testing.assert_close(got_grad[4:], grad[4:], rtol=0, atol=0)
    assert got[0].isnan().all()


@pytest.mark.parametrize("packed", [False, True])
def test_a_dropped_probability_takes_its_share_of_the_bias(packed: bool) -> None:
    calls.assert_bias_is_dropped_with_its_probability(torch.float64, packed, 1e-12)
    calls.assert_bias_is_dropped_with_its_probability(torch.float32, packed, 4e-6)
    calls.assert_bias_is_dropped_with_its_probability(torch.bfloat16, packed, 2**-7)


@pytest.mark.parametrize("Q", [1, 33], ids=["few", "many"])
@pytest.mark.parametrize("algorithm", ["projected", "absorbed"])
def test_a_value_of_its_bias_alone_spreads_under_dropout(algorithm: str, Q: int) -> None:
    """V = 1 by its bias: the output is ΣP after dropout, of mean 1 and variance p / (1 − p) · ΣP²."""
    torch.manual_seed(0)
    q, x, w_k = torch.randn(1, Q, 16), torch.randn(1, 9, 10), torch.randn(16, 10)
    heads = [t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, x @ w_k.T)]
    p = (heads[0] @ heads[1].transpose(-1, -2) * 8**-0.5).softmax(-1)
    variance = (0.3 / 0.7 * p.square().sum(-1)).transpose(1, 2)[..., None].expand(1, Q, 2, 8)
    draws = mmkernels.cross_attention(
        q.expand(8192 // Q, -1, -1), x.expand(8192 // Q, -1, -1), w_k, torch.zeros(16, 10), None, torch.ones(16),
        num_heads=2, dropout_p=0.3, algorithm=algorithm,
    )  # fmt: skip
    centred = (draws - 1) / variance.flatten(2).sqrt()
    assert centred.mean().abs() < 0.05 and (centred.square().mean() - 1).abs() < 0.1


def test_gradients_under_dropout_are_those_of_the_values() -> None:
    call, _ = calls.dropped(torch.float64, False)
    names = [n for n, t in call.items() if t is not None and t.is_floating_point()]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        arguments = {**call, **dict(zip(names, tensors, strict=True))}
        return torch.ops.mmkernels.cross_attention(*arguments.values(), 0, 2, 0.5, 0.4)[0]

    assert torch.autograd.gradcheck(run, [call[n].clone().requires_grad_() for n in names])
