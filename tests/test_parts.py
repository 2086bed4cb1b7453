# SPDX-License-Identifier: Apache-2.0
"""An MM-LLM from folders written by transformers: features, logits and answers are those of its parts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmkernels.models import MMLLM, answer, from_parts, generate
from mmkernels.models.config import DropPrefixConfig, LinearConfig, TransformersVisionConfig
from mmkernels.models.transformers_vision import TransformersVision
from mmkernels.serve import Engine
from mmkernels.train import checkpoint, stages

transformers = pytest.importorskip("transformers")
PROJECTOR = (DropPrefixConfig(), LinearConfig(32, act="gelu"), LinearConfig(32))
TOWER = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 28, "patch_size": 7,
}  # fmt: skip
LANGUAGE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def _saved(folder: Path, kind: str, sizes: dict[str, int], **more: Any) -> tuple[Any, Path]:
    torch.manual_seed(0)
    suffix = "VisionModel" if kind in ("CLIP", "Siglip") else "ForCausalLM"
    config_suffix = "VisionConfig" if kind in ("CLIP", "Siglip") else "Config"
    config = getattr(transformers, kind + config_suffix)(**sizes, **more)
    model = getattr(transformers, kind + suffix)(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model = model.double().eval()
    model.save_pretrained(folder / kind)
    return model, folder / kind


@pytest.fixture(scope="module", params=["CLIP", "Siglip"])
def vision(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _saved(tmp_path_factory.mktemp("vision"), request.param, TOWER)


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "Qwen3"])
def language(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    more = {"head_dim": 10} if request.param == "Qwen3" else {}
    return _saved(tmp_path_factory.mktemp("language"), request.param, LANGUAGE, **more)


def _images(n: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return list(torch.randint(0, 256, (n, 3, 28, 28), dtype=torch.uint8, generator=g))


def test_features_are_those_of_the_tower(vision: Any, language: Any) -> None:
    theirs, folder = vision
    model = from_parts(
        folder, language[1], PROJECTOR, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)
    )
    images = _images(3)
    mean, std = (
        torch.tensor(v, dtype=torch.double)[:, None, None]
        for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    )
    pixels = ((torch.stack(images).double() / 255 - mean) / std).double()
    expected = theirs(pixels, output_hidden_states=True).hidden_states[-2]
    seen = model.encode("image", images)
    torch.testing.assert_close(seen.tokens, expected.flatten(0, 1), rtol=1e-9, atol=1e-9)
    projected = model.project("image", seen)
    assert projected.counts == [16] * 3
    assert [p.shape for p in seen.tokens.split(seen.counts)] == [expected.shape[1:]] * 3


def test_logits_and_answers_are_those_of_the_language_model(vision: Any, language: Any) -> None:
    theirs, folder = language
    model = from_parts(vision[1], folder, PROJECTOR)
    features = {"image": model.project("image", model.encode("image", _images(2)))}
    ids = [model.tokenizer.encode_prompt(p) for p in ("<image>what?", "a longer text, <image>")]
    plan = model.plan(ids, features)
    got = model.logits(model(plan, features)).split(plan.cu_seqlens.diff().tolist())
    table = theirs.get_input_embeddings().weight
    parts = features["image"].tokens.split(16)
    for i, row in enumerate(ids):
        at = row.tolist().index(model.tokenizer.modalities["image"])
        embeds = torch.cat((table[row[:at]], parts[i], table[row[at + 1 :]]))[None]
        expected = theirs(inputs_embeds=embeds).logits[0]
        # inv_freq and the angles are float32 in both
        torch.testing.assert_close(got[i], expected, rtol=1e-5, atol=1e-5)
        answered = theirs.generate(
            inputs_embeds=embeds,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=model.tokenizer.eos,
            pad_token_id=0,
        )[0].tolist()
        assert generate(model, ids, features, 6)[i] == model.tokenizer.until_end(answered)


def test_far_positions_are_as_exact_in_bf16(vision: Any, tmp_path: Path) -> None:
    """Frequencies stay fp32 whatever the weights are: 1,500 tokens, beside transformers' own bf16."""
    sizes = {**LANGUAGE, "max_position_embeddings": 2048}
    exact, folder = _saved(tmp_path, "Llama", sizes)
    # whose frequencies stay fp32 when it is loaded so
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    exact.load_state_dict(theirs.state_dict())
    model = from_parts(vision[0], theirs, PROJECTOR)
    ids = torch.randint(3, 256, (1500,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        truth = exact(ids[None]).logits[0, -200:]
        plan = model.plan([ids], {})
        errors = [
            (logits.double() - truth).norm() / truth.norm()
            for logits in (model.logits(model(plan, {}))[-200:], theirs(ids[None]).logits[0, -200:])
        ]
    assert model.language_model.model.inv_freq.dtype == torch.float32
    assert errors[0] <= 1.25 * errors[1], errors


def test_a_tower_configuration_fetches_no_kernel(vision: Any, language: Any) -> None:
    model = from_parts(vision[1], language[1], PROJECTOR)
    said = model.config.encoders["image"]
    assert isinstance(said, TransformersVisionConfig)
    asks = json.dumps({**json.loads(said.config), "attn_implementation": "org/kernel"})
    tower = TransformersVision(replace(said, config=asks))
    assert tower.model.config._attn_implementation == "sdpa"


def test_trains_saves_and_serves(vision: Any, language: Any, tmp_path: Path) -> None:
    model = from_parts(*(m for m, _ in (vision, language)), PROJECTOR)  # of models, not folders
    stages.learn_only(model, model.projectors)
    features = {"image": model.project("image", model.encode("image", _images(1)))}
    loss = stages.answer_loss(model, [stages.row_of(model, "<image>?", "yes")], features)
    loss.backward()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None} == {
        "projectors"
    }
    checkpoint.save(tmp_path, model, ("pt",))
    again = checkpoint.load(tmp_path).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    engine = Engine(again)
    request = engine.submit("what?", [("image", _images(1)[0])], 5)
    engine.run()
    with torch.no_grad():
        seen = {"image": model.project("image", model.encode("image", _images(1)))}
    assert request.text == answer(model, ["<image>what?"], seen, 5)[0]


def test_a_tokenizer_in_the_folder_is_taken(vision: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model, folder = _saved(tmp_path, "Llama", LANGUAGE)
    words = {w: i for i, w in enumerate(["<unk>", "</s>", "what", "is", "it", "\u010a"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    made: MMLLM = from_parts(vision[1], folder, PROJECTOR)
    assert made.tokenizer.modalities == {"image": 6, "video": 7, "audio": 8}
    assert made.tokenizer.encode_prompt("what is <image> it")[:5].tolist() == [1, 2, 3, 6, 4]
    features = {"image": made.project("image", made.encode("image", _images(1)))}
    text = answer(made, ["what is <image> it"], features, 4)[0]
    assert set(text.split()) <= set(words)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be",
        ),
        ({"attention_bias": True}, "attention_bias must be False in llama"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
    ],
)
def test_parts_that_are_not_built_here_are_refused(
    vision: Any, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    _, folder = _saved(tmp_path, "Llama", LANGUAGE, **change)
    with pytest.raises(ValueError, match=problem):
        from_parts(vision[1], folder, PROJECTOR)


def test_other_towers_and_sizes_are_refused(vision: Any, language: Any) -> None:
    with pytest.raises(ValueError, match="model_type must be one of"):
        from_parts(language[0], language[1], PROJECTOR)
    with pytest.raises(ValueError, match="ends with width 16, the decoder has 32"):
        from_parts(vision[1], language[1], (LinearConfig(16),))
    model = from_parts(vision[1], language[1], PROJECTOR)
    with pytest.raises(ValueError, match="images must be 28×28"):
        model.encode("image", [F.pad(_images(1)[0], (0, 7))])
