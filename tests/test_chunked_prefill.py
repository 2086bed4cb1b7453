# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL's decoder through rope_write_kv and paged_attention: a prompt in chunks of any size, or after a shared
prefix that ends inside an image, gives what transformers' own forward gives at once."""

from typing import Any

import pytest
import torch
from against_transformers import InFp64
from packed_models import MODELS, Sample, samples

import mmkernels
from mmkernels.cache import PagedKVCache, PagePool

ENTRY = next(m for m in MODELS if m.kind.startswith("Qwen2VL"))


class Decoder:
    """The layers of ``model``'s text model over pages."""

    def __init__(self, model: Any, page_size: int) -> None:
        self.text, self.head = model.model.language_model, model.lm_head
        config = self.text.config
        self.d = config.hidden_size // config.num_attention_heads
        self.table = mmkernels.rope_table(self.text.rotary_emb, self.d)
        dtype = self.head.weight.dtype
        heads = config.num_key_value_heads
        self.pool = PagePool(256, page_size, config.num_hidden_layers, heads, self.d, dtype)
        self.cache = PagedKVCache(self.pool)

    @torch.no_grad()
    def __call__(
        self, sequences: list[int], embeds: list[torch.Tensor], positions: list[torch.Tensor]
    ) -> torch.Tensor:
        """New tokens of each sequence, ``[n, D]`` and ``[3, n]``: logits of all, behind one another."""
        counts = [len(e) for e in embeds]
        slots = self.cache.append(sequences, counts).slot_mapping
        tables = self.cache.tables(sequences, counts)
        ends = torch.tensor([0, *counts]).cumsum(0)
        x, at = torch.cat(embeds), torch.cat(positions, 1)
        inv_freq, axis, pairing, scaling = self.table
        for i, layer in enumerate(self.text.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                proj(h).view(len(x), -1, self.d)
                for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            caches = self.pool.key_cache[i], self.pool.value_cache[i]
            q, _ = mmkernels.rope_write_kv(
                q, k, v, *caches, slots, at, inv_freq, axis, pairing=pairing, attention_scaling=scaling
            )  # fmt: skip
            out = mmkernels.paged_attention(
                q, *caches, tables.block_table, tables.seq_lens, cu_seqlens_q=ends, shared_prefix=tables.shared_prefix
            )  # fmt: skip
            x = x + attention.o_proj(out.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.text.norm(x))


def prompts(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings with the media in, and positions, of every sample."""
    found = []
    for sample in samples(ENTRY):
        inputs = {
            k: v[None] if k in ("input_ids", "mm_token_type_ids") else v for k, v in sample.items()
        }
        positions, _ = mmkernels.mrope_positions(
            inputs["input_ids"], inputs["mm_token_type_ids"], family=model.config.model_type,
            image_grid_thw=inputs.get("image_grid_thw"), video_grid_thw=inputs.get("video_grid_thw"),
            image_token_id=model.config.image_token_id, video_token_id=model.config.video_token_id,
        )  # fmt: skip
        found.append((_embeddings(model, inputs), positions[:, 0]))
    return found


@torch.no_grad()
def _embeddings(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = model.lm_head.weight.dtype
    features, ids = [], []
    for kind, token in (
        ("image", model.config.image_token_id),
        ("video", model.config.video_token_id),
    ):
        pixels = inputs.get("pixel_values" if kind == "image" else "pixel_values_videos")
        if pixels is not None:
            parts = model.model.visual(pixels.to(dtype), inputs[f"{kind}_grid_thw"])
            features.append(parts.pooler_output if hasattr(parts, "pooler_output") else parts)
            ids.append(token)
    table = model.get_input_embeddings().weight
    return mmkernels.merge_embeddings(inputs["input_ids"], table, features, feature_token_ids=ids)[
        0
    ]


@torch.no_grad()
def truth(model: Any, batch: list[Sample], dtype: torch.dtype) -> list[torch.Tensor]:
    """transformers' own forward of every sample."""
    found = []
    for sample in batch:
        inputs = {
            k: v[None] if k in ("input_ids", "mm_token_type_ids") else v for k, v in sample.items()
        }
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        found.append(model(**inputs, use_cache=False).logits[0])
    return found


def in_chunks(
    decoder: Decoder,
    prompt: tuple[torch.Tensor, torch.Tensor],
    size: int,
    done: int = 0,
    sequence: int | None = None,
) -> torch.Tensor:
    """Logits of what is not done yet."""
    embeds, positions = prompt
    sequence = decoder.cache.add() if sequence is None else sequence
    return torch.cat([
        decoder([sequence], [embeds[i : i + size]], [positions[:, i : i + size]])
        for i in range(done, len(embeds), size)
    ])  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_chunks_of_any_size_are_the_whole(page_size: int) -> None:
    model = ENTRY.build().double().eval()
    for prompt in prompts(model):
        decoder = Decoder(model, page_size)
        whole = in_chunks(decoder, prompt, 1000)
        for size in (1, 7, 16, 64):
            part = in_chunks(decoder, prompt, size)
            assert (part - whole).abs().max() <= 1e-9 * whole.abs().max()
            top = whole.topk(2).values
            sure = top[:, 0] - top[:, 1] > 1e-8
            assert torch.equal(part.argmax(1)[sure], whole.argmax(1)[sure]) and sure.any()


def test_the_logits_are_those_of_transformers() -> None:
    wide, batch = ENTRY.build().double().eval(), samples(ENTRY)
    with InFp64():
        exact = truth(wide, batch, torch.float64)
    model = ENTRY.build().eval()
    theirs = truth(model, batch, torch.float32)
    error = max((t.double() - e).abs().max() for t, e in zip(theirs, exact, strict=True))
    for size in (1, 7, 1000):
        for prompt, expected in zip(prompts(model), exact, strict=True):
            found = in_chunks(Decoder(model, 4), prompt, size)
            assert (found.double() - expected).abs().max() <= 1.5 * error
            top = expected.topk(2).values
            sure = top[:, 0] - top[:, 1] > 4 * error
            assert torch.equal(found.argmax(1)[sure], expected.argmax(1)[sure]) and sure.any()


def test_a_shared_prefix_that_ends_inside_an_image() -> None:
    """Two questions about one image; the second takes the pages of the first up to the middle of the image."""
    model = ENTRY.build().double().eval()
    embeds, positions = prompts(model)[2]  # of two images
    ids = samples(ENTRY)[2]["input_ids"]
    inside = int((ids == model.config.image_token_id).nonzero()[3]) + 1
    decoder = Decoder(model, 4)
    first = decoder.cache.add()
    whole = decoder([first], [embeds], [positions])
    second = decoder.cache.fork(first)
    decoder.cache.truncate(second, inside)
    again = in_chunks(decoder, (embeds, positions), 3, done=inside, sequence=second)
    assert (again - whole[inside:]).abs().max() <= 1e-9 * whole.abs().max()
    # Both go on together: pages they share are attended as a prefix.
    tail = embeds[:2].flip(0)
    at = positions.max() + 1 + torch.arange(2).expand(3, 2)
    both = decoder([first, second], [tail, tail], [at, at])
    assert (both[:2] - both[2:]).abs().max() <= 1e-9 * both.abs().max()
    alone = Decoder(model, 16)
    sequence = alone.cache.add()
    alone([sequence], [embeds], [positions])
    expected = alone([sequence], [tail], [at])
    assert (both[:2] - expected).abs().max() <= 1e-9 * expected.abs().max()
