# SPDX-License-Identifier: Apache-2.0
"""FLOPs that ``FlopCounterMode`` reports of our ops: those of the eager modules, forward and backward."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import mmkernels

Call = Callable[[], torch.Tensor]


def flops(call: Call) -> tuple[int, int]:
    """Of the forward and of the backward; attention in its plain form, which the counter knows everywhere."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        out = call()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_every_op_has_a_formula() -> None:
    ours = [s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("mmkernels::")]
    helpers = ("poll", "_table")  # of the launchers of kernels: no ops of ours
    names = {n.removeprefix("mmkernels::") for n in ours if not n.endswith(helpers)}
    assert len(names) > 15
    missing = [n for n in names if getattr(torch.ops.mmkernels, n) not in flop_registry]
    assert not missing


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("frozen", ["nothing", "pixels", "weight"])
def test_patch_embed_counts_as_the_convolution(frozen: str) -> None:
    pixels, weight, bias = leaf(2, 3, 8, 12), leaf(10, 3, 4, 4), leaf(10)
    clip, deep = leaf(2, 3, 4, 8, 12), leaf(10, 3, 2, 4, 4)
    rows, of_rows = leaf(7, 48), leaf(10, 48)
    for tensor in {"pixels": (pixels, clip, rows), "weight": (weight, deep, of_rows)}.get(
        frozen, ()
    ):
        tensor.requires_grad_(False)
    prefix, position = leaf(2, 10), leaf(8, 10)
    still = leaf(2, 3, 8, 12).requires_grad_(frozen != "pixels")
    embed = mmkernels.patch_embed
    pairs: dict[str, tuple[Call, Call]] = {
        "conv2d": (lambda: embed(pixels, weight, bias), lambda: F.conv2d(pixels, weight, bias, 4)),
        "prefix": (lambda: embed(pixels, weight, bias, prefix_tokens=prefix, position_embed=position),
                   lambda: F.conv2d(pixels, weight, bias, 4)),
        "overlap": (lambda: embed(pixels, weight, stride=2), lambda: F.conv2d(pixels, weight, None, 2)),
        "conv3d": (lambda: embed(clip, deep), lambda: F.conv3d(clip, deep, None, (2, 4, 4))),
        "still": (lambda: embed(still, deep),
                  lambda: F.conv3d(still[:, :, None].repeat(1, 1, 2, 1, 1), deep, None, (2, 4, 4))),
        "rows": (lambda: embed(rows, of_rows, bias), lambda: F.linear(rows, of_rows, bias)),
        "list": (lambda: mmkernels.patch_embed_packed(list(pixels), weight, bias).tokens,
                 lambda: F.conv2d(pixels, weight, bias, 4)),
    }  # fmt: skip
    for name, (ours, eager) in pairs.items():
        counted = flops(ours)
        assert counted == flops(eager), name
        assert counted[0] > 0, name


def test_a_patched_tower_reports_the_flops_of_the_model() -> None:
    pytest.importorskip("transformers")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    model, pixels = CLIPVisionModel(config), torch.randn(2, 3, 28, 28)
    expected = flops(lambda: model(pixels).last_hidden_state)
    with mmkernels.patch(model):
        assert flops(lambda: model(pixels).last_hidden_state) == expected


def test_attention_over_pages_counts_as_attention() -> None:
    """Every query with every key of its sequence and of its group's prefix."""
    caches = torch.randn(2, 9, 4, 2, 8)
    table = torch.tensor([[0, 1], [2, 3]])
    lens, cu = torch.tensor([5, 8]), torch.tensor([0, 3, 4])
    query = torch.randn(4, 6, 8)
    heads = lambda m, n: F.scaled_dot_product_attention(
        torch.randn(1, 6, m, 8), torch.randn(1, 6, n, 8), torch.randn(1, 6, n, 8)
    )  # fmt: skip
    both = lambda *sizes: torch.cat([heads(*s)[0, 0] for s in sizes])
    attend = mmkernels.paged_attention
    with torch.no_grad():
        decode = flops(lambda: attend(query[:2], *caches, table, lens))
        assert decode == flops(lambda: both((1, 5), (1, 8))) and decode[0] > 0
        prefill = flops(lambda: attend(query, *caches, table, lens, cu_seqlens_q=cu))
        assert prefill == flops(lambda: both((3, 5), (1, 8)))
        prefix = (torch.tensor([-1, 0]), torch.tensor([[7, 8]]), torch.tensor([6]))
        shared = flops(
            lambda: attend(query, *caches, table, lens, cu_seqlens_q=cu, shared_prefix=prefix)
        )
        assert shared == flops(lambda: both((3, 5), (1, 14)))


def test_projected_attention_counts_as_its_layers() -> None:
    x, w, q = leaf(2, 7, 6), torch.randn(2, 8, 6, requires_grad=True), leaf(2, 3, 8)
    heads = lambda t: t.unflatten(-1, (2, 4)).transpose(1, 2)
    eager = lambda: F.scaled_dot_product_attention(
        heads(q), heads(F.linear(x, w[0])), heads(F.linear(x, w[1]))
    )
    ours = lambda: mmkernels.cross_attention(q, x, w[0], w[1], num_heads=2, algorithm="projected")
    counted = flops(ours)
    assert counted == flops(eager) and counted[1] > 0


def test_moving_rows_counts_nothing() -> None:
    ids, table, rows = torch.tensor([[1, 0, 0]]), leaf(4, 8), leaf(1, 8)
    for call in (
        lambda: mmkernels.merge_embeddings(ids, table, [rows], feature_token_ids=[1]),
        lambda: mmkernels.patch_merge(leaf(1, 4, 4, 8)),
        lambda: mmkernels.mrope(leaf(1, 5, 2, 8), leaf(1, 5, 2, 8), torch.arange(5)[None], torch.ones(8))[0],
    ):  # fmt: skip
        assert flops(call) == (0, 0)
