# SPDX-License-Identifier: Apache-2.0
"""The trainer: stopped anywhere it goes on to the bit, and a gradient that is not finite changes nothing."""

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

from mmkernels.models import MMLLM
from mmkernels.train import checkpoint, digits, questions, stages
from mmkernels.train.trainer import Plan, Trainer

CONFIG = tiny_config(32, queries=3, qformer_layers=1, decoder_layers=1)


class Pictures:
    """Fresh pictures with a question each; goes on anywhere by its two generators."""

    def __init__(self) -> None:
        self.scans = digits.load_scans("train")
        self.torch, self.python = torch.Generator().manual_seed(3), random.Random(4)

    def __next__(self) -> list[tuple[torch.Tensor, str, str]]:
        pictures = digits.draw(self.scans, 3, self.torch)
        asked = [questions.ask(s, self.python) for s in questions.scenes(pictures)]
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
    return Trainer(model, Pictures(), loss_of, Plan(steps, 2e-3, accumulate))


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
trainer = trainer_of(model, steps=400, accumulate=1)
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
        said = int(child.stdout.readline())  # the first step is saved
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
