# SPDX-License-Identifier: Apache-2.0
"""The patch-embedding modules: parameters of the layers they replace, refusals, torch integrations."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.nn import AudioPatchEmbed, PackedPatchEmbed, PatchEmbed


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def rows_of(conv: nn.Conv2d | nn.Conv3d, pixels: torch.Tensor) -> torch.Tensor:
    return conv(pixels).flatten(2).mT


def cases() -> dict[str, tuple[nn.Module, dict[str, Any], torch.Tensor, Any]]:
    """A layer, the module's options, pixels, and the tokens as the layer gives them."""
    image = torch.randn(2, 3, 8, 12, dtype=torch.double)
    clip = torch.randn(2, 3, 4, 8, 12, dtype=torch.double)
    ppc = lambda x: (
        x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    )
    cpp = lambda x: F.unfold(x, 4, stride=4).mT
    return {
        "conv2d": (nn.Conv2d(3, 10, 4, 4), {}, image, rows_of),
        "conv3d": (nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4), bias=False), {}, clip, rows_of),
        "still": (nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4)), {}, image,
                  lambda c, x: rows_of(c, x.unsqueeze(2).expand(-1, -1, 2, -1, -1))),
        "overlap": (nn.Conv2d(3, 10, 4, 2, padding="valid"), {"stride": 2}, image, rows_of),
        "linear": (nn.Linear(48, 10), {}, image, lambda c, x: c(cpp(x))),
        "linear_ppc": (nn.Linear(48, 10), {"patch_order": "ppc"}, image, lambda c, x: c(ppc(x))),
        "linear_tall": (nn.Linear(48, 10), {"stride": (8, 2)}, image,
                        lambda c, x: c(F.unfold(x, (8, 2), stride=(8, 2)).mT)),
        "linear_rows": (nn.Linear(48, 10, bias=False), {}, cpp(image), lambda c, x: c(x)),
        "crop": (nn.Conv2d(3, 10, 3, 3), {"crop": True}, image, rows_of),
        "pad": (nn.Conv2d(3, 10, 5, 5), {"pad": True}, image,
                lambda c, x: rows_of(c, F.pad(x, (0, 3, 0, 2)))),
        "merge": (nn.Conv2d(3, 10, 2, 2), {"merge_size": 2}, image,
                  lambda c, x: c(x).unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).flatten(2, 4).mT),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_from_conv_gives_the_layers_tokens_and_gradients(name: str) -> None:
    layer, options, pixels, expected_of = cases()[name]
    layer = layer.double()
    module = PatchEmbed.from_conv(layer, **options)
    assert list(module.state_dict()) == list(layer.state_dict())
    assert module.weight is layer.weight and module.bias is layer.bias
    expected = expected_of(layer, pixels)
    got = module(pixels)
    close(got, expected)
    grads = torch.autograd.grad(expected.sin().sum(), list(layer.parameters()))
    got.sin().sum().backward()  # reaches the layer's own parameters
    for parameter, grad in zip(layer.parameters(), grads, strict=True):
        close(parameter.grad, grad)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        (nn.Conv2d(3, 10, (4, 6), (4, 6)), lambda: PatchEmbed(3, 10, (4, 6))),
        (nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4)), lambda: PatchEmbed(3, 10, (2, 4, 4))),
        (nn.Linear(48, 10), lambda: PatchEmbed(3, 10, 4, patch_order="ppc")),
        (nn.Conv2d(3, 10, 4, 4, bias=False), lambda: PackedPatchEmbed(3, 10, 4, bias=False)),
        (nn.Conv2d(1, 10, 6, (4, 5)), lambda: AudioPatchEmbed(10, 6, frequency_stride=4, time_stride=5)),
    ],
    ids=["conv2d", "conv3d", "linear", "packed", "audio"],
)  # fmt: skip
def test_state_dict_goes_both_ways(layer: nn.Module, module: Any) -> None:
    ours = module()
    ours.load_state_dict(layer.state_dict())
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in other.state_dict().items())


def test_rectangular_ppc_patches_need_no_stride() -> None:
    module = PatchEmbed(3, 10, (4, 2), patch_order="ppc").double()
    image = torch.randn(2, 3, 8, 12, dtype=torch.double)
    rows = image.unfold(2, 4, 4).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    close(module(image), F.linear(rows, module.weight, module.bias))


