# SPDX-License-Identifier: Apache-2.0
"""Byte tokenizer: every text has ids; a placeholder in a prompt is one id, whatever its medium becomes."""

import re
from collections.abc import Iterable

import torch

PAD, BOS, EOS = 256, 257, 258
MODALITIES = {"image": 259, "video": 260, "audio": 261}
SIGNALS = (262, 263, 264, 265)  # [IMG0] … [IMG3]: their hidden states are drawn
VOCAB_SIZE = 266
_PLACEHOLDER = re.compile("<(" + "|".join(MODALITIES) + ")>")


def encode(text: str) -> list[int]:
    """UTF-8 bytes as ids 0…255."""
    return list(text.encode())


def decode(ids: Iterable[int]) -> str:
    """Text up to the first end token; other special ids are dropped."""
    kept: list[int] = []
    for token in ids:
        if token == EOS:
            break
        if token < PAD:
            kept.append(token)
    return bytes(kept).decode(errors="replace")


def placeholders(prompt: str) -> list[str]:
    """The modalities a prompt names, in order: ``"<image>what is said in <audio>?"`` gives image, audio."""
    return _PLACEHOLDER.findall(prompt)


def place(prompt: str, modality: str) -> str:
    """The medium first, unless the prompt places one itself."""
    return prompt if placeholders(prompt) else f"<{modality}>{prompt}"


def encode_prompt(prompt: str) -> torch.Tensor:
    """``<bos> prompt \\n`` as ids ``[L]``, one id for each placeholder.

    A space sets two media of a kind apart: M-RoPE's positions go by runs of tokens of a kind.
    """
    ids = [BOS]
    for i, part in enumerate(_PLACEHOLDER.split(prompt)):
        if i % 2 and ids[-1] == MODALITIES[part]:
            ids += encode(" ")
        ids += [MODALITIES[part]] if i % 2 else encode(part)
    return torch.tensor([*ids, *encode("\n")])
