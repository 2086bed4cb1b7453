# SPDX-License-Identifier: Apache-2.0
"""Every preset: in small it takes a step of each stage and answers, at its published size it can be built."""

from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmkernels.models import MMLLM, Features, MMConfig, generate
from mmkernels.models.config import AudioConfig, DecoderConfig, VisionConfig
from mmkernels.models.presets import PRESETS, Preset, learn, preset
from mmkernels.models.presets.__main__ import table
from mmkernels.models.presets.schema import NOT_PUBLISHED, READ, RECALLED, Part
from mmkernels.train.stages import answer_loss, row_of

FIRST = (
    "Flamingo", "BLIP-2", "InstructBLIP", "LLaVA-1.5", "MiniGPT-4", "Qwen-VL", "MiniCPM-V", "Video-LLaMA", "NExT-GPT",
    "GILL", "VILA", "InternVL",
)  # fmt: skip
QUICK = ("Flamingo", "NExT-GPT", "Video-LLaMA")  # to be built at full size in every run
BUILT = [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in PRESETS]
STAGES = ("pt", "it")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _tiny(name: str) -> MMLLM:
    config = preset(name, "tiny")
    if config.decoder.lora_rank:
        pytest.importorskip("peft")
    return MMLLM(config)


def _medium(model: MMLLM, modality: str) -> torch.Tensor:
    config = model.encoder(modality).config
    if isinstance(config, AudioConfig):
        return torch.rand(40 * config.hop) * 2 - 1
    assert isinstance(config, VisionConfig)
    shape = (3, config.image_size, config.image_size)
    return torch.randint(0, 256, (2, *shape) if modality == "video" else shape, dtype=torch.uint8)


def _features(model: MMLLM, modality: str) -> dict[str, Features]:
    seen = model.encode(modality, [_medium(model, modality)])
    return {modality: model.project(modality, seen)}


def _loss(model: MMLLM) -> torch.Tensor:
    """A question about each modality; with an output projector also its distance from a made-up condition."""
    losses = []
    for modality in model.config.encoders:
        rows = [row_of(model, f"<{modality}>what is it?", "a cat")]
        losses.append(answer_loss(model, rows, _features(model, modality)))
    if model.output_projector is not None:
        plan = model.plan([torch.tensor([65, *model.tokenizer.signals])], {})
        condition = model.output_projector(model.signal_states(plan, model(plan, {})))
        losses.append(F.mse_loss(condition, torch.zeros_like(condition)))
    return torch.stack(losses).sum()


def test_the_surveyed_systems_are_all_there() -> None:
    assert len(PRESETS) == 33 and set(FIRST) <= set(PRESETS)
    with pytest.raises(ValueError, match=r"name must be one of .*got 'BLIP-3'"):
        preset("BLIP-3")
    with pytest.raises(ValueError, match="scale must be 'full' or 'tiny', got 'big'"):
        preset("BLIP-2", "big")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_trains_the_stage_s_parts_and_no_others(name: str, stage: str) -> None:
    model = _tiny(name)
    parts = getattr(PRESETS[name], stage)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = learn(model, parts)
    matched = {p: {n for n in before if fnmatchcase(n, p)} for p in parts.learns}
    assert all(matched.values()), f"a pattern that is no part of {name}: {matched}"
    assert set(names) == set().union(*matched.values())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(
        2
    ):  # adapters and gates begin at 0: what is behind them moves with the second step
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(names)
        optimizer.step()
    assert torch.isfinite(loss)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = {n for n in set(names) - moved if not _cancels(n)}
    assert moved <= set(names) and not still, still


def test_of_minigpt4_one_linear_layer_learns() -> None:
    linear = [f"projectors.image.blocks.1.linear.{leaf}" for leaf in ("weight", "bias")]
    assert learn(_tiny("MiniGPT-4"), PRESETS["MiniGPT-4"].pt) == linear
    assert not any(n.startswith("encoders") for n in learn(_tiny("VILA"), PRESETS["VILA"].pt))


def _cancels(name: str) -> bool:
    """A bias of all keys shifts all scores alike: no gradient but rounding's."""
    return name.endswith(("key.bias", "k_proj.bias"))


@pytest.mark.parametrize("name", PRESETS)
def test_generation_and_configuration(name: str) -> None:
    model = _tiny(name)
    for modality in model.config.encoders:
        prompt = model.tokenizer.encode_prompt(f"<{modality}>what is it?")
        with torch.no_grad():
            ((answer),) = generate(model, [prompt], _features(model, modality), 3)
        assert len(answer) <= 3 and all(0 <= i < model.config.decoder.vocab_size for i in answer)
    assert MMConfig.from_json(model.config.to_json()) == model.config
    full = preset(name)
    assert MMConfig.from_json(full.to_json()) == full
    assert _kinds(full) == _kinds(model.config)


def _kinds(config: MMConfig) -> list[object]:
    """Encoders, blocks and what decides which code runs, in order."""
    found: list[object] = [type(config.output_projector)]
    for modality, blocks in config.projectors.items():
        chain = blocks if isinstance(blocks, str) else [type(b) for b in blocks]
        encoder = config.encoders[modality]
        found += [modality, chain, encoder if isinstance(encoder, str) else type(encoder)]
    d: DecoderConfig = config.decoder
    return [*found, bool(d.gated_layers), bool(d.lora_rank), d.attention_bias, d.lora_targets]


@pytest.mark.parametrize("name", BUILT)
def test_the_published_size_can_be_built(name: str) -> None:
    config = preset(name)
    if config.decoder.lora_rank:
        pytest.importorskip("peft")
    with torch.device("meta"):
        model = MMLLM(config)
    assert all(p.is_meta for p in model.parameters())
    for projector in model.projectors.values():
        assert projector.width == config.decoder.feature_width
    for stage in STAGES:
        assert learn(model, getattr(PRESETS[name], stage))


@pytest.mark.parametrize("system", PRESETS.values(), ids=list(PRESETS))
def test_every_fact_has_a_source_and_a_status(system: Preset) -> None:
    parts: list[Part] = list(system.parts.values())
    for part in parts:
        assert part.published and part.source and part.status in (READ, RECALLED)
        assert part.config is not None or part.published
    for stage in (system.pt, system.it):
        assert stage.learns and stage.source and stage.status in (READ, RECALLED, NOT_PUBLISHED)
    assert set(system.encoders) == set(system.projectors)


def test_parameter_counts_of_what_is_built() -> None:
    """The Q-Former by hand: BERT-base's layers, six cross-attentions to width 1408, 32 queries, a norm."""
    D, X, inner = 768, 1408, 3072
    linear = lambda a, b: a * b + b
    attention = 3 * linear(D, D) + linear(D, D) + 2 * D
    feed_forward = linear(D, inner) + linear(inner, D) + 2 * D
    cross = 2 * linear(D, D) + 2 * linear(X, D) + 2 * D
    by_hand = 12 * (attention + feed_forward) + 6 * cross + 32 * D + 2 * D
    with torch.device("meta"):
        model = MMLLM(preset("BLIP-2"))
    qformer: nn.Module = model.projectors["image"].blocks[0]  # type: ignore[union-attr, index]
    assert sum(p.numel() for p in qformer.parameters()) == by_hand


@pytest.mark.full
def test_the_table_in_the_docs_is_this_one() -> None:
    pytest.importorskip("peft")
    committed = Path(__file__).parents[1] / "docs" / "systems.md"
    assert committed.read_text() == table(), "python -m mmkernels.models.presets writes it"
