# SPDX-License-Identifier: Apache-2.0
"""``patch(model, cache=True)``: the tokens of the unpatched model, however ``generate`` is asked; else left alone."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers as tf

import mmkernels
from mmkernels.cache.hf import PagedCache
from mmkernels.hf.generation import pages
from mmkernels.hf.row import Found

VOCAB = 99
IMAGE = 98
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip


def built(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().eval()
    for part in model.modules():
        if getattr(part, "generation_config", None) is not None:
            part.generation_config.eos_token_id = None
            part.generation_config.pad_token_id = 0
    return model


def llama() -> Any:
    return built(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2)))


def prompt(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def paged(model: Any, served: bool | None = True) -> Iterator[list[Any]]:
    """Patched; gives the caches of pages that ``generate`` made, and sees that there were some."""
    made = []
    start = PagedCache.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        made.append(self)

    PagedCache.__init__ = init  # type: ignore[method-assign]
    try:
        with mmkernels.patch(model, cache=True):
            yield made
    finally:
        PagedCache.__init__ = start  # type: ignore[method-assign]
    assert served is None or bool(made) == served


def same(model: Any, served: bool | None = True, seed: int = 3, **kwargs: Any) -> None:
    options = {"max_new_tokens": 8, "do_sample": False, **kwargs}

    def tokens() -> Any:
        torch.manual_seed(seed)
        return model.generate(**{k: copy.deepcopy(v) for k, v in options.items()})

    expected = tokens()
    with paged(model, served):
        assert torch.equal(tokens(), expected)


def test_pages_are_of_the_keys_dtype() -> None:
    """The vision tower in another dtype than the language model."""
    ids = torch.tensor([[1, 5, *[IMAGE] * 4, 7, 8]])
    language, vision = ("language_model", "lm_head"), ("vision_tower", "multi_modal_projector")
    for halves in (language, vision):
        config = tf.LlavaConfig(
            vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**SIZES),
            image_token_index=IMAGE, image_token_id=IMAGE,
        )  # fmt: skip
        model = built(lambda config=config: tf.LlavaForConditionalGeneration(config))
        for name in halves:
            model.get_submodule(name if name == "lm_head" else f"model.{name}").bfloat16()
        dtype = next(model.model.vision_tower.parameters()).dtype
        same(model, input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32).to(dtype))


def test_a_chat_goes_on_over_the_cache_it_got() -> None:
    model = llama()
    settings = {"max_new_tokens": 20, "return_dict_in_generate": True, "do_sample": False}

    def chat() -> torch.Tensor:
        ids, cache = prompt(1, 9), {}
        for turn in range(6):
            out = model.generate(ids, **cache, **settings)
            name = "cache" if "cache" in out else "past_key_values"
            ids = torch.cat([out.sequences, prompt(1, 7, seed=turn)], 1)
            cache = {name: out[name]}
        assert ids.shape[1] > 150
        return ids

    expected = chat()
    with paged(model) as made:
        assert torch.equal(chat(), expected)
    assert len(made) == 1


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "lora"])
def test_with_peft(kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=40),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=40),
        "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=40),
        "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    }[kind]()
    model = built(lambda: peft.get_peft_model(llama(), config))
    ids = prompt(2, 9)
    same(model, input_ids=ids, attention_mask=torch.ones_like(ids))


def blip2() -> tuple[Any, dict[str, Any]]:
    qformer = {"vocab_size": VOCAB, "encoder_hidden_size": 32, "cross_attention_frequency": 1}
    qformer |= {k: VISION[k] for k in list(VISION)[:4]}
    text = tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=37, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**VISION), qformer_config=tf.Blip2QFormerConfig(**qformer),
        text_config=text, num_query_tokens=4, image_token_id=IMAGE, image_token_index=IMAGE,
    )  # fmt: skip
    ids = prompt(2, 9)
    ids[:, :4] = IMAGE
    return built(lambda: tf.Blip2ForConditionalGeneration(config)), {"input_ids": ids}


def kosmos2() -> tuple[Any, dict[str, Any]]:
    text = {"embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 37}
    text |= {k: SIZES[k] for k in SIZES if not k.startswith(("hidden", "num", "inter"))}
    config = tf.Kosmos2Config(vision_config=VISION, text_config=text, latent_query_num=4)
    ids = prompt(2, 9)
    places = torch.zeros_like(ids)
    places[:, 1:5] = 1
    inputs = {"input_ids": ids, "image_embeds_position_mask": places}
    inputs["attention_mask"] = torch.ones_like(ids)
    return built(lambda: tf.Kosmos2ForConditionalGeneration(config)), inputs


def blip() -> tuple[Any, dict[str, Any]]:
    text = {**SIZES, "encoder_hidden_size": 32, "is_decoder": True, "sep_token_id": 2}
    config = tf.BlipConfig(vision_config=VISION, text_config=text)
    return built(lambda: tf.BlipForConditionalGeneration(config)), {"input_ids": prompt(2, 5)}


def git() -> tuple[Any, dict[str, Any]]:
    config = tf.GitConfig(vision_config=VISION, **SIZES)
    return built(lambda: tf.GitForCausalLM(config)), {"input_ids": prompt(2, 5)}


@pytest.mark.parametrize("make", [blip2, kosmos2, blip, git])
def test_a_generate_of_its_own_signature(make: Any) -> None:
    model, inputs = make()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    same(model, pixel_values=pixels, **inputs)


def mllama() -> tuple[Any, dict[str, Any]]:
    ratios = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    vision = {
        "image_size": 30, "patch_size": 2, "num_channels": 3, "hidden_size": 16, "intermediate_layers_indices": [0],
        "vision_output_dim": 32, "projection_dim": 32, "num_hidden_layers": 2, "num_global_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 37, "supported_aspect_ratios": ratios, "max_num_tiles": 4,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {
        **SIZES,
        "num_key_value_heads": 4,
        "rope_parameters": rope,
        "cross_attention_layers": [1],
    }
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=4)
    ids = prompt(2, 9)
    ids[:, 0] = 4
    g = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 4, 3, 30, 30, generator=g), "aspect_ratio_ids": torch.full((2, 1), 6),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 9, 1, 4, dtype=torch.long),
    }  # fmt: skip
    return built(lambda: tf.MllamaForConditionalGeneration(config)), inputs


@pytest.mark.parametrize("beams", [1, 3])
def test_layers_with_the_keys_of_an_image(beams: int) -> None:
    """They keep them beside the pages, which hold the text's."""
    model, inputs = mllama()
    same(model, **inputs, num_beams=beams)
    with paged(model) as made:
        out = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
    (cache,) = made
    assert [layer.paged for layer in cache.layers] == [True, False]
    assert len(cache.pages.pages(cache.sequences[0])) == 1 and out.sequences.shape[1] <= 17


