# SPDX-License-Identifier: Apache-2.0
"""Every model that ``PackingCollator`` takes keeps packed samples apart, called as users call it.

``model(**batch)`` and ``Trainer``, with the model's own defaults. ``varlen`` stands for flash-attn: it reads what
flash-attn is given, and computes each stretch of ``cu_seq_lens`` by SDPA.
"""

import copy
import itertools
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
import transformers as tf
from transformers import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vlm_zoo import PATCH, Entry, Inputs, _batch, shrink
from vlm_zoo_more import ZOO

from mmkernels.train import PackingCollator
from mmkernels.train.packable import DECODERS, FAMILIES

PARTS = 4
OLD = tuple(map(int, tf.__version__.split(".")[:2])) < (5, 23)
pytestmark = pytest.mark.skipif(OLD, reason="the lists are of the newest transformers")


def varlen(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
    scaling: float | None = None, cu_seq_lens_q: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    causal = getattr(module, "is_causal", True) and query.shape[2] == key.shape[2]
    packed = causal and cu_seq_lens_q is not None
    ends = cu_seq_lens_q.tolist() if packed else [0, query.shape[2]]  # type: ignore[union-attr]
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    found = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b] if packed else key, value[:, :, a:b] if packed else value,
            is_causal=causal and b - a > 1, scale=scaling,
        )
        for a, b in itertools.pairwise(ends)
    ]  # fmt: skip
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register("varlen", varlen)


def one(entry: Entry, case: str, seed: int) -> Inputs:
    """A sample as the processor gives it: one row of a batch."""
    g = torch.Generator().manual_seed(seed)
    if case != "audio":
        # One token alone loses its dimension in Mistral 3's squeeze: two images there.
        many = 2 if entry.name in ("Mistral3", "LightOnOcr") else 1
        return _batch(entry, [many * (case == "image")], case, g)
    both = _batch(entry, [0, 0], case, g)
    return {name: value[:1] for name, value in both.items()}


def samples(entry: Entry) -> list[Inputs]:
    medium = "audio" if entry.images is None else "image"
    found = [one(entry, case, i) for i, case in enumerate(("text", medium, medium, "text"))]
    if entry.kind.startswith("Gemma3"):
        for sample in found:
            sample["token_type_ids"] = (sample["input_ids"] == 90).long()
    return found


def some(values: list[Any]) -> list[Any]:
    """An ordinary run takes one of ``PARTS``; ``make full`` takes all."""
    marked = [(value, [pytest.mark.full] * (i % PARTS > 0)) for i, value in enumerate(values)]
    return [pytest.param(v, marks=m, id=getattr(v, "name", v)) for v, m in marked]


def known() -> list[Entry]:
    """Of the zoo, those whose family is in the list."""
    kinds = [(e, getattr(getattr(tf, e.kind).config_class, "model_type", "")) for e in ZOO]
    return [e for e, kind in kinds if kind in FAMILIES and e.placed]


def set_attention(model: Any, name: str) -> None:
    """For the decoder alone: towers have their own batches."""
    parts = {n for n in ("text_config", "language_config") if hasattr(model.config, n)}
    model.set_attn_implementation(dict.fromkeys(parts, name) if parts else name)


def in_fp64(model: Any) -> Any:
    return model.double() if not any(p.is_complex() for p in model.parameters()) else model


def cast(model: Any, inputs: Inputs) -> Inputs:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    floats = lambda v: torch.is_tensor(v) and v.is_floating_point()
    return {k: v.to(dtype) if floats(v) else v for k, v in inputs.items() if k != "labels"}


def collator(model: Any, attention: str) -> PackingCollator:
    """For ``varlen``, what a user of flash-attn gets."""
    config = copy.deepcopy(model.config)
    if attention == "varlen":
        config.get_text_config(decoder=True)._attn_implementation = "flash_attention_2"
    return PackingCollator(config, cu_seq_lens=attention == "varlen")


@torch.no_grad()
def compare(model: Any, batch: list[Inputs], attention: str) -> float:
    """The largest difference, of the largest logit, between samples packed and alone."""
    set_attention(model, attention)
    collate = collator(model, attention)
    single = lambda s: collate([s]) if attention == "varlen" else s
    alone = [model(**cast(model, single(s))).logits[0] for s in batch]
    packed = model(**cast(model, collate(batch))).logits[0].split([len(a) for a in alone])
    pairs = zip(packed, alone, strict=True)
    return max(((p - a).abs().max() / a.abs().max()).item() for p, a in pairs)


