# SPDX-License-Identifier: Apache-2.0
"""Which models of transformers keep the samples of a packed batch apart.

A model does if attention alone mixes tokens and its masks come from ``position_ids`` or ``cu_seq_lens``. Nothing in a
config says so, and a model that does not gives other numbers without a word. So these are names of classes that were
compared, packed with alone, in fp64: ``tests/test_packable.py`` builds every one of them.
"""

from typing import Any

# By model_type: the whole model's own, whatever its decoder.
FAMILIES = frozenset((
    "aria", "aya_vision", "cohere2_vision", "cosmos3_omni", "deepseek_vl", "deepseek_vl_hybrid", "emu3", "exaone4_5",
    "fuyu", "gemma3", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "got_ocr2", "granite_docling",
    "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus", "lighton_ocr", "llava", "llava_next",
    "llava_next_video", "llava_onevision", "mistral3", "ovis2", "paddleocr_vl", "phi4_multimodal", "qianfan_ocr",
    "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
    "step3p7", "video_llama_3", "video_llava", "vipllava",
))  # fmt: skip
# By model_type of the decoder: alone, or in one of the above.
DECODERS = frozenset((
    "arcee", "aria_text", "cohere", "cohere2", "emu3_text_model", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon",
    "gemma", "gemma3_text", "glm", "glm4", "glm4_moe", "glm4v_moe_text", "glm4v_text", "glm_ocr_text", "gpt2",
    "gpt_neox", "granite", "granite_docling_text", "granitemoe", "hyperclovax", "llama", "mistral", "mixtral", "olmo",
    "olmo2", "olmo3", "paddleocr_vl_text", "persimmon", "phi", "phi3", "phi4_multimodal", "qwen2", "qwen2_5_omni_text",
    "qwen2_5_vl_text", "qwen2_moe", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
    "qwen3_vl_text", "seed_oss", "smollm3", "starcoder2", "step3p5",
))  # fmt: skip
LAYERS = {"full_attention", "sliding_attention"}
ATTENTION = ("sdpa", "eager")
NO_FLASH = {"gemma3": "its images attend in both directions, which cu_seq_lens cannot say"}
REASONS = {
    "blip-2": "its forward makes a mask of ones, and then transformers looks for no samples",
    "instructblip": "its forward makes a mask of ones, and then transformers looks for no samples",
    "instructblipvideo": "its forward makes a mask of ones, and then transformers looks for no samples",
    "paligemma": "its prefix attends in both directions, by a mask of its own",
    "mllama": "its cross-attention has a mask for the tokens of one sample",
    "idefics": "its cross-attention has a mask for the tokens of one sample",
    "hunyuan_vl": "its decoder takes 4 rows of positions, and none is left to tell samples apart",
    "opt": "it counts positions by its mask",
    "bloom": "it counts positions by its mask",
    "gpt_oss": "its sinks add to every row of a packed mask",
    "llama4": "its chunks are counted from the start of the packed row",
    "llama4_text": "its chunks are counted from the start of the packed row",
}


def decoder_of(config: Any) -> Any:
    """The config of what is trained: an Omni model's thinker, else the model's own."""
    return getattr(config, "thinker_config", None) or config


def why_not_packed(config: Any) -> str:
    """Why a packed batch may mix samples in a model of this config; empty: it was compared and does not."""
    if config is None:
        return ""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = list(dict.fromkeys(getattr(c, "model_type", "") for c in (config, text)))
    name = " with ".join(kinds)
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} cannot be packed: it is an encoder and decoder"
    for kind in kinds:
        if kind in REASONS:
            return f"{name} cannot be packed: {REASONS[kind]}"
    if others := sorted({*(getattr(text, "layer_types", None) or ())} - LAYERS):
        return f"{name} cannot be packed: its layers of {others} go on over the ends of samples"
    if kinds[0] not in FAMILIES | DECODERS or kinds[-1] not in DECODERS:
        return (
            f"{name} is not among the models that were compared packed with alone "
            "(docs/support.md): mmkernels.train.packable says which"
        )
    attention = getattr(text, "_attn_implementation", None) or "sdpa"
    if "flash" in attention:
        why = NO_FLASH.get(kinds[0], "")
        return (
            f"{name} cannot be packed with attn_implementation={attention!r}: {why}" if why else ""
        )
    if attention not in ATTENTION:
        return (
            f"{name} with attn_implementation={attention!r} was not compared packed with alone: "
            f"set one of {', '.join(ATTENTION)}, flash_attention_2"
        )
    return ""
