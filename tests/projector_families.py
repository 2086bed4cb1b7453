# SPDX-License-Identifier: Apache-2.0
"""Projectors of transformers beside ours: theirs(module, features), ours(module, features).

``ours`` takes transformers' own parameters: through one of ``mmkernels.nn`` (``through``), or op by op.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from patch_embed_families import Family, Run
from torch import nn
from torch.func import functional_call

import mmkernels
from mmkernels import Norm
from mmkernels import nn as ours

FAMILIES: list[Family] = []


_NUMBERS = torch.randn(512, generator=torch.Generator().manual_seed(7)).bfloat16()


def fixed(*shape: int) -> torch.Tensor:
    """Numbers that are the same in every call and under any default dtype, exact in bf16."""
    return _NUMBERS[: math.prod(shape)].view(shape)


def row(
    path: str, build: Callable[[Any, Any], nn.Module], ours: Run, *, pixels: tuple[int, ...],
    theirs: Run = lambda m, x: m(x), frozen: tuple[str, ...] = (), note: str = "", file: str = "modeling",
) -> None:  # fmt: skip
    """Adds a family. ``build`` gets modeling and configuration file; ``frozen``: parameters whose gradient is exactly 0
    (biases of keys)."""

    def made() -> nn.Module:
        folder = path.split(".")[0]
        base = f"transformers.models.{folder}"
        name = file if file == "perceiver" else f"{file}_{folder}"
        modules = [
            importlib.import_module(f"{base}.{n}") for n in (name, f"configuration_{folder}")
        ]
        module = build(*modules)
        for name, parameter in module.named_parameters():
            if name.endswith(frozen or ("nothing",)):
                parameter.requires_grad_(False)
        return module

    FAMILIES.append(Family(path, made, pixels, theirs, ours, note=note, chain=True))


def through(build: Callable[[], nn.Module], *arguments: Any, rename: Any = lambda n: n) -> Run:
    """Ours with the parameters of theirs."""

    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        named = {rename(n): p for n, p in module.named_parameters()}
        made = build().eval()
        assert named.keys() == dict(made.named_parameters()).keys()
        return functional_call(made, named, (x, *arguments))

    return run


def sdpa(config: Any) -> Any:
    """What transformers chooses by default."""
    config._attn_implementation = "sdpa"
    return config


# Cross-attention -----------------------------------------------------------------------------------------------

QFORMER = {
    "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 40,
    "encoder_hidden_size": 24, "vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
KEY_BIAS = ("key.bias", "k_proj.bias")
MASK = (torch.arange(7) < torch.tensor([7, 4])[:, None]).long()


def qformer(text: bool = False, algorithm: str = "auto") -> nn.Module:
    return ours.QFormer(
        hidden_size=32, num_heads=4, num_layers=4, intermediate_size=40, encoder_hidden_size=24, text=text,
        algorithm=algorithm,
    )  # fmt: skip


def qformer_of(query: torch.Tensor, mask: Any, algorithm: str) -> Run:
    def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        named = dict(module.named_parameters())
        return functional_call(qformer(algorithm=algorithm), named, (query.to(x), x, mask))

    return run


for algorithm in ("projected", "absorbed"):
    row(
        "blip_2.Blip2QFormerModel",
        lambda m, c: m.Blip2QFormerModel(sdpa(c.Blip2QFormerConfig(**QFORMER))),
        qformer_of(fixed(1, 5, 32), MASK, algorithm), pixels=(2, 7, 24), note=algorithm, frozen=KEY_BIAS,
        theirs=lambda m, x: m(
            query_embeds=fixed(1, 5, 32).to(x).expand(2, -1, -1), encoder_hidden_states=x,
            encoder_attention_mask=MASK,
        ).last_hidden_state,
    )  # fmt: skip

TEXT, TEXT_MASK = torch.tensor([[3, 7, 1], [2, 4, 0]]), torch.tensor([[1] * 8, [1] * 7 + [0]])


def _instruct(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    named = {n.removeprefix("embeddings."): p for n, p in module.named_parameters()}
    words, places = named.pop("word_embeddings.weight"), named.pop("position_embeddings.weight")
    text = F.embedding(TEXT, words) + places[:3]
    given = (fixed(1, 5, 32).to(x), x, MASK, text, TEXT_MASK)
    return functional_call(qformer(text=True), named, given)


# Text of the last layer is read by nobody.
UNREAD = ("layer.3.intermediate.dense.weight", "layer.3.intermediate.dense.bias", "layer.3.output.dense.weight",
          "layer.3.output.dense.bias", "layer.3.output.LayerNorm.weight", "layer.3.output.LayerNorm.bias")  # fmt: skip
for name, folder in (
    ("InstructBlipQFormerModel", "instructblip"), ("InstructBlipVideoQFormerModel", "instructblipvideo"),
):  # fmt: skip
    row(
        f"{folder}.{name}",
        lambda m, c, name=name: getattr(m, name)(
            sdpa(getattr(c, name.replace("Model", "Config"))(max_position_embeddings=3, **QFORMER))
        ),
        _instruct, pixels=(2, 7, 24), frozen=KEY_BIAS + UNREAD,
        theirs=lambda m, x: m(
            input_ids=TEXT, attention_mask=TEXT_MASK, query_embeds=fixed(1, 5, 32).to(x).expand(2, -1, -1),
            encoder_hidden_states=x, encoder_attention_mask=MASK,
        ).last_hidden_state[:, :5],
    )  # fmt: skip

PERCEIVER = {
    "hidden_size": 24, "resampler_n_latents": 5, "resampler_depth": 2, "resampler_n_heads": 6,
    "num_key_value_heads": 2, "resampler_head_dim": 8, "hidden_act": "silu", "rms_norm_eps": 1e-5,
}  # fmt: skip
for algorithm in ("projected", "absorbed"):
    row(
        "idefics2.Idefics2PerceiverResampler",
        lambda m, c: m.Idefics2PerceiverResampler(sdpa(c.Idefics2PerceiverConfig(**PERCEIVER))),
        through(
            lambda algorithm=algorithm: ours.PerceiverResampler(
                24, num_latents=5, num_layers=2, num_heads=6, num_key_value_heads=2, head_dim=8, eps=1e-5,
                algorithm=algorithm,
            ), MASK,
        ), pixels=(2, 7, 24), theirs=lambda m, x: m(x, MASK).reshape(2, 5, 24), note=algorithm,
    )  # fmt: skip


def _idefics(qk_norm: bool) -> Callable[[Any, Any], nn.Module]:
    def build(m: Any, c: Any) -> nn.Module:
        config = c.IdeficsConfig(
            vision_config={"embed_dim": 24}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
        )
        return m.IdeficsPerceiverResampler(config, 24, 2, 3, 8, 5)

    return build


def _layer(norm: nn.LayerNorm) -> Norm:
    return Norm("layer", norm.weight, norm.bias, norm.eps)


def _idefics_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    latents = module.latents.expand(x.shape[0], -1, -1)
    for attention, mlp in module.blocks:
        inner = attention.latents_layer_norm(latents)
        q = attention.q_proj(inner)
        if attention.qk_layer_norms:
            q = attention.q_layer_norm(q.unflatten(-1, (3, 8))).flatten(-2)
        out = mmkernels.cross_attention(
            q, x, attention.k_proj.weight, attention.v_proj.weight, num_heads=3, latents=inner,
            context_norm=_layer(attention.context_layer_norm),
            key_norm=_layer(attention.k_layer_norm) if attention.qk_layer_norms else None,
        )  # fmt: skip
        latents = attention.output_proj(out) + latents
        latents = mlp(latents) + latents
    return module.layer_norm(latents)


for qk_norm in (False, True):
    row(
        "idefics.IdeficsPerceiverResampler", _idefics(qk_norm), _idefics_ours, pixels=(2, 7, 24), file="perceiver",
        note="qk_norm" if qk_norm else "", frozen=("k_layer_norm.bias",),  # a constant on a row of scores
    )  # fmt: skip


def _kosmos(m: Any, c: Any) -> nn.Module:
    text = {"embed_dim": 24, "attention_heads": 3, "attention_dropout": 0.0}
    config = c.Kosmos2Config(
        text_config=text, vision_config={"hidden_size": 20}, latent_query_num=5
    )
    return m.Kosmos2ImageToTextProjection(sdpa_text(config))


def sdpa_text(config: Any) -> Any:
    config.text_config._attn_implementation = "sdpa"
    return config


def _kosmos_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    a, latents = module.x_attn, module.latent_query
    out = mmkernels.cross_attention(
        a.q_proj(latents), module.dense(x), a.k_proj.weight, a.v_proj.weight, a.k_proj.bias, a.v_proj.bias,
        num_heads=3, latents=latents.expand(len(x), -1, -1),
    )  # fmt: skip
    return a.out_proj(out)


row(
    "kosmos2.Kosmos2ImageToTextProjection", _kosmos, _kosmos_ours, pixels=(2, 7, 20),
    theirs=lambda m, x: m(x)[0], frozen=KEY_BIAS,
)  # fmt: skip


def _aria(m: Any, c: Any) -> nn.Module:
    vision = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
    }
    text = {
        "hidden_size": 28,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
    }
    config = c.AriaConfig(
        vision_config=vision, text_config=text, projector_patch_to_query_dict={7: 4}
    )
    return m.AriaProjector(config)


def _aria_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    a = module.cross_attn
    w_q, w_k, w_v = a.multihead_attn.in_proj_weight.chunk(3)
    b_q, b_k, b_v = a.multihead_attn.in_proj_bias.chunk(3)
    query = F.linear(a.q_proj(a.layer_norm(module.query[:4])), w_q, b_q)
    # Two linear layers in a row are one.
    out = mmkernels.cross_attention(
        query, x, w_k @ a.k_proj.weight, w_v @ a.v_proj.weight, b_k, b_v, num_heads=3,
        context_norm=_layer(a.layer_norm_kv),
    )  # fmt: skip
    out = a.linear(a.multihead_attn.out_proj(out))
    return module.feed_forward(module.layer_norm(out))


row("aria.AriaProjector", _aria, _aria_ours, pixels=(2, 7, 24))

MAP = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20}
for folder, kind in (("siglip", "Siglip"), ("siglip2", "Siglip2")):
    for algorithm in ("projected", "absorbed"):
        row(
            f"{folder}.{kind}MultiheadAttentionPoolingHead",
            lambda m, c, kind=kind: getattr(m, f"{kind}MultiheadAttentionPoolingHead")(
                sdpa(getattr(c, f"{kind}VisionConfig")(**MAP))
            ),
            through(lambda algorithm=algorithm: ours.AttentionPool(24, 3, 20, algorithm=algorithm)),
            pixels=(2, 9, 24), note=algorithm,
        )  # fmt: skip


def _granite(m: Any, c: Any) -> nn.Module:
    projector = {"model_type": "blip_2_qformer", **QFORMER, "_attn_implementation": "sdpa"}
    config = c.GraniteSpeechConfig(
        projector_config=projector, text_config={"model_type": "granite", "hidden_size": 32}, window_size=15,
        downsample_rate=5,
    )  # fmt: skip
    return m.GraniteSpeechEncoderProjector(config)


def _granite_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Windows of 15 frames, 3 queries each."""
    windows = F.pad(x, (0, 0, 0, -x.shape[1] % 15)).view(-1, 15, x.shape[2])
    named = dict(module.qformer.named_parameters())
    out = functional_call(qformer(), named, (module.query, windows))
    return module.linear(out.view(len(x), -1, 32))


