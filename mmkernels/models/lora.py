# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters in the decoder, by peft: ``with_lora`` puts them in, ``merged`` takes them into the weights.

Source: LoRA (Hu et al. 2021).
"""

from dataclasses import replace

from mmkernels.models.config import MMConfig
from mmkernels.models.mmllm import MMLLM

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def with_lora(model: MMLLM, rank: int, targets: tuple[str, ...] = TARGETS) -> MMLLM:
    """A copy with adapters of ``rank`` at the named layers; it computes what ``model`` does until they learn."""
    if model.config.decoder.lora_rank:
        raise ValueError(f"lora: the model has adapters of rank {model.config.decoder.lora_rank}")
    new = MMLLM(_config(model, rank, targets)).to(model.language_model.lm_head.weight.dtype)
    adapted = {name for name, _ in new.named_parameters()}
    renamed = {_base(name, adapted): t for name, t in model.state_dict().items()}
    new.load_state_dict(renamed, strict=False)
    return new


def merged(model: MMLLM) -> MMLLM:
    """A copy without adapters whose weights are ``W + (α / rank) · B · A``, here with α = 2 rank."""
    new = MMLLM(_config(model, 0, ())).to(model.language_model.lm_head.weight.dtype)
    tensors = model.state_dict()
    plain = {n.replace(".base_layer", ""): t for n, t in tensors.items() if "lora_" not in n}
    for name, down in tensors.items():
        layer, found, rest = name.partition(".lora_A")
        if found:
            up = tensors[f"{layer}.lora_B{rest}"]
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + 2 * up @ down
    new.load_state_dict(plain)
    return new


def _config(model: MMLLM, rank: int, targets: tuple[str, ...]) -> MMConfig:
    decoder = replace(model.config.decoder, lora_rank=rank, lora_targets=targets)
    return replace(model.config, decoder=decoder)


def _base(name: str, adapted: set[str]) -> str:
    layer, _, leaf = name.rpartition(".")
    inner = f"{layer}.base_layer.{leaf}"
    return inner if inner in adapted else name
