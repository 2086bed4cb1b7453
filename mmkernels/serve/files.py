# SPDX-License-Identifier: Apache-2.0
"""Media from files, and requests from a file of JSON lines; every error is one line that names field and file."""

import json
import warnings
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from mmkernels.models import MMLLM
from mmkernels.serve.engine import Engine
from mmkernels.serve.request import Medium, Request, RequestError, one_line

MAX_PIXELS = 64_000_000
MAX_SAMPLES = 10_000_000
READ_AHEAD = 2  # times max_running: requests of a file in flight or waiting
FIELDS = ("id", "prompt", "image", "video", "audio", "max_new_tokens")


def read_image(path: Path, side: int) -> torch.Tensor:
    """Any PNG or JPEG as ``[3, side, side]`` uint8, upright as its EXIF says; transparency is dropped.

    The size is checked before pixels are decoded.

    Raises:
        RequestError: Missing, unreadable, too large, truncated or corrupt; names the file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opening reads the EXIF, too
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise RequestError(
                        f"{path}: {width}×{height} pixels, at most {MAX_PIXELS} are read"
                    )
                image.load()
                upright = _upright(_eight_bits(image)).convert("RGB")
            pixels = np.asarray(upright.resize((side, side), Image.Resampling.BILINEAR))
    except UnidentifiedImageError:
        raise RequestError(f"{path}: not a PNG or JPEG, or its header is corrupt") from None
    except Image.DecompressionBombError as error:
        raise RequestError(f"{path}: {error}") from None
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None
    except (SyntaxError, ValueError) as error:  # Pillow's words for a broken PNG
        raise RequestError(f"{path}: corrupt: {error}") from None
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _eight_bits(image: Any) -> Any:
    """The high bytes of 16 bits of grey, which ``convert`` would clip. Colours have 8 bits already."""
    from PIL import Image

    if not image.mode.startswith("I"):
        return image
    grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey.info = image.info  # its EXIF
    return grey


def _upright(image: Any) -> Any:
    """Turned as its EXIF says. One that is damaged is ignored, as viewers do.

    ``ImageOps.exif_transpose`` also writes the EXIF anew. That fails where a tag is damaged.
    """
    from PIL import ExifTags, Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds
        return image
    return image if turn is None else image.transpose(turn)


def read_audio(path: Path, sampling_rate: int) -> torch.Tensor:
    """A WAV of 16-bit samples, one channel, at ``sampling_rate`` → ``[n]`` in −1…1.

    Raises:
        RequestError: Missing, of another kind, too long or truncated; names the file.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, bits, rate = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
            frames = file.getnframes()
            if (channels, bits, rate) != (1, 16, sampling_rate):
                raise RequestError(
                    f"{path}: must be 1 channel of 16 bits at {sampling_rate} Hz,"
                    f" got {channels} of {bits} at {rate}"
                )
            if not 0 < frames <= MAX_SAMPLES:
                raise RequestError(f"{path}: {frames} samples, 1 to {MAX_SAMPLES} are read")
            content = file.readframes(frames)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror or error}") from None
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: a chunk that ends nowhere
        raise RequestError(f"{path}: not a WAV file: {str(error) or 'truncated'}") from None
    except ValueError as error:  # a path that no file can have
        raise RequestError(f"{path}: {error}") from None
    if len(content) != 2 * frames:
        raise RequestError(f"{path}: truncated: {len(content) // 2} of {frames} samples")
    return torch.from_numpy(np.frombuffer(content, "<i2").astype(np.float32) / 32768)


def media_of(model: MMLLM, fields: dict[str, Any]) -> list[Medium]:
    """The media a request names: ``image`` a path or a list of paths, ``video`` the paths of its frames, ``audio`` a
    path; in this order.

    Raises:
        RequestError: The model takes none of that kind, or a file cannot be read; names field and file.
    """
    media: list[Medium] = []
    images = fields.get("image", [])
    for path in [images] if isinstance(images, str | Path) else images:
        media.append(("image", _named("image", read_image, path, _side(model, "image"))))
    if fields.get("video"):
        side = _side(model, "video")
        frames = [_named("video", read_image, path, side) for path in fields["video"]]
        media.append(("video", torch.stack(frames)))
    if fields.get("audio") is not None:
        _check_takes(model, "audio")
        assert model.sampling_rate is not None  # it has ears
        media.append(("audio", _named("audio", read_audio, fields["audio"], model.sampling_rate)))
    return media


