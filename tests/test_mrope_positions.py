# SPDX-License-Identifier: Apache-2.0
"""``mrope_positions`` against ``get_rope_index`` of transformers, family by family: equal, positions and deltas."""

import random
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing

pytest.importorskip("transformers")
from mrope_families import (
    CLASSES as EVERY,
)  # fmt: skip
from mrope_families import (
    Batch,
    draw,
    draw_one,
    joined,
    media,
    model_of,
    packed,
    padded,
    row_of,
    theirs,
)

from mmkernels import backends, mrope_positions
from mmkernels.ops.mrope_positions import FAMILIES, Family, family_of
from mmkernels.ops.mrope_positions.families import CANVAS, INDEX, RUNS, SPANS, UNITS
from mmkernels.testing import which_kernel_ran

Pair = tuple[torch.Tensor, torch.Tensor]
CLASSES = {
    n: c for n, c in EVERY.items() if find_spec(f"transformers.models.{n.removesuffix('_talker')}")
}
BY_TYPE = [name for name in CLASSES if row_of(name).scan == RUNS]


def ours(name: str, tokens: dict[str, Any], batch: Batch) -> Pair:
    return mrope_positions(**tokens, **media(batch), family=batch.row)


def assert_equal(got: Pair, expected: Pair, *told: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (*told, a, b)


def compare(name: str, seeds: range) -> None:
    for seed in seeds:
        rng = random.Random(f"{name} {seed}")
        batch = draw(rng, name)
        tokens = padded(rng, batch, rng.choice(("left", "right", "holes")))
        expected = theirs(name, tokens, batch)
        for how in ("auto", "reference"):
            with backends.backend(how):
                assert_equal(ours(name, tokens, batch), expected, name, seed, how, tokens)


@pytest.mark.parametrize("name", CLASSES)
def test_equal_to_transformers(name: str) -> None:
    compare(name, range(20))


@pytest.mark.full
@pytest.mark.parametrize("name", CLASSES)
def test_equal_to_transformers_500_times(name: str) -> None:
    compare(name, range(20, 520))


@pytest.mark.parametrize("name", CLASSES)
def test_without_a_mask(name: str) -> None:
    """A mask of ones is none."""
    for seed in range(5):
        rng = random.Random(f"{name} {seed}")
        whole = draw_one(rng, name)
        tokens = padded(rng, whole, "left")
        bare = {k: v for k, v in tokens.items() if k != "attention_mask"}
        assert_equal(ours(name, bare, whole), ours(name, tokens, whole), name, seed)
        if row_of(name).scan != UNITS:  # there transformers needs the mask
            assert_equal(ours(name, bare, whole), theirs(name, bare, whole), name, seed)


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize("name", CLASSES)
def test_packed_is_each_sample_alone(name: str, how: str) -> None:
    for seed in range(5):
        rng = random.Random(f"{name} {seed}")
        alone = [draw_one(rng, name) for _ in range(3)]
        if (
            row_of(name).scan == UNITS
        ):  # without any grid, transformers' padding has a say in the deltas
            alone = [b for b in alone if b.images or b.videos]
        if (row_of(name).scan == SPANS and not all(b.images for b in alone)) or not alone:
            continue
        whole = joined(alone)
        with backends.backend(how):
            positions, deltas = ours(name, packed(whole), whole)
        parts = [theirs(name, padded(rng, b, "right"), b) for b in alone]
        expected = torch.cat([p[:, 0] for p, _ in parts], 1)
        assert torch.equal(positions[1:], expected), (name, seed)
        assert torch.equal(deltas, torch.cat([d for _, d in parts])), (name, seed)
        text = torch.cat([torch.arange(len(s)) for s in whole.samples])
        assert torch.equal(positions[0], text.to(positions.dtype))
        in_a_row = {k: v[None] if k != "cu_seqlens" else v for k, v in packed(whole).items()}
        assert torch.equal(ours(name, in_a_row, whole)[0], positions[:, None])


def test_transformers_finds_packed_samples_by_the_first_row() -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    rng = random.Random(0)
    whole = joined([draw_one(rng, "qwen2_vl") for _ in range(4)])
    positions, _ = ours("qwen2_vl", packed(whole), whole)
    found = find_packed_sequence_indices(positions[:1].long())
    lengths = torch.tensor([len(s) for s in whole.samples])
    assert torch.equal(found[0], torch.arange(4).repeat_interleave(lengths))


@pytest.mark.parametrize("name", BY_TYPE)
def test_types_by_token_id_are_those_of_the_processor(name: str) -> None:
    for seed in range(5):
        rng = random.Random(f"{name} {seed}")
        batch = draw(rng, name)
        tokens = padded(rng, batch, "left")
        expected = theirs(name, tokens, batch)
        tokens.pop("mm_token_type_ids")
        for how in ("auto", "reference"):
            with backends.backend(how):
                assert_equal(ours(name, tokens, batch), expected, name, seed, how)


@pytest.mark.parametrize(
    "name", [n for n in CLASSES if not n.endswith("talker")]
)  # its config has no model_type
def test_the_table_is_that_of_the_configs(name: str) -> None:
    row = family_of(model_of(name).config)
    assert row == row_of(name)


def test_the_table_covers_every_get_rope_index() -> None:
    """A new family of a new transformers fails here, and is then a new row."""
    import transformers

    models = Path(transformers.__file__).parent / "models"
    having = [p for p in models.glob("*/modeling_*.py") if "def get_rope_index" in p.read_text()]
    assert {p.parent.name for p in having} <= set(FAMILIES)
    assert set(CLASSES) <= set(FAMILIES)


def test_the_kernels_rule_is_the_table_s_row() -> None:
    """Field by field, in one order."""
    header = Path(__file__).parents[1] / "csrc/mrope_positions/mrope_positions.h"
    declared = re.search(r"struct Rule \{\s*int64_t ([^;]*);", header.read_text())
    assert declared and re.split(r",\s*", declared[1]) == list(Family._fields)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.uint8, torch.int16, torch.float32])