def close(model: Any, attention: str) -> float:
    """Eager attention's softmax and the routers of experts are in fp32, whatever the model's dtype."""
    fp32 = attention == "eager" or "moe" in model.config.get_text_config(decoder=True).model_type
    return 1e-6 if fp32 else 1e-9


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("entry", some(known()))
def test_packed_is_alone(entry: Entry, attention: str) -> None:
    model = in_fp64(entry.build())
    if entry.name == "Gemma3" and attention == "varlen":
        with pytest.raises(ValueError, match="cannot be packed with attn_implementation='flash"):
            collator(model, attention)
        return
    assert compare(model, samples(entry), attention) <= close(model, attention)


class InOrder(tf.Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("entry", some(known()))
def test_trainer_sees_the_same_in_a_pack(entry: Entry) -> None:
    """The loss of one pack of four is the mean over the tokens of the four one by one."""
    if entry.name == "Emu3":
        pytest.skip("BatchNorm in its image tokenizer: statistics of a batch, packed or padded")
    rows, start = samples(entry), entry.build()
    collate = PackingCollator(start.config)

    def losses(size: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            settings = tf.TrainingArguments(
                folder, max_steps=4 // size, per_device_train_batch_size=size, report_to=[], use_cpu=True,
                learning_rate=0.0, save_strategy="no", logging_steps=1, remove_unused_columns=False,
                disable_tqdm=True,
            )  # fmt: skip
            trainer = InOrder(
                copy.deepcopy(start), settings, train_dataset=rows, data_collator=collate
            )
            trainer.train()
            return [line["loss"] for line in trainer.state.log_history if "loss" in line]

    counts = [int((collate([row])["labels"] != -100).sum()) for row in rows]
    singly = sum(n * x for n, x in zip(counts, losses(1), strict=True)) / sum(counts)
    (packed,) = losses(4)
    assert abs(packed - singly) <= 1e-5 * singly, (packed, singly)


def decoder(kind: str) -> Any:
    """Tiny; None where transformers has no model of text alone for it, or its default cannot be made small."""
    if kind not in CONFIG_MAPPING:
        return None
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[kind]())
    try:
        model = tf.AutoModelForCausalLM.from_config(config).double().eval()
    except ValueError:  # no such class
        return None
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim < 2:
            p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("kind", some(sorted(DECODERS)))
def test_a_decoder_of_text(kind: str, attention: str) -> None:
    model = decoder(kind)
    if model is None:
        pytest.skip("is the decoder of a family above")
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 80, (1, n), generator=g)} for n in (5, 9, 1, 7, 20)]
    assert compare(model, rows, attention) <= close(model, attention)


def test_every_name_in_the_list_is_compared() -> None:
    """A family by the zoo, a decoder alone or inside a family of the zoo."""
    entries = known()
    assert {getattr(tf, e.kind).config_class.model_type for e in entries} == FAMILIES
    inside = {e.build().config.get_text_config(decoder=True).model_type for e in entries}
    alone = {kind for kind in DECODERS - inside if decoder(kind) is not None}
    assert inside <= DECODERS and DECODERS == inside | alone


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "blip-2": (lambda: shrink(tf.Blip2Config()), "a mask of ones"),
    "instructblip": (lambda: shrink(tf.InstructBlipConfig()), "a mask of ones"),
    "paligemma": (lambda: shrink(tf.PaliGemmaConfig()), "its prefix attends in both directions"),
    "lfm2": (lambda: tf.Lfm2Config(num_hidden_layers=1, layer_types=["conv"]), r"layers of \['conv'\]"),
    "lfm2_vl": (lambda: tf.Lfm2VlConfig(), "cannot be packed|not among"),
    "lfm3_vl": (lambda: tf.Lfm3VlConfig(), "cannot be packed"),
    "mamba": (lambda: tf.MambaConfig(), "cannot be packed|not among"),
    "qwen3_5": (lambda: tf.Qwen3_5Config(), "linear_attention"),
    "florence2": (lambda: tf.Florence2Config(), "an encoder and decoder"),
    "llava with opt": (lambda: tf.LlavaConfig(text_config=tf.OPTConfig()), "counts positions by"),
    "llava with mamba": (lambda: tf.LlavaConfig(text_config=tf.MambaConfig()), "cannot be|not among"),
    "unheard of": (lambda: tf.ViTConfig(), "vit is not among the models that were compared"),
    "flex": (lambda: tf.LlamaConfig(attn_implementation="flex_attention"), "set one of sdpa, eager"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_may_mix_samples_is_refused(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"PackingCollator: .*({reason})"):
        PackingCollator(config())


def test_what_is_refused_does_mix_samples() -> None:
    """OPT, were it packed all the same: the comparison can fail."""
    torch.manual_seed(0)
    model = tf.OPTForCausalLM(shrink(tf.OPTConfig())).double().eval()
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 80, (1, n), generator=g)} for n in (5, 9)]
    collate = PackingCollator(cu_seq_lens=False)
    packed = model(**cast(model, collate(rows))).logits[0, 5:]
    alone = model(**rows[1]).logits[0]
    assert (packed - alone).abs().max() > 1e-3 * alone.abs().max()


