# SPDX-License-Identifier: Apache-2.0
"""A patched model in Trainer, peft, torch.compile, torch.export, FSDP2, checkpointing, autocast and generate."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

pytest.importorskip("transformers")
import transformers as tf
from packed_models import MODELS, samples
from test_packed_models import padded
from test_patch import CONV, clip, pixels

import mmkernels

LLAVA, QWEN = MODELS[0], MODELS[4]
AOTI_EMPTY = pytest.mark.xfail(
    strict=True,
    reason="AOTInductor of torch 2.13 hands an empty list of tensors (positions) to an op as None",
)
both = pytest.mark.parametrize("entry", [LLAVA, QWEN], ids=["llava", "qwen2_vl"])


def pair(entry: Any) -> tuple[Any, Any]:
    """As it is, and patched."""
    model = entry.build().eval()
    patched = copy.deepcopy(model)
    mmkernels.patch(patched)
    return model, patched


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


def close(a: torch.Tensor, b: torch.Tensor, rel: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= rel * b.abs().max())


class Same(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One image, eight tokens, over and over."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(i)
        ids = torch.cat([torch.full((4,), 90), torch.randint(3, 80, (4,), generator=g)])
        labels = ids.masked_fill(ids == 90, -100)
        return {
            "input_ids": ids,
            "labels": labels,
            "pixel_values": torch.randn(3, 28, 28, generator=g),
        }


def trained(tmp_path: Path, callbacks: list[Any]) -> tuple[list[float], Any]:
    settings = tf.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=3, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    trainer = tf.Trainer(LLAVA.build(), settings, train_dataset=Same(), callbacks=callbacks)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model


def test_trainer(tmp_path: Path) -> None:
    """The same losses; what is saved loads into a model that was never patched."""
    from mmkernels.hf.trainer import PatchCallback

    theirs, _ = trained(tmp_path, [])
    callback = PatchCallback()
    ours, model = trained(tmp_path, [callback])
    assert callback.patched is not None and callback.patched.replaced
    assert len(ours) == 3 and ours == pytest.approx(theirs, rel=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_peft(first: str) -> None:
    """LoRA on the decoder and on the convolution that cuts patches, which then must not be passed by."""
    peft = pytest.importorskip("peft")
    inputs = padded(samples(LLAVA))
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "patch_embedding"], init_lora_weights=False
    )

    def adapted(model: Any) -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(model, config).eval()

    theirs = adapted(LLAVA.build().eval())
    ours = LLAVA.build().eval()
    if first == "patch":
        mmkernels.patch(ours)
        ours = adapted(ours)
    else:
        ours = adapted(ours)
        mmkernels.patch(ours)
    expected = logits(theirs, inputs)
    assert close(logits(ours, inputs), expected)
    for model in (theirs, ours):
        model(**inputs).logits.square().sum().backward()
    named = dict(theirs.named_parameters())
    of_conv = [n for n in named if "patch_embedding" in n and "lora" in n]
    assert of_conv and all(named[n].grad.abs().max() > 0 for n in of_conv)
    for name, p in ours.named_parameters():
        assert (p.grad is None) == (named[name].grad is None), name
        assert p.grad is None or close(p.grad, named[name].grad, 1e-4), name


@pytest.mark.parametrize(
    "entry", [LLAVA, pytest.param(QWEN, marks=pytest.mark.full)], ids=["llava", "qwen2_vl"]
)
def test_compile_has_no_more_graph_breaks(entry: Any) -> None:
    inputs = padded(samples(entry))
    told = []
    for model in pair(entry):
        torch._dynamo.reset()
        told.append(torch._dynamo.explain(model)(**inputs))
    assert told[1].graph_break_count <= told[0].graph_break_count
    torch._dynamo.reset()
    model, patched = pair(entry)
    compiled = torch.compile(patched, backend="aot_eager")
    assert close(logits(compiled, inputs), logits(model, inputs))


def test_compiled_tower_is_one_graph() -> None:
    model = clip()
    expected = model(pixels()).last_hidden_state
    mmkernels.patch(model)
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True)(pixels()).last_hidden_state
    assert close(got, expected)


def test_export() -> None:
    model = clip()
    expected = model(pixels()).last_hidden_state
    mmkernels.patch(model)
    program = torch.export.export(model, (pixels(),))
    assert any("mmkernels.patch_embed" in str(n.target) for n in program.graph.nodes)
    assert close(program.module()(pixels()).last_hidden_state, expected)


@pytest.mark.full
@pytest.mark.parametrize("embeddings", [True, pytest.param(False, marks=AOTI_EMPTY)])
def test_aot_inductor(tmp_path: Path, embeddings: bool) -> None:
    """A tower compiled ahead of time calls the C++ kernels; also where only its convolution does."""

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = clip()
            mmkernels.patch(self.model if embeddings else self.model.get_submodule(CONV))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(x).last_hidden_state
            return found

    tower = Tower()
    with torch.no_grad():
        expected = tower(pixels())
        program = torch.export.export(tower, (pixels(),))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "t.pt2"))
    assert close(torch._inductor.aoti_load_package(path)(pixels()), expected)


def test_checkpointing() -> None:
    """Recomputed, the same gradients."""
    inputs = padded(samples(LLAVA))
    grads = []
    for model in pair(LLAVA):
        for recompute in (False, True):
            model.train()
            model.zero_grad()
            if recompute:
                model.gradient_checkpointing_enable()
            model(**inputs).logits.square().sum().backward()
            grads.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
    for name, g in grads[0].items():
        assert all(close(other[name], g, 1e-4) or g.abs().max() < 1e-6 for other in grads[1:]), name


def test_autocast() -> None:
    """bf16 by autocast: as near to fp64 as the unpatched model."""
    inputs = padded(samples(LLAVA))
    model, patched = pair(LLAVA)
    exact = copy.deepcopy(model).double()
    truth = logits(exact, {**inputs, "pixel_values": inputs["pixel_values"].double()})
    with torch.autocast("cpu", torch.bfloat16):
        off = [
            (logits(m, inputs).double() - truth).square().mean().sqrt() for m in (model, patched)
        ]
    assert off[1] <= 1.25 * off[0]


@both
def test_generate_over_pages(entry: Any) -> None:
    model = entry.build().eval()
    model.generation_config.eos_token_id = None
    one = {k: v for k, v in padded(samples(entry)[1:2]).items() if k != "labels"}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(**one, **settings)
    with mmkernels.patch(model, cache=True) as patched:
        assert any(line.op == "paged cache" and not line.why_not for line in patched.lines)
        assert torch.equal(model.generate(**one, **settings), theirs)
        text = {"input_ids": torch.arange(5, 11)[None]}
        alone = model.generate(**text, **settings)
        assert torch.equal(model.generate(**text, **settings, use_cache=False), alone)
        beams = model.generate(**one, **settings, num_beams=2)
    assert torch.equal(model.generate(**one, **settings, num_beams=2), beams)


@both
def test_generate_as_the_caller_asks(entry: Any) -> None:
    """Another cache, a configuration by position, autocast: as the unpatched model."""
    model = entry.build().eval()
    model.generation_config.eos_token_id = None
    one = {k: v for k, v in padded(samples(entry)[1:2]).items() if k != "labels"}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    config = copy.deepcopy(model.generation_config)
    config.update(**settings)
    theirs = model.generate(**one, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.generate(**one, **settings)
    with mmkernels.patch(model, cache=True):
        for asked in ({"cache_implementation": "static"}, {"past_key_values": tf.DynamicCache()}):
            assert torch.equal(model.generate(**one, **settings, **asked), theirs)
        rest = {k: v for k, v in one.items() if k != "input_ids"}
        assert torch.equal(model.generate(one["input_ids"], config, **rest), theirs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.generate(**one, **settings), rounded)


def test_functional_call() -> None:
    model = clip()
    mmkernels.patch(model)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    out = torch.func.functional_call(model, zeros, (pixels(),))
    assert out.last_hidden_state.abs().max() == 0


def test_two_processes(tmp_path: Path) -> None:
    """FSDP2 over two gloo processes: the losses of one process, unpatched; after sharding nothing is patched."""
    script = Path(__file__).parent / "patched_processes.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    losses = []
    for processes in (1, 2):
        done = subprocess.run(
            [*torchrun, str(processes), str(script)], capture_output=True, text=True, timeout=240, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([float(x) for x in done.stdout.split("losses")[1].split()])
    assert len(losses[0]) == 3 and losses[0][0] > losses[0][-1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
