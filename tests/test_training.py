# SPDX-License-Identifier: Apache-2.0
"""The trainer: stopped anywhere it goes on to the bit, and a gradient that is not finite changes nothing."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config

import mmkernels
from mmkernels.models import MMLLM
from mmkernels.models.config import GeneratorConfig, OutputProjectorConfig
from mmkernels.train import checkpoint, digits, distributed, questions, run, stages, torchrun
from mmkernels.train.sample import AnswerLoss, Sample
from mmkernels.train.trainer import Mean, Schedule, Trainer

CONFIG = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)
DRAWS = dataclasses.replace(
    CONFIG,
    output_projector=OutputProjectorConfig(32, 1, 1, 4, 64, 4, 64),
    generator=GeneratorConfig(),
)
REACHED = ("encoders", "projectors", "language_model", "output_projector")


class Pictures:
    """Fresh pictures with a question each; goes on anywhere by its two generators."""

    def __init__(self) -> None:
        self.scans = digits.load_scans("train")
        self.torch, self.python = torch.Generator().manual_seed(3), random.Random(4)

    def __next__(self) -> list[tuple[torch.Tensor, str, str]]:
        pictures = digits.draw(self.scans, 3, self.torch)
        shown = [[d for d in row if d != digits.BACKGROUND] for row in pictures.digits.tolist()]
        asked = [questions.ask(questions.Scene(tuple(s), ()), self.python) for s in shown]
        return [(p, q.text, q.answer) for p, q in zip(pictures.pixel_values, asked, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = self.python.getstate()
        return {"torch": self.torch.get_state().tolist(), "python": [version, list(words), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.torch.set_state(torch.tensor(state["torch"], dtype=torch.uint8))
        version, words, gauss = state["python"]
        self.python.setstate((version, tuple(words), gauss))


def trainer_of(model: MMLLM, steps: int = 12, accumulate: int = 2) -> Trainer[Any]:
    def loss_of(batch: list[tuple[torch.Tensor, str, str]]) -> torch.Tensor:
        features = {
            "image": model.project("image", model.encode("image", [p for p, _, _ in batch]))
        }
        rows = [stages.row_of(model, f"<image>{text}", answer) for _, text, answer in batch]
        noise = 1 + 0.01 * torch.randn(()) * random.random()  # global states count too
        return stages.answer_loss(model, rows, features) * noise

    stages.learn_only(model, model.projectors, model.language_model)
    return Trainer(model, Pictures(), loss_of, Schedule(steps, 2e-3, accumulate))


def start() -> MMLLM:
    digits.load_scans("train")  # importing scikit-learn draws random numbers
    torch.manual_seed(0)
    random.seed(0)
    return MMLLM(CONFIG)


@pytest.mark.parametrize("stop", [1, 7])
def test_a_stopped_training_goes_on_to_the_bit(tmp_path: Path, stop: int) -> None:
    whole = start()
    losses = trainer_of(whole).run("whole")
    model = start()
    trainer = trainer_of(model)
    for _ in range(stop):
        trainer.step()
    checkpoint.save(tmp_path, model, ("pt",), trainer.save())
    torch.manual_seed(99)
    random.seed(99)
    loaded = checkpoint.load(tmp_path)
    again = trainer_of(loaded.model)
    assert loaded.training is not None
    again.load(loaded.training)
    assert again.run("again") == losses and len(losses) == 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kernels_train_as_the_reference_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss by loss over 200 steps, fp32."""
    monkeypatch.setattr("mmkernels.train.trainer.fast_bf16", lambda: False)
    losses = []
    for backend in ("auto", "reference"):
        digits.load_scans("train")
        torch.manual_seed(seed)
        random.seed(seed)
        with mmkernels.backend(backend):
            losses.append(trainer_of(MMLLM(CONFIG), steps=200, accumulate=1).run(backend))
    ratio = torch.tensor(losses[0]) / torch.tensor(losses[1])
    assert losses[0][-1] < 0.8 * losses[0][0]
    assert (ratio - 1).abs().max() <= 1e-5, (ratio - 1).abs().max()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = start()
    trainer = trainer_of(model, accumulate=1)
    trainer.step()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    moments = trainer.save().tensors
    real = trainer.loss_of
    trainer.loss_of = lambda batch: real(batch) * torch.inf
    trainer.step()
    assert trainer.skipped == 1
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    after = trainer.save().tensors
    assert all(torch.equal(t, after[n]) for n, t in moments.items() if n.startswith("optimizer"))
    trainer.loss_of = real
    trainer.step()
    assert trainer.skipped == 1
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_step_of_several_batches_is_their_mean() -> None:
    trainer = trainer_of(start(), accumulate=2)
    torch.manual_seed(5)
    random.seed(5)
    alone = [trainer.loss_of(b) for b in (next(trainer.stream), next(trainer.stream))]
    weights = list(trainer.parameters.values())
    grads = torch.autograd.grad(sum(alone) / 2, weights, allow_unused=True)
    again = trainer_of(start(), accumulate=2)
    again.schedule = dataclasses.replace(again.schedule, clip=1e9)
    torch.manual_seed(5)
    random.seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkernels.train.trainer.fast_bf16", lambda: False)
        assert again.step() == pytest.approx(float(sum(alone).detach()) / 2, rel=1e-6)
    for p, g in zip(again.parameters.values(), grads, strict=True):
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


