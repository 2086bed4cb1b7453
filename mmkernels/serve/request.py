# SPDX-License-Identifier: Apache-2.0
"""One request: what is asked, and how far the answer is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from mmkernels.cache import prefix_key
from mmkernels.models.tokenizer import ByteTokenizer, placeholders

Medium = tuple[str, torch.Tensor]


class RequestError(ValueError):
    """One line that names the field at fault; nothing has been queued."""


def one_line(error: Exception) -> str:
    """What went wrong, without newlines; an error that is not about a value says its type, too."""
    lines = str(error).splitlines()
    if isinstance(error, RequestError):
        return " ".join(lines)  # our own words: only a path in them can have newlines
    kind = [] if isinstance(error, ValueError) and lines else [type(error).__name__]
    return ": ".join([*kind, *lines[:1]])


@dataclass(eq=False)
class Request:
    """``text`` grows while the engine steps; ``finished`` tells why it no longer does: ``"end"``, ``"length"``,
    ``"cancelled"``, or ``"error"`` with ``error`` saying what."""

    prompt: str
    media: tuple[Medium, ...]
    max_new_tokens: int
    tokenizer: ByteTokenizer = field(repr=False)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: str | None = None
    error: str | None = None

    # The engine's
    input_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    key: str | None = (
        None  # of what others with the same media can share: all up to the last medium
    )
    prefix_rows: int = 0  # of that, in rows
    embeds: torch.Tensor | None = None  # rows of the prompt that are not in a kept prefix
    position_ids: torch.Tensor | None = None  # theirs
    done: int = 0  # of them, computed
    sequence: int = -1

    def push(self, token: int) -> None:
        """One more token; the bytes of an unfinished character wait for the rest."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.text = text


def checked(
    tokenizer: ByteTokenizer, prompt: str, media: Sequence[Medium], max_new_tokens: int
) -> Request:
    """A request with its media where the prompt places them, or in front.

    Raises:
        RequestError: Names field, got, expected.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError(f"prompt: must be text, got {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # half a character, or a byte that is not UTF-8
        got = f"{prompt[error.start]!r} at {error.start}"
        raise RequestError(f"prompt: must be Unicode text, got {got}") from None
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise RequestError(f"max_new_tokens: must be at least 1, got {max_new_tokens!r}")
    for i, (modality, tensor) in enumerate(media):
        _check_medium(i, modality, tensor)
    given = [modality for modality, _ in media]
    if not placeholders(prompt):
        prompt = "".join(f"<{m}>" for m in given) + prompt
    named = placeholders(prompt)
    if named != given:
        raise RequestError(f"media: the prompt names {named}, got {given}")
    request = Request(prompt, tuple(media), max_new_tokens, tokenizer)
    request.input_ids = tokenizer.encode_prompt(prompt)
    return request


def text_behind(request: Request) -> torch.Tensor:
    """The ids after the last medium."""
    ids, media = request.input_ids, set(request.tokenizer.modalities.values())
    places = [i for i, t in enumerate(ids.tolist()) if t in media]
    return ids[places[-1] + 1 :] if places else ids


def key_of(request: Request) -> str | None:
    """A name for everything up to the last medium, equal only where every byte of it is."""
    if not request.media:
        return None
    before = len(request.input_ids) - len(text_behind(request))
    first, *others = (tensor for _, tensor in request.media)
    return prefix_key(first, [request.input_ids[:before].tolist(), *others])


_SHAPES = {
    "image": ("uint8 [3, H, W]", torch.uint8, 3),
    "video": ("uint8 [T, 3, H, W]", torch.uint8, 4),
    "audio": ("float [n]", torch.float32, 1),
}  # fmt: skip


def _check_medium(i: int, modality: str, tensor: torch.Tensor) -> None:
    if modality not in _SHAPES:
        raise RequestError(f"media[{i}]: modality must be one of {list(_SHAPES)}, got {modality!r}")
    letters, dtype, dims = _SHAPES[modality]
    fits = isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.dim() == dims
    if not fits or tensor.numel() == 0 or (dims > 1 and tensor.shape[-3] != 3):
        shape = (
            f"{tensor.dtype} {list(tensor.shape)}"
            if isinstance(tensor, torch.Tensor)
            else type(tensor)
        )
        raise RequestError(f"media[{i}]: {modality} must be {letters}, got {shape}")
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise RequestError(f"media[{i}]: {modality} must be finite")