def test_keys_wider_than_values() -> None:
    """Multi-head latent attention."""
    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    config = tf.DeepseekV3Config(
        **sizes, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1,
    )  # fmt: skip
    model = built(lambda: tf.DeepseekV3ForCausalLM(config))
    for beams in (1, 2):
        same(model, inputs=prompt(2, 20), num_beams=beams)
    model.set_attn_implementation("mmkernels_paged")
    same(model, inputs=prompt(1, 20))
    same(model, inputs=prompt(2, 20))


def test_the_attention_changes_while_a_cache_lives() -> None:
    """Keys of pages are gathered when another attention reads them."""
    model, ids = llama(), prompt(2, 20)
    model.set_attn_implementation("mmkernels_paged")
    tokens = []
    for cache in (PagedCache.from_config(model.config), tf.DynamicCache()):
        with torch.no_grad():
            model(ids, past_key_values=cache)
        model.set_attn_implementation("sdpa")
        options = {"max_new_tokens": 8, "do_sample": False, "past_key_values": cache}
        tokens.append(model.generate(torch.cat([ids, prompt(2, 3)], 1), **options))
    assert torch.equal(*tokens)


PADDED = {"input_ids": prompt(3, 19), "attention_mask": torch.ones(3, 19, dtype=torch.long)}
PADDED["attention_mask"][1, :7] = PADDED["input_ids"][1, :7] = 0
REPEATED = torch.cat([prompt(1, 6)] * 3, 1)
LOOKUP = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30, "eos_token_id": 2}
HOW: dict[str, tuple[bool | None, dict[str, Any]]] = {  # None: served since some release

    "by keyword": (True, {"input_ids": prompt(2, 5)}),
    "left padding": (True, PADDED),
    "beams": (True, {**PADDED, "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 40}),
    "sampling": (True, {**PADDED, "do_sample": True, "temperature": 1.5, "num_return_sequences": 3}),
    "sampling beams": (True, {**PADDED, "do_sample": True, "num_beams": 3}),
    "max_length": (True, {"input_ids": prompt(2, 31), "max_new_tokens": None, "max_length": 70}),
    "no length": (True, {"input_ids": prompt(2, 9), "max_new_tokens": None}),
    "embeddings": (True, {"inputs_embeds": torch.randn(2, 9, 32)}),
    "prompt lookup": (None, {"input_ids": REPEATED, **LOOKUP}),
    "chunked prefill": (True, {"input_ids": prompt(1, 40), "prefill_chunk_size": 7}),
    "nothing": (True, {}),
    "no cache": (False, {**PADDED, "use_cache": False}),
    "static": (False, {**PADDED, "cache_implementation": "static", "disable_compile": True}),
    "dynamic": (True, {**PADDED, "cache_implementation": "dynamic"}),
    "its own": (False, {**PADDED, "past_key_values": tf.DynamicCache()}),
}  # fmt: skip


@pytest.mark.parametrize("how", HOW)
def test_however_generate_is_asked(how: str) -> None:
    served, options = HOW[how]
    same(llama(), served, **options)


def test_assisted_generation() -> None:
    """The candidates that are refused are cropped."""
    model, assistant = llama(), llama()
    with torch.no_grad():
        for p in assistant.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    expected = model.generate(prompt(1, 9), assistant_model=assistant, max_new_tokens=40)
    with mmkernels.patch(model, cache=True), mmkernels.patch(assistant, cache=True):
        got = model.generate(prompt(1, 9), assistant_model=assistant, max_new_tokens=40)
    assert torch.equal(got, expected)


def test_by_position_and_a_changed_signature() -> None:
    model = llama()
    settings = copy.deepcopy(model.generation_config)
    settings.update(max_new_tokens=9, do_sample=False)
    expected = model.generate(prompt(2, 9), settings)
    with paged(model):
        assert torch.equal(model.generate(prompt(2, 9), settings), expected)
        assert torch.equal(model.generate(prompt(2, 9), generation_config=settings), expected)


def test_two_threads_are_independent() -> None:
    model = llama()
    prompts = [prompt(2, 9 + 20 * i, seed=i) for i in range(4)]
    expected = [model.generate(p, max_new_tokens=40, do_sample=False) for p in prompts]
    got: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        got[i] = model.generate(prompts[i], max_new_tokens=40, do_sample=False)

    with paged(model) as made:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(4))
    assert len({id(cache.pages.pool) for cache in made}) == 4


def test_memory_is_that_of_the_pages_in_use() -> None:
    """Not of ``max_length``."""
    model = llama()
    with paged(model) as made:
        model.generate(prompt(1, 100), max_length=250, stopping_criteria=[Stop(105)])
    pool = made[0].pages.pool
    assert pool.num_pages - pool.num_free == 7 and pool.num_pages <= 8
    assert all(len(cache) == pool.num_pages for cache in pool.key_cache + pool.value_cache)


class Stop(tf.StoppingCriteria):  # type: ignore[misc]
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_cache_goes_when_generate_is_done() -> None:
    """At once, not at the next collection of cycles."""
    model = llama()
    gc.collect()
    gc.disable()
    try:
        with paged(model) as made:
            model.generate(prompt(1, 9), max_new_tokens=3)
            alive = weakref.ref(made[0])
            pool = made[0].pages.pool
            made[:] = [None]
            assert alive() is None and pool.num_free == pool.num_pages
    finally:
        gc.enable()


def lefts() -> dict[str, tuple[Any, str]]:
    window = tf.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    kinds = ["full_attention", "sliding_attention"]
    mixed = tf.Qwen2Config(**SIZES, layer_types=kinds, sliding_window=8, use_sliding_window=True)
    t5 = tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    mamba = tf.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)
    return {
        "window": (tf.MistralForCausalLM(window), "has layers of"),
        "mixed": (tf.Qwen2ForCausalLM(mixed), r"has layers of \['sliding_attention'\]"),
        "encoder and decoder": (tf.T5ForConditionalGeneration(t5), "is an encoder and decoder"),
        "states": (tf.MambaForCausalLM(mamba), "makes a cache of its own|has layers of"),
        "own": (Own(tf.LlamaConfig(**SIZES)), "makes a cache of its own"),
    }


