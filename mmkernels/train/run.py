# SPDX-License-Identifier: Apache-2.0
"""``mmkernels train --config FILE``: one stage of training from a checkpoint or a configuration, by a YAML file.

```
start: runs/demo            # a checkpoint's folder, or a JSON file of MMConfig: new weights
stage: it                   # pt: the projectors learn; it: projectors and language model
tasks: {image: 3, text: 1}  # kinds of samples and their shares
steps: 500
lr: 1.0e-3
lora_rank: 8                # the language model learns by adapters
```

Stopped at any time the same command goes on to the bit where the last checkpoint is. ``torchrun.py`` is the same in
several processes.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmkernels.models import MMLLM, MMConfig
from mmkernels.models.config import read_fields
from mmkernels.models.lora import with_lora
from mmkernels.train import checkpoint, distributed
from mmkernels.train.evaluate import exact_match
from mmkernels.train.sample import AnswerLoss, Sample
from mmkernels.train.trainer import Mean, Schedule, Stream, Trainer, Training

LEARNS = {
    "pt": ("projectors", "output_projector"),
    "it": ("projectors", "output_projector", "language_model"),
}
STEPS = "step-" + 8 * "[0-9]"  # folders of shards, which torchrun.py writes
LEARN_TO_ANSWER = {"encoders", "projectors", "language_model"}
Streams = Callable[["RunConfig"], Stream[list[Sample]]]


@dataclass(frozen=True)
class RunConfig:
    """What the YAML file may say; ``batch`` samples, ``save_every`` and ``evaluate_every`` steps (0: never)."""

    start: str
    stage: str
    steps: int
    lr: float
    tasks: dict[str, float] = field(default_factory=dict)  # empty: all alike
    batch: int = 32
    accumulate: int = 1
    learn: tuple[str, ...] = ()  # parts of the model; empty: those of the stage
    lora_rank: int = 0
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 0
    exam: int = 0  # held-out samples of each task at every evaluation


def read_config(path: Path) -> RunConfig:
    """A YAML file. ValueError names file and field."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be fields and values")
    for f in dataclasses.fields(RunConfig):
        if f.default is not dataclasses.MISSING:
            values.setdefault(
                f.name, list(f.default) if isinstance(f.default, tuple) else f.default
            )
    values.setdefault("tasks", {})
    config: RunConfig = read_fields(RunConfig, values, str(path))
    if config.stage not in LEARNS:
        raise ValueError(f"{path}.stage must be one of {list(LEARNS)}, got {config.stage!r}")
    if min(config.steps, config.batch, config.accumulate) < 1:
        raise ValueError(f"{path}: steps, batch and accumulate must be at least 1")
    return config


def train(
    config: RunConfig, out: Path, streams: Streams, exam: Sequence[Sample] = ()
) -> Trainer[list[Sample]]:
    """Trains to the end, from the last checkpoint in ``out`` if there is one of this stage.

    Raises:
        CheckpointError: A damaged checkpoint, one that is not ready for this stage, or a run that stopped in several
            processes.
    """
    model, stages, training = start(config, out)
    if (sharded := newest(out)) is not None:
        raise checkpoint.CheckpointError(
            f"{sharded}: stopped in several processes; go on with torchrun, or choose another folder"
        )
    step = AnswerLoss(model)
    choose(model, config)
    schedule = Schedule(config.steps, config.lr, config.accumulate)
    trainer = Trainer(step, streams(config), lambda batch: _mean(step, batch), schedule)
    said = json.loads(json.dumps(dataclasses.asdict(config)))
    if training is not None:
        check_same(out, training.state["run"], said)
        trainer.load(training)
    log = Log(out, trainer)

    def after(trainer: Trainer[list[Sample]]) -> None:
        done = len(trainer.losses)
        due = exam and config.evaluate_every and done % config.evaluate_every == 0
        log.write(exact_match(model, exam) if due else None)
        if config.save_every and done % config.save_every == 0 and done < config.steps:
            saved = trainer.save()
            saved.state["run"] = said
            checkpoint.save(out, model, stages, saved)

    trainer.run(config.stage, after)
    checkpoint.save(out, model, (*stages, config.stage))
    return trainer


