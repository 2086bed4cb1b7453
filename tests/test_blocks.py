# SPDX-License-Identifier: Apache-2.0
"""Projector blocks against plain arithmetic, features beside the text, sound: each does what its name says."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_config

from mmkernels.models import MMLLM, AudioConfig, Features, VisionConfig, generate
from mmkernels.models import config as c
from mmkernels.models.audio import AudioEncoder, log_mel, mel_filters
from mmkernels.models.features import join, select
from mmkernels.models.gated import last_medium
from mmkernels.models.projector import Projector
from mmkernels.models.vision import VisionEncoder

GRIDS = ((2, 2, 4), (1, 4, 2))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _features(width: int = 6, prefix: int = 0, grids: Any = GRIDS) -> Features:
    rows = sum(t * (prefix + h * w) for t, h, w in grids)
    return Features(torch.randn(rows, width, dtype=torch.double), grids, prefix)


def _run(blocks: tuple[c.Block, ...], features: Features) -> tuple[Projector, Features]:
    projector = Projector(blocks, features.tokens.shape[1]).double()
    return projector, projector(features)


def test_prefix_frames_and_places() -> None:
    features = _features(prefix=1)
    _, out = _run((c.DropPrefixConfig(),), features)
    items = features.tokens.split(features.counts)
    expected = torch.cat([items[0].view(2, 9, 6)[:, 1:].flatten(0, 1), items[1][1:]])
    assert torch.equal(out.tokens, expected) and out.counts == [16, 8] and out.prefix == 0
    projector, out = _run((c.FramePlaceConfig(2),), features)
    table = projector.blocks[0].frame_embed
    first, second = out.tokens.split(features.counts)
    assert torch.equal(first.view(2, 9, 6), items[0].view(2, 9, 6) + table[:, None])
    assert torch.equal(second, items[1] + table[0])
    with pytest.raises(ValueError, match="at most 1 frames are placed, got 2"):
        _run((c.FramePlaceConfig(1),), features)
    square = _features(8, prefix=2, grids=((1, 2, 2), (3, 2, 2)))
    projector, out = _run((c.PlaceConfig(2),), square)
    moved = (out.tokens - square.tokens).view(4, 6, 8)
    assert moved[:, :2].abs().max() == 0
    place = projector.blocks[0].position_embed
    torch.testing.assert_close(moved[:, 2:], place.expand(4, 4, 8))
    with pytest.raises(ValueError, match="every grid must be 3×3"):
        _run((c.PlaceConfig(3),), square)


def test_pools() -> None:
    features = _features(prefix=1)
    frames = [
        x.view(t, -1, 6)
        for x, (t, _, _) in zip(features.tokens.split(features.counts), GRIDS, strict=True)
    ]
    expected = {
        "item": ([x[:, 1:].mean((0, 1))[None] for x in frames], [1, 1]),
        "frame": ([x[:, 1:].mean(1) for x in frames], [2, 1]),
        "time_and_space": (
            [torch.cat((x[:, 1:].mean(1), x[:, 1:].mean(0))) for x in frames],
            [10, 9],
        ),
        "prefix": ([x[:, 0] for x in frames], [2, 1]),
    }
    for over, (tokens, counts) in expected.items():
        _, out = _run((c.PoolConfig(over),), features)
        assert out.counts == counts and out.prefix == 0
        torch.testing.assert_close(out.tokens, torch.cat(tokens), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="over must be one of"):
        _run((c.PoolConfig("all"),), features)


def test_merge_and_spread() -> None:
    features = _features()
    _, out = _run((c.MergeConfig(2, 2),), features)
    first = features.tokens[:8].view(1, 2, 2, 2, 6).permute(0, 2, 1, 3, 4).reshape(2, 24)
    assert torch.equal(out.tokens[:2], first)
    assert out.grids == ((2, 1, 2), (1, 2, 1)) and out.counts == [4, 2]
    _, out = _run((c.MergeConfig(1, 4, pad=True),), features)  # MiniGPT-v2
    assert torch.equal(out.tokens[0], features.tokens[:4].flatten()) and out.counts == [4, 4]
    projector, out = _run((c.SpreadConfig(3, 5),), features)
    assert torch.equal(out.tokens, projector.blocks[0].linear(features.tokens).view(-1, 5))
    assert out.counts == [48, 24]
    with pytest.raises(ValueError, match="must have no prefix tokens"):
        _run((c.MergeConfig(),), _features(prefix=1))


def test_layers_and_widths() -> None:
    features = _features()
    blocks = (
        c.NormConfig("rms", 1e-5),
        c.LinearConfig(10, act="gelu"),
        c.SwiGLUConfig(4, 7),
        c.LinearConfig(3, bias=False),
    )
    projector, out = _run(blocks, features)
    norm, first, glu, last = projector.blocks
    x = F.rms_norm(features.tokens, (6,), norm.norm.weight, 1e-5)
    x = F.gelu(F.linear(x, first.linear.weight, first.linear.bias))
    m = glu.mlp
    x = (F.silu(x @ m.gate_proj.weight.T) * (x @ m.up_proj.weight.T)) @ m.down_proj.weight.T
    torch.testing.assert_close(out.tokens, x @ last.linear.weight.T, rtol=1e-10, atol=1e-10)
    assert projector.width == 3 and out.grids == GRIDS


@pytest.mark.parametrize("kind", ["QFormer", "Perceiver", "Resampler"])
@pytest.mark.parametrize("per", ["item", "frame"])
def test_queries_read_each_item_as_if_alone(kind: str, per: str) -> None:
    blocks: dict[str, c.Block] = {
        "QFormer": c.QFormerConfig(3, 16, 2, 4, 16, per=per),
        "Perceiver": c.PerceiverConfig(3, 2, 4, 2, 4, 16, per=per),
        "Resampler": c.ResamplerConfig(3, 8, 2),
    }
    features = _features(8)
    projector, out = _run((blocks[kind],), features)
    framewise = per == "frame" or kind == "Resampler"
    assert out.counts == ([6, 3] if framewise else [3, 3])
    for i in range(2):
        alone = projector(select(features, [i]))
        torch.testing.assert_close(
            out.tokens.split(out.counts)[i], alone.tokens, rtol=1e-9, atol=1e-9
        )
    if framewise:
        halves = [
            select(Features(features.tokens, ((1, 2, 4), (1, 2, 4), (1, 4, 2))), [i])
            for i in range(3)
        ]
        again = join([projector(h) for h in halves])
        torch.testing.assert_close(again.tokens, out.tokens, rtol=1e-9, atol=1e-9)
    assert projector(select(features, [])).tokens.shape == (0, projector.width)


def test_perceiver_as_in_flamingo() -> None:
    """Against mlfoundations/open_flamingo, ``src/helpers.py``, ``PerceiverResampler.forward``.

    LayerNorm on media and latents, keys of both, a residual, LayerNorm and an MLP with GELU.
    """
    features = _features(8, grids=((1, 3, 5),))
    block = c.PerceiverConfig(3, 2, 2, 2, 4, 20, norm="layer", mlp="gelu")
    projector, out = _run((block,), features)
    resampler = projector.blocks[0].resampler
    for parameter in resampler.parameters():  # norms too, or their places go untested
        torch.nn.init.normal_(parameter, std=0.4)
    latents = resampler.latents
    heads = lambda x: x.unflatten(-1, (2, 4)).transpose(0, 1)
    for layer in resampler.layers:
        x, normed = layer.input_context_norm(features.tokens), layer.input_latents_norm(latents)
        keys, a = torch.cat((x, normed)), layer.self_attn
        scores = heads(a.q_proj(normed)) @ heads(a.k_proj(keys)).mT * 4**-0.5
        mixed = (scores.softmax(-1) @ heads(a.v_proj(keys))).transpose(0, 1).flatten(1)
        latents = latents + a.o_proj(mixed)
        inner = F.gelu(layer.mlp.up_proj(layer.post_attention_layernorm(latents)))
        latents = latents + layer.mlp.down_proj(inner)
    assert [type(n) for n in (resampler.norm, layer.input_context_norm)] == [torch.nn.LayerNorm] * 2
    expected = resampler.norm(latents)
    torch.testing.assert_close(projector(features).tokens, expected, rtol=1e-9, atol=1e-9)
    for wrong in ({"norm": "batch"}, {"mlp": "relu"}):
        with pytest.raises(ValueError, match="must be one of"):
            _run((replace(block, **wrong),), features)


def test_wrap_transformer_and_an_activated_norm() -> None:
    features = _features(8)
    blocks = (c.TransformerConfig(2, 2, 12), c.NormConfig(act="gelu"), c.WrapConfig())
    projector, out = _run(blocks, features)
    layers, norm, wrap = projector.blocks
    assert out.counts == [n + 2 for n in features.counts] and out.grids[0] == (1, 1, 18)
    ends = wrap.ends
    for i in range(2):
        alone = select(features, [i])
        for layer in layers.layers:
            qkv = layer.qkv(layer.norm1(alone.tokens)).unflatten(-1, (3, 2, 4))
            q, k, v = (x.transpose(0, 1) for x in qkv.unbind(1))
            mixed = ((q @ k.mT / 2).softmax(-1) @ v).transpose(0, 1).flatten(1)
            tokens = alone.tokens + layer.proj(mixed)
            inner = F.gelu(layer.fc1(layer.norm2(tokens)), approximate="tanh")
            alone = alone._replace(tokens=tokens + layer.fc2(inner))
        expected = torch.cat((ends[:1], F.gelu(norm.norm(alone.tokens)), ends[1:]))
        got = out.tokens.split(out.counts)[i]
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert projector(select(features, [])).counts == []


def test_a_projector_that_two_modalities_share() -> None:
    tiny = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)
    shared = replace(
        tiny,
        encoders={**tiny.encoders, "video": "image"},
        projectors={**tiny.projectors, "video": "image"},
    )
    assert c.MMConfig.from_json(shared.to_json()) == shared
    model = MMLLM(shared)
    assert list(model.projectors) == ["image"]
    seen = model.encode("image", [torch.zeros(3, 112, 112, dtype=torch.uint8)])
    assert torch.equal(model.project("video", seen).tokens, model.project("image", seen).tokens)
    for wrong in (
        replace(shared, projectors={**tiny.projectors, "video": "audio"}),
        replace(shared, encoders={**tiny.encoders, "video": VisionConfig(hidden_size=64)}),
    ):
        with pytest.raises(ValueError, match="must have a projector for the same features"):
            MMLLM(wrong)


# Features beside the text


def _gated() -> MMLLM:
    tiny = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=2)
    model = MMLLM(replace(tiny, decoder=replace(tiny.decoder, gated_layers=(1,)))).double()
    return model


def test_gated_layers_have_sizes_of_their_own() -> None:
    gated = c.DecoderConfig(gated_layers=(0,), gated_num_heads=2, gated_head_dim=5)
    assert gated.feature_width == gated.hidden_size
    wide = replace(gated, gated_feature_size=7)
    layer = MMLLM(c.MMConfig(projectors={"image": (c.LinearConfig(7),)}, decoder=wide))
    block = layer.language_model.model.layers[0].gated
    shapes = [list(m.weight.shape) for m in (block.to_q, block.to_kv, block.to_out)]
    assert shapes == [[10, 128], [20, 7], [128, 10]] and block.num_heads == 2
    with pytest.raises(ValueError, match="ends with width 7, the decoder has 128"):
        MMLLM(c.MMConfig(projectors={"image": (c.LinearConfig(7),)}, decoder=gated))


def _open(model: MMLLM) -> None:
    for layer in model.language_model.model.layers:
        if layer.gated is not None:
            torch.nn.init.ones_(layer.gated.attn_gate)
            torch.nn.init.ones_(layer.gated.ff_gate)


def test_a_token_sees_the_last_medium_before_it() -> None:
    samples = torch.tensor([0, 0, 0, 0, 1, 1])
    before = torch.tensor([0, 1, 1, 2, 0, 1])
    seen = last_medium(samples, before, torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 2, 1]))
    assert seen.tolist() == [
        [False] * 4, [True, True, False, False], [True, True, False, False], [False, False, True, False],
        [False] * 4, [False, False, False, True],
    ]  # fmt: skip


def test_gates_start_closed_and_open_to_the_picture() -> None:
    model = _gated()
    ids = [
        model.tokenizer.encode_prompt(p)
        for p in ("a <image> b <image> c", "no picture", "<image>d")
    ]
    images = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    seen = model.project("image", model.encode("image", list(images)))
    other = seen._replace(tokens=seen.tokens.flip(0))

    def states(features: Features, rows: list[torch.Tensor] = ids) -> torch.Tensor:
        given = {"image": features}
        return model(model.plan(rows, given), given)

    assert torch.equal(states(seen), states(other))
    _open(model)
    opened, lengths = states(seen), [len(r) for r in ids]
    moved = [
        (a - b).abs().amax(-1)
        for a, b in zip(opened.split(lengths), states(other).split(lengths), strict=True)
    ]
    assert moved[1].max() == 0 and moved[0][:3].max() == 0  # before any picture
    assert moved[0][4:].min() > 0 and moved[2][1:].min() > 0
    alone = states(select(seen, [2]), [ids[2]])
    torch.testing.assert_close(opened.split(lengths)[2], alone, rtol=1e-9, atol=1e-9)
    plan = model.plan([ids[1]], {})  # without any media at all
    torch.testing.assert_close(model(plan, {}), opened.split(lengths)[1], rtol=1e-9, atol=1e-9)
    features = {"image": seen}
    for i, new in enumerate(generate(model, ids, features, 5)):
        mine, row = {"image": select(seen, [[0, 1], [], [2]][i])}, ids[i]
        for token in new:
            logits = model.logits(model(model.plan([row], mine), mine))
            assert token == logits[-1].argmax()
            row = torch.cat((row, torch.tensor([token])))


# Sight of any size, and sound


def test_images_of_different_sizes_and_clips_are_as_alone() -> None:
    encoder = VisionEncoder(
        VisionConfig(
            28,
            7,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            intermediate_size=16,
            offset_bias=False,
        )
    ).double()
    sizes = ((3, 28, 28), (3, 14, 42), (2, 3, 28, 28), (3, 28, 28))
    items = [torch.randint(0, 256, s, dtype=torch.uint8) for s in sizes]
    out = encoder(items)
    assert out.grids == ((1, 4, 4), (1, 2, 6), (2, 4, 4), (1, 4, 4)) and out.prefix == 1
    for i, item in enumerate(items):
        part = out.tokens.split(out.counts)[i]
        torch.testing.assert_close(part, encoder([item]).tokens, rtol=1e-9, atol=1e-9)
    frames = encoder(list(items[2]))
    torch.testing.assert_close(out.tokens.split(out.counts)[2], frames.tokens, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="must be 4×4 patches, got 2×6"):
        VisionEncoder(VisionConfig(28, 7, hidden_size=16, num_heads=2))([items[1]])


def test_tubelets_join_two_frames() -> None:
    encoder = VisionEncoder(
        VisionConfig(
            28,
            7,
            2,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            class_token=False,
            offset_bias=False,
        )
    ).double()
    clip = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    out = encoder([clip, clip[:2]])
    assert out.grids == ((2, 4, 4), (1, 4, 4))
    torch.testing.assert_close(out.tokens[:16], out.tokens[32:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_lies_in_its_band(hertz: int) -> None:
    config = AudioConfig()
    time = torch.arange(4000) / config.sampling_rate
    spectrogram = log_mel((2 * math.pi * hertz * time).sin(), mel_filters(config), config)
    assert spectrogram.shape == ((4000 - config.window) // config.hop + 1, config.mel_bins)
    top = 2595 * math.log10(1 + config.sampling_rate / 2 / 700)
    expected = 2595 * math.log10(1 + hertz / 700) / top * (config.mel_bins + 1) - 1
    assert (spectrogram.argmax(1) - expected).abs().max() <= 1.5
    loud, silent = spectrogram.amax(), log_mel(torch.zeros(4000), mel_filters(config), config)
    assert loud > 0.2 and silent.unique().tolist() == pytest.approx([math.log(1e-5) / 6])


def test_recordings_of_different_lengths_are_as_alone() -> None:
    encoder = AudioEncoder(
        AudioConfig(hidden_size=16, num_layers=2, num_heads=2, intermediate_size=16)
    ).double()
    items = [torch.rand(n, dtype=torch.double) - 0.5 for n in (3000, 8000, 3000)]
    out = encoder(items)
    assert out.grids == ((1, 4, 2), (1, 4, 6), (1, 4, 2))
    for part, item in zip(out.tokens.split(out.counts), items, strict=True):
        torch.testing.assert_close(part, encoder([item]).tokens, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="n ≥ 1400 samples"):
        encoder([torch.zeros(1399)])


def test_features_on_a_grid_have_positions_on_a_grid() -> None:
    tiny = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)
    model = MMLLM(replace(tiny, decoder=replace(tiny.decoder, mrope_section=(2, 1, 1))))
    features = {"image": Features(torch.randn(7, 32), ((1, 2, 3), (1, 1, 1)))}
    ids = [model.tokenizer.encode_prompt(p) for p in ("<image>a", "b<image>")]
    plan = model.plan(ids, features)
    expected = [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 0, 1, 2, 3],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 0, 1, 2, 3],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 0, 1, 2, 3],
    ]
    assert model.positions(plan, features).tolist() == expected
