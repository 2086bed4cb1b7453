# SPDX-License-Identifier: Apache-2.0
"""PagedCache in transformers' generate: the tokens and logits DynamicCache gives, and no page is lost."""

import copy
import pickle
import random
import threading
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mmkernels.cache import OutOfPages, PagePool
from mmkernels.cache.hf import PagedCache
from mmkernels.cache.pool import LayerwisePages
from mmkernels.testing import which_kernel_ran

VOCAB = 99


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def qwen2_vl() -> Any:
    text = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=3, video_token_id=4,
        vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def with_image() -> dict[str, torch.Tensor]:
    """Two samples of 4 image tokens (an image of 4×4 patches merged 2×2)."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCAB, (2, 12), generator=g)
    ids[:, 2], ids[:, 3:7], ids[:, 7] = 5, 3, 6
    pixels = torch.randn(32, 3 * 2 * 14 * 14, generator=g)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    kinds = (ids == 3).int()
    return {
        **inputs,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": kinds,
    }


def text(B: int = 3) -> dict[str, torch.Tensor]:
    """Padded left: samples of 9, 8 and 7 tokens."""
    ids = torch.randint(10, VOCAB, (B, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for b in range(B):
        ids[b, :b], mask[b, :b] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **options: Any) -> Any:
    options = {
        "max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options,
    }  # fmt: skip
    with torch.no_grad():
        return model.generate(
            **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
        )  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["llama", "qwen2_vl"])
def test_the_tokens_of_a_dynamic_cache(name: str, page_size: int) -> None:
    model = llama() if name == "llama" else qwen2_vl()
    inputs = text() if name == "llama" else with_image()
    cache = PagedCache.from_config(model.config, 128, page_size)
    got, expected = generated(model, inputs, cache), generated(model, inputs, DynamicCache())
    assert torch.equal(got.sequences, expected.sequences)
    assert all(
        torch.equal(a, b) for a, b in zip(got.logits, expected.logits, strict=True)
    )  # the same keys and values go into the same attention
    assert len(set(got.sequences[0].tolist())) > 3
    pool = cache.pages.pool
    B, length = got.sequences.shape
    assert pool.num_free == 128 - B * -(-(length - 1) // page_size)
    cache.reset()
    assert pool.num_free == 128
    assert torch.equal(generated(model, inputs, cache).sequences, expected.sequences)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2_vl"])
def test_attention_reads_the_pages(name: str, padded: bool) -> None:
    model = llama() if name == "llama" else qwen2_vl()
    inputs = text(3 if padded else 1) if name == "llama" else with_image()
    if padded and name == "qwen2_vl":
        inputs["attention_mask"][0, 0] = 0
    expected = generated(model, inputs, DynamicCache())
    model.set_attn_implementation("mmkernels_paged")
    cache = PagedCache.from_config(model.config, 128, 4)
    with which_kernel_ran() as ran:
        got = generated(model, inputs, cache)
    assert ("paged_attention" in ran) != padded  # a mask goes to SDPA
    assert torch.equal(got.sequences, expected.sequences)
    for a, b in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b)


def test_beams_share_pages() -> None:
    model, inputs = llama(), text(2)
    cache = PagedCache.from_config(model.config, 60, 4)
    got = generated(model, inputs, cache, num_beams=3)
    expected = generated(model, inputs, DynamicCache(), num_beams=3)
    assert torch.equal(got.sequences, expected.sequences)
    pool = cache.pages.pool
    assert 60 - pool.num_free < 6 * -(-(got.sequences.shape[1] - 1) // 4)
    cache.reset()
    assert pool.num_free == 60


def test_crop_and_go_on() -> None:
    model, inputs = llama(), text(1)["input_ids"]
    paged, dynamic = PagedCache.from_config(model.config, 20, 4), DynamicCache()
    for cache in (paged, dynamic):
        with torch.no_grad():
            model(inputs, past_key_values=cache)
        cache.crop(-5)
    assert paged.get_seq_length() == dynamic.get_seq_length() == 4
    assert 20 - paged.pages.pool.num_free == 1
    with torch.no_grad():
        a, b = (model(inputs[:, :3], past_key_values=c).logits for c in (paged, dynamic))
    assert torch.equal(a, b)


def test_a_prompt_too_long_raises_and_leaves_the_pages() -> None:
    model = llama()
    cache = PagedCache.from_config(model.config, 5, 4)
    with pytest.raises(OutOfPages, match="9 pages requested, 5 are free"):
        generated(model, text(), cache)
    assert cache.pages.pool.num_free == 5


def test_sliding_windows_are_refused() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=2, layer_types=kinds)
    with pytest.raises(ValueError, match="every layer must be full_attention"):
        PagedCache.from_config(config, 4)


LAYERS = ((2, 8, 8), (1, 6, 4), (2, 8, 8))  # heads, width of a key, of a value


class Beside:
    """A ``PagedCache`` and a ``DynamicCache`` that are told the same."""

    def __init__(self, paged: PagedCache, dynamic: DynamicCache) -> None:
        self.both = paged, dynamic

    def step(self, r: random.Random, g: torch.Generator) -> None:
        """New tokens to all layers; now and then to one of them others, or none, as cross-attention has it."""
        new = r.choice((1, 1, 1, 3, 9))
        for i, (heads, d_key, d_value) in enumerate(LAYERS):
            count = r.choice((new, new, new, new, 5, 0)) if i == 2 else new
            if count == 0:
                continue
            key, value = (
                torch.randn(self.batch, heads, count, d, generator=g) for d in (d_key, d_value)
            )
            paged, dynamic = (cache.update(key, value, i) for cache in self.both)
            assert all(torch.equal(a, b) for a, b in zip(paged, dynamic, strict=True))

    @property
    def batch(self) -> int:
        keys = self.both[1].layers[0].keys
        return 2 if keys is None or keys.dim() < 4 else len(keys)

    def change(self, r: random.Random) -> None:
        n = self.batch
        rows = torch.tensor([r.randrange(n) for _ in range(r.choice((1, n)))])
        same = torch.tensor([r.randrange(n) for _ in range(n)])
        resets = "reset" in vars(DynamicLayer)  # of earlier releases keeps the length
        name, argument = r.choice(
            [
                ("crop", -r.randrange(4)), ("crop", 0), ("reorder_cache", same),
                ("reset", None) if resets else ("crop", -1),
                ("batch_select_indices", rows), ("batch_repeat_interleave", 2 if n < 4 else 1),
            ]
        )  # fmt: skip
        layers = self.both[1].layers
        if any(la.is_initialized and la.get_seq_length() == 0 for la in layers) and name != "reset":
            return  # a layer without tokens keeps its number of rows, the others do not
        for cache in self.both:
            getattr(cache, name)(*([] if argument is None else [argument]))

    def check(self) -> None:
        paged, dynamic = self.both
        assert [la.get_seq_length() for la in paged.layers] == [
            la.get_seq_length() for la in dynamic.layers
        ]
        assert len(paged) == len(dynamic) and paged.is_initialized == dynamic.is_initialized
        for ours, theirs in zip(paged, dynamic, strict=True):
            for a, b in zip(ours[:2], theirs[:2], strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a.shape == b.shape and torch.equal(a, b))

    def copied(self) -> "Beside":
        return Beside(*copy.deepcopy(self.both))


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_give_what_a_dynamic_cache_holds(seed: int) -> None:
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    pool = LayerwisePages(None, 4, len(LAYERS))
    dynamic = DynamicCache(config=llama().config)
    caches = [Beside(PagedCache(pool), dynamic)]
    for _ in range(150):
        cache = r.choice(caches)
        cache.step(r, g)
        if r.random() < 0.3:
            cache.change(r)
        if r.random() < 0.1:
            caches.append(cache.copied())
        if len(caches) > 4:
            del caches[r.randrange(len(caches))]
        for c in caches:
            c.check()
    del cache, c
    caches.clear()
    assert pool.num_free == pool.num_pages > 0


def step(cache: Any, new: int, batch: int = 1, seed: int = 0, **kind: Any) -> torch.Tensor:
    """The same keys and values for two layers; what one of them hands out."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, 2, new, 8, generator=g).to(**kind)
    cache.update(states, states, 0)
    keys: torch.Tensor = cache.update(states, states, 1)[0]
    return keys