def test_dtypes_of_mask_and_types_change_nothing(kind: torch.dtype) -> None:
    rng = random.Random(1)
    batch = draw(rng, "qwen2_vl")
    tokens = padded(rng, batch, "holes")
    expected = ours("qwen2_vl", tokens, batch)
    assert_equal(
        ours("qwen2_vl", {**tokens, "attention_mask": tokens["attention_mask"].to(kind)}, batch),
        expected,
    )
    ids = {**tokens, "input_ids": tokens["input_ids"].int()}
    assert_equal(ours("qwen2_vl", ids, batch), expected)
    if not kind.is_floating_point and kind != torch.bool:
        types = {**tokens, "mm_token_type_ids": tokens["mm_token_type_ids"].to(kind)}
        assert_equal(ours("qwen2_vl", types, batch), expected)


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize(
    "make",
    [list, torch.tensor, lambda s: torch.tensor(s).double(), lambda s: torch.tensor(s).long()],
)
def test_seconds_round_as_they_came(make: Any, how: str) -> None:
    """Lists of Python numbers, float32 and float64 multiply differently in transformers, too."""
    rng = random.Random(3)
    ids = torch.zeros(1, 122, dtype=torch.int64)
    types = torch.tensor([[0, *[2] * 60, 0, *[2] * 60]])
    grid = torch.tensor([[60, 2, 2]] * 2)
    for _ in range(40):  # products beside whole numbers
        seconds = make([rng.randint(1, 400) / (4 * rng.randint(1, 60)) for _ in range(2)])
        given = {"video_grid_thw": grid, "second_per_grid_ts": seconds}
        with backends.backend(how):
            got = mrope_positions(ids, types, family="qwen2_5_vl", **given)
        expected = model_of("qwen2_5_vl").get_rope_index(ids, types, **given)
        assert_equal(got, expected, seconds)


