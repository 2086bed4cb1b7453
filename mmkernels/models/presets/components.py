# SPDX-License-Identifier: Apache-2.0
"""Encoders, projectors and decoders that several systems share, at their published sizes."""

from dataclasses import replace

from mmkernels.models.config import (
    AudioConfig,
    DecoderConfig,
    OutputProjectorConfig,
    QFormerConfig,
    VisionConfig,
)  # fmt: skip
from mmkernels.models.presets.schema import NOT_PUBLISHED, READ, RECALLED, Part

PRE_NORM = "stand-in: a pre-norm ViT with learned positions, of the published sizes"
LLAMA_LIKE = "stand-in: a Llama-style decoder of the published sizes"


def vit(
    image_size: int, patch_size: int, width: int, layers: int, heads: int, inner: int, cls: bool = True
) -> VisionConfig:  # fmt: skip
    """Without the offset biases of our own small encoder."""
    return VisionConfig(
        image_size=image_size, patch_size=patch_size, hidden_size=width, num_layers=layers, num_heads=heads,
        intermediate_size=inner, class_token=cls, offset_bias=False,
    )  # fmt: skip


def llama(
    width: int, inner: int, layers: int, heads: int, vocabulary: int, positions: int, kv_heads: int = 0
) -> DecoderConfig:  # fmt: skip
    """Multi-head attention unless ``kv_heads`` says otherwise."""
    return DecoderConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads or heads, max_position_embeddings=positions,
    )  # fmt: skip


EVA_G = Part(
    vit(224, 14, 1408, 39, 16, 6144), "EVA-CLIP ViT-g/14, 224 px, 257 tokens, last layer removed",
    "transformers blip_2/configuration_blip_2.py, Blip2VisionConfig", READ, PRE_NORM,
    "1.0 B with the last layer (EVA, Fang et al. 2022; recalled)",
)  # fmt: skip
EVA_G_448 = replace(
    EVA_G, config=replace(EVA_G.config, image_size=448), published="EVA-CLIP ViT-g/14, 448 px, 1024 patches",
    source="MiniGPT-4 minigpt4/models/minigpt_v2.py:63-90",
)  # fmt: skip
EVA_E = Part(
    vit(490, 14, 1792, 63, 16, 15360), "EVA2-CLIP-E/14, width 1792", 
    "CogVLM utils/models/cogvlm_model.py:75; depth, heads, MLP and 490 px recalled", RECALLED, PRE_NORM,
    "4.4 B (CogVLM, Wang et al. 2023; recalled)",
)  # fmt: skip
CLIP_L = Part(
    vit(224, 14, 1024, 24, 16, 4096), "CLIP ViT-L/14, 224 px, 256 patches and a class token",
    "CLIP, Radford et al. 2021", RECALLED, PRE_NORM,
)  # fmt: skip
CLIP_L_336 = Part(
    vit(336, 14, 1024, 24, 16, 4096), "CLIP ViT-L/14, 336 px, features of layer -2, 576 patches",
    "transformers llava/configuration_llava.py; LLaVA scripts/v1_5/pretrain.sh", READ,
    f"{PRE_NORM}; features of the last layer",
)  # fmt: skip
CLIP_BIG_G_448 = Part(
    vit(448, 14, 1664, 48, 16, 8192), "OpenCLIP ViT-bigG/14, 448 px", "Qwen-VL, Bai et al. 2023", RECALLED,
    PRE_NORM, "1.9 B (Qwen-VL, Bai et al. 2023, table 1; recalled)",
)  # fmt: skip
SIGLIP_448 = Part(
    vit(448, 14, 1152, 27, 16, 4304, cls=False), "SigLIP so400m/14, 448 px, features of layer -2",
    "VILA scripts/NVILA-Lite/align.sh; width, depth, heads and MLP recalled", RECALLED,
    f"{PRE_NORM}; features of the last layer", "400 M (its name)",
)  # fmt: skip
SIGLIP_980 = Part(
    vit(980, 14, 1152, 27, 16, 4304, cls=False), "SigLIP so400m/14, positions of 70 x 70 patches",
    "MiniCPM-V, Yao et al. 2024", RECALLED, PRE_NORM, "400 M (its name)",
)  # fmt: skip
INTERNVIT = Part(
    vit(448, 14, 1024, 24, 16, 4096), "InternViT-300M, 448 px, 1024 patches",
    "InternVL internvl_chat/shell/internvl2.5/stage1/internvl2_5_8b_internlm2_5_7b_dynamic_res_stage1.sh;"
    " width in modeling_internvl_chat.py; depth, heads and MLP recalled", RECALLED, PRE_NORM, "300 M (its name)",
)  # fmt: skip
VIT_22B = Part(
    vit(224, 14, 6144, 48, 48, 24576, cls=False), "ViT-22B", "PaLI-X, Chen et al. 2023", RECALLED,
    f"{PRE_NORM}; attention and MLP one behind the other, not side by side", "22 B (its name)",
)  # fmt: skip
NFNET_F6 = Part(
    vit(320, 32, 1536, 24, 16, 6144, cls=False), "NFNet-F6, a convolutional network, width 1536, 320 px",
    "Flamingo, Alayrac et al. 2022", RECALLED,
    "stand-in: a ViT of that width with a patch of 32; depth and MLP are ours",
    "435 M (Flamingo, table 5; recalled)",
)  # fmt: skip
IMAGEBIND = Part(
    vit(224, 14, 1280, 32, 16, 5120), "ImageBind-H, clips of two frames under Conv3d(2, 14, 14), width 1280, 32 layers",
    "PandaGPT imagebind_model.py:496-521; heads and MLP recalled", RECALLED, f"{PRE_NORM}; frames one by one",
)  # fmt: skip
IMAGEBIND_AUDIO = Part(
    AudioConfig(
        sampling_rate=16000, hop=160, window=400, mel_bins=128, patch_size=16, stride=10, hidden_size=768,
        num_layers=12, num_heads=12, intermediate_size=3072,
    ),
    "ImageBind-H audio, Conv2d 16 stride 10, 128 mel bins",
    "PandaGPT imagebind_model.py:496-521; width, depth and heads recalled", RECALLED,
    "stand-in: pre-norm, sine positions, no class token",
)  # fmt: skip
BEATS = Part(
    replace(IMAGEBIND_AUDIO.config, stride=16), "BEATs, width 768",
    "X-InstructBLIP blip2_vicuna_xinstruct.py:178-181; all but the width recalled", RECALLED,
    "stand-in: pre-norm, sine positions", "90 M (BEATs, Chen et al. 2022; recalled)",
)  # fmt: skip
WHISPER = Part(
    AudioConfig(
        sampling_rate=16000, hop=160, window=400, mel_bins=128, patch_size=16, stride=16, hidden_size=1280,
        num_layers=32, num_heads=20, intermediate_size=5120,
    ),
    "Whisper-like: width 1280, 20 heads; Conv1d k3 s1, k3 s2, and at the end AvgPool1d(2)",
    "transformers qwen2_audio/modeling_qwen2_audio.py:316,325; depth and MLP recalled", RECALLED,
    "stand-in: patches of 16 bins x 16 frames for convolutions and pooling, sine positions",
)  # fmt: skip