def test_a_layer_told_to_change_alone_is_a_dynamic_layer() -> None:
    both = PagedCache(LayerwisePages(None, 4, 2)), DynamicCache()
    for cache in both:
        step(cache, 9, batch=2)
        cache.layers[1].crop(-3)
        cache.layers[0].reorder_cache(torch.tensor([1, 1]))
        cache.update(*[torch.ones(2, 2, 1, 8)] * 2, 1)
        cache.layers[0].keys = cache.layers[0].keys + 1
        step(cache, 1, batch=2)
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_copies_share_pages_and_give_them_back() -> None:
    pool = LayerwisePages(8, 4, 2)
    cache = PagedCache(pool)
    step(cache, 14)
    assert pool.num_free == 4
    copies = [copy.deepcopy(cache) for _ in range(3)]
    assert pool.num_free == 4
    before = cache.layers[0].keys
    for i, copied in enumerate(copies):
        step(copied, 2, seed=i + 1)
    assert pool.num_free == 1  # the last page, once for each
    assert torch.equal(cache.layers[0].keys, before)
    assert not torch.equal(copies[0].layers[1].values, copies[1].layers[1].values)
    del copies, copied
    assert pool.num_free == 4
    for i in range(20):
        step(copy.deepcopy(cache), 9, seed=i)
    assert pool.num_free == 4
    del cache
    assert pool.num_free == 8