class Rows:
    """Rows of text, so many a batch; two of them have nothing to be said."""

    def __init__(self, batch: int) -> None:
        self.batch, self.at = batch, 0

    def __next__(self) -> list[stages.Row]:
        said = (
            "",
            "",
            "1",
            "a long answer of many tokens",
            "no",
            "2",
            "longer still, this one is",
            "3",
        )
        self.at += self.batch
        chosen = [(i, said[i]) for i in range(self.at - self.batch, self.at)]
        return [(torch.tensor([5, 6, 7 + i]), list(text.encode())) for i, text in chosen]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_every_token_of_a_step_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the rows are cut into batches; the first two rows have no tokens, so 4 × 2 has a batch of none."""
    monkeypatch.setattr("mmkernels.train.trainer.fast_bf16", lambda: False)

    def step(batch: int, accumulate: int) -> tuple[float, torch.Tensor]:
        model = start()
        stages.learn_only(model, model.language_model)
        loss_of = lambda rows: Mean(*stages.answer_total(model, rows, {})[:2])
        schedule = Schedule(10, 1e-3, accumulate, clip=1e9)
        trainer = Trainer(model, Rows(batch), loss_of, schedule)
        loss = trainer.step()
        grads = [p.grad for p in trainer.parameters.values() if p.grad is not None]
        return loss, torch.cat([g.flatten() for g in grads])

    loss, whole = step(8, 1)
    for batch, accumulate in ((4, 2), (2, 4), (1, 8)):
        cut, gradient = step(batch, accumulate)
        assert cut == pytest.approx(loss, rel=1e-5), (batch, accumulate)
        assert (gradient - whole).norm() <= 1e-5 * whole.norm(), (batch, accumulate)
    nothing, gradient = step(2, 1)
    assert nothing == 0 and not gradient.any()


def test_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(start())
    trainer.step()
    saved = trainer.save()
    model = start()
    other = trainer_of(model)
    stages.learn_only(model, model.projectors)
    other.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ValueError, match=r"do not learn here.*language_model"):
        other.load(saved)


@pytest.mark.parametrize("role", ["model", "training"])
def test_damage_to_either_file_is_found(tmp_path: Path, role: str) -> None:
    model = start()
    trainer = trainer_of(model)
    trainer.step()
    checkpoint.save(tmp_path, model, (), trainer.save())
    (path,) = tmp_path.glob(f"{role}-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"{path.name}.*altered"):
        checkpoint.load(tmp_path)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from test_training import start, trainer_of
from mmkernels.train import checkpoint
model, out = start(), Path({out!r})
trainer = trainer_of(model, steps=100_000, accumulate=1)  # more than any number of kills lets it do
if (out / "manifest.json").exists():
    loaded = checkpoint.load(out)
    model.load_state_dict(loaded.model.state_dict())
    trainer.load(loaded.training)
trainer.run("killed", lambda t: (checkpoint.save(out, model, (), t.save()), print(len(t.losses), flush=True)))
"""


