# SPDX-License-Identifier: Apache-2.0
"""``generate`` with keys and values in pages."""

import inspect
from typing import Any

import torch
from torch import nn

from mmkernels.hf.row import Found

PAGE_SIZE = 16


def pages(module: nn.Module) -> Found | str | None:
    """A decoder of transformers all of whose layers attend to everything before."""
    if not inspect.isfunction(getattr(type(module), "generate", None)) or not hasattr(
        module, "config"
    ):
        return None
    if getattr(module.config, "is_encoder_decoder", False):
        return "is an encoder and decoder"
    config: Any = module.config
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"has layers of {sorted(kinds - {'full_attention'})}"
    return Found("paged cache", _generate, None, method="generate")


def _generate(
    module: Any,
    original: Any,
    inputs: torch.Tensor | None = None,
    generation_config: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """As ``generate``; a call that brings or names a cache, or wants none, goes through untouched."""
    from mmkernels.cache.hf import PagedCache

    given = next(
        (
            t
            for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            if t is not None
        ),
        None,
    )
    settings = generation_config or module.generation_config

    def setting(name: str, default: Any) -> Any:
        return kwargs.get(name) or getattr(settings, name, None) or default

    brought = any(kwargs.get(name) is not None for name in ("past_key_values", "cache"))
    named = setting("cache_implementation", None)
    if given is None or brought or named or kwargs.get("use_cache", settings.use_cache) is False:
        return original(inputs, generation_config, *args, **kwargs)
    longest = given.shape[1] + (
        setting("max_new_tokens", 0) or max(0, setting("max_length", 20) - given.shape[1])
    )
    rows = len(given) * max(setting("num_beams", 1), setting("num_return_sequences", 1))
    num_pages = 2 * rows * -(-longest // PAGE_SIZE)  # beams hold old and new ones for a moment
    weight = next(module.parameters())
    cache = PagedCache.from_config(module.config, num_pages, PAGE_SIZE, weight.dtype, weight.device)
    takes = inspect.signature(type(module).forward).parameters
    name = "cache" if "cache" in takes else "past_key_values"  # since 5.24
    return original(inputs, generation_config, *args, **{name: cache}, **kwargs)
