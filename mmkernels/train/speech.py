# SPDX-License-Identifier: Apache-2.0
"""Spoken digits: ten words by 36 voices of espeak-ng, shipped in ``assets`` (which also has the script that made them).

A voice is an accent and a speaker. The held-out speakers are in no training recording.

Dimensions: n samples at 8 kHz, in −1…1.
"""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

ASSET = Path(__file__).parent / "assets" / "spoken_digits.safetensors"
SHA256 = "61a4c29b0ca90031429cae6757bac71d4d109747ee90fafcf71a2107061cba91"
SAMPLING_RATE = 8000
HELDOUT_SPEAKERS = ("m4", "f2")
GAP_S = (0.03, 0.25)
LEAD_S = (0.05, 0.3)
_MU = 255.0


@dataclass(frozen=True)
class Spoken:
    """Recordings ``waveforms[i]`` ``[n]``, the digit said ``[i]``, and whose voice it is."""

    waveforms: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    voices: tuple[str, ...]

    def of(self, digit: int) -> list[int]:
        """Which recordings say it."""
        return (self.labels == digit).nonzero().flatten().tolist()


def load_spoken(split: str) -> Spoken:
    """The ``"train"`` or ``"heldout"`` speakers.

    Raises:
        ValueError: The file is missing or not the one that was shipped.
    """
    if not ASSET.exists() or hashlib.sha256(ASSET.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{ASSET}: missing or altered: its SHA-256 must be {SHA256[:12]}…")
    with safe_open(ASSET, "pt") as file:
        names = file.metadata()["voices"].split(",")
        curved = file.get_tensor("mu_law").float() / 255 * 2 - 1
        lengths, labels, voices = (file.get_tensor(k) for k in ("lengths", "labels", "voices"))
    waves = (curved.sign() * (1 + _MU) ** curved.abs() - curved.sign()) / _MU
    heldout = torch.tensor([n.partition("+")[2] in HELDOUT_SPEAKERS for n in names])[voices.long()]
    chosen = {"train": ~heldout, "heldout": heldout}[split].nonzero().flatten().tolist()
    parts = waves.split(lengths.tolist())
    return Spoken(
        tuple(parts[i] for i in chosen), labels[chosen].long(), tuple(names[int(voices[i])] for i in chosen)
    )  # fmt: skip


def say(spoken: Spoken, digits: tuple[int, ...], rng: random.Random) -> torch.Tensor:
    """One speaker after another says the digits, with gaps, louder and softer, over a little noise, ``[n]``."""
    pieces = [_silence(rng.uniform(*LEAD_S))]
    for digit in digits:
        wave = spoken.waveforms[rng.choice(spoken.of(digit))]
        pieces += [rng.uniform(0.4, 1.0) * wave, _silence(rng.uniform(*GAP_S))]
    pieces.append(_silence(rng.uniform(*LEAD_S)))
    waveform = torch.cat(pieces)
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(rng.getrandbits(31)))
    return (waveform + rng.uniform(0, 0.01) * noise).clamp(-1, 1)


def _silence(seconds: float) -> torch.Tensor:
    return torch.zeros(round(seconds * SAMPLING_RATE))
