# SPDX-License-Identifier: Apache-2.0
"""Vision and audio front ends of transformers, one row each: how it is built and called, and how ours is.

Compared is what turns pixels into tokens: patches, positions and prefix tokens. A class whose model does
this in its own ``forward`` is stopped where the first layer would run.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from mmkernels.nn import AudioPatchEmbed, PackedPatchEmbed, PatchEmbed

D, P, SIDE = 24, 4, 16  # width, patch and image side of the tiny models: 4×4 patches
K = 3 * P * P
Run = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """``theirs`` and ``ours`` take the module (transformers' own, for its parameters) and the pixels."""

    path: str  # folder.Class of transformers.models
    build: Callable[[], nn.Module]
    pixels: tuple[int, ...]
    theirs: Run
    ours: Run
    note: str = ""
    chain: bool = (
        False  # more than one reduction (norms): held to the error of transformers' module
    )
    scale: float = (
        1.0  # pixels count as scale · pixel + shift: what ``ours`` gives the op to normalise
    )
    shift: float = 0.0

    @property
    def name(self) -> str:
        """For pytest."""
        return self.path.split(".")[1] + ("-" + self.note if self.note else "")


FAMILIES: list[Family] = []


def row(
    path: str, config: str | None, ours: Run, *, sizes: Any = None,
    pixels: tuple[int, ...] = (2, 3, SIDE, SIDE), theirs: Run = lambda m, x: m(x), **rest: Any,
) -> None:  # fmt: skip
    """Adds a family. ``config``: names of its configs, sizes for each; without, sizes are its arguments."""

    def build() -> nn.Module:
        folder, name = path.split(".")
        base = f"transformers.models.{folder}"
        file = "vision" if path == "idefics.IdeficsVisionEmbeddings" else f"modeling_{folder}"
        cls = getattr(importlib.import_module(f"{base}.{file}"), name)
        if config is None:
            return cls(**sizes)
        configs = importlib.import_module(f"{base}.configuration_{folder}")
        each = sizes if isinstance(sizes, list) else [sizes]
        return cls(*(getattr(configs, n)(**s) for n, s in zip(config.split(), each, strict=True)))

    FAMILIES.append(Family(path, build, pixels, theirs, ours, **rest))


def stopped(module: nn.Module, at: str, *args: Any, after: bool = False) -> torch.Tensor:
    """What reaches (``after``: leaves) a submodule when the module is called."""
    found: list[torch.Tensor] = []

    def keep(_: nn.Module, inputs: Any, *output: Any) -> None:
        found.append(output[0] if after else inputs[0])
        raise StopIteration

    place = module.get_submodule(at)
    hook = place.register_forward_hook(keep) if after else place.register_forward_pre_hook(keep)
    try:
        module(*args)
    except StopIteration:
        return found[0]
    finally:
        hook.remove()
    raise AssertionError(f"{at} was not called")


def until(at: str, *args: Any, after: bool = False) -> Run:
    """``theirs``: the module called with the pixels and ``args``, stopped at a submodule."""
    return lambda m, x: stopped(m, at, x, *args, after=after)


def dense(conv: str, position: str = "", tokens: str = "", **options: Any) -> Run:
    """``ours``: images, a fixed table and prefix tokens, by the names they have in the module."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        found = [attrgetter(name)(m).reshape(-1, D) for name in tokens.split()]
        return PatchEmbed.from_conv(attrgetter(conv)(m), **options)(
            x,
            attrgetter(position)(m).reshape(-1, D) if position else None,
            torch.cat(found) if found else None,
        )

    return run


def packed(
    conv: str, table: str = "", side: int = 0, tokens: str = "", grid: Any = None,
    cut: Callable[[torch.Tensor], Any] = lambda x: x, skip: int = 0, **options: Any,
) -> Run:  # fmt: skip
    """``ours``: images of several sizes or rows, a square table resampled, by their names."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        module = PackedPatchEmbed.from_conv(attrgetter(conv)(m), **options)
        found = attrgetter(table)(m).reshape(-1, D)[skip:].view(side, side, D) if table else None
        prefix = attrgetter(tokens)(m).reshape(-1, D) if tokens else None
        return module(cut(x), grid, position_table=found, prefix_tokens=prefix).tokens

    return run


HF = {"hidden_size": D, "image_size": SIDE, "patch_size": P}
LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

# Conv2d, a table for every place ------------------------------------------------------------------
CLIP = dense("patch_embedding", "position_embedding.weight", "class_embedding")
for path, config in (
    ("clip.CLIPVisionEmbeddings", "CLIPVisionConfig"),
    ("kosmos2.Kosmos2VisionEmbeddings", "Kosmos2VisionConfig"),
    ("chinese_clip.ChineseCLIPVisionEmbeddings", "ChineseCLIPVisionConfig"),
    ("altclip.AltCLIPVisionEmbeddings", "AltCLIPVisionConfig"),
    ("x_clip.XCLIPVisionEmbeddings", "XCLIPVisionConfig"),
    ("owlvit.OwlViTVisionEmbeddings", "OwlViTVisionConfig"),
    ("git.GitVisionEmbeddings", "GitVisionConfig"),
    ("metaclip_2.MetaClip2VisionEmbeddings", "MetaClip2VisionConfig"),
):
    row(path, config, CLIP, sizes=HF)
row("idefics.IdeficsVisionEmbeddings", "IdeficsVisionConfig", CLIP,
    sizes={"embed_dim": D, "image_size": SIDE, "patch_size": P})  # fmt: skip
BLIP = dense("patch_embedding", "position_embedding", "class_embedding")
for path, config in (
    ("blip_2.Blip2VisionEmbeddings", "Blip2VisionConfig"),
    ("instructblip.InstructBlipVisionEmbeddings", "InstructBlipVisionConfig"),
    ("blip.BlipVisionEmbeddings", "BlipVisionConfig"),
):
    row(path, config, BLIP, sizes=HF)
for path, config in (
    ("siglip.SiglipVisionEmbeddings", "SiglipVisionConfig"),
    ("granite_docling.GraniteDoclingVisionEmbeddings", "GraniteDoclingVisionConfig"),
):
    row(path, config, dense("patch_embedding", "position_embedding.weight"), sizes=HF)
VIT = dense("patch_embeddings.projection", "position_embeddings", "cls_token")
row("vit.ViTEmbeddings", "ViTConfig", VIT, sizes=HF)
row("internvl.InternVLVisionEmbeddings", "InternVLVisionConfig", VIT,
    sizes={**HF, "use_absolute_position_embeddings": True})  # fmt: skip
row("beit.BeitEmbeddings", "BeitConfig", VIT,
    sizes={**HF, "use_absolute_position_embeddings": True})  # fmt: skip
row("dinov2.Dinov2Embeddings", "Dinov2Config", VIT, sizes=HF)
row("dinov2_with_registers.Dinov2WithRegistersEmbeddings", "Dinov2WithRegistersConfig",
    dense("patch_embeddings.projection", "position_embeddings", "cls_token register_tokens"),
    sizes={**HF, "num_register_tokens": 3}, note="registers without positions")  # fmt: skip
row("dinov3_vit.DINOv3ViTEmbeddings", "DINOv3ViTConfig",
    dense("patch_embeddings", tokens="cls_token register_tokens"),
    sizes={**HF, "num_register_tokens": 3})  # fmt: skip
row("deit.DeiTEmbeddings", "DeiTConfig",
    dense("patch_embeddings.projection", "position_embeddings", "cls_token distillation_token"),
    sizes=HF)  # fmt: skip
row("vit_mae.ViTMAEEmbeddings", "ViTMAEConfig", VIT, sizes={**HF, "mask_ratio": 0.0},
    theirs=lambda m, x: m(x, noise=torch.arange(16.0).expand(2, 16))[0])  # fmt: skip
row("got_ocr2.GotOcr2VisionEncoder", "GotOcr2VisionConfig",
    dense("patch_embed.projection", "pos_embed"),
    sizes={**HF, **LAYERS, "window_size": 2, "mlp_dim": 32}, theirs=until("layers.0"))  # fmt: skip
row("sam.SamPatchEmbeddings", "SamVisionConfig", dense("projection"), sizes=HF)
row("ovis2.Ovis2VisionEmbeddings", "Ovis2VisionConfig",
    lambda m, x: dense("patch_embedding", "position_embedding.weight", norm=m.rms_norm)(m, x),
    sizes=HF, note="norm", chain=True)  # fmt: skip
row("aimv2.Aimv2VisionEmbeddings", "Aimv2VisionConfig",
    lambda m, x: dense("patch_embed", "position_embedding.weight", norm=m.rms_norm)(m, x),
    sizes={**HF, "is_native": False}, note="norm", chain=True)  # fmt: skip
row("timesformer.TimesformerEmbeddings", "TimesformerConfig",
    lambda m, x: VIT(m, x.flatten(0, 1)), pixels=(2, 3, 3, SIDE, SIDE),
    sizes={**HF, "num_frames": 3, "attention_type": "space_only"})  # fmt: skip

# Conv2d, a table resampled or picked for each image ----------------------------------------------
S = 7  # shares no factor with the grids below: where i·S/g is whole, theirs rounds one way or the other
GRIDS = [(5, 3), (4, 5)]
PADDED = (2, 3, 5 * P, 5 * P)
NEAREST = packed(
    "patch_embedding", "position_embedding.weight", S, position_mode="nearest",
    cut=lambda x: [x[i, :, : h * P, : w * P] for i, (h, w) in enumerate(GRIDS)],
)  # fmt: skip


def mask(limits: list[tuple[int, int]], high: int, wide: int) -> torch.Tensor:
    found = torch.zeros(len(limits), high, wide, dtype=torch.bool)
    for i, (h, w) in enumerate(limits):
        found[i, :h, :w] = True
    return found


for path, config in (
    ("idefics2.Idefics2VisionEmbeddings", "Idefics2VisionConfig"),
    ("idefics3.Idefics3VisionEmbeddings", "Idefics3VisionConfig"),
    ("smolvlm.SmolVLMVisionEmbeddings", "SmolVLMVisionConfig"),
    ("phi4_multimodal.Phi4MultimodalVisionEmbeddings", "Phi4MultimodalVisionConfig"),
):
    row(path, config, NEAREST, sizes={**HF, "image_size": S * P}, pixels=PADDED,
        theirs=lambda m, x: m(x, patch_attention_mask=mask(GRIDS, 5, 5))[mask(GRIDS, 5, 5).flatten(1)],
    )  # fmt: skip

THW = torch.tensor([[1, 5, 3], [1, 4, 5]])
ROWS = (35, K)


def strip(x: torch.Tensor) -> torch.Tensor:
    """Rows as MiniCPM-V packs them: one image a patch high."""
    return x.view(-1, 3, P, P).permute(1, 2, 0, 3).reshape(1, 3, P, -1)


for path, config in (
    ("minicpmv4_6.MiniCPMV4_6VisionEmbeddings", "MiniCPMV4_6VisionConfig"),
    ("minicpmv4_7.MiniCPMV4_7VisionEmbeddings", "MiniCPMV4_7VisionConfig"),
):
    row(path, config,
        packed("patch_embedding", "position_embedding.weight", S, grid=THW, position_mode="nearest"),
        sizes={**HF, "image_size": S * P}, pixels=ROWS, theirs=lambda m, x: m(strip(x), THW[:, 1:]))  # fmt: skip
row("paddleocr_vl.PaddleOCRVisionEmbeddings", "PaddleOCRVisionConfig",
    packed("patch_embedding", "position_embedding.weight", 4, grid=THW), sizes=HF, pixels=ROWS,
    theirs=lambda m, x: m(x.view(1, -1, 3, P, P), THW))  # fmt: skip
row("hunyuan_vl.HunYuanVLVisionPatchEmbed", "HunYuanVLVisionConfig",
    packed("patch_embedding", "position_embedding.weight", 4, skip=1, grid=THW),
    sizes={"hidden_size": D, "patch_size": P, "max_image_size": SIDE}, pixels=ROWS,
    theirs=lambda m, x: m(x, THW.tolist()))  # fmt: skip
row("kimi_k25.Kimi_K25VisionPatchEmbed", "Kimi_K25VisionConfig",
    packed("proj", "pos_emb.position_embeddings", 4, grid=THW, position_mode="bicubic"),
    sizes={"hidden_size": D, "patch_size": P, "pos_emb_height": 4, "pos_emb_width": 4, **LAYERS},
    pixels=ROWS, theirs=lambda m, x: m(x.view(-1, 3, P, P), THW), note="stills")  # fmt: skip
row("video_llama_3.VideoLlama3VisionEmbeddings", "VideoLlama3VisionConfig",
    dense("patch_embedding"), sizes=HF, pixels=ROWS)  # fmt: skip
row("dots3_note.Dots3NoteVisionPatchEmbed", "Dots3NoteVisionConfig",
    lambda m, x: dense("proj", norm=m.norm)(m, x), pixels=ROWS, note="norm", chain=True,
    sizes={**HF, "adapter_in_dim": D})  # fmt: skip
SIZES = [(16, 12), (8, 16)]
row("pixtral.PixtralVisionModel", "PixtralVisionConfig",
    lambda m, x: packed("patch_conv", norm=m.ln_pre,
                        cut=lambda x: [x[i, :, :h, :w] for i, (h, w) in enumerate(SIZES)])(m, x),
    sizes={**HF, **LAYERS}, theirs=until("transformer", SIZES), note="norm", chain=True)  # fmt: skip
TALL = (2, 3, 20, 12)
row("clip.CLIPVisionEmbeddings", "CLIPVisionConfig",
    lambda m, x: PackedPatchEmbed.from_conv(m.patch_embedding, position_mode="bicubic")(
        list(x), position_table=m.position_embedding.weight[1:].view(4, 4, D),
        prefix_tokens=m.class_embedding + m.position_embedding.weight[0]).tokens,
    sizes=HF, pixels=TALL, theirs=lambda m, x: m(x, interpolate_pos_encoding=True),
    note="interpolated", chain=True)  # fmt: skip
row("step3p7.Step3p7VisionEmbeddings", "Step3p7VisionConfig",
    packed("patch_embedding", "position_embedding.weight", 4, cut=list), sizes=HF, pixels=TALL,
    theirs=lambda m, x: m(x, interpolate_pos_encoding=True), note="interpolated")  # fmt: skip

# Conv3d ------------------------------------------------------------------------------------------
CLIPS = (2, 4, 3, SIDE, SIDE)  # [B, T, C, H, W]
FILM = {**HF, "num_frames": 4}
row("vivit.VivitEmbeddings", "VivitConfig", lambda m, x: VIT(m, x.transpose(1, 2)), pixels=CLIPS,
    sizes={**FILM, "tubelet_size": [2, P, P]})  # fmt: skip


def videomae(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Its table is no parameter: made exact in every dtype."""
    m.position_embeddings = m.position_embeddings.bfloat16()
    return m(x, None)


row("videomae.VideoMAEEmbeddings", "VideoMAEConfig",
    lambda m, x: PatchEmbed.from_conv(m.patch_embeddings.projection)(
        x.transpose(1, 2), m.position_embeddings.bfloat16().type_as(x)),
    sizes={**FILM, "tubelet_size": 2}, pixels=CLIPS, theirs=videomae)  # fmt: skip
VJEPA = {"hidden_size": D, "patch_size": P, "crop_size": SIDE, "tubelet_size": 2}
row("vjepa2.VJEPA2Embeddings", "VJEPA2Config",
    lambda m, x: PatchEmbed.from_conv(m.patch_embeddings.proj)(x.transpose(1, 2)), pixels=CLIPS,
    sizes=VJEPA, theirs=lambda m, x: m(x))  # fmt: skip
row("vjepa2.VJEPA2Embeddings", "VJEPA2Config",
    lambda m, x: PatchEmbed.from_conv(m.patch_embeddings.proj, pad=True)(x.transpose(1, 2)),
    pixels=(2, 1, 3, SIDE, SIDE), sizes=VJEPA, note="one frame")  # fmt: skip
ROWS3 = (44, 2 * K)
MERGED = torch.tensor([[1, 2, 6], [2, 4, 4]])  # blocks of 2×2, the second a film
SMALL = {"patch_size": P, "temporal_patch_size": 2, "in_channels": 3}
ON_ROWS = dense("proj")
row("qwen2_vl.PatchEmbed", None, ON_ROWS, sizes={**SMALL, "embed_dim": D}, pixels=ROWS3)
row("qwen2_5_vl.Qwen2_5_VisionPatchEmbed", None, ON_ROWS, sizes={**SMALL, "embed_dim": D},
    pixels=ROWS3)  # fmt: skip
row("qwen2_5_omni.Qwen2_5_VisionPatchEmbed", None, ON_ROWS, sizes={**SMALL, "embed_dim": D},
    pixels=ROWS3, note="omni")  # fmt: skip
row("exaone4_5.Exaone4_5_PatchEmbed", None, ON_ROWS, sizes={**SMALL, "embed_dim": D},
    pixels=ROWS3)  # fmt: skip
for path, config in (
    ("glm_ocr.GlmOcrVisionPatchEmbed", "GlmOcrVisionConfig"),
    ("glm5_next.Glm5NextVisionPatchEmbed", "Glm5NextVisionConfig"),
    ("cohere_compass.CohereCompassVisionPatchEmbed", "CohereCompassVisionConfig"),
):
    row(path, config, ON_ROWS, sizes={**SMALL, "hidden_size": D}, pixels=ROWS3)
row("minimax_m3_vl.MiniMaxM3VLVisionEmbeddings", "MiniMaxM3VLVisionConfig", ON_ROWS,
    sizes={**HF, "temporal_patch_size": 2}, pixels=ROWS3)  # fmt: skip
QWEN = {**SMALL, "hidden_size": D, "depth": 1, "num_heads": 2, "intermediate_size": 32,
        "out_hidden_size": D, "spatial_merge_size": 2}  # fmt: skip
for path, config in (
    ("qwen3_vl.Qwen3VLVisionModel", "Qwen3VLVisionConfig"),
    ("qwen3_vl_moe.Qwen3VLMoeVisionModel", "Qwen3VLMoeVisionConfig"),
    ("qwen3_omni_moe.Qwen3OmniMoeVisionEncoder", "Qwen3OmniMoeVisionEncoderConfig"),
    ("qwen3_5.Qwen3_5VisionModel", "Qwen3_5VisionConfig"),
    ("qwen3_5_moe.Qwen3_5MoeVisionModel", "Qwen3_5MoeVisionConfig"),
):
    row(path, config,
        packed("patch_embed.proj", "pos_embed.weight", 5, grid=MERGED, merge_size=2, align_corners=True),
        sizes={**QWEN, "num_position_embeddings": 25, "deepstack_visual_indexes": []},
        pixels=ROWS3, theirs=until("blocks.0", MERGED))  # fmt: skip


STILLS = torch.tensor([[1, 2, 6], [1, 4, 4]])


def without_norm(m: Any, x: torch.Tensor, grid: torch.Tensor = STILLS) -> torch.Tensor:
    """GLM-4V normalises between projection and positions, which the op cannot: both, without that norm."""
    norm, m.post_conv_layernorm = m.post_conv_layernorm, nn.Identity()
    try:
        return stopped(m, "blocks.0", x, grid)
    finally:
        m.post_conv_layernorm = norm


for path, config in (
    ("glm4v.Glm4vVisionModel", "Glm4vVisionConfig"),
    ("glm4v_moe.Glm4vMoeVisionModel", "Glm4vMoeVisionConfig"),
):
    row(path, config,
        packed("patch_embed.proj", "embeddings.position_embedding.weight", 4, grid=STILLS, merge_size=2,
               position_mode="bicubic"),
        sizes={**QWEN, "image_size": SIDE}, pixels=(28, 2 * K), theirs=without_norm,
        note="without its norm")  # fmt: skip
    row(path, config, lambda m, x: dense("patch_embed.proj", norm=m.post_conv_layernorm)(m, x),
        sizes={**QWEN, "image_size": SIDE}, pixels=(28, 2 * K), note="norm, no positions", chain=True,
        theirs=until("post_conv_layernorm", STILLS, after=True))  # fmt: skip

# Linear on rows ----------------------------------------------------------------------------------
VALID = mask([(1, 15), (1, 20)], 1, 20)[:, 0]  # 5×3 and 4×5 patches, padded to 20
BATCH = (2, 20, K)


def places(first: int) -> torch.Tensor:
    """Row and column of each patch of ``GRIDS``, padded by 0."""
    found = torch.zeros(2, 20, 2, dtype=torch.long)
    for i, (h, w) in enumerate(GRIDS):
        found[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)) + first
    return found


row("siglip2.Siglip2VisionEmbeddings", "Siglip2VisionConfig",
    packed("patch_embedding", "position_embedding.weight", 8, grid=THW, cut=lambda x: x[VALID],
           antialias=True),
    sizes={"hidden_size": D, "patch_size": P, "num_patches": 64}, pixels=BATCH,
    theirs=lambda m, x: m(x, THW[:, 1:])[VALID])  # fmt: skip
row("cosmos3_edge.Cosmos3EdgeVisionEmbeddings", "Cosmos3EdgeVisionConfig",
    packed("patch_embedding", "position_embedding.weight", 7, grid=MERGED, antialias=True, merge_size=2),
    sizes={"hidden_size": D, "patch_size": P, "num_patches": 49, "spatial_merge_size": 2},
    pixels=(44, K), theirs=lambda m, x: m(x, MERGED))  # fmt: skip
row("gemma4.Gemma4VisionPatchEmbedder", "Gemma4VisionConfig",
    lambda m, x: PackedPatchEmbed.from_conv(
        m.input_proj, position_mode="factorised", rescale_factor=2.0, image_mean=[1.0])(
            x[VALID], THW, position_table=m.position_embedding_table.flip(0)).tokens,
    sizes={"hidden_size": D, "patch_size": P, "position_embedding_size": 9}, pixels=BATCH, scale=2.0,
    shift=-1.0,
    theirs=lambda m, x: m(x, torch.where(VALID[..., None], places(0).flip(-1), -1), ~VALID)[VALID],
    note="x before y")  # fmt: skip
for path, config, size in (
    ("pix2struct.Pix2StructVisionEmbeddings", "Pix2StructVisionConfig", "seq_len"),
    ("kosmos2_5.Kosmos2_5VisionEmbeddings", "Kosmos2_5VisionConfig", "max_num_patches"),
):
    row(path, config,
        lambda m, x: PackedPatchEmbed.from_conv(m.patch_projection, position_mode="factorised")(
            x[VALID], THW,
            position_table=(m.row_embedder.weight[1:], m.column_embedder.weight[1:])).tokens,
        sizes={"hidden_size": D, "patch_embed_hidden_size": K, size: 9}, pixels=BATCH,
        theirs=lambda m, x: m(torch.cat([places(1).to(x), x], -1))[VALID])  # fmt: skip
row("ernie4_5_vl_moe.Ernie4_5_VLMoePatchEmbed", None, ON_ROWS,
    sizes={"patch_size": P, "embed_dim": D}, pixels=ROWS)  # fmt: skip
row("molmo2.Molmo2VisionModel", "Molmo2VisionConfig",
    dense("patch_embedding", "positional_embedding"),
    sizes={**HF, **LAYERS, "image_size": [SIDE, SIDE], "num_position_embeddings": 16,
           "num_key_value_heads": 2, "head_dim": 12},
    pixels=(2, 16, K), theirs=until("layers.0"))  # fmt: skip
row("lfm3_vl.Lfm3VlVisionModel", "Lfm3VlVisionConfig",
    lambda m, x: dense("patch_embed", norm=m.embedding_norm)(m, x), note="norm", chain=True,
    sizes={**SMALL, **LAYERS, "hidden_size": D, "num_key_value_heads": 2, "spatial_merge_size": 2},
    pixels=ROWS3, theirs=until("embedding_norm", MERGED, after=True))  # fmt: skip
row("gemma4_unified.Gemma4UnifiedVisionEmbedder", "Gemma4UnifiedVisionConfig Gemma4UnifiedTextConfig",
    lambda m, x: PatchEmbed.from_conv(m.patch_dense, pre_norm=m.patch_ln1, norm=m.patch_ln2)(x),
    sizes=[{"patch_size": 2, "pooling_kernel_size": 2, "mm_embed_dim": D, "mm_posemb_size": 9},
           {"hidden_size": D, "vocab_size": 32, "num_hidden_layers": 1}],
    pixels=(2, 20, K), note="norms, no positions", chain=True,
    theirs=until("patch_ln2", places(0), after=True))  # fmt: skip
row("neomme.NeoMMEPatchEmbeddings", "NeoMMEConfig",
    lambda m, x: PatchEmbed.from_conv(m.up_proj, pre_norm=m.norm)(x), note="first Linear", chain=True,
    sizes={"hidden_size": D // 2, "patch_size": P}, pixels=ROWS,
    theirs=until("up_proj", after=True))  # fmt: skip
row("fuyu.FuyuModel", "FuyuConfig", dense("vision_embed_tokens"), pixels=(2, 16, K),
    theirs=lambda m, x: m.get_image_features(x).last_hidden_state,
    sizes={"patch_size": P, "text_config": {"model_type": "persimmon", "hidden_size": D, "vocab_size": 32,
                                            "num_hidden_layers": 1, "num_attention_heads": 2,
                                            "intermediate_size": 32}})  # fmt: skip
row("radio.RadioPatchEmbeddings", "RadioConfig",
    packed("patch_projection", "position_embedding", 8, tokens="cls_register_token", cut=list),
    sizes={"hidden_size": D, "patch_size": P, "image_size": SIDE, "max_img_size": 32,
           "num_cls_tokens": 2, "num_registers": 3}, note="square")  # fmt: skip
# MuseGlimmer is left out: 5.23 pads its table with zeros, 5.24 also swaps rows and columns.


def blocks(x: torch.Tensor) -> torch.Tensor:
    """Rows (h, w, channel) of four patches each as the ``[2P, 2P, 3]`` pictures Inkling 2 takes."""
    return x.view(-1, 2, 2, P, P, 3).transpose(2, 3).reshape(-1, 2 * P, 2 * P, 3)


INDEX = torch.tensor([*range(1, 13), *range(14, 30)])
row("inkling2.Inkling2VisionEmbeddings", "Inkling2VisionConfig",
    lambda m, x: PackedPatchEmbed.from_conv(m.patch_embedding, patch_order="ppc", merge_size=2)(
        x, STILLS, position_table=m.position_embedding.weight.view(5, 5, D),
        prefix_tokens=m.class_embedding + m.cls_position_embedding).tokens,
    sizes={"hidden_size": D, "patch_size": P, "spatial_merge_size": 2, "posemb_grid_size": 5, **LAYERS},
    pixels=(28, K), theirs=lambda m, x: m(blocks(x), STILLS, INDEX), note="cls", chain=True)  # fmt: skip
row("llama4.Llama4VisionModel", "Llama4VisionConfig",
    dense("patch_embedding.linear", "positional_embedding_vlm", "class_embedding", prefix="last"),
    sizes={**HF, **LAYERS}, theirs=until("layernorm_pre"), note="cls last")  # fmt: skip


def mllama(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Every tile has positions of its own, so every tile is a call."""
    gate, tile = m.gated_positional_embedding.gate.tanh(), m.pre_tile_positional_embedding
    table = m.gated_positional_embedding
    own = table.tile_embedding.weight[2].view(2, 17, D)
    before = tile.embedding.weight[2].view(2, 1, D) * tile.gate.tanh()
    tokens = []
    for i in range(2):
        position = (1 - gate) * table.embedding + gate * own[i]
        position = torch.cat([position[:1], position[1:] + before[i]])
        tokens.append(
            PatchEmbed.from_conv(m.patch_embedding)(x[i : i + 1], position, m.class_embedding)
        )
    return torch.cat(tokens)


row("mllama.MllamaVisionModel", "MllamaVisionConfig", mllama, chain=True, note="a call a tile",
    sizes={**HF, "attention_heads": 2, "num_hidden_layers": 1, "num_global_layers": 1, "intermediate_size": 32,
           "max_num_tiles": 2, "intermediate_layers_indices": [0], "vision_output_dim": 2 * D,
           "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
    theirs=lambda m, x: stopped(m, "layernorm_pre", x[None, None], torch.tensor([[2]]),
                                torch.ones(1, 1, 2)))  # fmt: skip

# Audio -------------------------------------------------------------------------------------------
row("audio_spectrogram_transformer.ASTEmbeddings", "ASTConfig",
    lambda m, x: AudioPatchEmbed.from_conv(m.patch_embeddings.projection)(
        x, m.position_embeddings, torch.cat([m.cls_token, m.distillation_token], 1)),
    sizes={"hidden_size": D, "patch_size": 6, "frequency_stride": 4, "time_stride": 5, "max_length": 33,
           "num_mel_bins": 16},
    pixels=(2, 33, 16))  # fmt: skip

# Pixels as the image processors lay them out -----------------------------------------------------


@dataclass(frozen=True)
class Processed:
    """A family fed by its image processor (the PIL one), and ours by the uint8 images themselves."""

    path: str  # of the family
    processor: str  # folder.Class
    sizes: dict[str, Any]
    theirs: Callable[[Any, Any], torch.Tensor]  # module and what the processor gives
    ours: Callable[[Any, list[torch.Tensor]], torch.Tensor]

    def process(self, images: list[torch.Tensor]) -> Any:
        """Neither resized nor normalised: the layout alone."""
        folder, name = self.processor.split(".")
        base = f"transformers.models.{folder}.image_processing_pil_{folder}"
        processor = getattr(importlib.import_module(base), name)(**self.sizes)
        pictures = [i.permute(1, 2, 0).numpy() for i in images]
        if folder == "fuyu":
            rows = [processor.patchify_image(p.transpose(2, 0, 1)) for p in pictures]
            return {"pixel_values": torch.cat([torch.as_tensor(r) for r in rows])}
        off = {"do_resize": False, "do_rescale": False, "do_normalize": False}
        return processor(pictures, return_tensors="pt", **off)


def grouped(x: Any) -> torch.Tensor:
    return x["pixel_values"].double()


MERGE = {"patch_size": P, "temporal_patch_size": 2, "merge_size": 2}
PROCESSED = [
    Processed("qwen3_vl.Qwen3VLVisionModel", "qwen2_vl.Qwen2VLImageProcessorPil", MERGE,
              lambda m, x: stopped(m, "blocks.0", grouped(x), x["image_grid_thw"]),
              packed("patch_embed.proj", "pos_embed.weight", 5, merge_size=2, align_corners=True)),
    Processed("qwen2_5_vl.Qwen2_5_VisionPatchEmbed", "qwen2_vl.Qwen2VLImageProcessorPil", MERGE,
              lambda m, x: m(grouped(x)), packed("proj", merge_size=2)),
    Processed("glm4v.Glm4vVisionModel", "glm4v.Glm4vImageProcessorPil", MERGE,
              lambda m, x: without_norm(m, grouped(x), x["image_grid_thw"]),
              packed("patch_embed.proj", "embeddings.position_embedding.weight", 4, merge_size=2,
                     position_mode="bicubic")),
    Processed("paddleocr_vl.PaddleOCRVisionEmbeddings", "paddleocr_vl.PaddleOCRVLImageProcessorPil",
              {**MERGE, "temporal_patch_size": 1},
              lambda m, x: m(grouped(x)[None], x["image_grid_thw"]),
              packed("patch_embedding", "position_embedding.weight", 4)),
    Processed("siglip2.Siglip2VisionEmbeddings", "siglip2.Siglip2ImageProcessorPil",
              {"patch_size": P, "max_num_patches": 24},
              lambda m, x: m(grouped(x), x["spatial_shapes"])[x["pixel_attention_mask"].bool()],
              packed("patch_embedding", "position_embedding.weight", 8, antialias=True,
                     patch_order="ppc")),
    Processed("gemma4.Gemma4VisionPatchEmbedder", "gemma4.Gemma4ImageProcessorPil",
              {"patch_size": P, "pooling_kernel_size": 2, "max_soft_tokens": 70},
              lambda m, x: m(grouped(x), x["image_position_ids"], x["image_position_ids"][..., 0] < 0)[
                  x["image_position_ids"][..., 0] >= 0],
              lambda m, images: PackedPatchEmbed.from_conv(
                  m.input_proj, patch_order="ppc", position_mode="factorised", rescale_factor=2.0,
                  image_mean=[1.0] * 3)(images, position_table=m.position_embedding_table.flip(0)).tokens),
    Processed("minicpmv4_6.MiniCPMV4_6VisionEmbeddings", "minicpmv4_6.MiniCPMV4_6ImageProcessorPil",
              {"patch_size": P}, lambda m, x: m(grouped(x), x["target_sizes"]),
              packed("patch_embedding", "position_embedding.weight", S, position_mode="nearest")),
    Processed("idefics2.Idefics2VisionEmbeddings", "idefics2.Idefics2ImageProcessorPil",
              {"do_image_splitting": False},
              lambda m, x: m(grouped(x)[0], mask([(4, 6), (6, 2)], 6, 6))[
                  mask([(4, 6), (6, 2)], 6, 6).flatten(1)],
              packed("patch_embedding", "position_embedding.weight", S, position_mode="nearest")),
    Processed("fuyu.FuyuModel", "fuyu.FuyuImageProcessorPil", {"patch_size": {"height": P, "width": P}},
              lambda m, x: m.get_image_features(grouped(x)).last_hidden_state,
              packed("vision_embed_tokens", patch_order="ppc")),
]  # fmt: skip
