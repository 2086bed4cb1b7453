# SPDX-License-Identifier: Apache-2.0
"""A system in small: the same parts, blocks and kinds in the same order, with widths a test can afford."""

from dataclasses import fields, replace
from typing import Any

from mmkernels.models.config import Block, DecoderConfig, MMConfig
from mmkernels.models.tokenizer import VOCAB_SIZE

WIDTH, DECODER_WIDTH, LAYERS, HEADS = 16, 32, 2, 2
# A field of any part that is a size, and its value in small. What a block is (frequency, order, pad) stays.
SIZES = {
    "patch_size": 4, "stride": 4, "window": 64, "hop": 32, "mel_bins": 16, "hidden_size": WIDTH, "num_layers": LAYERS,
    "num_heads": HEADS, "head_dim": 8, "intermediate_size": 32, "num_query_tokens": 4, "num_latents": 4,
    "num_queries": 4, "frames": 4, "num_encoder_layers": 1, "num_decoder_layers": 1, "condition_size": WIDTH,
    "num_condition_tokens": 5,
}  # fmt: skip
GRID = 4  # patches a side; an odd side stays odd


def tiny(config: MMConfig) -> MMConfig:
    """``config`` in small."""
    E = config.decoder.hidden_size
    out = config.output_projector
    return replace(
        config,
        encoders={m: e if isinstance(e, str) else _encoder(e) for m, e in config.encoders.items()},
        projectors={
            m: b if isinstance(b, str) else tuple(_block(block, E) for block in b)
            for m, b in config.projectors.items()
        },
        decoder=_decoder(config.decoder),
        output_projector=out and _small(out),
    )


def _small(part: Any) -> Any:
    return replace(part, **{f.name: SIZES[f.name] for f in fields(part) if f.name in SIZES})


def _encoder(part: Any) -> Any:
    small = _small(part)
    if hasattr(part, "image_size"):
        side = GRID + part.image_size // part.patch_size % 2
        return replace(small, image_size=side * small.patch_size)
    overlap = part.stride < part.patch_size
    return replace(small, stride=small.patch_size - overlap)


def _block(block: Block, decoder_width: int) -> Block:
    small = _small(block)
    if hasattr(small, "width"):
        small = replace(small, width=DECODER_WIDTH if block.width == decoder_width else WIDTH)  # type: ignore[union-attr]
    if hasattr(small, "num_key_value_heads"):
        same = block.num_key_value_heads == block.num_heads  # type: ignore[union-attr]
        small = replace(small, num_key_value_heads=HEADS if same else 1)
    found: Block = small
    return found


def _decoder(part: DecoderConfig) -> DecoderConfig:
    layers = (LAYERS - 1,) if 0 not in part.gated_layers else (0,)
    return replace(
        part, vocab_size=VOCAB_SIZE, hidden_size=DECODER_WIDTH, intermediate_size=2 * DECODER_WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4 if part.num_key_value_heads == part.num_attention_heads else 2,
        max_position_embeddings=256, gated_layers=layers if part.gated_layers else (),
        gated_num_heads=part.gated_num_heads and HEADS, gated_head_dim=part.gated_head_dim and 8,
        gated_feature_size=part.gated_feature_size and WIDTH, lora_rank=part.lora_rank and 2,
    )  # fmt: skip
