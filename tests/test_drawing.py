# SPDX-License-Identifier: Apache-2.0
"""Drawing through the whole model: signal tokens are learned, their states are read, the generator stays as it is."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_config

from mmkernels.models import MMLLM, MMConfig, draw, tokenizer
from mmkernels.models.config import GeneratorConfig, OutputProjectorConfig
from mmkernels.train.drawing import image_loss
from mmkernels.train.sample import AnswerLoss, Sample
from mmkernels.train.stages import answer_total, learn_only, row_of

CONFIG = replace(
    tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1),
    output_projector=OutputProjectorConfig(16, 1, 1, 2, 24, num_condition_tokens=2, condition_size=8),
    generator=GeneratorConfig(
        image_size=8, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, num_condition_tokens=2,
        condition_size=8,
    ),
)  # fmt: skip
SAMPLES = [
    Sample("draw", "draw a seven.", "here it is", draw=7),
    Sample("sum", "two and two?", "4"),
    Sample("draw", "please paint the digit 3", "done", draw=3),
]


@pytest.fixture
def model() -> MMLLM:
    torch.manual_seed(0)
    model = MMLLM(CONFIG)
    assert model.generator is not None and model.output_projector is not None
    learn_only(model, model.language_model, model.output_projector)
    return model


def test_loss_is_that_of_words_and_conditions(model: MMLLM) -> None:
    assert MMConfig.from_json(CONFIG.to_json()) == CONFIG
    loss, count = AnswerLoss(model)(SAMPLES)
    assert count == len("here it is") + len("4") + len("done") + 2 * 4 + 3
    loss.backward()
    moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {"language_model", "output_projector"}
    words, same, plan, states = answer_total(model, _rows(model), {})
    signals = model.signal_states(plan, states)
    drawn = image_loss(model.output_projector, model.generator, signals, torch.tensor([7, 3]))
    assert same == count
    torch.testing.assert_close(loss, words + 2 * 4 * drawn)
    assert drawn > 0.1
    plan = model.plan([torch.cat((g, torch.tensor(s))) for g, s in _rows(model)], {})
    states = model.signal_states(plan, model(plan, {}))
    assert states.shape == (2, 4, 32)
    at = (plan.input_ids == tokenizer.SIGNALS[0]).nonzero().flatten()
    table = model.language_model.model.embed_tokens.weight
    torch.testing.assert_close(states[1, 0], model(plan, {})[at[1]] + table[tokenizer.SIGNALS[0]])


def _rows(model: MMLLM) -> list[tuple[torch.Tensor, list[int]]]:
    return [row_of(model, s.prompt, s.answer, s.draw is not None) for s in SAMPLES]


def test_pictures_follow_from_the_text_and_the_seed(model: MMLLM) -> None:
    for p in model.generator.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(p, std=0.3)
    rows = [torch.cat((g, torch.tensor(s))) for g, s in _rows(model)]
    pictures = [draw(model, rows, {}, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert pictures[0].shape == (2, 1, 8, 8) and pictures[0].dtype == torch.uint8
    assert torch.equal(*pictures)
    other = draw(model, [rows[2], rows[0]], {}, torch.Generator().manual_seed(1))
    assert not torch.equal(other, pictures[0])


def test_a_model_that_cannot_draw_says_so() -> None:
    plain = MMLLM(replace(CONFIG, generator=None, output_projector=None))
    with pytest.raises(ValueError, match="no output projector and generator"):
        AnswerLoss(plain)(SAMPLES)
    with pytest.raises(ValueError, match="no output projector and generator"):
        draw(plain, [torch.tensor([1])], {})