def killed_at_random_times(out: Path, times: int) -> None:
    """A training that saves every step, killed again and again: the newest checkpoint loads and has all but a step."""
    rng, script = random.Random(0), KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    done = 0
    for _ in range(times):
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert child.stdout is not None
        first = child.stdout.readline()  # the first step is saved
        assert first, f"it ended by itself after {done} steps, exit code {child.wait()}"
        said = int(first)
        time.sleep(rng.random() * 0.5)
        child.send_signal(signal.SIGKILL)
        said = max([said, *(int(line) for line in child.stdout if line.endswith("\n"))])
        child.wait()
        loaded = checkpoint.load(out)
        assert loaded.training is not None
        steps = len(loaded.training.state["losses"])
        assert done < said <= steps <= said + 1
        done = steps
    model = loaded.model
    checkpoint.save(out, model, ())
    assert len(os.listdir(out)) == 2  # what the kills left is gone


def test_kill_9_loses_at_most_a_step(tmp_path: Path) -> None:
    killed_at_random_times(tmp_path, 3)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kill_9_many_times(tmp_path: Path) -> None:
    killed_at_random_times(tmp_path, 60)


# Runs by a YAML file


class Sums:
    """Text and pictures as samples; sample i is a function of i."""

    def __init__(self, config: run.RunConfig) -> None:
        self.at, self.batch = config.seed, config.batch

    def __next__(self) -> list[Sample]:
        self.at += 1
        rng = random.Random(self.at)
        a, b = rng.randrange(5), rng.randrange(5)
        pixels = torch.full((3, 112, 112), 20 * a, dtype=torch.uint8)
        shown = Sample("grey", "<image>how grey?", str(a), (("image", pixels),))
        said = (1 + a) * str(a + b)  # answers of several lengths
        return [Sample("sum", f"{a}+{b}?", said), shown][: self.batch]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def _yaml(folder: Path, **more: Any) -> Path:
    start = folder / "start.json"
    start.write_text(CONFIG.to_json())
    values = {
        "start": str(start),
        "stage": "pt",
        "steps": 6,
        "lr": 1e-3,
        "batch": 2,
        "save_every": 2,
        **more,
    }
    path = folder / "run.yaml"
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    return path


def test_a_run_stops_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run.read_config(_yaml(tmp_path, evaluate_every=3))
    exam = next(Sums(config))
    whole = run.train(config, tmp_path / "whole", Sums, exam)
    real, calls = run.Trainer.step, []

    def dies(self: run.Trainer[Any]) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(run.Trainer, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run.train(config, tmp_path / "cut", Sums, exam)
    monkeypatch.undo()
    other = dataclasses.replace(config, tasks={"sum": 2.0}, lr=1.0, save_every=50)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"another run \(lr: 0.001 then, 1.0 now; tasks"
    ):
        run.train(other, tmp_path / "cut", Sums, exam)
    again = run.train(config, tmp_path / "cut", Sums, exam)
    assert again.losses == whole.losses and len(again.losses) == 6
    logs = [
        [json.loads(x) for x in (tmp_path / f / "log.jsonl").read_text().splitlines()]
        for f in ("whole", "cut")
    ]
    assert [x["loss"] for x in logs[0]] == [x["loss"] for x in logs[1]] == whole.losses
    assert ["exact_match" in x for x in logs[0]] == [False, False, True] * 2
    models = [checkpoint.load(tmp_path / f) for f in ("whole", "cut")]
    assert models[0].stages == ("pt",) and models[0].training is None
    for name, tensor in models[0].model.state_dict().items():
        assert torch.equal(tensor, models[1].model.state_dict()[name])
    with pytest.raises(checkpoint.CheckpointError, match="has finished stages"):
        run.train(config, tmp_path / "cut", Sums)


