# SPDX-License-Identifier: Apache-2.0
"""Byte tokenizer: every text has ids, and ``<image>`` in a prompt stands for one image."""

from collections.abc import Iterable, Sequence

import torch

PAD, BOS, EOS, IMAGE = 256, 257, 258, 259
VOCAB_SIZE = 260
PLACEHOLDER = "<image>"


def encode(text: str) -> list[int]:
    """UTF-8 bytes as ids 0…255."""
    return list(text.encode())


def decode(ids: Iterable[int]) -> str:
    """Text up to the first end token; other special ids are dropped."""
    kept: list[int] = []
    for token in ids:
        if token == EOS:
            break
        if token < 256:
            kept.append(token)
    return bytes(kept).decode(errors="replace")


def encode_prompt(prompt: str, num_image_tokens: int) -> list[int]:
    """``<bos> image… prompt \\n``; the image comes first unless the prompt places ``<image>`` itself."""
    if PLACEHOLDER not in prompt:
        prompt = PLACEHOLDER + prompt
    first, *rest = prompt.split(PLACEHOLDER)
    ids = [BOS, *encode(first)]
    for part in rest:
        ids += [IMAGE] * num_image_tokens + encode(part)
    return [*ids, *encode("\n")]


def pad(rows: Sequence[Sequence[int]], value: int = PAD) -> torch.Tensor:
    """Rows padded on the right to the longest, ``[B, L]`` int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