def test_a_pool_is_not_copied() -> None:
    pool = PagePool(4, 4, 1, 2, 8, torch.float32)
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="PagePool: cannot be copied or pickled"):
            call(pool)


def test_a_pool_without_room_changes_nothing() -> None:
    for pool in (PagePool(3, 4, 2, 2, 8, torch.float32), LayerwisePages(3, 4, 2)):
        cache = PagedCache(pool)
        with pytest.raises(OutOfPages, match="4 pages requested, 3 are free"):
            step(cache, 5, batch=2)
        step(cache, 12)  # of another batch
        before = cache.layers[0].keys
        with pytest.raises(OutOfPages, match="1 pages requested, 0 are free"):
            step(cache, 1)
        assert cache.get_seq_length() == 12 and torch.equal(cache.layers[0].keys, before)
        with pytest.raises(ValueError, match="holds 1 sequences, got 2"):
            step(cache, 1, batch=2)
        cache.reset()
        with pytest.raises(
            ValueError, match=r"key_cache\[0\] holds heads of \[2, 8\], got \[2, 4\]"
        ):
            cache.update(*[torch.zeros(1, 2, 1, 4)] * 2, 0)
        assert pool.num_free == 3


def test_pages_grow_by_a_quarter() -> None:
    pool = LayerwisePages(None, 4, 2)
    cache = PagedCache(pool)
    step(cache, 400)
    assert pool.num_pages == 100
    for i in range(40):
        step(cache, 1, seed=i)
        used = pool.num_pages - pool.num_free
        assert used == -(-cache.get_seq_length() // 4) and pool.num_pages <= 1.25 * used
        assert all(len(c) == pool.num_pages for c in pool.key_cache + pool.value_cache)


def test_keys_of_two_dtypes() -> None:
    """As ``torch.cat`` has it; a pool of one dtype hands out that of the keys."""
    both = PagedCache(LayerwisePages(None, 4, 2)), DynamicCache()
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        for cache in both:
            step(cache, 3, seed=2, dtype=dtype)
        for ours, theirs in zip(*both, strict=True):
            assert ours[0].dtype == theirs[0].dtype and torch.equal(ours[0], theirs[0])
    half = PagedCache(PagePool(4, 4, 2, 2, 8, torch.bfloat16))
    step(half, 3)
    assert step(half, 1).dtype == torch.float32 and half.layers[0].keys.dtype == torch.bfloat16


def test_in_and_out_of_inference_mode() -> None:
    both = PagedCache(LayerwisePages(None, 4, 2)), DynamicCache()
    for cache in both:
        with torch.inference_mode():
            step(cache, 9)
        step(cache, 9, seed=1)
        with torch.inference_mode():
            step(cache, 9, seed=2)
    assert torch.equal(both[0].layers[0].keys, both[1].layers[0].keys)


def test_keys_with_a_gradient_keep_it() -> None:
    grads = []
    for cache in (PagedCache(LayerwisePages(None, 4, 2)), DynamicCache()):
        step(cache, 9)
        x = torch.ones(1, 2, 3, 8, requires_grad=True)
        for _ in range(2):
            key, _ = cache.update(x, x, 0)
        key.square().sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_copies_in_threads() -> None:
    """Pages move to larger memory while others are written: no row is lost."""
    cache = PagedCache(LayerwisePages(None, 4, 2))
    step(cache, 10)
    copies = [copy.deepcopy(cache) for _ in range(4)]

    def work(i: int) -> None:
        for n in range(60):
            step(copies[i], 1, seed=100 * i + n)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, copied in enumerate(copies):
        alone = DynamicCache()
        step(alone, 10)
        for n in range(60):
            step(alone, 1, seed=100 * i + n)
        assert torch.equal(copied.layers[1].values, alone.layers[1].values)


def test_one_prompt_and_many_questions() -> None:
    """The recipe of transformers' guide: fill a cache once, copy it for each question."""
    model, prompt = llama(), torch.arange(3, 33)[None]
    answers = []
    for cache in (PagedCache.from_config(model.config), DynamicCache()):
        with torch.no_grad():
            model(prompt, past_key_values=cache)
        for question in ([40, 41], [42, 43, 44]):
            ids = torch.cat([prompt, torch.tensor([question])], 1)
            answers.append(generated(model, {"input_ids": ids}, copy.deepcopy(cache)).sequences)
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