def test_stage_it_learns_by_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first = run.read_config(_yaml(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match="needs a checkpoint with stage pt"):
        run.train(dataclasses.replace(first, stage="it"), tmp_path / "early", Sums)
    run.train(first, tmp_path / "pt", Sums)
    second = run.read_config(_yaml(tmp_path, start=str(tmp_path / "pt"), stage="it", lora_rank=2))
    run.train(second, tmp_path / "it", Sums)
    before, after = (checkpoint.load(tmp_path / f) for f in ("pt", "it"))
    assert after.stages == ("pt", "it")
    old = before.model.state_dict()
    new = {n.replace(".base_layer", ""): t for n, t in after.model.state_dict().items()}
    changed = {n.split(".")[0] for n in old if not torch.equal(old[n], new[n])}
    assert changed == {"projectors"}
    assert any(t.abs().max() > 0 for n, t in new.items() if "lora_B" in n)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"stage": "xt"}, "stage must be one of"),
        ({"steps": "many"}, "steps must be a number"),
        ({"steps": 0}, "must be at least 1"),
        ({"stepps": 3}, r"unknown fields: \['stepps'\]"),
        ({"tasks": {"image": "x"}}, r"tasks.image must be a number"),
    ],
)
def test_wrong_fields_are_named(tmp_path: Path, more: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        run.read_config(_yaml(tmp_path, **more))


def test_parts_that_do_not_exist_are_named(tmp_path: Path) -> None:
    config = run.read_config(_yaml(tmp_path, learn=["eyes"]))
    with pytest.raises(ValueError, match=r"no parts \['eyes'\]"):
        run.train(config, tmp_path / "x", Sums)


@pytest.mark.parametrize(
    ("tasks", "learn", "problem"),
    [
        ({}, ["generator"], r"not \['generator'\]: .*train_generator"),
        ({}, ["generator", "projectors"], r"reaches .*'projectors'\], not \['generator'\]"),
        ({"text": 1}, ["output_projector"], r"not \['output_projector'\]: .*have 'draw'"),
        (
            {"text": 1, "draw": 0},
            ["output_projector"],
            r"not \['output_projector'\]: .*have 'draw'",
        ),
    ],
)
def test_parts_that_the_loss_does_not_reach_are_named(
    tmp_path: Path, tasks: dict[str, float], learn: list[str], problem: str
) -> None:
    config = run.read_config(_yaml(tmp_path, tasks=tasks, learn=learn))
    (tmp_path / "start.json").write_text(DRAWS.to_json())
    with pytest.raises(ValueError, match=problem):
        run.train(config, tmp_path / "x", Sums)


def test_parts_that_the_loss_reaches_may_learn() -> None:
    config = run.RunConfig("", "pt", 1, 1e-3, {"text": 1.0, "draw": 1.0}, learn=tuple(REACHED))
    model = MMLLM(DRAWS)
    run.choose(model, config)
    samples = [*next(Sums(dataclasses.replace(config, batch=2))), Sample("draw", "3!", "", draw=3)]
    AnswerLoss(model)(samples)[0].backward()
    for part in REACHED:
        assert any(p.grad is not None for p in model.get_submodule(part).parameters()), part
    assert not any(p.requires_grad for p in model.get_submodule("generator").parameters())


def _stopped(config: run.RunConfig, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one process that dies in its fourth step, two of them saved."""
    real = run.Trainer.step

    def dies(self: run.Trainer[Any]) -> float:
        if len(self.losses) == 3:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            run.train(config, out, Sums)


def test_the_order_of_tasks_may_not_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are drawn by it."""
    config, out = run.read_config(_yaml(tmp_path, tasks={"image": 1, "text": 2})), tmp_path / "out"
    _stopped(config, out, monkeypatch)
    turned = run.read_config(_yaml(tmp_path, tasks={"text": 2, "image": 1}))
    assert turned.tasks == config.tasks
    problem = (
        r"tasks in another order: {'image': 1.0, 'text': 2.0} then, {'text': 2.0, 'image': 1.0}"
    )
    with pytest.raises(checkpoint.CheckpointError, match=problem):
        run.train(turned, out, Sums)
    assert len(run.train(config, out, Sums).losses) == 6


def test_a_run_of_one_process_does_not_go_on_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = run.read_config(_yaml(tmp_path)), tmp_path / "out"
    _stopped(config, out, monkeypatch)
    before = {p: p.read_bytes() for p in out.glob("*.*")}
    monkeypatch.setattr(distributed, "process_group", lambda: contextlib.nullcontext(0))
    with pytest.raises(checkpoint.CheckpointError, match=r"in one process; go on without torchrun"):
        torchrun.train(config, out, Sums)
    assert before == {p: p.read_bytes() for p in out.glob("*.*")}  # the log is whole


def test_a_run_of_several_processes_does_not_go_on_in_one(tmp_path: Path) -> None:
    config, out = run.read_config(_yaml(tmp_path)), tmp_path / "out"
    (out / "step-00000002").mkdir(parents=True)
    (out / "step-00000004").mkdir()
    checkpoint.write_manifest(out / "step-00000004" / distributed.MANIFEST, {})
    problem = r"step-00000004: stopped in several processes; go on with torchrun"
    with pytest.raises(checkpoint.CheckpointError, match=problem):
        run.train(config, out, Sums)
    assert not (out / "log.jsonl").exists()