@pytest.mark.parametrize("name", CLASSES)
def test_same_for_any_number_of_threads(name: str) -> None:
    rng = random.Random(f"{name} threads")
    batch = joined([draw_one(rng, name) for _ in range(7)])
    if row_of(name).scan == SPANS and not batch.images:
        return
    tokens = padded(rng, batch, "left")
    torch.set_num_threads(1)
    with which_kernel_ran() as ran:
        expected = ours(name, tokens, batch)
    assert ran == {"mrope_positions": "native"}
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_equal(ours(name, tokens, batch), expected, threads)


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        ([1.0], "second_per_grid_ts must be 2 numbers, one a video, got 1"),
        ([1.0, float("nan")], "second_per_grid_ts must be finite numbers, got nan"),
        ([1.0, 1e30], "second_per_grid_ts must be finite numbers, got"),
    ],
)
def test_seconds_are_checked(seconds: list[float], message: str, how: str) -> None:
    ids = torch.randint(3, 9, (1, 9))
    types = torch.tensor([[0, 2, 2, 0, 2, 2, 2, 2, 0]])
    grid = torch.tensor([[2, 2, 2], [1, 4, 4]])
    with backends.backend(how), pytest.raises(ValueError, match=f"mrope_positions: {message}"):
        mrope_positions(
            ids, types, video_grid_thw=grid, second_per_grid_ts=seconds, family="qwen2_5_vl"
        )
    mrope_positions(ids, types, video_grid_thw=grid, second_per_grid_ts=[1, 2], family="qwen2_5_vl")


@pytest.mark.parametrize("how", ["auto", "reference"])
def test_a_sample_of_padding_alone(how: str) -> None:
    ids = torch.randint(3, 9, (3, 5))
    mask = torch.tensor([[1] * 5, [0] * 5, [0, 0, 1, 1, 1]])
    with backends.backend(how):
        positions, deltas = mrope_positions(
            ids, torch.zeros_like(ids), attention_mask=mask, family="qwen3_vl"
        )
    assert torch.equal(positions[0], torch.tensor([[0, 1, 2, 3, 4], [0] * 5, [0, 0, 0, 1, 2]]))
    assert deltas.flatten().tolist() == [0, 0, 0]


def test_canvas_needs_the_token_ids_of_its_config() -> None:
    ids = torch.randint(3, 9, (1, 5))
    with pytest.raises(ValueError, match=r"mrope_positions: family must be family_of\(config\)"):
        mrope_positions(ids, torch.zeros_like(ids), family="minicpmv4_7")
    with pytest.raises(ValueError, match="mrope_positions: mm_token_type_ids must be a tensor"):
        mrope_positions(ids, family=row_of("minicpmv4_7")._replace(image_token_id=-1))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_omni_moe"])
def test_one_graph_for_packed_samples_of_any_length(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mrope_positions, fullgraph=True, dynamic=True, backend=counter)
    rng = random.Random(name)
    whole = [joined([draw_one(rng, name) for _ in range(k)]) for k in (4, 7, 9)]
    for batch in whole:
        given = {**packed(batch), **media(batch), "family": batch.row}
        assert_equal(compiled(**given), mrope_positions(**given))
    assert counter.frame_count <= 3  # the first, and once more for what varies


def test_rows_of_other_scans_are_refused_by_the_kernel() -> None:
    """Callers of torch.ops skip the Python checks; no number may lead out of memory."""
    ids = torch.randint(3, 9, (1, 5))
    nothing = [None] * 8
    for change in (
        {"scan": 7},
        {"axes": 99},
        {"axes": 2},
        {"spatial_merge_size": 0},
        {"temporal_merge": 0},
        {"newline": -2},
    ):
        with pytest.raises(RuntimeError, match="mrope_positions: family must be a row"):
            torch.ops.mmkernels.mrope_positions(
                ids, *nothing, list(FAMILIES["qwen2_vl"]._replace(**change))
            )
    with pytest.raises(RuntimeError, match="mrope_positions: family must be 25 numbers"):
        torch.ops.mmkernels.mrope_positions(ids, *nothing, [0] * 24)
    with pytest.raises(RuntimeError, match="must be as input_ids"):
        torch.ops.mmkernels.mrope_positions(
            ids, ids[:, :3], *nothing[1:], list(FAMILIES["qwen2_vl"])
        )


