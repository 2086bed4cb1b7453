# SPDX-License-Identifier: Apache-2.0
"""Every class of the zoo runs in every case it has, sees its media, and sends gradients back to where they enter."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from vlm_zoo import CASES, Entry, Inputs
from vlm_zoo_more import ZOO

OFTEN = ("Llava", "Mllama", "Qwen2Audio")  # of every run; `make full` takes all
MEDIA = ("pixel_values", "pixel_values_videos", "flattened_patches", "input_features", "input_values",
         "image_pixel_values", "audio_input_features")  # fmt: skip
# Emu 3 looks its pictures up in the table of text.
UNREACHED = ("Emu3ForConditionalGeneration",)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SEEN = 1e-3  # of the largest logit


def taken() -> list[Any]:
    """All of them, most marked ``full``."""
    found, names = [], set()
    for entry in ZOO:
        name = (
            entry.name if entry.name not in names else entry.name + "-" + entry.note.split("'")[0]
        )
        often = entry.name in OFTEN and entry.name not in names
        found.append(pytest.param(entry, id=name, marks=() if often else (pytest.mark.full,)))
        names.add(entry.name)
    return found


def out(model: Any, inputs: Inputs) -> torch.Tensor:
    """A model may write into what it is given."""
    result = model(**copy.deepcopy(inputs))
    return next(
        result[k] for k in ("logits", "logits_per_image", "last_hidden_state") if k in result
    )


def cases(entry: Entry) -> list[tuple[str, Inputs]]:
    made = ((c, entry.batch(c, torch.Generator().manual_seed(3))) for c in CASES)
    return [(case, inputs) for case, inputs in made if inputs is not None]


@contextlib.contextmanager
def entrances(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Weights that media enter by: of layers called with something that no parameter was applied to."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):

            def keep(module: Any, inputs: Any, name: str = name) -> None:
                if inputs and not inputs[0].requires_grad:
                    found[name] = module.weight

            hooks.append(module.register_forward_pre_hook(keep))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("entry", taken())
def test_runs_and_sees_its_media(entry: Entry) -> None:
    model = entry.build()
    found = cases(entry)
    assert found
    for case, inputs in found:
        assert "labels" not in inputs
        with entrances(model) as weights:
            before = out(model, inputs)
        assert before.isfinite().all() and torch.equal(out(model, inputs), before), case
        media = [name for name in MEDIA if name in inputs and case != "text"]
        for name in media:
            other = copy.deepcopy(inputs)
            g = torch.Generator().manual_seed(8)
            fresh = torch.rand(other[name].shape, generator=g)
            # Kosmos 2.5 has rows and columns in front of the pixels.
            fresh[..., :2] = other[name][..., :2]
            other[name] = fresh
            moved = (out(model, other) - before).abs().max()
            assert moved > SEEN * before.abs().max(), (case, name)
        if not media:
            assert case == "text"
            continue
        model.zero_grad()
        before.float().square().mean().backward()
        assert weights, case
        for name, weight in weights.items():
            reached = weight.grad is not None and bool(weight.grad.any())
            assert reached != (entry.kind in UNREACHED), (case, name)


@pytest.mark.parametrize("entry", taken())
def test_generates(entry: Entry) -> None:
    if not entry.generates:
        pytest.skip("has no generate")
    model = entry.build()
    for case, inputs in cases(entry):
        if case == "right":
            continue
        ids = model.generate(**copy.deepcopy(inputs), max_new_tokens=4, do_sample=False)
        assert len(ids) == len(inputs["input_ids"]), case
        assert ids.shape[1] >= 4, case


def test_every_image_counts() -> None:
    """Of two images of one sample, in every class that takes them."""
    entry = next(e for e in ZOO if e.name == "Mllama")
    model = entry.build()
    inputs = entry.batch("images", torch.Generator().manual_seed(3))
    assert inputs is not None
    before = out(model, inputs)
    for image in range(2):
        other = copy.deepcopy(inputs)
        other["pixel_values"][2, image] *= -1
        moved = (out(model, other) - before).abs().amax(dim=(1, 2))
        assert moved[2] > SEEN * before.abs().max() and (moved[:2] == 0).all()
