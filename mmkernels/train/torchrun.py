# SPDX-License-Identifier: Apache-2.0
"""``torchrun -m mmkernels train --config FILE``: the run of ``run.py`` in several processes, sharded.

Every rank takes its share of each batch; losses are those of one process. ``OUT/step-<n>/`` holds the shards of model
and optimizer, its manifest comes last, older folders go then: a kill at any time loses what came after the last one.
At the end rank 0 writes the ordinary checkpoint, which everything else reads, and the last folder goes too.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from mmkernels.models import MMLLM
from mmkernels.train import checkpoint, distributed, run
from mmkernels.train.sample import AnswerLoss, Sample
from mmkernels.train.trainer import Schedule, Stream, Trainer, Training


class Dealt:
    """This rank's samples of every batch."""

    def __init__(self, whole: Stream[list[Sample]]) -> None:
        self.whole = whole

    def __next__(self) -> list[Sample]:
        return next(self.whole)[dist.get_rank() :: dist.get_world_size()]

    def state_dict(self) -> dict[str, Any]:
        return self.whole.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.whole.load_state_dict(state)


def train(config: run.RunConfig, out: Path, streams: run.Streams) -> Trainer[list[Sample]]:
    """Trains to the end, from the last sharded checkpoint in ``out`` if there is one.

    Raises:
        CheckpointError: A damaged checkpoint, one of another run, one that is not ready for this stage, or a run that
            stopped in one process.
    """
    with distributed.process_group() as rank:
        if config.evaluate_every:
            raise ValueError(
                "evaluate_every: must be 0 in several processes, evaluate the checkpoint after"
            )
        model, stages, training = run.start(config, out)
        if training is not None:  # its moments are whole
            raise checkpoint.CheckpointError(
                f"{out}: stopped in one process; go on without torchrun, or choose another folder"
            )
        run.choose(model, config)
        step = distributed.shard(AnswerLoss(model), recompute=True)
        schedule = Schedule(config.steps, config.lr, config.accumulate)
        loss_of = lambda batch: distributed.mean_over_all(*step(batch))
        trainer = Trainer(step, Dealt(streams(config)), loss_of, schedule)
        said = json.loads(json.dumps(dataclasses.asdict(config)))
        if (last := run.newest(out)) is not None:
            run.check_same(last, distributed.check_sharded(last)["training"]["run"], said)
            _load(last, model, trainer)
        log = run.Log(out, trainer) if rank == 0 else None

        def after(trainer: Trainer[list[Sample]]) -> None:
            done, loss = len(trainer.losses), torch.tensor(trainer.losses[-1], dtype=torch.float64)
            dist.all_reduce(loss)
            trainer.losses[-1] = loss.item() / dist.get_world_size()
            if log is not None:
                log.write(None)
            if config.save_every and done % config.save_every == 0 and done < config.steps:
                _save(out, model, trainer, said)

        trainer.run(config.stage, after)
        _finish(out, model, (*stages, config.stage))
        return trainer


def _finish(out: Path, model: MMLLM, stages: tuple[str, ...]) -> None:
    """The ordinary checkpoint; then nothing is left to go on with."""
    whole = distributed.whole_state(model)  # every rank is here: none reads a sharded checkpoint
    if dist.get_rank() == 0:
        finished = MMLLM(model.config)
        finished.load_state_dict(whole, strict=False)
        checkpoint.save(out, finished, stages)
        _remove_steps(out)
    dist.barrier()


def _remove_steps(out: Path, kept: Path | None = None) -> None:
    for old in out.glob(run.STEPS):
        if old != kept:
            shutil.rmtree(old)


def _save(out: Path, model: MMLLM, trainer: Trainer[list[Sample]], said: dict[str, Any]) -> None:
    folder = out / f"step-{len(trainer.losses):08d}"
    if dist.get_rank() == 0 and folder.exists():  # what a kill has left, without a manifest
        shutil.rmtree(folder)
    dist.barrier()
    saved = trainer.save()
    state = get_model_state_dict(model) | saved.tensors
    facts = {"training": {**saved.state, "run": said}, "tensors": sorted(saved.tensors)}
    distributed.save_state_of(folder, model, state, facts)
    if dist.get_rank() == 0:
        _remove_steps(out, folder)
    dist.barrier()


def _load(folder: Path, model: MMLLM, trainer: Trainer[list[Sample]]) -> None:
    """Into shards of the same shape: the optimizer's are made here, like the parameters'."""
    manifest = distributed.check_sharded(folder)
    tensors: dict[str, torch.Tensor] = {"rng.torch": torch.get_rng_state()}
    for name in manifest["tensors"]:
        parameter, _, kind = name.removeprefix("optimizer.").rpartition(".")
        if name.startswith("optimizer."):
            like = trainer.parameters[parameter].detach()
            tensors[name] = torch.zeros(()) if kind == "step" else torch.zeros_like(like)
    weights = get_model_state_dict(model)
    distributed.load_state_of(folder, weights | tensors)
    set_model_state_dict(model, weights)
    trainer.load(Training(tensors, manifest["training"]))
