# SPDX-License-Identifier: Apache-2.0
"""Sizes of the reference MM-LLM as dataclasses, JSON in and out."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """ViT encoder; pixels are uint8, sides in pixels."""

    image_size: int = 112
    patch_size: int = 14
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    intermediate_size: int = 512


@dataclass(frozen=True)
class ProjectorConfig:
    """Q-Former between the encoder's width and the decoder's."""

    num_query_tokens: int = 8
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 8
    intermediate_size: int = 256
    cross_attention_frequency: int = 1


@dataclass(frozen=True)
class DecoderConfig:
    """Llama-style decoder; names are transformers'."""

    vocab_size: int = 260
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class MMConfig:
    """The three parts of the model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def to_json(self) -> str:
        """Indented JSON, every field written out."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "MMConfig":
        """Reads what ``to_json`` wrote. ValueError names a part or field that does not belong."""
        parts = {"vision": VisionConfig, "projector": ProjectorConfig, "decoder": DecoderConfig}
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != set(parts):
            raise ValueError(f"config: expected an object with {sorted(parts)}")
        return cls(**{name: _read(part, values[name], name) for name, part in parts.items()})


def _read(part: type[Any], values: Any, name: str) -> Any:
    fields = {f.name: f.type for f in dataclasses.fields(part)}
    if not isinstance(values, dict) or set(values) != set(fields):
        wrong = sorted(set(values) ^ set(fields)) if isinstance(values, dict) else values
        raise ValueError(f"config: {name} has missing or unknown fields: {wrong}")
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (fields[key] is int and not isinstance(value, int)) or value <= 0:
            raise ValueError(f"config: {name}.{key} must be a positive number, got {value!r}")
    return part(**values)