@pytest.mark.parametrize(
    ("layer", "options", "error", "message"),
    [
        (nn.Conv2d(3, 8, 4, 2), {}, ValueError, "stride = kernel"),
        (nn.Conv2d(3, 8, 4, 2), {"stride": 3}, ValueError, "stride = kernel"),
        (nn.Conv2d(3, 8, 4, 4, padding=1), {}, ValueError, "no padding"),
        (nn.Conv2d(3, 8, 4, 4, dilation=2), {}, ValueError, "dilation"),
        (nn.Conv2d(4, 8, 4, 4, groups=2), {}, ValueError, "groups"),
        (nn.Conv3d(3, 8, (2, 4, 4), (1, 4, 4)), {}, ValueError, "stride = kernel"),
        (nn.Conv1d(3, 8, 4, 4), {}, TypeError, "Conv2d, a Conv3d or a Linear"),
        (nn.Linear(48, 8), {"pre_norm": nn.LayerNorm(48), "rescale_factor": 1 / 255}, ValueError,
         "pre_norm comes before"),
    ],
)  # fmt: skip
def test_from_conv_refuses(
    layer: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PatchEmbed.from_conv(layer, **options)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 8, 4, 4), nn.Conv2d(1, 8, (4, 3)), nn.Linear(4, 4)])
def test_audio_refuses_other_layers(layer: Any) -> None:
    with pytest.raises(ValueError, match=r"Conv2d\(1, D, P\)"):
        AudioPatchEmbed.from_conv(layer)


def test_norms_stand_before_and_between() -> None:
    linear, before, after = nn.Linear(48, 10), nn.LayerNorm(48), nn.RMSNorm(10)
    module = PatchEmbed.from_conv(linear, pre_norm=before, norm=after)
    assert {n.split(".")[0] for n in module.state_dict()} == {"weight", "bias", "norm", "pre_norm"}
    module.double()
    rows, position = torch.randn(2, 6, 48).double(), torch.randn(6, 10).double()
    expected = after(linear(before(rows)))
    close(module(rows, position), expected + position)
    packed = PackedPatchEmbed.from_conv(linear, pre_norm=before, norm=after)
    grid = torch.tensor([[1, 2, 3], [2, 3, 1]])
    close(packed(rows.flatten(0, 1), grid).tokens, expected.flatten(0, 1))
    cls, table = torch.randn(10).double(), torch.randn(3, 3, 10).double()
    for wrong in (
        lambda: module(rows, position, cls),
        lambda: PatchEmbed.from_conv(linear, norm=after, merge_size=2)(rows, position),
        lambda: packed(rows.flatten(0, 1), grid, position_table=table),
        lambda: packed(rows.flatten(0, 1), grid, prefix_tokens=cls),
    ):
        with pytest.raises(ValueError, match=r"a norm between projection and positions|merge_size"):
            wrong()
    for wrong in (lambda: module(torch.randn(2, 3, 4, 8)), lambda: packed([torch.randn(3, 4, 8)])):
        with pytest.raises(ValueError, match="must be rows"):
            wrong()


def test_packed_images_rows_and_tables() -> None:
    conv = nn.Conv2d(3, 10, 4, 4).double()
    table = nn.Parameter(torch.randn(5, 5, 10).double())
    module = PackedPatchEmbed.from_conv(conv, position_table=table)
    assert module.position_table is table and "position_table" in module.state_dict()
    images = [torch.randn(3, 8, 12).double(), torch.randn(3, 16, 4).double()]
    cls = torch.randn(10).double()
    out = module(images, prefix_tokens=cls)

    def expected(t: torch.Tensor) -> torch.Tensor:
        tokens = []
        for image in images:
            patches = conv(image[None])
            at = F.interpolate(t.permute(2, 0, 1)[None], patches.shape[2:], mode="bilinear")
            tokens += [cls[None], (patches + at)[0].flatten(1).T]
        return torch.cat(tokens)

    close(out.tokens, expected(table))
    assert out.cu_seqlens.tolist() == [0, 7, 12] and out.grid_thw.tolist() == [[1, 2, 3], [1, 4, 1]]
    rows = torch.cat([F.unfold(i[None], 4, stride=4)[0].T for i in images])
    close(module(rows, out.grid_thw, prefix_tokens=cls).tokens, out.tokens)
    other = torch.randn(5, 5, 10).double()
    close(module(images, position_table=other, prefix_tokens=cls).tokens, expected(other))
    close(torch.autograd.grad(out.tokens.sin().sum(), table)[0],
          torch.autograd.grad(expected(table).sin().sum(), table)[0])  # fmt: skip


