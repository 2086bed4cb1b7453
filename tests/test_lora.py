# SPDX-License-Identifier: Apache-2.0
"""Adapters: silent until they learn, alone in learning, and merged they compute the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config

from mmkernels.models import MMLLM, MMConfig
from mmkernels.models.lora import merged, with_lora
from mmkernels.train import checkpoint
from mmkernels.train.sample import AnswerLoss, Sample

pytest.importorskip("peft")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest) -> MMLLM:
    torch.manual_seed(0)
    config = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=2)
    decoder = replace(config.decoder, tie_word_embeddings=request.param)
    return MMLLM(replace(config, decoder=decoder)).double()


def batch_loss(model: MMLLM, samples: list[Sample]) -> torch.Tensor:
    total, count = AnswerLoss(model)(samples)
    return total / count


def _samples() -> list[Sample]:
    g = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8, generator=g)
    shown = Sample("list", "<image>which?", "3 7", (("image", image),))
    return [shown, Sample("sum", "two and two?", "4")]


def test_adapters_are_silent_learn_alone_and_merge(model: MMLLM, tmp_path: Path) -> None:
    before = batch_loss(model, _samples())
    adapted = with_lora(model, 4)
    assert torch.equal(batch_loss(adapted, _samples()), before)
    for name, p in adapted.named_parameters():
        p.requires_grad_("lora_" in name)
    batch_loss(adapted, _samples()).backward()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            assert (p.grad is not None) == ("lora_" in name), name
            if "lora_" in name:
                p.add_(torch.randn_like(p))
    learned = batch_loss(adapted, _samples())
    assert (learned - before).abs() > 1e-3
    torch.testing.assert_close(batch_loss(merged(adapted), _samples()), learned, rtol=1e-10, atol=0)
    assert merged(adapted).config == model.config
    checkpoint.save(tmp_path, adapted, ("pt",))
    again = checkpoint.load(tmp_path).model
    assert torch.equal(batch_loss(again, _samples()), learned)
    assert MMConfig.from_json(adapted.config.to_json()) == adapted.config


def test_wrong_targets_and_second_adapters_are_refused(model: MMLLM) -> None:
    with pytest.raises(ValueError, match=r"no layers named \['c_attn'\]"):
        with_lora(model, 4, ("q_proj", "c_attn"))
    with pytest.raises(ValueError, match="adapters of rank 2"):
        with_lora(with_lora(model, 2), 2)
