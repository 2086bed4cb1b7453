# SPDX-License-Identifier: Apache-2.0
"""The reference MM-LLM: its parts equal the layers they replace, its flow puts features where they belong."""

import pytest
import torch
from torch import nn

import mmkernels
from mmkernels.models import (
    MMLLM,
    DecoderConfig,
    MMConfig,
    ProjectorConfig,
    VisionConfig,
    tokenizer,
)
from mmkernels.models.decoder import Decoder
from mmkernels.nn import CrossAttention, PatchEmbed, QFormer

TINY = MMConfig(
    VisionConfig(hidden_size=32, num_layers=1, intermediate_size=48),
    ProjectorConfig(num_query_tokens=3, hidden_size=32, num_layers=2, intermediate_size=48),
    DecoderConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _pair(algorithm: str, frequency: int) -> tuple[nn.Module, QFormer]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Blip2QFormerConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        encoder_hidden_size=20, cross_attention_frequency=frequency, use_qformer_text_input=False,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = transformers.Blip2QFormerModel(config).double()
    for parameter in theirs.parameters():  # biases and norms too, or their places go untested
        nn.init.normal_(parameter, std=0.4)
    ours = QFormer(
        hidden_size=24, num_heads=4, num_layers=3, intermediate_size=40, encoder_hidden_size=20,
        cross_attention_frequency=frequency, algorithm=algorithm,
    ).double()  # fmt: skip
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("shared", [False, True], ids=["own-queries", "shared-queries"])
@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("algorithm", ["projected", "absorbed"])
def test_qformer_equals_blip2(algorithm: str, frequency: int, shared: bool) -> None:
    theirs, ours = _pair(algorithm, frequency)
    query = torch.randn(1 if shared else 3, 5, 24, dtype=torch.double)
    features = torch.randn(3, 11, 20, dtype=torch.double)
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, 7:] = 0
    results = []
    for model in (theirs, ours):
        q, x = query.clone().requires_grad_(), features.clone().requires_grad_()
        given = q.expand(3, -1, -1) if model is theirs else q
        out = model(given, encoder_hidden_states=x, encoder_attention_mask=mask)
        out = getattr(out, "last_hidden_state", out)
        out.sin().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append((out, q.grad, x.grad, grads))
    for a, b in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    for name, grad in results[0][3].items():
        got = results[1][3][name]
        got = torch.zeros_like(grad) if got is None else got  # key bias, absorbed
        torch.testing.assert_close(got, grad, rtol=1e-8, atol=1e-10, msg=name)


def test_cross_attention_passes_the_algorithm_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = mmkernels.cross_attention
    monkeypatch.setattr(
        mmkernels,
        "cross_attention",
        lambda *a, **k: (seen.append(k["algorithm"]), real(*a, **k))[1],
    )
    for algorithm in ("auto", "projected", "absorbed"):
        module = CrossAttention(8, 2, 6, algorithm=algorithm)
        assert module(torch.randn(1, 3, 8), torch.randn(4, 5, 6)).shape == (4, 3, 8)
    assert seen == ["auto", "projected", "absorbed"]


def test_patch_embed_from_conv_takes_uint8() -> None:
    conv = nn.Conv2d(3, 10, 4, 4)
    module = PatchEmbed.from_conv(
        conv, rescale_factor=1 / 255, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)
    )
    assert list(module.state_dict()) == list(conv.state_dict())
    assert module.weight is conv.weight and module.bias is conv.bias
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    rows = conv((pixels / 255 - mean) / std).flatten(2).mT
    prefix, position = torch.randn(1, 10), torch.randn(6, 10)
    expected = torch.cat((prefix.expand(2, 1, 10), rows + position), 1)
    torch.testing.assert_close(module(pixels, position, prefix), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"stride": 2}, {"padding": 1}, {"dilation": 2}])
def test_patch_embed_from_conv_refuses_other_convolutions(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stride = kernel"):
        PatchEmbed.from_conv(nn.Conv2d(3, 8, 4, **{"stride": 4, **wrong}))


def test_decoder_equals_llama() -> None:
    transformers = pytest.importorskip("transformers")
    c = DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
            rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    ).double()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Decoder(c).double()
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(0, 50, (3, 9))
    a, b = theirs(ids).logits, ours(ours.model.embed_tokens(ids))
    # inv_freq and the angles are float32 in both
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    a.sin().sum().backward()
    b.sin().sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_generation_with_cache_equals_generation_without() -> None:
    decoder = Decoder(TINY.decoder)
    rows = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
    embeds = decoder.model.embed_tokens(tokenizer.pad(rows))
    got = decoder.generate(embeds, torch.tensor([6, 2, 4]), 12, eos=-1)
    for row, new in zip(rows, got.tolist(), strict=True):
        ids = list(row)
        for token in new:
            logits = decoder(decoder.model.embed_tokens(torch.tensor([ids])))
            assert token == logits[0, -1].argmax()
            ids.append(token)