@pytest.mark.parametrize("how", ["auto", "reference"])
def test_glm_image_s_rows_are_those_of_the_sample(how: str) -> None:
    """A sample's images are not its neighbour's, however many rows there are."""
    row = FAMILIES["glm_image"]
    ids = torch.tensor([[5, row.start_id, 7, 7, row.end_id], [5, 5, 5, 5, row.start_id]])
    given = {"image_grid_thw": torch.tensor([[1, 1, 2], [1, 1, 2]]), "family": "glm_image"}
    with backends.backend(how):
        mrope_positions(ids, images_per_sample=torch.tensor([1, 1]), **given)
        with pytest.raises(ValueError, match=r"a row for every image \(sample 0 has one more\)"):
            mrope_positions(ids, images_per_sample=torch.tensor([0, 2]), **given)


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_a_unit_cut_off_is_refused(name: str, how: str) -> None:
    """Its end token would lie behind the sample."""
    row = FAMILIES[name]
    ids = torch.tensor([[5, 6, row.start_id, row.image_token_id, row.image_token_id]])
    grid = torch.tensor([[1, 2, 4]])
    with backends.backend(how), pytest.raises(ValueError, match="an end token after every image"):
        mrope_positions(ids, image_grid_thw=grid, family=name)


INVALID = [
    ("glm_image", {"images_per_sample": torch.tensor([1, 1])}, "images_per_sample must be 1 numbers, 1 rows .* in all, got 2 numbers, 2 in all"),
    ("glm_image", {"images_per_sample": torch.tensor([-1])}, "images_per_sample must be numbers of at most 1, got -1"),
    ("glm_image", {"image_grid_thw": torch.tensor([[1, 2, 2]])}, r"input_ids of sample 0 must be 4 image tokens .* got 6"),
    ("qwen2_5_omni", {"image_grid_thw": torch.tensor([[1, 4, 4]])}, r"input_ids of sample 0 must be 4 image tokens in a row \(image_grid_thw\[0\] = \[1, 4, 4\]\), got 6"),
    ("qwen2_5_omni", {"image_grid_thw": torch.tensor([[1, 4, 6]] * 2)}, "image_grid_thw must be as many as input_ids has images, 1 rows, got 2"),
    ("qwen3_omni_moe", {"audio_seqlens": torch.tensor([9])}, "audio_seqlens must be as many as input_ids has audios, 0 numbers, got 1"),
    ("minicpmv4_7", {"image_grid_thw": torch.tensor([[8, 8]])}, r"input_ids of sample 0 must be 4 image tokens .* got 6"),
    ("hunyuan_vl", {"image_grid_thw": torch.tensor([[1, 4, 6]])}, r"input_ids of sample 0 must be 8 image tokens .* got 6"),
]  # fmt: skip


@pytest.mark.parametrize("how", ["auto", "reference"])
@pytest.mark.parametrize(("name", "change", "message"), INVALID)
def test_invalid_calls_of_other_scans(
    name: str, change: dict[str, Any], message: str, how: str
) -> None:
    row = row_of(name)
    start, end, token = max(row.start_id, 1), max(row.end_id, 2), max(row.image_token_id, 3)
    ids = torch.tensor([[5, 6, start, *[token] * 6, end, 5]])
    types = (ids == token).int()
    m = row.spatial_merge_size
    sides = [2 * m, 3 * m] if row.scan == CANVAS else [1, 2 * m, 3 * m]
    if row.advance == INDEX:
        sides = [1, 2 * m, 2 * m]
    given = {"image_grid_thw": torch.tensor([sides])}
    with backends.backend(how):
        mrope_positions(ids, types, family=row, **given)  # valid before the change
        with pytest.raises(ValueError, match=message) as raised:
            mrope_positions(ids, types, family=row, **{**given, **change})
    assert str(raised.value).startswith("mrope_positions: ") and "\n" not in str(raised.value)
