# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: safetensors and a JSON manifest with SHA-256, complete or not there at all.

``DIR/model-<hash>.safetensors``, and ``DIR/training-<hash>.safetensors`` of a training that will go on, are named by
their content; ``DIR/manifest.json`` is replaced last and in one step, so at every moment the directory holds the old
checkpoint or the new one.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from mmkernels.models import MMLLM, MMConfig
from mmkernels.train.trainer import Training

MANIFEST = "manifest.json"
DTYPES = {
    str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}  # fmt: skip
_LISTED = 3  # names shown in an error
_NAME = r"(model|training)-[0-9a-f]{12}\.safetensors"
_UNFINISHED = rf"\.({_NAME}|{re.escape(MANIFEST)})\.[a-z0-9_]{{8}}"
_OURS = re.compile(f"{_NAME}|{_UNFINISHED}")


class CheckpointError(Exception):
    """One line that names the file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, the training stages it has been through and the state of one under way."""

    model: MMLLM
    stages: tuple[str, ...]
    training: Training | None = None


def save(
    directory: Path, model: MMLLM, stages: tuple[str, ...], training: Training | None = None
) -> None:
    """Writes the checkpoint; an interrupted call leaves what was there before. Files of earlier checkpoints go, those
    of others stay."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"model": _own_tensors(model)} | ({"training": training.tensors} if training else {})
    manifest: dict[str, Any] = {
        "stages": list(stages),
        "config": json.loads(model.config.to_json()),
        "dtype": next(
            n for n, t in DTYPES.items() if t == model.language_model.lm_head.weight.dtype
        ),
        "files": {role: _write(directory, role, tensors) for role, tensors in files.items()},
        "training": training.state if training else None,
    }
    write_manifest(directory / MANIFEST, manifest)
    kept = {facts["name"] for facts in manifest["files"].values()}
    for old in directory.iterdir():  # also what a writer that was killed has left
        if _OURS.fullmatch(old.name) and old.name not in kept:
            old.unlink()


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """With format and seal; whole or not at all."""
    whole = {"format": 2, **manifest}
    write_file(path, json.dumps({**whole, "sha256": _seal(whole)}, indent=2).encode())


def _write(directory: Path, role: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    content = save_tensors({name: t.detach().contiguous() for name, t in tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"{role}-{digest[:12]}.safetensors"
    write_file(directory / name, content)
    return {"name": name, "sha256": digest, "bytes": len(content)}


def _own_tensors(model: MMLLM) -> dict[str, torch.Tensor]:
    """The state_dict without second names of the same tensor (a tied output weight)."""
    known: set[int] = set()
    own = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:
            known.add(id(tensor))
            own[name] = tensor
    return own


def write_file(path: Path, content: bytes) -> None:
    """Temporary name, fsync, rename, fsync of the directory: whole or absent."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # mode by the umask: mkstemp would make a file that nobody else may read
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(directory: Path) -> Checkpoint:
    """Reads and verifies everything before a model exists.

    Raises:
        CheckpointError: Missing, truncated or altered file; missing, extra or wrong-shape tensors; a configuration
            that no model can be made of, a tokenizer's folder that is not there among them.
    """
    manifest = read_manifest(directory / MANIFEST)
    try:
        config = MMConfig.from_json(json.dumps(manifest["config"]))
        path = directory / manifest["files"]["model"]["name"]
        stages, dtype = tuple(manifest["stages"]), DTYPES[manifest["dtype"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error}") from None
    read = {role: _read_tensors(directory, facts) for role, facts in manifest["files"].items()}
    try:
        model = MMLLM(config).to(dtype)
    except ValueError as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error}") from error
    check_tensors(path, read["model"], _own_tensors(model))
    model.load_state_dict(read["model"], strict=False)
    training = Training(read["training"], manifest["training"]) if "training" in read else None
    return Checkpoint(model, stages, training)


def _read_tensors(directory: Path, facts: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = directory / Path(facts["name"]).name  # of this folder, whatever the manifest says
    content = _read(path)
    if len(content) != facts["bytes"]:
        raise CheckpointError(
            f"{path}: truncated or padded: {len(content)} bytes, expected {facts['bytes']}"
        )
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise CheckpointError(f"{path}: altered: its SHA-256 is not the manifest's")
    try:
        return load_tensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None


def check_tensors(
    path: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    """Names, shapes and dtypes agree, or CheckpointError says which do not."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"missing {_some(missing)}"] * bool(missing) + [f"extra {_some(extra)}"] * bool(
            extra
        )
        raise CheckpointError(f"{path}: wrong tensors: {', '.join(parts)}")
    for name, tensor in expected.items():
        got = found[name]
        if got.shape != tensor.shape or got.dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name} must be {list(tensor.shape)} {tensor.dtype}, "
                f"got {list(got.shape)} {got.dtype}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None


def read_manifest(path: Path) -> dict[str, Any]:
    content = _read(path)
    try:
        manifest: dict[str, Any] = json.loads(content)
        seal = manifest.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{path}: not a checkpoint manifest, or truncated") from None
    if seal != _seal(manifest):
        raise CheckpointError(f"{path}: altered: its SHA-256 does not match its content")
    if manifest.get("format") != 2:
        raise CheckpointError(f"{path}: format must be 2, got {manifest.get('format')!r}")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    """Over everything but itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
