# SPDX-License-Identifier: Apache-2.0
"""An MM-LLM from models of transformers: ``from_parts(vision=folder, llm=folder, projector=blocks)``."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmkernels.models.config import Block, DecoderConfig, MMConfig, TransformersVisionConfig
from mmkernels.models.mmllm import MMLLM

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
}  # fmt: skip
_SAME_NAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip
HALF = (0.5, 0.5, 0.5)


def from_parts(
    vision: str | Path | Any,
    llm: str | Path | Any,
    projector: Sequence[Block],
    *,
    layer: int = -2,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> MMLLM:
    """A model whose encoder and decoder have the weights of others, and a projector that is new.

    Args:
        vision: CLIP or SigLIP vision tower: a folder of safetensors or a ``PreTrainedModel``.
        llm: Llama, Qwen2 or Qwen3 for causal LM, likewise; of a folder with a tokenizer that is taken too.
        projector: Blocks from the tower's width to the language model's.
        layer: Of the tower's hidden states.
        image_mean, image_std: Default: of the folder's ``preprocessor_config.json``, else 0.5.

    Raises:
        ValueError: A model of another kind, or with a part (scaled RoPE, sliding windows) that is not built here; no
            such folder, or none of safetensors.
    """
    from transformers import AutoModel, AutoModelForCausalLM

    folder = vision if isinstance(vision, str | Path) else None
    found = json.loads(_preprocessor(folder)) if folder else {}
    tower = _loaded("vision", AutoModel, vision)
    language = _loaded("llm", AutoModelForCausalLM, llm)
    config = MMConfig(
        encoders={
            "image": TransformersVisionConfig(
                config=_tower_config(tower), layer=layer,
                image_mean=tuple(image_mean or found.get("image_mean", HALF)),
                image_std=tuple(image_std or found.get("image_std", HALF)),
            )
        },
        projectors={"image": tuple(projector)},
        decoder=decoder_config(language.config),
        tokenizer=_tokenizer_folder(llm),
    )  # fmt: skip
    model = MMLLM(config)
    model.encoders["image"].model.load_state_dict(tower.state_dict())  # type: ignore[union-attr]
    model.language_model.load_state_dict(language.state_dict())
    return model.to(language.dtype)


def _loaded(argument: str, kind: Any, model: str | Path | Any) -> Any:
    """A model, or what safetensors of this machine say: nothing is fetched, unpickled or run."""
    from transformers import AutoConfig

    if not isinstance(model, str | Path):
        return model
    path = Path(model)
    if not path.is_dir():
        raise ValueError(f"{argument}: must be a folder or a PreTrainedModel, no folder {path}")
    if any(path.glob("adapter_*")):  # transformers would look for its model elsewhere, and unpickle
        raise ValueError(f"{argument}: {path} has an adapter; merge it into its model first")
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **here)
        config._attn_implementation = "eager"  # it could name a kernel of the hub
        return kind.from_pretrained(path, config=config, use_safetensors=True, **here)
    except (OSError, ValueError) as error:
        raise ValueError(f"{argument}: {path}: {' '.join(str(error).split())}") from error


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder's sizes, of a config of transformers."""
    if config.model_type not in DECODERS:
        raise ValueError(
            f"llm: model_type must be one of {list(DECODERS)}, got {config.model_type!r}"
        )
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"llm: rope_type must be 'default', got {rope['rope_type']!r}")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError("llm: every layer must be full_attention, some have a sliding window")
    if config.model_type != "qwen2" and getattr(config, "attention_bias", False):
        raise ValueError(f"llm: attention_bias must be False in {config.model_type}")
    for name, built in {"hidden_act": "silu", "mlp_bias": False}.items():
        if getattr(config, name, built) != built:
            raise ValueError(f"llm: {name} must be {built!r}, got {getattr(config, name)!r}")
    if (turned := rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"llm: partial_rotary_factor must be 1.0, got {turned}")
    same = {name: getattr(config, name) for name in _SAME_NAME}
    head_dim = getattr(config, "head_dim", None) or 0
    made = DecoderConfig(**same, rope_theta=rope["rope_theta"], head_dim=head_dim)
    return replace(made, **DECODERS[config.model_type])


def _tower_config(tower: Any) -> str:
    values = tower.config.to_diff_dict()
    return json.dumps({**values, "model_type": tower.config.model_type}, sort_keys=True)


def _preprocessor(folder: str | Path) -> str:
    path = Path(folder) / "preprocessor_config.json"
    return path.read_text() if path.exists() else "{}"


def _tokenizer_folder(llm: Any) -> str:
    """Empty: bytes."""
    known = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    is_folder = isinstance(llm, str | Path) and any((Path(llm) / name).exists() for name in known)
    return str(llm) if is_folder else ""
