# SPDX-License-Identifier: Apache-2.0
"""PagedCache in transformers' generate: the tokens and logits DynamicCache gives, and no page is lost."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers import DynamicCache

from mmkernels.cache import OutOfPages
from mmkernels.cache.hf import PagedCache
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
