# SPDX-License-Identifier: Apache-2.0
"""The whole reference MM-LLM on one page: images, videos, sound and text in, text and pictures out.

```
media ── encode: patch_embed, ViT ──▶ features [n, X] ── project: Q-Former, MLP, … ──▶ features [q, E] ┐
ids, one placeholder a medium ── plan_pack ──▶ rows ── pack_embeddings ────────────────────────────────┴▶ [T, E]
  ── decoder: mrope and attention within samples, or rope_write_kv and paged_attention ──▶ hidden states [T, E]
  ── logits [·, V] ──▶ text; states of [IMG0…r] ── output projector ──▶ condition [m, C] ── generator ──▶ picture
```

Samples lie behind one another: there is no padding.
Dimensions: T rows in all, E decoder width, X encoder width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import mmkernels
from mmkernels.models.attention import Packed
from mmkernels.models.audio import AudioEncoder
from mmkernels.models.config import AudioConfig, MMConfig, TransformersVisionConfig, VisionConfig
from mmkernels.models.decoder import Attend, Decoder
from mmkernels.models.features import Features
from mmkernels.models.gated import Media, last_medium
from mmkernels.models.generator import ImageGenerator
from mmkernels.models.output_projector import OutputProjector
from mmkernels.models.projector import Projector
from mmkernels.models.tokenizer import ByteTokenizer, FolderTokenizer
from mmkernels.models.transformers_vision import TransformersVision
from mmkernels.models.vision import VisionEncoder

AnyEncoder = VisionEncoder | AudioEncoder | TransformersVision
ENCODERS: dict[type[Any], Any] = {
    VisionConfig: VisionEncoder, AudioConfig: AudioEncoder, TransformersVisionConfig: TransformersVision,
}  # fmt: skip


class MMLLM(nn.Module):
    """An encoder and a projector for each modality, a language model, and what draws, if the configuration has it.

    Source: the layout of BLIP-2 (Li et al. 2023) and its training stages; of NExT-GPT (Wu et al. 2023) and GILL (Koh et
    al. 2023) for drawing.
    """

    def __init__(self, config: MMConfig | None = None) -> None:
        super().__init__()
        self.config = config or MMConfig()
        folder = self.config.tokenizer
        self.tokenizer = FolderTokenizer(folder) if folder else ByteTokenizer()
        self.encoders, self.projectors = nn.ModuleDict(), nn.ModuleDict()
        for modality, encoder in self.config.encoders.items():
            if not isinstance(encoder, str):
                self.encoders[modality] = ENCODERS[type(encoder)](encoder)
        for modality, blocks in self.config.projectors.items():
            if not isinstance(blocks, str):
                self.projectors[modality] = Projector(blocks, self.encoder(modality).width)
        self.language_model = Decoder(self.config.decoder)
        out, gen = self.config.output_projector, self.config.generator
        E = self.config.decoder.hidden_size
        self.output_projector = OutputProjector(out, E) if out else None
        self.generator = ImageGenerator(gen) if gen else None
        _check_widths(self)

    def encoder(self, modality: str) -> AnyEncoder:
        """The encoder of a modality, which may be another's."""
        shared = self.config.encoders.get(modality)
        name = shared if isinstance(shared, str) else modality
        if name not in self.encoders:
            got = repr(shared) if shared else "none"
            raise ValueError(f"encoders: {modality} must have one or name another's, got {got}")
        found = self.encoders[name]
        assert isinstance(found, AnyEncoder)
        return found

    def picture_side(self, modality: str = "image") -> int:
        """Side of a picture that every position of the encoder's table fits, in pixels.

        Raises:
            ValueError: The modality has no encoder, or one that takes no pictures.
        """
        encoder = self.encoder(modality)
        if isinstance(encoder, TransformersVision):
            return int(encoder.model.config.image_size)
        if isinstance(encoder, VisionEncoder):
            return encoder.config.image_size
        raise ValueError(f"{modality}: its encoder takes no pictures: {type(encoder).__name__}")

    @property
    def sampling_rate(self) -> int | None:
        """Of the waveforms the audio encoder takes; None: there is none."""
        if "audio" not in self.config.projectors:
            return None
        encoder = self.encoder("audio")
        assert isinstance(encoder, AudioEncoder)
        return encoder.config.sampling_rate

    def encode(self, modality: str, items: Sequence[torch.Tensor]) -> Features:
        """uint8 images and clips or waveforms → features ``[n, X]``; constant while the encoder is frozen."""
        features: Features = self.encoder(modality)(items)
        return features

    def project(self, modality: str, features: Features) -> Features:
        """``[n, X]`` → ``[q, E]``."""
        shared = self.config.projectors[modality]
        projected: Features = self.projectors[shared if isinstance(shared, str) else modality](
            features
        )
        return projected

    def plan(
        self,
        input_ids: Sequence[torch.Tensor],
        features: dict[str, Features],
        labels: Sequence[torch.Tensor] | None = None,
    ) -> mmkernels.PackPlan:
        """Where every row of a batch comes from; ``input_ids`` have one placeholder for each medium, ``features`` their
        projected features in the order of the placeholders.

        Raises:
            ValueError: Placeholders and media do not match in number.
        """
        _check_media(self.tokenizer.modalities, input_ids, features)
        if self.config.decoder.gated_layers:  # features lie beside: a placeholder is a word
            return mmkernels.plan_pack(input_ids, labels=labels)
        return mmkernels.plan_pack(
            input_ids, labels=labels, feature_token_ids=[self.tokenizer.modalities[m] for m in features],
            feature_counts=[f.counts for f in features.values()],
        )  # fmt: skip

    def forward(
        self,
        plan: mmkernels.PackPlan,
        features: dict[str, Features],
        attend: Attend | None = None,
    ) -> torch.Tensor:
        """Hidden states ``[T, E]`` of a plan's rows; ``logits`` follows where they are needed."""
        weight, gated = (
            self.language_model.model.embed_tokens.weight,
            self.config.decoder.gated_layers,
        )
        inside = [] if gated else [f.tokens for f in features.values()]
        embeds = mmkernels.pack_embeddings(plan, weight, inside)
        attend = attend or Packed(plan.cu_seqlens, plan.max_seqlen)
        hidden_states: torch.Tensor = self.language_model(
            embeds, self.positions(plan, features), attend, self.beside(plan, features)
        )
        return hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[..., E]`` → ``[..., V]``."""
        return self.language_model.logits(hidden_states)

    def signal_states(self, plan: mmkernels.PackPlan, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the output projector reads, ``[n, r, E]``: states and embeddings of each run of signal tokens."""
        signals = self.tokenizer.signals
        at = torch.isin(plan.input_ids, torch.tensor(signals, dtype=torch.int64))
        embeds = self.language_model.model.embed_tokens.weight[plan.input_ids[at]]
        return (hidden_states[at] + embeds).unflatten(0, (-1, len(signals)))

    def positions(self, plan: mmkernels.PackPlan, features: dict[str, Features]) -> torch.Tensor:
        """``[T]``, or ``[3, T]`` with M-RoPE: time, height and width of features that lie on a grid."""
        if not self.config.decoder.mrope_section:
            return plan.position_ids
        grids = {
            m: torch.tensor(features[m].grids, dtype=torch.int64).view(-1, 3)
            if m in features
            else None
            for m in ("image", "video")
        }
        position_ids, _ = mmkernels.mrope_positions(
            plan.input_ids[None], self._media_types(plan.input_ids), family="qwen2_vl", cu_seqlens=plan.cu_seqlens,
            image_grid_thw=grids["image"], video_grid_thw=grids["video"], spatial_merge_size=1,
            image_token_id=self.tokenizer.modalities["image"],
            video_token_id=self.tokenizer.modalities["video"],
        )  # fmt: skip
        return position_ids[-3:, 0]

    def _media_types(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``[1, T]``: 1 image, 2 video, 0 anything else."""
        image, video = (input_ids == self.tokenizer.modalities[m] for m in ("image", "video"))
        return (image.long() + 2 * video.long())[None]

    def beside(self, plan: mmkernels.PackPlan, features: dict[str, Features]) -> Media | None:
        """What gated layers read: a token sees the last medium before it."""
        if not self.config.decoder.gated_layers:
            return None
        brought = {m: f for m, f in features.items() if f.grids}
        if len(brought) > 1:
            raise ValueError(f"gated layers read one modality, got {sorted(brought)}")
        tokens = self._read(brought, features)
        if not brought:  # the layers' feed-forward parts still run, as for a sample beside others that have media
            return Media(tokens, tokens.new_empty(len(plan.input_ids), 0, dtype=torch.bool))
        ((modality, found),) = brought.items()
        lengths, counts = (
            plan.cu_seqlens.diff().long(),
            torch.tensor(found.counts, dtype=torch.int64),
        )
        sample = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        begins = plan.input_ids == self.tokenizer.modalities[modality]
        so_far = begins.long().cumsum(0)
        before = (
            so_far - torch.cat((so_far.new_zeros(1), so_far))[plan.cu_seqlens[:-1].long()][sample]
        )
        of_medium = sample[begins], before[begins]
        rows = [torch.repeat_interleave(x, counts) for x in of_medium]
        return Media(tokens, last_medium(sample, before, *rows))

    def _read(self, brought: dict[str, Features], features: dict[str, Features]) -> torch.Tensor:
        """The tokens that were brought, and of the other modalities none: these learn nothing, but take part."""
        tokens = [f.tokens for f in (brought | features).values()]
        if not tokens:
            weight = self.language_model.model.embed_tokens.weight
            return weight.new_empty(0, self.config.decoder.feature_width)
        return torch.cat([x.to(tokens[0].dtype) for x in tokens]) if tokens[1:] else tokens[0]


def _check_media(
    known: dict[str, int], input_ids: Sequence[torch.Tensor], features: dict[str, Features]
) -> None:
    for modality, token in known.items():
        named = [int((ids == token).sum()) for ids in input_ids]
        given = len(features[modality].grids) if modality in features else 0
        if sum(named) != given:
            raise ValueError(f"{modality}: {given} given, but the prompts name {named}")


def _check_widths(model: MMLLM) -> None:
    for modality, shared in model.config.projectors.items():
        if isinstance(shared, str) and (
            shared not in model.projectors
            or model.encoder(shared).width != model.encoder(modality).width
        ):
            raise ValueError(
                f"config.projectors.{modality}: {shared!r} must have a projector for the same features"
            )
    for modality, projector in model.projectors.items():
        E = model.config.decoder.feature_width
        if projector.width != E:
            raise ValueError(
                f"config.projectors.{modality}: ends with width {projector.width}, the decoder has {E}"
            )
