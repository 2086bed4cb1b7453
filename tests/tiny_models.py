# SPDX-License-Identifier: Apache-2.0
"""Configurations of the reference MM-LLM that a test can afford."""

from mmkernels.models import DecoderConfig, MMConfig, VisionConfig
from mmkernels.models.config import LinearConfig, PlaceConfig, QFormerConfig


def tiny_config(width: int, *, queries: int, qformer_layers: int, decoder_layers: int) -> MMConfig:
    """The demo's image model, of one width throughout."""
    projector = QFormerConfig(
        num_query_tokens=queries, hidden_size=width, num_layers=qformer_layers,
        intermediate_size=width * 3 // 2, ordered_side=8,
    )  # fmt: skip
    return MMConfig(
        encoders={
            "image": VisionConfig(hidden_size=width, num_layers=1, intermediate_size=width * 3 // 2)
        },
        projectors={"image": (PlaceConfig(8), projector, LinearConfig(width))},
        decoder=DecoderConfig(
            hidden_size=width, intermediate_size=width * 3 // 2, num_hidden_layers=decoder_layers
        ),
    )
