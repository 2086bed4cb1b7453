# SPDX-License-Identifier: Apache-2.0
"""Systems whose input projector is a Q-Former, and that answer in text."""

from dataclasses import replace

from mmkernels.models.config import AudioConfig, FramePlaceConfig, LinearConfig, TransformerConfig
from mmkernels.models.presets import components as c
from mmkernels.models.presets.schema import PROJECTORS, READ, RECALLED, Part, Preset, Stage, no_such


def qformer(width: int, source: str = c.QFORMER_SOURCE, differs: str = "") -> Part:
    """BLIP-2's Q-Former and a linear layer to ``width``."""
    return Part(
        (c.QFORMER, LinearConfig(width)), f"Q-Former of 32 queries, Linear 768 -> {width}", source, READ, differs
    )  # fmt: skip


_BLIP2 = Stage((PROJECTORS,), "BLIP-2, Li et al. 2023, section 3.3")
BLIP2 = Preset(
    "BLIP-2",
    {"image": c.EVA_G},
    {
        "image": replace(
            qformer(2560), differs="the half that reads text in the first stage is not built",
            parameters="188 M with the half that reads text (BLIP-2, section 3.1; read in a copy of its text)",
        )
    },
    c.OPT_2_7B, _BLIP2, no_such(_BLIP2),
)  # fmt: skip

INSTRUCTBLIP = Preset(
    "InstructBLIP",
    {"image": c.EVA_G},
    {
        "image": qformer(
            4096, "transformers instructblip/modeling_instructblip.py:590",
            "stand-in: the Q-Former does not read the instruction (vocabulary 30522, feed-forward of its own)",
        )
    },
    c.VICUNA_7B, Stage((PROJECTORS,), "BLIP-2, Li et al. 2023"), Stage((PROJECTORS,), "InstructBLIP, Dai et al. 2023"),
)  # fmt: skip

_LAST = ("projectors.image.blocks.1.*",)
_MINIGPT4 = Stage(_LAST, "MiniGPT-4 minigpt4/models/minigpt4.py", READ)
MINIGPT4 = Preset(
    "MiniGPT-4", {"image": c.EVA_G}, {"image": qformer(4096, "MiniGPT-4 minigpt4.py, minigpt4_vicuna0.yaml")},
    c.VICUNA_7B, _MINIGPT4, _MINIGPT4,
)  # fmt: skip

_XLLM = Stage((PROJECTORS,), "X-LLM, Chen et al. 2023")
_CIF = AudioConfig(
    sampling_rate=16000, hop=160, window=400, mel_bins=80, patch_size=16, stride=16, hidden_size=512, num_layers=12,
    num_heads=8, intermediate_size=2048,
)  # fmt: skip
X_LLM = Preset(
    "X-LLM",
    {
        "image": c.EVA_G, "video": "image",
        "audio": Part(
            _CIF, "conformer with continuous integrate-and-fire, width 512",
            "X-LLM xllm/models/xllm_models/xllm.py:73-124", READ, "stand-in: an AST of that width whose depth is ours",
        ),
    },
    {
        "image": qformer(4096, "X-LLM xllm/models/xllm_models/xllm.py:73-124"),
        "video": qformer(
            4096, "X-LLM xllm/models/xllm_models/xllm.py:73-124",
            "a Q-Former of its own, where X-LLM has one with a second set of queries",
        ),
        "audio": Part(
            (LinearConfig(768), TransformerConfig(12, 12, 3072), LinearConfig(4096)), "Linear 512 -> 768, BERT, Linear",
            "X-LLM xllm/models/xllm_models/xllm.py:73-124; BERT's sizes recalled", RECALLED,
            "stand-in: pre-norm layers of BERT-base's sizes",
        ),
    },
    c.CHATGLM_6B, _XLLM, _XLLM,
)  # fmt: skip

_VIDEOCHAT = Stage(
    ("projectors.video.blocks.0.query_tokens", "projectors.video.blocks.1.*"), "VideoChat, Li et al. 2023", RECALLED,
    "and the GMHRA layers, which are not built; all 96 queries learn, not 64",
)  # fmt: skip
VIDEOCHAT = Preset(
    "VideoChat",
    {"image": replace(c.EVA_G, differs=f"{c.PRE_NORM}; the 8 GMHRA layers are not built"), "video": "image"},
    {
        "image": "video",
        "video": Part(
            (replace(c.QFORMER, num_query_tokens=96), LinearConfig(5120)),
            "Q-Former of 32 + 64 queries, Linear 768 -> 5120",
            "Ask-Anything video_chat/configs/config.json; videochat_it.py:45-200",
        ),
    },
    replace(c.VICUNA_13B, published="StableVicuna-13B"), _VIDEOCHAT, _VIDEOCHAT,
)  # fmt: skip