def test_with_a_cache_samples_would_mix() -> None:
    """Why the batch says ``use_cache=False``: ``config.use_cache`` is True by default."""
    model = decoder("llama")
    g = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(3, 80, (1, n), generator=g)} for n in (5, 9)]
    batch = PackingCollator(model.config, cu_seq_lens=False)(rows)
    assert model.config.use_cache and batch["use_cache"] is False
    packed = model(**cast(model, {**batch, "use_cache": True})).logits[0, 5:]
    alone = model(**rows[1]).logits[0]
    assert (packed - alone).abs().max() > 1e-3 * alone.abs().max()


def test_tiles_of_different_numbers_are_padded() -> None:
    """SmolVLM: an image of one tile beside one of three; LLaVA-NeXT pads likewise."""
    entry = next(e for e in ZOO if e.name == "SmolVLM")
    model = in_fp64(entry.build())
    g = torch.Generator().manual_seed(0)
    few, many = _batch(entry, [1], "image", g), _batch(entry, [3], "image", g)
    assert few["pixel_values"].shape[1] != many["pixel_values"].shape[1]
    assert compare(model, [few, many, few], "sdpa") <= 1e-9


def test_pictures_of_different_sizes_are_padded_where_their_sizes_are_known() -> None:
    model = in_fp64(next(e for e in ZOO if e.name == "Mistral3").build())
    g = torch.Generator().manual_seed(0)
    rows = []
    for h, w in ((4, 2), (4, 4), (2, 4)):
        n = h * w // model.config.spatial_merge_size**2
        pixels = torch.randn(1, 3, h * PATCH, w * PATCH, generator=g)
        ids = torch.tensor([[5, *[model.config.image_token_id] * n, 7, 8]])
        sizes = torch.tensor([[h * PATCH, w * PATCH]])
        rows.append({"input_ids": ids, "pixel_values": pixels, "image_sizes": sizes})
    assert compare(model, rows, "sdpa") <= 1e-9
    for row in rows:
        del row["image_sizes"]
    with pytest.raises(
        ValueError, match=r"pixel_values must be alike .* of sample 0 and .* of sample 1"
    ):
        PackingCollator(model.config)(rows)


def test_placeholders_of_a_whole_omni_config() -> None:
    whole = tf.Qwen2_5OmniConfig()
    thinker = whole.thinker_config
    ids = torch.tensor([5, thinker.image_token_id, thinker.audio_token_id, 7])
    types = torch.tensor([0, 1, 3, 0])
    for config in (whole, thinker):
        collate = PackingCollator(config)
        assert {thinker.image_token_id, thinker.audio_token_id} <= {*collate.placeholders}
        assert collate.family is not None
    labels = PackingCollator(whole).placeholders
    assert torch.isin(ids, torch.tensor(labels)).tolist() == [False, True, True, False]
    assert types.shape == ids.shape


def test_rows_as_a_dataset_gives_them() -> None:
    """Lists, numpy arrays, None and empty columns; a text row without types; labels of some."""
    config = tf.Qwen2VLConfig(
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93
    )
    collate = PackingCollator(config)
    picture: Inputs = {
        "input_ids": [5, 92, 90, 93, 7], "mm_token_type_ids": [0, 0, 1, 0, 0],
        "image_grid_thw": [[1, 2, 2]], "pixel_values": [[0.5] * 1176] * 4, "labels": None,
    }  # fmt: skip
    text: Inputs = {"input_ids": [8, 9], "image_grid_thw": [], "labels": [-100, 9]}
    as_tensors = lambda row: {k: torch.tensor(v) for k, v in row.items() if v is not None}
    as_arrays = lambda row: {k: v if v is None else torch.tensor(v).numpy() for k, v in row.items()}
    expected = collate([as_tensors(picture), as_tensors(text)])
    assert expected["labels"].tolist() == [[-100, 92, -100, 93, 7, -100, 9]]
    assert expected["mm_token_type_ids"].tolist() == [[0, 0, 1, 0, 0, 0, 0]]
    for make in (dict, as_arrays):
        found = collate([make(picture), make(text)])
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same = (
                torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
            )
            assert same, name
    assert "pixel_values" not in collate([text, text])
    without = {k: v for k, v in picture.items() if k != "mm_token_type_ids"}
    with pytest.raises(ValueError, match="sample 1 has placeholders and no mm_token_type_ids"):
        collate([picture, without])
    with pytest.raises(ValueError, match="labels of sample 0 must have a value for each of its 2"):
        collate([{**text, "labels": [1]}])
    with pytest.raises(ValueError, match="pixel_values of sample 0"):
        collate([{**picture, "pixel_values": [[0.5], [0.5, 0.5]]}])