row(
    "granite_speech.GraniteSpeechEncoderProjector",
    _granite,
    _granite_ours,
    pixels=(2, 40, 24),
    frozen=KEY_BIAS,
)

POOLED = torch.tensor([[0, 1, 4, 5], [2, 3, 6, -1], [8, 9, -1, -1], [10, 11, 14, 15]])


def _molmo(m: Any, c: Any) -> nn.Module:
    config = c.Molmo2AdapterConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=20,
        text_hidden_size=28, vision_feature_layer=[0], attention_dropout=0.0,
    )  # fmt: skip
    return m.Molmo2Adapter(sdpa(config))


def _molmo_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A window's mean asks its patches."""
    there = (POOLED >= 0).to(x.dtype)[..., None]
    windows = x.flatten(0, 1)[POOLED.clamp(min=0)] * there
    query = windows.sum(1, keepdim=True) / there.sum(1, keepdim=True)
    a = module.image_pooling_2d
    out = mmkernels.cross_attention(
        a.q_proj(query), windows, a.k_proj.weight, a.v_proj.weight, a.k_proj.bias, a.v_proj.bias, num_heads=4,
        num_key_value_heads=2, attention_mask=(POOLED >= 0)[:, None, None],
    )  # fmt: skip
    return module.image_projector(a.o_proj(out)[:, 0])