QFORMER = QFormerConfig(
    num_query_tokens=32, hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072,
    cross_attention_frequency=2,
)  # fmt: skip
QFORMER_SOURCE = "transformers blip_2/modeling_blip_2.py:535,678"
SMALL_QFORMER = replace(QFORMER, num_layers=2, cross_attention_frequency=1)

VICUNA_7B = Part(
    llama(4096, 11008, 32, 32, 32000, 2048), "Vicuna-7B (LLaMA-7B)", "LLaMA, Touvron et al. 2023", RECALLED,
    parameters="6.7 B (LLaMA, table 2; recalled)",
)  # fmt: skip
VICUNA_13B = Part(
    llama(5120, 13824, 40, 40, 32000, 2048), "Vicuna-13B (LLaMA-13B)", "LLaMA, Touvron et al. 2023", RECALLED,
    parameters="13.0 B (LLaMA, table 2; recalled)",
)  # fmt: skip
LLAMA_7B = replace(VICUNA_7B, published="LLaMA-7B")
LLAMA2_7B = replace(
    VICUNA_7B, config=llama(4096, 11008, 32, 32, 32000, 4096), published="LLaMA-2-7B",
    source="Llama 2, Touvron et al. 2023", parameters="7 B (its name)",
)  # fmt: skip
LLAMA2_70B = Part(
    llama(8192, 28672, 80, 64, 32000, 4096, 8), "LLaMA-2-70B", "Llama 2, Touvron et al. 2023", RECALLED,
    parameters="70 B (its name)",
)  # fmt: skip
OPT_2_7B = Part(
    llama(2560, 10240, 32, 32, 50272, 2048), "OPT-2.7B", "OPT, Zhang et al. 2022", RECALLED,
    f"{LLAMA_LIKE}; its MLP has a third matrix", "2.7 B (its name)",
)  # fmt: skip
OPT_6_7B = Part(
    llama(4096, 16384, 32, 32, 50272, 2048), "OPT-6.7B", "OPT, Zhang et al. 2022", RECALLED,
    f"{LLAMA_LIKE}; its MLP has a third matrix", "6.7 B (its name)",
)  # fmt: skip
QWEN_7B = Part(
    replace(llama(4096, 11008, 32, 32, 151936, 8192), attention_bias=True), "Qwen-7B, width 4096",
    "Qwen, Bai et al. 2023", RECALLED, parameters="7.7 B (Qwen-VL, Bai et al. 2023, table 1; recalled)",
)  # fmt: skip
QWEN2_7B = Part(
    replace(
        llama(3584, 18944, 28, 28, 152064, 32768, 4), attention_bias=True, rope_theta=1e6, rms_norm_eps=1e-6
    ),
    "Qwen2-7B", "Qwen2, Yang et al. 2024", RECALLED, parameters="7 B (its name)",
)  # fmt: skip
INTERNLM2_7B = Part(
    replace(llama(4096, 14336, 32, 32, 92544, 32768, 8), rope_theta=1e6), "InternLM2.5-7B-chat",
    INTERNVIT.source + "; sizes recalled", RECALLED, parameters="7 B (its name)",
)  # fmt: skip
CHATGLM_6B = Part(
    llama(4096, 16384, 28, 32, 130528, 2048), "ChatGLM-6B", "ChatGLM-6B, Zeng et al. 2022", RECALLED,
    f"{LLAMA_LIKE}; prefix attention and GELU are not built, its MLP has a third matrix",
    "6.2 B (its model card; recalled)",
)  # fmt: skip
UL2_32B = Part(
    llama(4096, 16384, 50, 32, 250112, 2048), "UL2, an encoder-decoder", NOT_PUBLISHED, RECALLED,
    "stand-in: a decoder whose sizes are ours", "32 B (PaLI-X, Chen et al. 2023; recalled)",
)  # fmt: skip

MAPPER = OutputProjectorConfig()  # GILLMapper's sizes are the class's own