def _check_takes(model: MMLLM, modality: str) -> None:
    if modality not in model.config.projectors:
        raise RequestError(f"{modality}: the model takes {sorted(model.config.projectors)}")


def _side(model: MMLLM, modality: str) -> int:
    _check_takes(model, modality)
    try:
        return model.picture_side(modality)
    except ValueError as error:
        raise RequestError(str(error)) from None


def serve_lines(model: MMLLM, lines: Iterable[str], out: TextIO, engine: Engine) -> int:
    """A request a line → an answer a line, in the order they end: ``{id, text, finished}`` or ``{id, error}``.

    Lines are read until ``READ_AHEAD`` × ``max_running`` requests are not answered; then one for each that ends. A line
    that is no request fails alone.

    Returns:
        How many failed.
    """
    failed, names = 0, dict[Request, Any]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            failed += not _submit(model, engine, (number, line), names, out)
        while len(names) >= READ_AHEAD * engine.max_running:
            failed += _step(engine, names, out)
    while names:
        failed += _step(engine, names, out)
    return failed


def _submit(
    model: MMLLM,
    engine: Engine,
    numbered: tuple[int, str],
    names: dict[Request, Any],
    out: TextIO,
) -> bool:
    """Queues the request of a line, or answers why not."""
    name: Any = numbered[0]
    try:
        fields = _object(numbered[1])
        name = _name(fields, name)
        _check_fields(fields)
        media, new = media_of(model, fields), fields.get("max_new_tokens", 48)
        names[engine.submit(fields.get("prompt", ""), media, new)] = name
    except Exception as error:  # whoever raised it, the other lines go on
        _write(out, {"id": name, "error": one_line(error)})
        return False
    return True


def _step(engine: Engine, names: dict[Request, Any], out: TextIO) -> int:
    """Steps, writes what has ended; returns how many of those failed."""
    ended = [r for r in engine.step() if r.finished and r in names]
    for request in ended:
        answer = {"text": request.text, "finished": request.finished}
        error = {"error": request.error}
        _write(out, {"id": names.pop(request)} | (error if request.error else answer))
    return sum(r.error is not None for r in ended)


def _object(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise RequestError(f"not JSON: {error}") from None
    except RecursionError:
        raise RequestError("not JSON: nested too deeply") from None
    if not isinstance(fields, dict):
        raise RequestError(f"must be an object, got {type(fields).__name__}")
    return fields


def _name(fields: dict[str, Any], number: int) -> str | int | float:
    name = fields.get("id", number)
    if not isinstance(name, str | int | float):
        raise RequestError(f"id: must be text or a number, got {type(name).__name__}")
    return name


def _check_fields(fields: dict[str, Any]) -> None:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise RequestError(f"unknown fields {unknown}, known are {list(FIELDS)}")
    lists = {"video": fields.get("video", []), "image": fields.get("image", "")}
    for name, value in lists.items():
        fits = isinstance(value, list) and all(isinstance(p, str) for p in value)
        if not fits and not (name == "image" and isinstance(value, str)):
            raise RequestError(f"{name}: must be a list of paths, got {value!r}")
    if not isinstance(fields.get("audio", ""), str):
        raise RequestError(f"audio: must be a path, got {fields['audio']!r}")


def _named(field: str, read: Any, path: Any, size: int) -> torch.Tensor:
    try:
        found: torch.Tensor = read(Path(path), size)
    except RequestError as error:
        raise RequestError(f"{field}: {error}") from None
    return found


def _write(out: TextIO, values: dict[str, Any]) -> None:
    out.write(json.dumps(values) + "\n")  # in ASCII: any id or path, on any terminal
    out.flush()