def check_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """CheckpointError unless both say the same of all that samples, schedule and the parts that learn follow from; how
    often to save or ask may change. Of tasks the order counts, samples are drawn by it."""
    free = {"save_every", "evaluate_every", "exam"}
    changed = [
        f"{n}{' in another order' if before[n] == now[n] else ''}: {before[n]!r} then, {now[n]!r} now"
        for n in now
        if n not in free and _in_order(before[n]) != _in_order(now[n])
    ]
    if changed:
        raise checkpoint.CheckpointError(f"{out}: stopped in another run ({'; '.join(changed)})")


def _in_order(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def newest(out: Path) -> Path | None:
    """The last complete sharded checkpoint, of a run in several processes that stopped."""
    done = [p.parent for p in out.glob(f"{STEPS}/{distributed.MANIFEST}")]
    return max(done, default=None)


def start(config: RunConfig, out: Path) -> tuple[MMLLM, tuple[str, ...], Training | None]:
    """The model, the stages it has had, and where a stopped training was."""
    if (out / checkpoint.MANIFEST).exists():
        found = checkpoint.load(out)
        if found.training is not None:
            return found.model, found.stages, found.training
        raise checkpoint.CheckpointError(
            f"{out}: has finished stages {list(found.stages)}; choose another folder"
        )
    torch.manual_seed(config.seed)
    start = Path(config.start)
    if start.is_dir():
        found = checkpoint.load(start)
        model, stages = found.model, found.stages
    else:
        model, stages = MMLLM(MMConfig.from_json(start.read_text())), ()
    if config.stage == "it" and "pt" not in stages:
        raise checkpoint.CheckpointError(
            f"{start}: stage it needs a checkpoint with stage pt, this one has {list(stages)}"
        )
    return with_lora(model, config.lora_rank) if config.lora_rank else model, stages, None


def choose(model: MMLLM, config: RunConfig) -> None:
    """Freezes all but the parts that learn; of a language model with adapters those alone.

    Raises:
        ValueError: A part that the model does not have, or that the loss has no gradient for.
    """
    parts = config.learn or LEARNS[config.stage]
    known = {name for name, _ in model.named_children()}
    wrong = sorted(set(config.learn) - known)
    if wrong:
        raise ValueError(f"learn: the model has no parts {wrong}, it has {sorted(known)}")
    draws = not config.tasks or config.tasks.get("draw", 0) > 0
    reached = LEARN_TO_ANSWER | ({"output_projector"} if draws else set())  # else it would decay
    if unreached := sorted(set(config.learn) - reached):
        raise ValueError(
            f"learn: the loss of these tasks reaches {sorted(reached & known)}, not {unreached}: an output projector "
            "learns where tasks have 'draw', a generator by mmkernels.train.drawing.train_generator alone"
        )
    adapted = model.config.decoder.lora_rank > 0
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        whole = not (adapted and part == "language_model")
        learns = part in parts and part in reached
        parameter.requires_grad_(learns and (whole or "lora_" in name))


def _mean(step: AnswerLoss, batch: list[Sample]) -> Mean:
    return Mean(*step(batch))


class Log:
    """``log.jsonl``, a line a step, and TensorBoard where it is installed."""

    def __init__(self, out: Path, trainer: Trainer[list[Sample]]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.trainer, self.last = out / "log.jsonl", trainer, time.perf_counter()
        if self.path.exists():  # steps after the checkpoint are computed again
            lines = self.path.read_text().splitlines()[: len(trainer.losses)]
            self.path.write_text("".join(f"{line}\n" for line in lines))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(out / "tensorboard"))
        except ImportError:
            self.board = None

    def write(self, exact: float | None) -> None:
        now, schedule = time.perf_counter(), self.trainer.schedule
        values: dict[str, Any] = {
            "step": len(self.trainer.losses), "loss": self.trainer.losses[-1], "skipped": self.trainer.skipped,
            "batches_per_s": round(schedule.accumulate / (now - self.last), 3),
        }  # fmt: skip
        if exact is not None:
            values["exact_match"] = exact
        self.last = now
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")
        if self.board is not None:
            for name in values.keys() - {"step"}:
                self.board.add_scalar(name, values[name], values["step"])
