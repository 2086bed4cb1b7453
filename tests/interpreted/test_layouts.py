# SPDX-License-Identifier: Apache-2.0
"""What the cases leave out: layouts, several tiles and groups, rows without keys, the padded tail."""

import importlib

import pytest
import torch
from test_cases import assert_within_bound, cases_of, tagged

from mmkernels.ops.cross_attention import reference
from mmkernels.testing import Case, gradients
from mmkernels.testing.case import map_tensors

PIXELS = cases_of("patch_embed")
CROSS = cases_of("cross_attention")
cross_attention = importlib.import_module("mmkernels.ops.cross_attention.triton")


def pixels_case(**sizes: object) -> Case:
    return Case("layout", {**PIXELS.DEFAULTS, "S": 0, **sizes})


def scattered(t: torch.Tensor) -> torch.Tensor:
    """The same values, last dimension outermost, every other element of memory."""
    room = t.new_full((*t.shape[::-1], 2), 7)
    return room[..., 1].permute(*reversed(range(t.dim()))).copy_(t)


@pytest.mark.parametrize(("cases", "case"), tagged("gradcheck"))
def test_any_strides_give_the_same_bits(cases: object, case: Case) -> None:
    inputs = cases.make_inputs(case, torch.float32)
    dense = gradients(cases.run, inputs)
    strided = gradients(cases.run, map_tensors(inputs, scattered))
    for name, value in dense.items():
        assert torch.equal(value, strided[name]), name


def test_uint8_nhwc_and_slices_give_the_same_bits() -> None:
    inputs = PIXELS.make_inputs(pixels_case(H=14, W=28, P=14, R=1, S=1), torch.bfloat16)
    pixels = inputs["pixel_values"]
    nhwc = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    frames = torch.stack([pixels + 1, pixels, pixels + 2], 1)[:, 1]  # of [B, T, C, H, W]
    expected = PIXELS.run(inputs)
    for view in (nhwc, frames):
        assert torch.equal(PIXELS.run({**inputs, "pixel_values": view}), expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {
            "B": 3,
            "H": 42,
            "W": 35,
            "P": 7,
            "D": 72,
            "R": 5,
            "S": 2,
        },  # 3, 2 and 5 tiles of M, D and K
        {
            "B": 1,
            "C": 2,
            "H": 32,
            "W": 20,
            "P": 1,
            "D": 3,
            "u8": False,
        },  # the weight gradient splits
        {"B": 1, "C": 5, "H": 4, "W": 6, "P": 2, "norm": False},  # more channels than RGB
    ],
    ids=["tiles", "split", "channels"],
)
def test_patch_embed_in_several_tiles(sizes: dict[str, object]) -> None:
    assert_within_bound(PIXELS, PIXELS.make_inputs(pixels_case(**sizes), torch.float32))


def test_patch_of_unequal_sides() -> None:
    inputs = PIXELS.make_inputs(pixels_case(H=8, W=12, R=1, S=0), torch.float32)
    inputs["weight"] = inputs["weight"][..., :2].repeat(1, 1, 2, 1)  # 8×2
    inputs["position_embed"] = torch.randn(6, 8)
    assert inputs["weight"].shape[2:] == (8, 2)
    torch.testing.assert_close(PIXELS.run(inputs), PIXELS.plain(inputs))


@pytest.mark.parametrize("name", ["shared_bool_mask", "additive_mask"])
def test_groups_of_one_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_attention, "_GROUP_BYTES", 1)
    case = next(c for c in CROSS.CASES if c.name == name)
    assert_within_bound(CROSS, CROSS.make_inputs(case, torch.float32))


@pytest.mark.parametrize("bias", [True, False])
def test_log_sum_exp_and_rows_without_keys(bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    B, Q, n, X, A, d = 2, 3, 40, 21, 2, 5
    query, context = torch.randn(B, Q, A * d, generator=g), torch.randn(B, n, X, generator=g)
    w_k, w_v = torch.randn(2, A * d, X, generator=g)
    b_v = torch.randn(A * d, generator=g) if bias else None
    mask = (torch.rand(B, 1, Q, n, generator=g) > 0.3).expand(B, A, Q, n).clone()
    mask[0, 1, 2] = False
    arguments = (query, context, None, w_k, w_v, None, b_v, mask, None, None, 0, A, 0.1, 0.0)
    out, lse = cross_attention.cross_attention(*arguments)
    expected, expected_lse = reference.cross_attention(*arguments)
    assert lse[0, 1, 2] == -torch.inf and torch.equal(out[0, 2, d:], torch.zeros(d))
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_nothing_past_the_context_is_read() -> None:
    case = next(c for c in CROSS.CASES if c.name == "small")
    inputs = CROSS.make_inputs(case, torch.float32)
    B, n, X = inputs["context"].shape
    poisoned = torch.full((B, n + 60, X + 60), torch.nan)
    poisoned[:, :n, :X] = inputs["context"]
    dense = gradients(CROSS.run, inputs)
    strided = gradients(CROSS.run, {**inputs, "context": poisoned[:, :n, :X]})
    for name, value in dense.items():
        assert torch.equal(value, strided[name]), name
