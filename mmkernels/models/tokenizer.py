# SPDX-License-Identifier: Apache-2.0
"""Text and ids: bytes, or a tokenizer of transformers; a placeholder is one id, whatever its medium becomes."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

PAD, BOS, EOS = 256, 257, 258
MODALITIES = {"image": 259, "video": 260, "audio": 261}
SIGNALS = (262, 263, 264, 265)  # [IMG0] … [IMG3]: their hidden states are drawn
VOCAB_SIZE = 266
_PLACEHOLDER = re.compile("<(" + "|".join(MODALITIES) + ")>")


def placeholders(prompt: str) -> list[str]:
    """The modalities a prompt names, in order: ``"<image>what is said in <audio>?"`` gives image, audio."""
    return _PLACEHOLDER.findall(prompt)


class ByteTokenizer:
    """UTF-8 bytes as ids 0…255: every text has ids."""

    def __init__(self) -> None:
        self.bos, self.eos = BOS, EOS
        self.modalities: dict[str, int] = MODALITIES
        self.signals: tuple[int, ...] = SIGNALS

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text; special ids are dropped."""
        return bytes(i for i in ids if i < PAD).decode(errors="replace")

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """``<bos> prompt \\n`` as ids ``[L]``, one id for each placeholder.

        A space sets two media of a kind apart: M-RoPE's positions go by runs of tokens of a kind.
        """
        ids = [self.bos]
        for i, part in enumerate(_PLACEHOLDER.split(prompt)):
            if i % 2 and ids[-1] == self.modalities[part]:
                ids += self.encode(" ")
            ids += [self.modalities[part]] if i % 2 else self.encode(part)
        return torch.tensor([*ids, *self.encode("\n")])

    def until_end(self, ids: Iterable[int]) -> list[int]:
        """Ids before the first end token."""
        kept: list[int] = []
        for token in ids:
            if token == self.eos:
                break
            kept.append(token)
        return kept


class FolderTokenizer(ByteTokenizer):
    """A tokenizer saved by transformers; placeholders take ids behind its own, which no embedding is looked up for.

    Raises:
        ValueError: No such folder, no tokenizer in it, or one without an end.
    """

    def __init__(self, folder: str) -> None:
        self.inner = _saved_tokenizer(folder)
        self.eos = self.inner.eos_token_id
        self.bos = self.eos if self.inner.bos_token_id is None else self.inner.bos_token_id
        if self.eos is None:
            raise ValueError(f"{folder}: the tokenizer has no eos token")
        behind = max(len(self.inner), max(self.inner.get_vocab().values()) + 1)
        self.signals = ()  # no embedding, no output for them
        self.modalities = {m: behind + i for i, m in enumerate(MODALITIES)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.inner.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


def _saved_tokenizer(folder: str) -> Any:
    """Of this machine and without code of its own, whatever the name of the folder looks like."""
    from transformers import AutoTokenizer

    path = Path(folder).absolute()
    if not path.is_dir():
        raise ValueError(
            f"tokenizer: no folder {path}; a model is saved with its tokenizer's path: put that tokenizer there again, "
            "or a link to it"
        )
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises no narrower one
        raise ValueError(f"tokenizer: {path}: {' '.join(str(error).split())}") from error
