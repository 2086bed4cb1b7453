# SPDX-License-Identifier: Apache-2.0
"""The reference MM-LLM: its parts equal the layers they replace, its flow puts features where they belong."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_config
from torch import nn

import mmkernels
from mmkernels.cache import PagedKVCache
from mmkernels.models import MMLLM, DecoderConfig, Features, MMConfig, answer, generate, tokenizer
from mmkernels.models.attention import Packed, Paged
from mmkernels.models.decoder import Decoder
from mmkernels.models.generate import new_pool
from mmkernels.models.tokenizer import ByteTokenizer
from mmkernels.nn import CrossAttention, PatchEmbed, QFormer

TINY = tiny_config(32, queries=3, qformer_layers=2, decoder_layers=2)


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


FAMILIES = {
    "Llama": {},
    "Qwen2": {"attention_bias": True},
    "Qwen3": {"qk_norm": True, "head_dim": 12, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_equals_transformers(family: str) -> None:
    """Samples of different lengths, packed, against each alone; logits and all gradients."""
    transformers = pytest.importorskip("transformers")
    c = DecoderConfig(
        vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2, **FAMILIES[family]
    )
    own = {"head_dim": c.head_dim} if c.head_dim else {}
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
            rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=c.tie_word_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, **own,
        )
    ).double()  # fmt: skip
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = Decoder(c).double()
    ours.load_state_dict(theirs.state_dict())
    rows = [torch.randint(0, 50, (n,)) for n in (9, 3, 7, 1)]
    a = torch.cat([theirs(row[None]).logits[0] for row in rows])
    b = _logits(ours, rows)
    # inv_freq and the angles are float32 in both
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    a.sin().sum().backward()
    b.sin().sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4, msg=name)


def _logits(decoder: Decoder, rows: list[torch.Tensor]) -> torch.Tensor:
    lengths = [len(r) for r in rows]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])
    embeds = decoder.model.embed_tokens(torch.cat(rows))
    return decoder.logits(decoder(embeds, positions, Packed(cu_seqlens, max(lengths))))


def _media(model: MMLLM, n: int) -> Features:
    side = model.picture_side()
    pixels = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    return model.project("image", model.encode("image", list(pixels)))


def test_generation_over_pages_equals_generation_without() -> None:
    model = MMLLM(TINY)
    features = {"image": _media(model, 3)}
    prompts = ["<image>a longer question", "no picture", "<image> or <image>?"]
    ids = [ByteTokenizer().encode_prompt(p) for p in prompts]
    for i, new in enumerate(generate(model, ids, features, 9)):
        media = {0: [0], 1: [], 2: [1, 2]}[i]
        parts = features["image"].tokens.split(3)
        tokens = torch.cat([parts[m] for m in media] or [parts[0][:0]])
        mine = {"image": Features(tokens, ((1, 1, 3),) * len(media))}
        row = ids[i]
        for token in new:
            logits = model.logits(model(model.plan([row], mine), mine))
            assert token == logits[-1].argmax()
            row = torch.cat((row, torch.tensor([token])))


def test_generation_stops_at_the_end_token_and_at_the_model_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = MMLLM(TINY)
    ids = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    free = generate(model, ids, {}, 8)
    end = free[0][2]
    monkeypatch.setattr(model.tokenizer, "eos", end)
    stopped = generate(model, ids, {}, 8)
    for a, b in zip(stopped, free, strict=True):
        assert a == (b[: b.index(end)] if end in b else b)
    with pytest.raises(ValueError, match="257 positions, the model has 256"):
        generate(model, ids, {}, 255)


def test_a_step_over_pages_is_the_packed_forward() -> None:
    model = MMLLM(TINY)
    features = {"image": _media(model, 2)}
    ids = [ByteTokenizer().encode_prompt(p) for p in ("<image>sum?", "text", "what? <image>")]
    plan = model.plan(ids, features)
    cache = PagedKVCache(new_pool(model, 32))
    sequences = [cache.add() for _ in ids]
    with torch.no_grad():
        paged = model(plan, features, Paged(cache, sequences, plan.cu_seqlens.diff().tolist()))
    torch.testing.assert_close(paged, model(plan, features), rtol=1e-4, atol=1e-5)


def test_features_stand_in_the_placeholders_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MMLLM(TINY)
    features = Features(torch.randn(6, 32), ((1, 1, 3),) * 2)
    ids = [ByteTokenizer().encode_prompt(p) for p in ("hi <image>!", "<image>longer text")]
    assert ids[0].tolist() == [tokenizer.BOS, *b"hi ", tokenizer.MODALITIES["image"], *b"!\n"]
    plan = model.plan(ids, {"image": features})
    seen: list[torch.Tensor] = []
    decoder = model.language_model
    monkeypatch.setattr(decoder, "forward", lambda x, *rest: seen.append(x) or x)
    model(plan, {"image": features})
    is_image = plan.input_ids == tokenizer.MODALITIES["image"]
    assert torch.equal(seen[0][is_image], features.tokens)
    table = decoder.model.embed_tokens.weight
    assert torch.equal(seen[0][~is_image], table[plan.input_ids[~is_image]])


def test_wrong_number_of_media_names_modality_and_counts() -> None:
    model = MMLLM(TINY)
    features = {"image": Features(torch.randn(6, 32), ((1, 1, 3),) * 2)}
    with pytest.raises(ValueError, match=r"image: 2 given, but the prompts name \[1, 2\]"):
        answer(model, ["<image>fine", "<image> two <image>"], features)


def test_kernels_and_reference_agree_end_to_end() -> None:
    model = MMLLM(TINY)
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    ids = [ByteTokenizer().encode_prompt("<image>what?")] * 2

    def run(pixels: torch.Tensor) -> torch.Tensor:
        features = {"image": model.project("image", model.encode("image", list(pixels)))}
        return model.logits(model(model.plan(ids, features), features))

    kernels = run(pixels)
    with mmkernels.backend("reference"):
        reference = run(pixels)
    torch.testing.assert_close(kernels, reference, rtol=1e-3, atol=1e-4)
    assert (run(255 - pixels) - kernels).abs().max() > 1e-3  # the picture matters


def test_tokenizer_takes_any_text() -> None:
    t = ByteTokenizer()
    for text in ("", "which digits?", "Zürich 図 🙂", "\x00\xff"):
        assert t.decode(t.until_end([*t.encode(text), t.eos, 65])) == text
    assert t.decode([65, t.modalities["image"], tokenizer.PAD, 66]) == "AB"


def test_config_round_trip_and_errors() -> None:
    assert MMConfig.from_json(TINY.to_json()) == TINY
    for old, new, problem in (
        (
            '"num_layers": 1',
            '"num_layer": 1',
            r"encoders.image has .* fields: \['num_layer', 'num_layers'\]",
        ),
        ('"num_layers": 1', '"num_layers": "1"', "encoders.image.num_layers must be a number"),
        ('"num_layers": 1', '"num_layers": 1.5', "encoders.image.num_layers must be a number"),
        ('"encoders"', '"encodres"', "config has missing or unknown fields"),
        (
            '"kind": "Vision"',
            '"kind": "Linear"',
            r"image.kind must be one of \['Audio', 'TransformersVision', 'Vision'\], got 'Linear'",
        ),
        ('"kind": "Place"', '"kind": "Plaice"', r"projectors.image\[0\].kind must be one of"),
        (
            '"patch_size": 14',
            '"patch_size": 0',
            "VisionConfig: patch_size must be at least 1, got 0",
        ),
        ('"num_attention_heads": 4', '"num_attention_heads": 0', "num_attention_heads must divide"),
        ('"num_attention_heads": 4', '"num_attention_heads": 3', "num_attention_heads must divide"),
        (
            '"gated_layers": []',
            '"gated_layers": [9]',
            r"gated_layers must be of the \d layers, got \[9\]",
        ),
    ):
        with pytest.raises(ValueError, match=problem):
            MMConfig.from_json(TINY.to_json().replace(old, new, 1))


@pytest.mark.parametrize("encoders", [{}, {"image": "video"}])
def test_a_modality_without_encoder_is_named(encoders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="encoders: image must have one or name another's"):
        MMLLM(replace(TINY, encoders=encoders))


def test_a_packed_batch_is_its_samples_alone() -> None:
    """Logits and gradients of questions of different lengths, with their images."""
    model = MMLLM(TINY).double()
    prompts = ("<image>sum?", "<image>what is the first digit?", "no image", "list <image><image>")
    rows = [ByteTokenizer().encode_prompt(p) for p in prompts]
    side = model.picture_side()
    pixels = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    grads, outputs = [], []
    for batches in ([rows], [[r] for r in rows]):
        model.zero_grad()
        images = iter(pixels)
        logits = []
        for batch in batches:
            found = [next(images) for r in batch for t in r if t == tokenizer.MODALITIES["image"]]
            features = {"image": model.project("image", model.encode("image", found))}
            logits.append(model.logits(model(model.plan(batch, features), features)))
        sum(x.square().sum() for x in logits).backward()  # type: ignore[union-attr]
        outputs.append(torch.cat(logits))
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-9 * outputs[1].abs().max()
    for name, theirs in grads[1].items():
        size = theirs.abs().max().clamp(min=1e-3)  # smaller ones are sums that cancel
        assert (grads[0][name] - theirs).abs().max() <= 1e-9 * size, name
