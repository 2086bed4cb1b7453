# SPDX-License-Identifier: Apache-2.0
"""Rotary modules of transformers, by the configuration that makes them; all M-RoPE layouts and 1-D ones."""

import importlib
from dataclasses import dataclass
from typing import Any

from mmkernels import RopeTable, rope_table


@dataclass(frozen=True)
class Rotary:
    """A model's rotary module and its ``apply_rotary_pos_emb``."""

    model: str
    config: str
    module: str
    changes: tuple[tuple[str, Any], ...] = ()
    layer_type: str | None = None

    def made(self) -> tuple[Any, Any, int]:
        """The module, the function, d."""
        place = f"transformers.models.{self.model}"
        configuration = importlib.import_module(f"{place}.configuration_{self.model}")
        config = getattr(configuration, self.config)(**dict(self.changes))
        modeling = importlib.import_module(f"{place}.modeling_{self.model}")
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return getattr(modeling, self.module)(config), modeling.apply_rotary_pos_emb, d

    def table(self) -> RopeTable:
        module, _, d = self.made()
        return rope_table(module, d, layer_type=self.layer_type)


def rope(**more: Any) -> tuple[str, Any]:
    return "rope_parameters", {"rope_type": "default", "rope_theta": 1e4, **more}


def _row(model: str, prefix: str, kind: str = "Text", *changes: Any, **more: Any) -> Rotary:
    config = more.pop("config", f"{prefix}TextConfig")
    return Rotary(model, config, f"{prefix}{kind}RotaryEmbedding", changes, **more)


YARN = rope(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=4096, mrope_section=[16, 24, 24]
)
GLM = rope(partial_rotary_factor=0.5, mrope_section=[8, 12, 12])
COMPASS = {"full_attention": rope(mrope_section=[24, 20, 20])[1]}

FAMILIES = [
    _row("qwen2_vl", "Qwen2VL", ""),
    _row("qwen2_vl", "Qwen2VL", "", YARN, ("max_position_embeddings", 16384)),
    _row("qwen2_5_vl", "Qwen2_5_VL", ""),
    _row("qwen2_5_omni", "Qwen2_5Omni", ""),
    _row("paddleocr_vl", "PaddleOCR", "", config="PaddleOCRTextConfig"),
    _row("qwen3_vl", "Qwen3VL"),
    _row("qwen3_vl_moe", "Qwen3VLMoe"),
    _row("qwen3_omni_moe", "Qwen3OmniMoe", "ThinkerText", ("head_dim", 128)),
    _row("qwen3_5", "Qwen3_5"),
    _row("qwen4_exp", "Qwen4Exp"),
    _row("cosmos3_edge", "Cosmos3Edge"),
    _row("cohere_compass", "CohereCompass", "", ("rope_parameters", COMPASS), ("layer_types", ["full_attention"]),
         ("num_hidden_layers", 1), layer_type="full_attention"),
    _row("hy_v4_vl", "HYV4VL", ""),
    _row("glm4v", "Glm4v", "Text", GLM),
    _row("glm4v_moe", "Glm4vMoe", "Text", GLM, ("head_dim", 128)),
    _row("glm_ocr", "GlmOcr"),
    _row("glm_image", "GlmImage", "Text", GLM),
    _row("ernie4_5_vl_moe", "Ernie4_5_VLMoe"),
    _row("hunyuan_vl", "HunYuanVL", "", rope(mrope_section=[16, 16, 16, 16]), ("head_dim", 128)),
    _row("hunyuan_vl", "HunYuanVL", "", rope(mrope_section=[8, 12, 12]), ("head_dim", 64)),
    _row("llama", "Llama", "", config="LlamaConfig"),
    _row("qwen2", "Qwen2", "", config="Qwen2Config"),
    _row("qwen3", "Qwen3", "", config="Qwen3Config"),
    _row("gemma3", "Gemma3", "", layer_type="sliding_attention"),
    _row("gemma3", "Gemma3", "", layer_type="full_attention"),
    _row("glm4", "Glm4", "", config="Glm4Config"),
    _row("cohere", "Cohere", "", config="CohereConfig"),
    _row("ernie4_5", "Ernie4_5", "", config="Ernie4_5Config"),
]  # fmt: skip