row(
    "molmo2.Molmo2Adapter", _molmo, _molmo_ours, pixels=(1, 16, 24),
    theirs=lambda m, x: m(x, POOLED).last_hidden_state, frozen=KEY_BIAS,
)  # fmt: skip


def _mllama(m: Any, c: Any) -> nn.Module:
    config = c.MllamaTextConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, dropout=0.0
    )
    return m.MllamaTextCrossAttention(sdpa(config), 0)


def _mllama_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    query = module.q_norm(module.q_proj(fixed(2, 6, 32).to(x)).unflatten(-1, (4, 8))).flatten(-2)
    norm = Norm("rms", module.k_norm.weight, None, module.k_norm.variance_epsilon)
    out = mmkernels.cross_attention(
        query,
        x,
        module.k_proj.weight,
        module.v_proj.weight,
        num_heads=4,
        num_key_value_heads=2,
        key_norm=norm,
    )
    return module.o_proj(out)


row(
    "mllama.MllamaTextCrossAttention", _mllama, _mllama_ours, pixels=(2, 11, 32),
    # Without a mask SDPA would take it for causal.
    theirs=lambda m, x: m(fixed(2, 6, 32).to(x), x, attention_mask=torch.ones(2, 1, 6, 11).bool())[0],
)  # fmt: skip

