# SPDX-License-Identifier: Apache-2.0
"""``generate`` with keys and values in pages.

The row takes the place of the method in which ``generate`` makes its cache. Every choice is left to transformers. Only
a ``DynamicCache`` all of whose layers keep every token becomes a ``PagedCache``, which holds what that one would.
"""

import inspect
from typing import Any

from torch import nn

from mmkernels.hf.row import Found, class_of

METHOD = "_prepare_cache_for_generation"
NAMES = ("cache", "past_key_values")  # the second before transformers 5.24
PAGE_SIZE = 16


def pages(module: nn.Module) -> Found | str | None:
    """A decoder of transformers all of whose layers attend to everything before."""
    config: Any = getattr(module, "config", None)
    if not inspect.isfunction(getattr(class_of(module), "generate", None)) or config is None:
        return None
    from transformers import GenerationMixin

    method = getattr(class_of(module), METHOD, None)
    if method is None or method is not getattr(GenerationMixin, METHOD, None):
        return "makes a cache of its own"
    try:
        return _unfit(module) or Found("paged cache", _prepare, None, method=METHOD)
    except Exception as error:  # whatever a stranger's config raises
        return f"its cache cannot be told: {type(error).__name__}: {error}".splitlines()[0]


def _unfit(module: Any) -> str:
    """Why ``generate`` would not make a ``DynamicCache`` that pages can stand for; empty: it would."""
    from transformers.cache_utils import DynamicCache

    if getattr(module.config, "is_encoder_decoder", False):
        return "is an encoder and decoder"
    if not module._supports_default_dynamic_cache():
        return "makes a cache of its own"
    text = module.config.get_text_config(decoder=True)
    if _plain(DynamicCache(config=text)):
        return ""
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    return f"has layers of {sorted(kinds - {'full_attention'})}"


def _plain(cache: Any) -> bool:
    """A ``DynamicCache`` on the model's own devices, of layers that keep every token."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = {type(layer) for layer in getattr(cache, "layers", ())}
    return type(cache) is DynamicCache and layers == {DynamicLayer} and not cache.offloading


def _prepare(module: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    """As the method, which writes the cache among the model's arguments."""
    arguments = inspect.signature(original).bind(*args, **kwargs).arguments["model_kwargs"]
    given = [arguments.get(name) for name in NAMES]
    original(*args, **kwargs)
    for name, before in zip(NAMES, given, strict=True):
        made = arguments.get(name)
        if made is before or not _plain(made):
            continue
        from mmkernels.cache import hf
        from mmkernels.cache.pool import LayerwisePages

        text = module.config.get_text_config(decoder=True)
        pool = LayerwisePages(None, PAGE_SIZE, len(made.layers))
        arguments[name] = hf.PagedCache(pool, gather=text._attn_implementation != hf.NAME)
