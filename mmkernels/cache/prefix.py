# SPDX-License-Identifier: Apache-2.0
"""A name for the keys and values of an image: equal only where every pixel and every step before them are."""

import hashlib
import json
from typing import Any

import numpy as np
import torch


def prefix_key(image: Any, preprocess: Any = None) -> str:
    """SHA-256 over what an image is and what will be done to it, in hex.

    What it is: its kind (PIL mode, tensor, array), shape, dtype, bytes and, of a PIL image, palette and transparency:
    30×150 is not 150×30, a palette is not its indices, int8 is not uint8.

    Args:
        image: A PIL image, a tensor (any device and strides) or an ndarray.
        preprocess: What follows: numbers, strings, None, and lists, tuples and dicts of them (a processor's
            ``to_dict()``); tensors and arrays count by content. Name the checkpoint here if several share a cache.

    Raises:
        TypeError: For any other type: its ``repr`` may say nothing about it, or something new in every process.
    """
    digest = hashlib.sha256()
    for part in (_image_parts(image), _spelled(preprocess)):
        text = json.dumps(part, sort_keys=True, ensure_ascii=True, allow_nan=True).encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _image_parts(image: Any) -> Any:
    if isinstance(image, torch.Tensor | np.ndarray):
        return _spelled(image)
    if not (hasattr(image, "mode") and hasattr(image, "tobytes") and hasattr(image, "size")):
        kind = type(image).__name__
        raise TypeError(
            f"prefix_key: image must be a PIL image, a tensor or an ndarray, got {kind}"
        )
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    transparency = image.info.get("transparency")
    return {
        "pil": image.mode, "size": list(image.size), "bytes": _sha(image.tobytes()), "palette": palette,
        "transparency": _spelled(transparency),
    }  # fmt: skip


def _spelled(value: Any) -> Any:
    """``value`` as JSON in which nothing is equal that was not: containers and scalars carry their type."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return [type(value).__name__, repr(value)]
    if isinstance(value, bytes):
        return ["bytes", _sha(value)]
    if isinstance(value, list | tuple):
        return ["list", *map(_spelled, value)]
    if isinstance(value, dict):
        pairs = ([_spelled(k), _spelled(v)] for k, v in value.items())
        return ["dict", sorted(pairs, key=json.dumps)]
    if isinstance(value, torch.Tensor):
        dense = value.detach().cpu().contiguous()
        flat = dense.view(-1).view(torch.uint8) if dense.numel() else dense
        return ["tensor", list(dense.shape), str(dense.dtype), _sha(flat.numpy().tobytes())]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return ["ndarray", list(value.shape), value.dtype.str, _sha(value.tobytes())]
    raise TypeError(f"prefix_key: cannot tell a {type(value).__name__} by its content")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