def test_generation_stops_at_the_end_token_and_at_the_model_limit() -> None:
    decoder = Decoder(TINY.decoder)
    embeds, lengths = (
        decoder.model.embed_tokens(torch.tensor([[1, 2], [3, 4]])),
        torch.tensor([2, 2]),
    )
    free = decoder.generate(embeds, lengths, 8, eos=-1)
    eos = int(free[0, 2])
    stopped = decoder.generate(embeds, lengths, 8, eos=eos)
    first = free[0].tolist().index(eos)
    assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(stopped[0, first:].tolist()) == {eos}
    with pytest.raises(ValueError, match="257 positions, the model has 256"):
        decoder.generate(embeds, lengths, 255, eos=eos)


def test_features_stand_in_the_placeholders_rows() -> None:
    model = MMLLM(TINY)
    features = torch.randn(2, 3, 32)
    rows = [tokenizer.encode_prompt("hi <image>!", 3), tokenizer.encode_prompt("longer text", 3)]
    ids = tokenizer.pad(rows)
    embeds = model.embed(ids, features)
    assert torch.equal(embeds[ids == tokenizer.IMAGE].view(2, 3, 32), features)
    text = ids != tokenizer.IMAGE
    table = model.language_model.model.embed_tokens.weight
    assert torch.equal(embeds[text], table[ids[text]])
    assert rows[0][:5] == [tokenizer.BOS, *b"hi ", tokenizer.IMAGE]


def test_wrong_number_of_image_tokens_names_sample_and_counts() -> None:
    model = MMLLM(TINY)
    with pytest.raises(ValueError, match=r"sample 1.*6.*3|sample 1.*3.*6"):
        model.answer(["fine", "<image> two <image>"], torch.randn(2, 3, 32))


def test_kernels_and_reference_agree_end_to_end() -> None:
    model = MMLLM(TINY)
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    ids = tokenizer.pad([tokenizer.encode_prompt("what?", 3)] * 2)
    kernels = model(ids, model.project(model.encode(pixels)))
    with mmkernels.backend("reference"):
        reference = model(ids, model.project(model.encode(pixels)))
    torch.testing.assert_close(kernels, reference, rtol=1e-3, atol=1e-4)
    other = model(ids, model.project(model.encode(255 - pixels)))
    assert (other - kernels).abs().max() > 1e-3  # the picture matters


def test_tokenizer_takes_any_text() -> None:
    for text in ("", "which digits?", "Zürich 図 🙂", "\x00\xff"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.EOS, 65]) == text
    assert tokenizer.decode([65, tokenizer.IMAGE, tokenizer.PAD, 66]) == "AB"


def test_config_round_trip_and_errors() -> None:
    assert MMConfig.from_json(TINY.to_json()) == TINY
    for old, new, problem in (
        ('"num_layers": 1', '"num_layer": 1', "vision has missing or unknown fields"),
        ('"num_layers": 1', '"num_layers": "1"', "vision.num_layers must be a positive"),
        ('"num_layers": 1', '"num_layers": 1.5', "vision.num_layers must be a positive"),
        ('"vision"', '"viison"', "expected an object with"),
    ):
        with pytest.raises(ValueError, match=problem):
            MMConfig.from_json(TINY.to_json().replace(old, new, 1))


def test_a_packed_batch_is_the_padded_one() -> None:
    """Logits and gradients of questions of different lengths, with their images."""
    model = MMLLM(TINY).double()
    Q = TINY.projector.num_query_tokens
    rows = [tokenizer.encode_prompt(p, Q) for p in ("sum?", "what is the first digit?", "list")]
    side = TINY.vision.image_size
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    grads, outputs = [], []
    for packed in (False, True):
        model.zero_grad()
        features = model.project(model.encode(pixels))
        if packed:
            plan = mmkernels.plan_pack(
                [torch.tensor(r) for r in rows], feature_token_ids=[tokenizer.IMAGE],
                feature_counts=[[Q] * 3], expand=False,
            )  # fmt: skip
            logits = model.forward_packed(plan, features).split([len(r) for r in rows])
        else:
            padded = model(tokenizer.pad(rows), features)
            logits = tuple(x[: len(r)] for x, r in zip(padded, rows, strict=True))
        sum(x.square().sum() for x in logits).backward()  # type: ignore[union-attr]
        outputs.append(logits)
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for ours, theirs in zip(outputs[1], outputs[0], strict=True):
        assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    for name, theirs in grads[0].items():
        if theirs is not None:
            size = theirs.abs().max().clamp(min=1e-3)  # smaller ones are sums that cancel
            assert (grads[1][name] - theirs).abs().max() <= 1e-9 * size, name