class Own(tf.LlamaForCausalLM):  # type: ignore[misc]
    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return super()._prepare_cache_for_generation(*args, **kwargs)


@pytest.mark.parametrize("name", ["window", "mixed", "encoder and decoder", "states", "own"])
def test_left_alone_with_a_reason(name: str) -> None:
    model, reason = lefts()[name]
    with pytest.raises(mmkernels.NothingToPatch, match=reason):
        mmkernels.patch(model, cache=True)
    found = pages(model)
    assert isinstance(found, str)


def test_looking_never_raises() -> None:
    """On meta, without a generation_config, with a config that does not answer, inside DataParallel."""
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES))
    assert isinstance(pages(model), Found)
    model = llama()
    del model.generation_config
    assert isinstance(pages(model), Found)
    model.config.get_text_config = None
    assert isinstance(pages(model), str)
    for config in (None, object(), {}):
        model = llama()
        model.config = config
        assert not isinstance(pages(model), Found)
    inner = llama()
    expected = inner.generate(prompt(1, 9), max_new_tokens=3, do_sample=False)
    with mmkernels.patch(torch.nn.DataParallel(inner), cache=True) as handle:
        assert torch.equal(
            inner.generate(prompt(1, 9), max_new_tokens=3, do_sample=False), expected
        )
        assert any(line.op == "paged cache" for line in handle.lines)


def test_no_weight_is_looked_at() -> None:
    """A quantised or offloaded model is recognised as any other."""
    model = llama()
    for module in model.modules():
        module._parameters.clear()
    assert isinstance(pages(model), Found)
