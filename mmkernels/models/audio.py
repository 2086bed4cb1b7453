# SPDX-License-Identifier: Apache-2.0
"""Audio encoder: a waveform as log-mel spectrogram, in patches, through the same blocks as pixels.

Dimensions: n samples, t frames, m mel bins, D width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from mmkernels.models.attention import Packed
from mmkernels.models.config import AudioConfig
from mmkernels.models.features import Features, join, take_part
from mmkernels.models.vision import EncoderBlock, patch_positions
from mmkernels.nn import AudioPatchEmbed

_FLOOR = 1e-5  # of a power: quieter than this is silence


class AudioEncoder(nn.Module):
    """A pre-norm ViT over patches of the spectrogram; attention over all of a recording.

    Source: AST (Gong et al. 2021).
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config, D = config, config.hidden_size
        self.patch_embed = AudioPatchEmbed(
            D, config.patch_size, frequency_stride=config.stride, time_stride=config.stride
        )
        self.filters: torch.Tensor
        self.register_buffer("filters", mel_filters(config), persistent=False)
        self.layers = nn.ModuleList(
            EncoderBlock(D, config.num_heads, config.intermediate_size)
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(D)
        self.width = D

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "AudioEncoder":
        """Moves all, casts all but the filters."""
        super()._apply(fn, recurse)
        self.filters = mel_filters(self.config).to(self.norm.weight.device)
        return self

    def forward(self, items: Sequence[torch.Tensor]) -> Features:
        """Waveforms ``[n]`` in −1…1 at ``sampling_rate`` → features ``[T, D]``, grids (1, frequency, time).

        Raises:
            ValueError: A recording too short for one patch.
        """
        parts = [self._embed(item) for item in items]
        features = join(parts) if parts else self._none()
        lengths = torch.tensor([0, *features.counts]).cumsum(0)
        recordings = Packed(lengths.int(), max(features.counts, default=0), causal=False)
        hidden_states = features.tokens
        for layer in self.layers:
            hidden_states = layer(hidden_states, recordings)
        return features._replace(tokens=self.norm(hidden_states))

    def _none(self) -> Features:
        tokens = self.norm.weight.new_empty(0, self.width)
        return Features(take_part(tokens, *self.patch_embed.parameters()), ())

    def _embed(self, waveform: torch.Tensor) -> Features:
        c = self.config
        least = (c.patch_size - 1) * c.hop + c.window
        if waveform.dim() != 1 or len(waveform) < least:
            raise ValueError(
                f"audio: a recording must be [n], n ≥ {least} samples, got {list(waveform.shape)}"
            )
        weight = self.patch_embed.weight
        exact = torch.promote_types(weight.dtype, torch.float32)  # no spectrum in 16 bits
        spectrogram = log_mel(waveform.to(exact), self.filters.to(exact), c).to(weight.dtype)
        rows = (c.mel_bins - c.patch_size) // c.stride + 1
        columns = (len(spectrogram) - c.patch_size) // c.stride + 1
        position = 0.3 * patch_positions(rows, self.width, columns).to(weight)
        tokens = self.patch_embed(spectrogram[None], position)[0]
        return Features(tokens, ((1, rows, columns),))


def log_mel(waveform: torch.Tensor, filters: torch.Tensor, config: AudioConfig) -> torch.Tensor:
    """``[n]`` → ``[t, m]``: the log of the power in each band of each Hann window, about −2 (silence) to 1."""
    window = torch.hann_window(config.window, device=waveform.device)
    spectrum = torch.stft(
        waveform, config.window, config.hop, window=window, center=False, return_complex=True
    )
    power = spectrum.abs().square().T @ filters
    return power.clamp(min=_FLOOR).log() / 6


def mel_filters(config: AudioConfig) -> torch.Tensor:
    """``[window/2 + 1, m]``: triangles evenly spaced in mel = 2595·log10(1 + Hz/700) (HTK)."""
    top = 2595 * torch.log10(torch.tensor(1 + config.sampling_rate / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, 1, config.mel_bins + 2) * top / 2595) - 1)
    frequency = torch.linspace(0, config.sampling_rate / 2, config.window // 2 + 1)[:, None]
    rise = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return rise.minimum(fall).clamp(min=0)
