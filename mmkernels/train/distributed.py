# SPDX-License-Identifier: Apache-2.0
"""Several processes: FSDP2 around every layer, a loss that is the one of one process, sharded checkpoints.

Run by ``torchrun``; gloo on CPU, nccl on CUDA. Source: ``torch.distributed.fsdp.fully_shard``.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torch.distributed.fsdp import fully_shard

from mmkernels.models import MMLLM
from mmkernels.models.decoder import DecoderLayer
from mmkernels.models.vision import EncoderBlock
from mmkernels.train.checkpoint import CheckpointError, read_manifest, write_manifest
from mmkernels.train.sample import AnswerLoss
from mmkernels.train.trainer import Mean

MANIFEST = "sharded.json"


@contextmanager
def process_group() -> Iterator[int]:
    """This process's rank in the group that torchrun set up."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
        dist.barrier()  # nobody leaves while others still talk to him
    finally:
        dist.destroy_process_group()


def leave() -> NoReturn:
    """Ends this process, whose work is done, without Python's own teardown.

    FSDP keeps gloo's threads alive past ``destroy_process_group``. One of them that still holds a tensor then asks for
    the lock of an interpreter that is gone, and the process ends with SIGABRT after all its work (pytorch#190489; seen
    here once in about 140 runs).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def shard(step: AnswerLoss, recompute: bool = False) -> AnswerLoss:
    """Shards parameters, gradients and optimizer state over all processes, in place; a unit is a layer of an encoder or
    of the decoder, a projector, and the rest. With ``recompute`` a layer of the decoder keeps its input alone and
    computes the rest again in the backward."""
    if recompute:
        apply_activation_checkpointing(step, check_fn=lambda m: isinstance(m, DecoderLayer))
    units = [m for m in step.modules() if isinstance(m, DecoderLayer | EncoderBlock)]
    for module in (*units, *step.model.projectors.values()):
        fully_shard(module)
    fully_shard(step)
    return step


def mean_over_all(total: torch.Tensor, count: int) -> Mean:
    """A loss whose gradients, averaged over processes as FSDP does, are those of ``Σ total / Σ count``."""
    counts = torch.tensor(count, device=total.device)
    dist.all_reduce(counts)
    return Mean(total * dist.get_world_size(), int(counts))


def save_sharded(directory: Path, model: MMLLM) -> None:
    """Every process writes its shards as safetensors into a new folder; the manifest comes last, from rank 0.

    Raises:
        CheckpointError: The folder has a checkpoint, which a kill in between would leave half.
    """
    save_state_of(directory, model, get_model_state_dict(model), {})


def save_state_of(
    directory: Path, model: MMLLM, state: dict[str, Any], facts: dict[str, Any]
) -> None:
    """``save_sharded`` of any tensors by name; ``facts`` go into the manifest."""
    if (directory / MANIFEST).exists():
        raise CheckpointError(f"{directory}: has a checkpoint; choose a new folder")
    dist.barrier()
    writer = HuggingFaceStorageWriter(
        str(directory), fqn_to_index_mapping=dict.fromkeys(state, 1), save_distributed=True
    )
    save_state(state, storage_writer=writer)
    dist.barrier()
    if dist.get_rank() == 0:
        files = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(directory.rglob("*.safetensors"))
        }
        manifest = {"config": json.loads(model.config.to_json()), "files": files, **facts}
        write_manifest(directory / MANIFEST, manifest)
    dist.barrier()


def load_sharded(directory: Path, model: MMLLM) -> None:
    """Into a model that is sharded over any number of processes.

    Raises:
        CheckpointError: A file is missing or not the one the manifest names.
    """
    check_sharded(directory)
    state = get_model_state_dict(model)
    load_state_of(directory, state)
    set_model_state_dict(model, state)


def load_state_of(directory: Path, state: dict[str, Any]) -> None:
    """Into these tensors, in place."""
    load_state(state, storage_reader=HuggingFaceStorageReader(str(directory)))


def check_sharded(directory: Path) -> dict[str, Any]:
    """The manifest, after every file has been compared with it."""
    manifest = read_manifest(directory / MANIFEST)
    found = {p.name: p for p in directory.rglob("*.safetensors")}
    for name, digest in manifest["files"].items():
        if name not in found:
            raise CheckpointError(f"{directory / name}: missing")
        if hashlib.sha256(found[name].read_bytes()).hexdigest() != digest:
            raise CheckpointError(f"{found[name]}: altered: its SHA-256 is not the manifest's")
    return manifest


def whole_state(model: nn.Module) -> dict[str, Any]:
    """All parameters unsharded, on every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