def test_audio() -> None:
    conv = nn.Conv2d(1, 10, 6, (4, 5)).double()
    module = AudioPatchEmbed.from_conv(conv, image_mean=[0.5], image_std=[2.0])
    sound, two = torch.randn(2, 33, 16).double(), torch.randn(2, 10).double()
    position = torch.randn(2 + 18, 10).double()
    patches = rows_of(conv, (sound.mT[:, None] - 0.5) / 2)
    assert patches.shape[1] == 18
    close(module(sound, position, two), torch.cat([two.expand(2, 2, 10), patches], 1) + position)


MODULES = {
    "dense": (lambda: PatchEmbed(3, 10, 4, rescale_factor=1 / 255, image_mean=[0.5] * 3),
              lambda: (torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8), torch.randn(7, 10),
                       torch.randn(10))),
    "norm": (lambda: PatchEmbed(3, 10, 4, norm=nn.RMSNorm(10)),
             lambda: (torch.randn(2, 3, 8, 12), torch.randn(6, 10))),
    "rows": (lambda: PackedPatchEmbed(3, 10, 4, position_table=torch.randn(5, 5, 10), merge_size=2),
             lambda: (torch.randn(16, 48), torch.tensor([[1, 2, 4], [2, 2, 2]]))),
    "list": (lambda: PackedPatchEmbed(3, 10, 4, position_table=torch.randn(5, 5, 10)),
             lambda: ([torch.randn(3, 8, 12), torch.randn(3, 16, 4)],)),
    "audio": (lambda: AudioPatchEmbed(10, 6, frequency_stride=4, time_stride=5),
              lambda: (torch.randn(2, 33, 16), torch.randn(20, 10), torch.randn(2, 10))),
}  # fmt: skip


def tokens_of(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out.tokens


@pytest.mark.parametrize("name", MODULES)
def test_compiles_into_one_graph(name: str) -> None:
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    expected = tokens_of(module(*given))
    expected.sin().sum().backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    torch._dynamo.reset()
    got = tokens_of(torch.compile(module, fullgraph=True, backend="aot_eager")(*given))
    got.sin().sum().backward()
    assert torch.equal(got, expected)
    assert all(torch.equal(p.grad, grads[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("name", [n for n in MODULES if n != "norm"])
def test_autocast_gives_what_a_module_in_bf16_gives(name: str) -> None:
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    cast = copy.deepcopy(module).bfloat16()
    small = [given[0], *(g.bfloat16() if g.is_floating_point() else g for g in given[1:])]
    with torch.autocast("cpu", torch.bfloat16):
        got = tokens_of(module(*given))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, tokens_of(cast(*small)))
    got.sum().backward()
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", MODULES)
def test_a_deep_copy_and_a_saved_copy_compute_the_same(name: str) -> None:
    make, inputs = MODULES[name]
    module, given = make(), inputs()
    twin, other = copy.deepcopy(module), make()
    other.load_state_dict({n: t.clone() for n, t in module.state_dict().items()})
    with torch.no_grad():
        expected = tokens_of(module(*given))
        module.weight.zero_()
        for copied in (twin, other):
            assert torch.equal(tokens_of(copied(*given)), expected)
        assert not torch.equal(tokens_of(module(*given)), expected)


def test_prints_what_was_chosen() -> None:
    module = PatchEmbed(3, 10, 4, stride=2, prefix="last")
    assert repr(module) == "PatchEmbed([10, 3, 4, 4], stride=2, prefix=last)"


def test_real_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = torch.from_numpy(datasets.load_digits().images[:64]).mul(15).to(torch.uint8)[:, None]
    mean, std = [0.3], [0.4]
    conv = nn.Conv2d(1, 12, 2, 2).double()
    options = {"rescale_factor": 1 / 255, "image_mean": mean, "image_std": std}
    expected = rows_of(conv, (digits.double() / 255 - 0.3) / 0.4)
    close(PatchEmbed.from_conv(conv, **options)(digits), expected)
    cut = [digit[:, : 4 + 2 * (i % 3), : 8 - 2 * (i % 2)] for i, digit in enumerate(digits)]
    each = [rows_of(conv, (c[None].double() / 255 - 0.3) / 0.4)[0] for c in cut]
    packed = PackedPatchEmbed.from_conv(conv, **options)(cut)
    close(packed.tokens, torch.cat(each))
    assert packed.cu_seqlens.diff().tolist() == [len(e) for e in each]