# Merging -------------------------------------------------------------------------------------------------------

for folder, name in (
    ("qwen2_vl", "PatchMerger"), ("qwen2_5_vl", "Qwen2_5_VLPatchMerger"), ("qwen2_5_omni", "Qwen2_5OmniPatchMerger"),
):  # fmt: skip
    kind = "layer" if folder == "qwen2_vl" else "rms"
    row(
        f"{folder}.{name}", lambda m, c, name=name: getattr(m, name)(28, 8),
        through(lambda kind=kind: ours.PatchMerger(28, 8, norm=kind)), pixels=(24, 8),
    )  # fmt: skip


def _qwen3(after: bool, kind: str) -> Callable[[Any, Any], nn.Module]:
    def build(m: Any, c: Any) -> nn.Module:
        config = getattr(c, f"{kind}VisionConfig")(
            hidden_size=8, spatial_merge_size=2, out_hidden_size=28
        )
        return getattr(m, f"{kind}VisionPatchMerger")(config, use_postshuffle_norm=after)

    return build


def qwen3_name(name: str) -> str:
    names = {"norm": "ln_q", "linear_fc1": "mlp.0", "linear_fc2": "mlp.2"}
    part, _, rest = name.partition(".")
    return f"{names[part]}.{rest}"


for folder, kind in (("qwen3_vl", "Qwen3VL"), ("qwen3_5", "Qwen3_5")):
    for after in (False, True):
        row(
            f"{folder}.{kind}VisionPatchMerger", _qwen3(after, kind),
            through(lambda after=after: ours.PatchMerger(28, 8, norm_after=after), rename=qwen3_name),
            pixels=(24, 8), note="after" if after else "",
        )  # fmt: skip


def _internvl(m: Any, c: Any) -> nn.Module:
    config = c.InternVLConfig(
        vision_config={"hidden_size": 8}, text_config={"model_type": "qwen2", "hidden_size": 32}
    )
    return m.InternVLMultiModalProjector(config)


def _internvl_theirs(module: Any, x: torch.Tensor) -> torch.Tensor:
    models = importlib.import_module("transformers.models.internvl.modeling_internvl")
    merged = models.InternVLModel.pixel_shuffle(None, x, 0.5)
    return module(merged.flatten(1, 2))


def _mlp_after_norm(module: Any, x: torch.Tensor, **merge: Any) -> torch.Tensor:
    norm = getattr(module, "layer_norm", None) or getattr(module, "layernorm", None)
    norm = None if norm is None else _layer(norm)
    x = mmkernels.patch_merge(x, 2, norm=norm, norm_after=norm is not None, **merge)
    return module.linear_2(module.act(module.linear_1(x)))


row(
    "internvl.InternVLMultiModalProjector",
    _internvl,
    _mlp_after_norm,
    pixels=(2, 4, 6, 8),
    theirs=_internvl_theirs,
)


def _swiglu(module: Any, x: torch.Tensor) -> torch.Tensor:
    norm = getattr(module, "layernorm", None)
    norm = None if norm is None else _layer(norm)
    x = mmkernels.patch_merge(x.unflatten(1, (4, 4)), 2, norm=norm, norm_after=norm is not None)
    x = x.unflatten(1, (2, 2))  # as theirs: sums over the rows round alike
    up, gate = module.linear_1(x).chunk(2, -1)
    return module.linear_2(module.act(gate) * up)


