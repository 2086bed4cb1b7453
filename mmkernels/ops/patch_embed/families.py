# SPDX-License-Identifier: Apache-2.0
"""Shapes of real models. ``hf-default``: what the class of transformers 5.23 builds from its default
configuration; ``checkpoint``: what a released checkpoint has (they differ more often than not).

Sources: ``shared/field/model-zoo.md`` section B; checkpoints from their model cards.
"""

from collections.abc import Callable

from mmkernels.testing.case import Case

_QWEN = {"Pt": 2, "m": 2, "bias": False}
_QWEN3 = {"Pt": 2, "m": 2, "P": 16, "table": (48, 48), "corners": True}


def FAMILY_CASES(case: Callable[..., Case]) -> list[Case]:
    """One row a family and list; ``bench`` rows are timed."""
    default, real = "family hf-default", "family checkpoint"
    return [
        case("clip_l14_336", f"{real} bench", B=4, H=336, W=336, P=14, D=1024, R=1, S=1, bias=False),
        case("siglip_so400m_384", f"{real} bench", B=4, H=378, W=378, P=14, D=1152, S=0),
        case("eva_g14_224", f"{real} bench", B=8, H=224, W=224, P=14, D=1408, R=1, S=1),
        case("vit_b16_224", f"{real} bench", B=16, H=224, W=224, P=16, D=768, R=1, S=1),
        case("qwen2_vl_still", f"{real} bench", **_QWEN, P=14, D=1280, grids=((0, 36, 52), (0, 24, 24))),
        case("qwen2_vl_video", f"{real} bench", **_QWEN, P=14, D=1280, grids=((4, 20, 28),)),
        case("qwen2_vl_rows", f"{real} bench", **_QWEN, P=14, D=1280, rows=True, grids=((1, 36, 52), (1, 24, 24)), u8=False, norm=False),
        case("qwen3_vl_still", f"{real} bench", **_QWEN3, D=1152, grids=((0, 32, 48), (0, 20, 26))),
        case("siglip2_naflex", f"{real} bench", P=16, D=768, order="ppc", grids=((0, 14, 18), (0, 20, 12), (0, 9, 28)), table=(16, 16), antialias=True),
        case("ast_audio", f"{real} bench", B=2, C=1, H=128, W=1024, P=16, stride=(10, 10), D=768, R=2, S=2, u8=False, norm=False, edge="crop"),
        case("videomae_b", f"{real} bench", B=1, T=16, H=224, W=224, P=16, Pt=2, D=768, S=0),
        case("gemma4", f"{real} bench", P=16, D=768, order="ppc", bias=False, grids=((0, 42, 60),), table=(64, 64), mode="factorised"),
        case("clip_b32_224", default, B=1, H=224, W=224, P=32, D=768, R=1, S=1, bias=False),
        case("siglip_b16_224", default, B=1, H=224, W=224, P=16, D=768, S=0),
        case("blip2_g14_224", default, B=1, H=224, W=224, P=14, D=1408, R=1, S=1),
        case("idefics2_p32", default, P=32, D=768, grids=((0, 7, 7), (0, 5, 7)), table=(7, 7), mode="nearest"),
        case("idefics3_364", real, P=14, D=1152, grids=((0, 26, 26), (0, 26, 13)), table=(26, 26), mode="nearest"),
        case("smolvlm_512", real, P=16, D=768, grids=((0, 32, 32),), table=(32, 32), mode="nearest"),
        case("mllama_560", real, B=1, H=560, W=560, P=14, D=1280, bias=False),
        case("internvl_448", real, B=1, H=448, W=448, P=14, D=1024, R=1, S=1),
        case("pixtral_p16", real, P=16, D=1024, bias=False, grids=((0, 24, 33), (0, 16, 16))),
        case("llama4_336", real, B=1, H=336, W=336, P=14, D=1408, R=1, S=1, last=True, order="cpp", bias=False),
        case("dinov2_l14_518", real, B=1, H=518, W=518, P=14, D=1024, R=5, S=1),
        case("dinov3_b16_224", default, B=1, H=224, W=224, P=16, D=384, R=5),
        case("deit_b16_224", default, B=1, H=224, W=224, P=16, D=768, R=2, S=2),
        case("qwen2_5_vl", real, **_QWEN, P=14, D=1280, grids=((0, 26, 18),)),
        case("qwen2_5_vl_video", default, **_QWEN, P=14, D=3584, grids=((2, 8, 8),)),
        case("qwen3_vl", default, **_QWEN3, D=1152, grids=((0, 16, 16),)),
        case("qwen3_vl_video", real, **_QWEN3, D=1024, grids=((2, 16, 20), (1, 12, 16))),
        case("qwen3_omni", default, **_QWEN3, D=1152, rows=True, u8=False, norm=False, grids=((1, 14, 18),)),
        case("glm4v", default, P=14, Pt=2, m=2, D=1536, rows=True, u8=False, norm=False, grids=((1, 18, 24),), table=(24, 24), mode="bicubic"),
        case("kimi_k25", default, P=14, D=1152, grids=((0, 18, 24),), table=(64, 64), mode="bicubic"),
        case("minimax_m3", default, P=14, Pt=2, D=1280, bias=False, grids=((0, 18, 24),)),
        case("ernie4_5_vl", default, P=14, D=1280, order="cpp", bias=False, rows=True, u8=False, norm=False, grids=((1, 18, 24),)),
        case("paddleocr_vl", default, P=14, D=1152, grids=((0, 20, 14),), table=(27, 27)),
        case("minicpmv4_6", default, P=14, D=1152, grids=((0, 30, 22),), table=(70, 70), mode="nearest"),
        case("phi4_multimodal_448", real, B=1, H=448, W=448, P=14, D=1152, S=0),
        case("aria_490", real, P=14, D=1152, grids=((0, 35, 35),), table=(70, 70), mode="nearest"),
        case("kosmos2_5", default, P=16, D=1536, order="ppc", rows=True, u8=False, norm=False, grids=((1, 20, 26),), table=(64, 64), mode="factorised"),
        case("pix2struct", default, P=16, D=768, order="ppc", rows=True, u8=False, norm=False, grids=((1, 20, 26),), table=(64, 64), mode="factorised"),
        case("fuyu_p30", default, P=30, D=4096, order="ppc", grids=((0, 6, 8),)),
        case("inkling2", default, P=20, D=1024, order="ppc", grids=((0, 10, 12),), table=(16, 16)),
        case("molmo2_378", real, P=14, D=1152, order="ppc", rows=True, B=1, H=27, W=27, S=0, u8=False, norm=False),
        case("radio_p16", default, P=16, D=1280, order="cpp", R=10, grids=((0, 20, 20),), table=(32, 32), bias=False),
        case("vivit_b16x2", default, B=1, T=4, H=224, W=224, P=16, Pt=2, D=768, R=1, S=1),
        case("got_ocr2_1024", default, B=1, H=512, W=512, P=16, D=768, S=0),
        case("nanovlm_512", real, B=1, H=512, W=512, P=16, D=768, S=0),
        case("imagebind_h14", real, B=1, T=2, H=224, W=224, P=14, Pt=2, D=1280, R=1, S=1, bias=False),
    ]  # fmt: skip
