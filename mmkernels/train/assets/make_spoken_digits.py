# SPDX-License-Identifier: Apache-2.0
"""Makes ``spoken_digits.safetensors``: the ten digits by many voices of espeak-ng, at 8 kHz, µ-law.

``pip install espeakng-loader``, then ``python make_spoken_digits.py``; prints the SHA-256 that ``speech.py`` checks.
espeak-ng is GPL-3.0-or-later; sound it has synthesised is not covered by its licence and is shipped as data.
"""

import ctypes
import hashlib
from pathlib import Path

import espeakng_loader
import numpy as np
import torch
from safetensors.torch import save

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en", "en-us", "en-gb-scotland")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")
PACES = ((150, 45), (190, 60))  # words a minute, pitch in 0…100
RATE = 8000
SYNCHRONOUS, UTF8, RATE_PARAMETER, PITCH_PARAMETER = 2, 1, 1, 3
MU = 255.0


def main() -> None:
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    native = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    heard: list[np.ndarray] = []
    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )

    @kind
    def keep(samples, count, events):  # type: ignore[no-untyped-def]
        if samples and count > 0:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(keep)
    library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # breathy voices are noise, else seeded by time
    clips, labels, voices = [], [], []
    names = [f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS]
    for v, name in enumerate(names):
        if library.espeak_SetVoiceByName(name.encode()) != 0:
            raise SystemExit(f"no voice {name}")
        pace, pitch = PACES[v % len(PACES)]
        library.espeak_SetParameter(RATE_PARAMETER, pace, 0)
        library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        for digit, word in enumerate(WORDS):
            heard.clear()
            library.espeak_Synth(word.encode(), len(word) + 1, 0, 1, 0, UTF8, None, None)
            library.espeak_Synchronize()
            clips.append(_compressed(np.concatenate(heard).astype(np.float64) / 32768, native))
            labels.append(digit)
            voices.append(v)
    lengths = torch.tensor([len(c) for c in clips], dtype=torch.int32)
    tensors = {
        "mu_law": torch.from_numpy(np.concatenate(clips)), "lengths": lengths,
        "labels": torch.tensor(labels, dtype=torch.uint8), "voices": torch.tensor(voices, dtype=torch.uint8),
    }  # fmt: skip
    content = save(tensors, metadata={"voices": ",".join(names)})  # one key: several have no order
    path = Path(__file__).with_name("spoken_digits.safetensors")
    path.write_bytes(content)
    print(
        f"{path}: {len(clips)} clips, {len(content)} bytes, SHA-256 {hashlib.sha256(content).hexdigest()}"
    )


def _compressed(wave: np.ndarray, native: int) -> np.ndarray:
    """At 8 kHz (below 3.8 kHz alone), silence cut off both ends, as loud as all others, one byte a sample."""
    spectrum = np.fft.rfft(wave)
    count = len(wave) * RATE // native
    spectrum[np.fft.rfftfreq(len(wave), 1 / native) > 3800] = 0
    wave = np.fft.irfft(spectrum[: count // 2 + 1], count) * count / len(wave)
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    wave = wave[max(0, loud[0] - 80) : loud[-1] + 80]
    wave = 0.9 * wave / np.abs(wave).max()
    curved = np.sign(wave) * np.log1p(MU * np.abs(wave)) / np.log1p(MU)
    return np.rint((curved + 1) / 2 * 255).astype(np.uint8)


if __name__ == "__main__":
    main()
