# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: what the walk over its cases leaves out."""

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.ops.patch_embed import cases
from mmkernels.testing import Case, gradients, yardstick

MEAN, STD = cases.MEAN, cases.STD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("images", "side"), [(21, 224), (2, 512)])
def test_terms_of_one_sign_and_size(images: int, side: int, dtype: torch.dtype) -> None:
    """White images, equal weights, equal gradients: one long chain would round to one side every time."""
    case = Case("white", {**cases.DEFAULTS, "B": images, "H": side, "W": side, "P": 16, "D": 40})
    inputs = cases.make_inputs(case, dtype)
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], 255)
    inputs["weight"] = torch.full_like(inputs["weight"], 0.1)
    grad = torch.full_like(cases.run(inputs), 0.3)
    got = gradients(cases.run, inputs, grad=grad)
    failed = [c for c in yardstick.check(cases, inputs, got, grad) if not c.ratio <= 1]
    assert not failed, "; ".join(map(str, failed))


def test_infinite_and_missing_values_stay_where_they_are() -> None:
    pixels, weight = torch.rand(2, 3, 8, 12), torch.rand(5, 3, 4, 4) + 0.1
    clean = mmkernels.patch_embed(pixels, weight, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for value in (float("inf"), float("-inf"), float("nan")):
        spoilt = pixels.clone()
        spoilt[1, 2, 5, 6] = value  # patch 4 of image 1
        out = mmkernels.patch_embed(spoilt, weight, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        expected = clean.clone()
        expected[1, 4] = value
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_an_infinite_table_row_reaches_its_own_positions_only() -> None:
    images, weight = [torch.rand(3, 12, 12), torch.rand(3, 4, 4)], torch.rand(5, 3, 4, 4)
    table = torch.rand(3, 3, 5)
    clean = mmkernels.patch_embed_packed(images, weight, position_table=table, align_corners=True)
    table[1, 1] = float("inf")
    out = mmkernels.patch_embed_packed(images, weight, position_table=table, align_corners=True)
    expected = clean.tokens.clone()
    expected[4] = float("inf")
    assert torch.equal(out.tokens, expected)


def test_fp64_pixels_are_normalised_in_fp64() -> None:
    pixels = 0.5 + torch.rand(1, 1, 4, 4, dtype=torch.float64) * 1e-7
    weight = torch.randn(3, 1, 4, 4)
    out = mmkernels.patch_embed(pixels, weight, image_mean=[0.5], image_std=[1e-7])
    exact = F.conv2d((pixels - 0.5) / 1e-7, weight.double(), stride=4).flatten(2).mT
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_one_image_alone_or_in_a_list_has_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(8, 12), (60, 4), (4, 4), (32, 40)]
    images = [torch.randint(0, 256, (3, *s), generator=generator, dtype=torch.uint8) for s in sizes]
    weight, table = torch.randn(40, 3, 4, 4), torch.randn(24, 24, 40)
    for dtype in (torch.float32, torch.bfloat16):
        for options in (
            {"antialias": True},
            {"position_mode": "bicubic"},
            {"position_mode": "nearest"},
        ):
            arguments = {"position_table": table.to(dtype), **options}
            packed = mmkernels.patch_embed_packed(images, weight.to(dtype), **arguments)
            offsets = packed.cu_seqlens.tolist()
            for i, image in enumerate(images):
                alone = mmkernels.patch_embed_packed([image], weight.to(dtype), **arguments)
                assert torch.equal(packed.tokens[offsets[i] : offsets[i + 1]], alone.tokens)


def test_a_still_frame_is_the_repeated_one() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    weight = torch.randn(6, 3, 2, 4, 4, dtype=torch.float64)
    twice = pixels[:, :, None].expand(-1, -1, 2, -1, -1)
    still = mmkernels.patch_embed(pixels, weight)
    torch.testing.assert_close(still, mmkernels.patch_embed(twice, weight))
    assert torch.equal(still, mmkernels.patch_embed(twice[:, :, :1], weight))
    mixed = mmkernels.patch_embed_packed([*pixels, twice[0]], weight)
    torch.testing.assert_close(mixed.tokens, torch.cat([*still, still[0]]))


def test_empty_overlap_under_compile() -> None:
    weight = torch.randn(5, 3, 4, 4)
    compiled = torch.compile(mmkernels.patch_embed, fullgraph=True, backend="aot_eager")
    assert compiled(torch.rand(2, 3, 0, 8), weight, stride=2).shape == (2, 0, 5)


@pytest.mark.parametrize("kind", ["list", "rows", "flat"])
def test_packed_calls_compile_to_one_graph(kind: str) -> None:
    weight, table = torch.randn(8, 3, 4, 4), torch.randn(5, 5, 8)

    def inputs(h: int, w: int) -> dict[str, object]:
        if kind == "list":
            return {"images": [torch.rand(3, 4 * h, 4 * w), torch.rand(3, 4 * w, 8)]}
        if kind == "flat":
            return {"images": torch.rand(3 * 16 * h * w), "image_sizes": [(4 * h, 4 * w)]}
        return {"images": torch.rand(h * w, 48), "grid_thw": torch.tensor([[1, h, w]])}

    def run(**kwargs: object) -> tuple[torch.Tensor, ...]:
        return mmkernels.patch_embed_packed(weight=weight, position_table=table, **kwargs)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    for h, w in ((2, 3), (4, 5), (7, 3), (3, 9)):
        given = inputs(h, w)
        for got, expected in zip(compiled(**given), run(**given), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count <= 2
