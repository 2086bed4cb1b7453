# SPDX-License-Identifier: Apache-2.0
"""Projectors against transformers' own modules, tiny and with random weights: output and all gradients.

In fp64 within 1e-9 of the largest value. In fp32 and bf16 output and gradients are at most 1.4 times as far from the
truth as transformers' module in that dtype, or one ulp of the largest value, by the median of five draws
(TOLERANCES.md). The mean square, 1.1 times, is not held to: of outputs this small it is a lottery.
"""

import contextlib
import copy
import statistics

import pytest
import torch

import mmkernels
from mmkernels.testing import yardstick

pytest.importorskip("transformers")
from against_transformers import InFp64, errors_of_transformers, made, result, truth
from patch_embed_families import Family
from projector_families import FAMILIES

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def ratios(family: Family, dtype: torch.dtype, seed: int) -> dict[str, float]:
    """Error over bound of the output and every gradient, of one draw of parameters and features."""
    module, features = made(family, dtype, seed)
    out = family.ours(module, features)
    grad = yardstick.upstream(out.reshape(-1, out.shape[-1]))
    with InFp64() if dtype == torch.float64 else contextlib.nullcontext():
        got = result(family.ours, module, features, grad)
    expected = truth(family, module, features, grad)
    assert got.keys() == expected.keys()
    assert all(got[n].dtype == dtype and got[n].shape == expected[n].shape for n in got)
    assert all(expected[n].abs().max() > 0 for n in expected), "nothing is compared"
    if dtype == torch.float64:
        bounds = {n: 1e-9 * t.abs().max().clamp(min=1e-3) for n, t in expected.items()}
    else:
        theirs = errors_of_transformers(family, module, features, grad, scalings=4)
        bounds = {
            n: torch.maximum(1.4 * theirs[n], yardstick.ulp(t.abs().max(), dtype))
            for n, t in expected.items()
        }
    return {n: yardstick.compare(n, got[n], t, bounds[n]).ratio for n, t in expected.items()}


def check(family: Family, dtype: torch.dtype) -> list[str]:
    """What is out of bounds: by the median of five draws."""
    drawn = [ratios(family, dtype, seed) for seed in range(1 if dtype == torch.float64 else 5)]
    medians = {name: statistics.median(r[name] for r in drawn) for name in drawn[0]}
    return [
        f"{name}: {ratio:.3g} of the bound" for name, ratio in medians.items() if not ratio <= 1
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_equals_transformers(family: Family, dtype: torch.dtype) -> None:
    failed = check(family, dtype)
    assert not failed, "; ".join(failed)


def test_enough_classes() -> None:
    assert len({f.path for f in FAMILIES}) >= 24
    names = [f.name for f in FAMILIES]
    assert len(names) == len(set(names))


def ratios_of_a_hidden_row(dtype: torch.dtype, seed: int) -> list[float]:
    """Error over bound of both algorithms and of the patched head, of one draw."""
    from transformers.models.siglip2 import modeling_siglip2 as siglip2

    config = siglip2.Siglip2VisionConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, attn_implementation="sdpa"
    )
    torch.manual_seed(seed)
    head = siglip2.Siglip2MultiheadAttentionPoolingHead(config).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head = head.to(dtype)
    ours = mmkernels.nn.AttentionPool(32, 4, 48).to(dtype).eval()
    ours.load_state_dict(head.state_dict())
    tokens = torch.randn(4, 6, 32).to(dtype)
    mask = torch.tensor([[0] * 6, [1, 1, 1, 0, 0, 0], [1] * 6, [0, 0, 0, 0, 0, 1]])
    expected = copy.deepcopy(head).double()(tokens.double(), mask)
    largest, theirs = expected.abs().max(), (head(tokens, mask).double() - expected).abs().max()
    bound = 1e-9 * largest
    if dtype != torch.float64:
        bound = torch.maximum(1.4 * theirs, yardstick.ulp(largest, dtype))
    got = []
    for ours.algorithm in ("absorbed", "projected"):
        got.append(ours(tokens, mask))
    with mmkernels.patch(head):
        got.append(head(tokens, mask))
    return [float((out.double() - expected).abs().max() / bound) for out in got]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_a_row_whose_mask_hides_everything(dtype: torch.dtype) -> None:
    """SigLIP2's head averages all values there."""
    drawn = [ratios_of_a_hidden_row(dtype, seed) for seed in range(5)]
    medians = [statistics.median(row) for row in zip(*drawn, strict=True)]
    assert max(medians) <= 1, medians


def test_a_hidden_row_under_autocast_stays_finite() -> None:
    ours = mmkernels.nn.AttentionPool(32, 4, 48).eval()
    for algorithm in ("absorbed", "projected"):
        ours.algorithm = algorithm
        with torch.autocast("cpu", torch.bfloat16):
            hidden, shown = (
                ours(torch.ones(1, 6, 32), m) for m in torch.tensor([[[0] * 6], [[1] * 6]])
            )
        assert torch.equal(hidden, shown)  # tokens that are alike: their average is any of them