_VIDEO_LLAMA_LEARNS = (
    "projectors.video.blocks.1.*", "projectors.video.blocks.2.*", "projectors.video.blocks.3.*",
    "projectors.audio.blocks.1.*", "projectors.audio.blocks.2.*",
)  # fmt: skip
_BRANCHES = "the branches are trained one after the other, here in one step"
VIDEO_LLAMA = Preset(
    "Video-LLaMA",
    {"image": c.EVA_G, "video": "image", "audio": c.IMAGEBIND_AUDIO},
    {
        "image": "video",
        "video": Part(
            (replace(c.QFORMER, per="frame"), FramePlaceConfig(32), c.SMALL_QFORMER, LinearConfig(4096)),
            "Q-Former of 32 queries per frame, 32 frame positions, video Q-Former of 2 layers and 32 queries, Linear"
            " 768 -> 4096",
            "Video-LLaMA video_llama/models/video_llama.py:30-270",
        ),
        "audio": Part(
            (LinearConfig(1024, bias=False), replace(c.SMALL_QFORMER, num_query_tokens=8), LinearConfig(4096)),
            "ImageBind's head, audio Q-Former of 2 layers and 8 queries, Linear 768 -> 4096",
            "Video-LLaMA video_llama/models/video_llama.py:30-270", READ,
            "reads every patch, where published there is one token for each clip of two seconds, with a position",
        ),
    },
    c.VICUNA_7B,
    Stage(
        _VIDEO_LLAMA_LEARNS,
        "Video-LLaMA train_configs/visionbranch_stage1_pretrain.yaml, audiobranch_stage1_pretrain.yaml", READ,
        f"{_BRANCHES}; that audio's last Linear learns is recalled",
    ),
    Stage(
        _VIDEO_LLAMA_LEARNS, "Video-LLaMA train_configs/visionbranch_stage2_finetune.yaml", READ,
        f"{_BRANCHES}; audio recalled",
    ),
)  # fmt: skip
DLP = Preset(
    "DLP",
    {"image": c.EVA_G},
    {
        "image": replace(
            qformer(2560, "DLP, Jian et al. 2023"), status=RECALLED,
            differs="the P-Former, which regularises the prompt in training alone, is not built",
        )
    },
    c.OPT_2_7B, Stage((PROJECTORS,), "DLP, Jian et al. 2023"),
    no_such(Stage((PROJECTORS,), "DLP, Jian et al. 2023")),
)  # fmt: skip

_BUBOGPT = Stage(
    ("projectors.image.blocks.1.*", "projectors.audio.blocks.0.*", "projectors.audio.blocks.1.*"),
    "BuboGPT, Zhao et al. 2023",
)  # fmt: skip
BUBOGPT = Preset(
    "BuboGPT",
    {"image": c.EVA_G, "audio": c.IMAGEBIND_AUDIO},
    {
        "image": qformer(4096, "bubogpt mmgpt4_stage2_mm.yaml; image_bind.py:52"),
        "audio": qformer(4096, "bubogpt mmgpt4_stage2_mm.yaml; image_bind.py:52"),
    },
    c.VICUNA_7B, _BUBOGPT, _BUBOGPT,
)  # fmt: skip

_XINSTRUCT = Stage((PROJECTORS,), "X-InstructBLIP, Panagopoulou et al. 2023")
_XINSTRUCT_SOURCE = "LAVIS blip2_vicuna_xinstruct.py:84,178-181,422"
_UNREAD = "stand-in: it does not read the instruction; ULIP's 3-D branch (width 512) is not built"
X_INSTRUCTBLIP = Preset(
    "X-InstructBLIP",
    {"image": c.EVA_G, "video": "image", "audio": c.BEATS},
    {m: qformer(4096, _XINSTRUCT_SOURCE, _UNREAD) for m in ("image", "video", "audio")},
    c.VICUNA_7B, no_such(_XINSTRUCT), _XINSTRUCT,
)  # fmt: skip
