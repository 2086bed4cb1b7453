# SPDX-License-Identifier: Apache-2.0
"""A batch without media or drawings leaves a gradient on all that others do: FSDP adds those of every process."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from test_training import CONFIG, DRAWS

from mmkernels.models import MMLLM, AudioConfig, Features, VisionConfig
from mmkernels.models import config as c
from mmkernels.models.audio import AudioEncoder
from mmkernels.models.config import TransformersVisionConfig
from mmkernels.models.lora import with_lora
from mmkernels.models.mmllm import ENCODERS
from mmkernels.models.presets import PRESETS, preset
from mmkernels.models.projector import BLOCKS, Projector
from mmkernels.train import run
from mmkernels.train.sample import AnswerLoss, Sample

TEXT = Sample("text", "what is two and two?", "four")


def with_gradient(model: MMLLM, *samples: Sample) -> dict[str, torch.Tensor]:
    """The gradients of those samples' loss, by name."""
    model.zero_grad()
    AnswerLoss(model)(samples)[0].backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def with_medium(model: MMLLM, modality: str) -> Sample:
    """A question about one medium, as the modality's encoder takes it."""
    if isinstance(encoder := model.encoder(modality), AudioEncoder):
        medium = torch.rand(encoder.config.sampling_rate // 2)
    else:
        frames = (2,) if modality == "video" else ()
        side = model.picture_side(modality)
        medium = torch.randint(256, (*frames, 3, side, side), dtype=torch.uint8)
    return Sample(modality, f"<{modality}>what is it?", "four", ((modality, medium),))


def check(model: MMLLM) -> None:
    """Text alone, and each modality without the others: a gradient on every parameter that learns.

    Not of ``generator``: the loss takes it as constant, and ``run.choose`` lets none learn by it.
    """
    learns = {n for n, p in model.named_parameters() if p.requires_grad}
    learns -= {n for n in learns if n.startswith("generator.")}
    text = with_gradient(model, TEXT)
    assert learns - set(text) == set()
    assert not any(g.any() for n, g in text.items() if not n.startswith("language_model."))
    for modality in model.config.projectors:
        assert learns - set(with_gradient(model, with_medium(model, modality))) == set(), modality


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    torch.manual_seed(0)
    check(MMLLM(preset(name, "tiny")))


def test_adapters() -> None:
    pytest.importorskip("peft")
    model = with_lora(MMLLM(CONFIG), 2)
    run.choose(model, run.RunConfig("", "it", 1, 1e-3))
    check(model)


def test_drawing() -> None:
    """The output projector learns from other samples, drawn by another process."""
    model = MMLLM(DRAWS)
    check(model)
    assert set(with_gradient(model, Sample("draw", "3!", "", draw=3))) == set(
        with_gradient(model, TEXT)
    )


@pytest.mark.parametrize("tasks", [{"text": 1.0}, {"text": 1.0, "draw": 1.0}])
def test_an_output_projector_that_nothing_reaches_is_frozen(tasks: dict[str, float]) -> None:
    """Gradients of zeros would let its weights decay."""
    model = MMLLM(DRAWS)
    run.choose(model, run.RunConfig("", "it", 1, 1e-3, tasks))
    assert model.output_projector is not None
    learns = {p.requires_grad for p in model.output_projector.parameters()}
    assert learns == {"draw" in tasks}


@pytest.mark.parametrize("layer", [-1, -2])
@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
def test_towers_of_transformers(kind: str, layer: int) -> None:
    """Those that the features come after have none, with and without pictures."""
    pytest.importorskip("transformers")
    tower = {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    encoder = TransformersVisionConfig(json.dumps(tower), layer)
    config = dataclasses.replace(
        CONFIG,
        encoders={"image": encoder},
        projectors={"image": (c.DropPrefixConfig(), c.LinearConfig(32))},
    )
    model = MMLLM(config)
    text = with_gradient(model, TEXT)
    assert not any(g.any() for n, g in text.items() if not n.startswith("language_model."))
    assert set(text) == set(with_gradient(model, with_medium(model, "image")))
    assert any(n.startswith("encoders") for n in text)


BLOCK_CONFIGS: list[Any] = [
    c.PlaceConfig(8), c.FramePlaceConfig(4), c.DropPrefixConfig(), c.NormConfig(), c.LinearConfig(16),
    c.SwiGLUConfig(16, 24), c.MergeConfig(), c.PoolConfig(), c.SpreadConfig(2, 16), c.WrapConfig(),
    c.TransformerConfig(1, 2, 24), c.QFormerConfig(2, 16, 1, 2, 24), c.PerceiverConfig(2, 1, 2, 1, 8, 24),
    c.ResamplerConfig(2, 16, 2), c.ResamplerConfig(2, 16, 2, post=False),
]  # fmt: skip


@pytest.mark.parametrize("config", BLOCK_CONFIGS, ids=str)
def test_blocks(config: Any) -> None:
    """Of no items, every parameter and the features before it."""
    assert {type(x) for x in BLOCK_CONFIGS} == set(BLOCKS)
    block = Projector((config,), 16)
    before = torch.zeros(0, 16, requires_grad=True)
    block(Features(before, ())).tokens.sum().backward()
    assert before.grad is not None
    assert [n for n, p in block.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "config", [VisionConfig(), VisionConfig(class_token=False, offset_bias=False), AudioConfig()]
)
def test_encoders(config: Any) -> None:
    encoder = ENCODERS[type(config)](config)
    encoder([]).tokens.sum().backward()
    assert [n for n, p in encoder.named_parameters() if p.grad is None] == []