for folder, kind in (("cohere2_vision", "Cohere2Vision"), ("aya_vision", "AyaVision")):
    row(
        f"{folder}.{kind}MultiModalProjector",
        lambda m, c, kind=kind: getattr(m, f"{kind}MultiModalProjector")(
            getattr(c, f"{kind}Config")(
                vision_config={"model_type": "siglip_vision_model", "hidden_size": 8},
                text_config={"model_type": "cohere2", "hidden_size": 32}, alignment_intermediate_size=24,
            )
        ), _swiglu, pixels=(2, 16, 8), theirs=lambda m, x: m(x).flatten(1, 2),
    )  # fmt: skip

row(
    "lfm2_vl.Lfm2VlMultiModalProjector",
    lambda m, c: m.Lfm2VlMultiModalProjector(
        c.Lfm2VlConfig(
            vision_config={"model_type": "siglip2_vision_model", "hidden_size": 8},
            text_config={"model_type": "lfm2", "hidden_size": 32}, projector_hidden_size=20,
        )
    ), _mlp_after_norm, pixels=(2, 4, 6, 8), theirs=lambda m, x: m(x).flatten(1, 2),
)  # fmt: skip

for folder, kind in (("idefics3", "Idefics3"), ("smolvlm", "SmolVLM")):
    row(
        f"{folder}.{kind}Connector",
        lambda m, c, kind=kind: getattr(m, f"{kind}Connector")(
            getattr(c, f"{kind}Config")(
                vision_config={"hidden_size": 8}, text_config={"model_type": "llama", "hidden_size": 32}
            )
        ),
        lambda m, x: m.modality_projection(mmkernels.patch_merge(x.unflatten(1, (4, 4)), 2)), pixels=(2, 16, 8),
    )  # fmt: skip

GRIDS = [[1, 4, 6], [1, 2, 4]]
row(
    "mistral3.Mistral3PatchMerger",
    lambda m, c: m.Mistral3PatchMerger(
        c.Mistral3Config(
            vision_config={"model_type": "pixtral", "hidden_size": 8, "patch_size": 14},
            text_config={"model_type": "mistral", "hidden_size": 32}, spatial_merge_size=2,
        )
    ),
    lambda m, x: m.merging_layer(mmkernels.patch_merge(x, 2, grid_thw=GRIDS, order="ckk")), pixels=(32, 8),
    theirs=lambda m, x: m(x, torch.tensor([[h * 14, w * 14] for _, h, w in GRIDS])),
)  # fmt: skip

CLIPS = torch.tensor([[1, 4, 6], [2, 2, 4]])


def _paddle_ours(module: Any, x: torch.Tensor) -> torch.Tensor:
    x = mmkernels.patch_merge(x, 2, grid_thw=CLIPS, norm=_layer(module.pre_norm))
    # Image by image as theirs: the gradient of a bias is then the same sum.
    images = x.split((CLIPS.prod(1) // 4).tolist())
    return torch.cat([module.linear_2(module.act(module.linear_1(i))) for i in images])


row(
    "paddleocr_vl.PaddleOCRProjector",
    lambda m, c: m.PaddleOCRProjector(
        c.PaddleOCRVLConfig(vision_config={"hidden_size": 8}, text_config={"hidden_size": 32})
    ), _paddle_ours, pixels=(40, 8), theirs=lambda m, x: m(x, CLIPS),
)  # fmt: skip

row(
    "llama4.Llama4VisionPixelShuffleMLP",
    lambda m, c: m.Llama4VisionPixelShuffleMLP(
        c.Llama4VisionConfig(
            hidden_size=8, intermediate_size=32, projector_input_dim=20, projector_output_dim=20,
            pixel_shuffle_ratio=0.5,
        )
    ),
    lambda m, x: m.mlp(mmkernels.patch_merge(x.unflatten(1, (4, 4)), 2)), pixels=(2, 16, 8),
)  # fmt: skip


class Downsample(nn.Module):
    """GLM-4V's, a layer of ``Glm4vVisionModel``."""

    def __init__(self) -> None:
        super().__init__()
        self.downsample = nn.Conv2d(8, 28, 2, 2)


row(
    "glm4v.Glm4vVisionModel", lambda m, c: Downsample(),
    lambda m, x: F.linear(
        mmkernels.patch_merge(x, 2, blocks=True, order="ckk"), m.downsample.weight.flatten(1), m.downsample.bias
    ), pixels=(24, 8), note="downsample",
    theirs=lambda m, x: m.downsample(x.view(-1, 2, 2, 8).permute(0, 3, 1, 2)).flatten(1),
)  # fmt: skip
