# SPDX-License-Identifier: Apache-2.0
"""The families of M-RoPE as rows of numbers: all a kernel knows about a model.

Keys are transformers' ``model_type``; defaults of token ids and rates are those of its configs (5.24). A checkpoint with
others: ``family_of(model.config)``, or ``FAMILIES["qwen2_5_vl"]._replace(rate=2)``.
"""

from typing import Any, NamedTuple

from mmkernels import checks

OP = "mrope_positions"
RUNS, SPANS, UNITS, CANVAS = range(4)  # where pictures lie
SIDE, BLOCK, INDEX = range(3)  # what a picture takes of the positions


class Family(NamedTuple):
    """One rule. Every field a number: the row goes into the op as ``int[]``, in this order (``Rule`` in the header).

    ``scan``: RUNS of equal token types; SPANS between two token ids; UNITS of a start token, its content and an end
    token, audio inside video interleaved; CANVAS of a thumbnail and its slices. ``advance``: after a picture of h×w
    merged tokens text goes on SIDE = max(h, w) further (UNITS: after its largest position); BLOCK: every frame takes max(h, w)
    on all axes; INDEX: text counts every token, a picture's last three axes are (column, row, number of the picture).
    """

    scan: int = RUNS
    advance: int = SIDE
    axes: int = 3
    frames: int = 0  # 1: a video is t pictures, text (timestamps) between them
    newline: int = 0  # 1: every row of a picture ends with one more token
    temporal_merge: int = 1  # frames of a video that became one
    rate: int = 0  # positions a second of video; 0: one a frame
    fractional: int = 0  # 1: positions are float32, a second's fractions kept
    pad: int = 0  # the position of padding
    pictures_per_sample: int = (
        0  # 1: rows of the grid may outnumber the pictures (those yet to be generated)
    )
    twin_markers: int = 0  # 1: the two start (end) tokens of a video with audio share a position
    chunk_seconds: int = 0  # audio and video alternate every so many seconds; 0: sorted by position
    audio_window: int = 0  # of the encoder's chunks; 0: two convolutions of stride 2
    spatial_merge_size: int = 2
    image_token_id: int = -1
    video_token_id: int = -1
    audio_token_id: int = -1
    start_id: int = -1  # UNITS: of vision; SPANS, CANVAS: of an image
    end_id: int = -1  # SPANS, CANVAS: of an image
    audio_start_id: int = -1
    video_start_id: int = -1  # RUNS: image tokens between these two are a video's
    video_end_id: int = -1
    slice_start_id: int = -1  # CANVAS
    slice_end_id: int = -1
    newline_id: int = -1


_qwen2 = Family(image_token_id=151655, video_token_id=151656)
_qwen3 = _qwen2._replace(frames=1)
_qwen3_5 = _qwen3._replace(image_token_id=248056, video_token_id=248057)
_glm4v = Family(frames=1, image_token_id=151343, video_start_id=151341, video_end_id=151342)
_qwen2_5_omni = Family(
    scan=UNITS, rate=25, pad=1, twin_markers=1, chunk_seconds=2, image_token_id=151655, video_token_id=151656,
    audio_token_id=151646, start_id=151652, audio_start_id=151647,
)  # fmt: skip
_qwen3_omni = _qwen2_5_omni._replace(
    fractional=1, pad=0, twin_markers=0, chunk_seconds=0, audio_window=50
)

FAMILIES = {
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2._replace(rate=4),
    "paddleocr_vl": Family(image_token_id=100295, video_token_id=100296),
    "ernie4_5_vl_moe": Family(temporal_merge=2, image_token_id=100295, video_token_id=103367),
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "qwen4_exp": _qwen3_5,
    "cosmos3_omni": _qwen3,
    "cosmos3_edge": Family(frames=1, image_token_id=19, video_token_id=18),
    "cohere_compass": Family(frames=1, image_token_id=255031, video_token_id=255032),
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v._replace(image_token_id=151363),
    "glm46v": _glm4v._replace(video_start_id=151361, video_end_id=151362),
    "glm_ocr": _glm4v._replace(image_token_id=59280, video_start_id=59258, video_end_id=59259),
    "glm_image": Family(scan=SPANS, pad=1, pictures_per_sample=1, spatial_merge_size=1, start_id=16384, end_id=16385),
    "hunyuan_vl": Family(advance=INDEX, axes=4, newline=1, image_token_id=120120),
    "hy_v4_vl": Family(advance=BLOCK, newline=1, image_token_id=120120, video_token_id=120124),
    "minicpmv4_7": Family(scan=CANVAS, spatial_merge_size=4),
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen3_omni_moe": _qwen3_omni,
    "qwen3_omni_moe_talker": _qwen3_omni._replace(audio_start_id=151669),
}  # fmt: skip
for _alias, _name in {
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen2_5_omni_talker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni_moe",
}.items():
    FAMILIES[_alias] = FAMILIES[_name]

# Where a transformers config (or its vision config) says a row's number; the first name that is there counts.
_SOURCES = {
    "image_token_id": ("image_token_id",),
    "video_token_id": ("video_token_id",),
    "audio_token_id": ("audio_token_id",),
    "start_id": ("vision_start_token_id", "image_start_token_id", "image_start_id"),
    "end_id": ("image_end_token_id", "image_end_id"),
    "audio_start_id": ("audio_start_token_id",),
    "video_start_id": ("video_start_token_id",),
    "video_end_id": ("video_end_token_id",),
    "slice_start_id": ("slice_start_id",),
    "slice_end_id": ("slice_end_id",),
    "newline_id": ("newline_id",),
    "rate": ("position_id_per_seconds", "tokens_per_second"),
    "chunk_seconds": ("seconds_per_chunk",),
    "spatial_merge_size": ("spatial_merge_size",),
    "temporal_merge": ("temporal_merge_size",),
}


def family_of(config: Any) -> Family:
    """The row of a transformers config, with the token ids, rates and merge sizes of this very model."""
    config = getattr(config, "thinker_config", config)
    row = family_named(config.model_type)
    places = (config, getattr(config, "vision_config", None))
    for field, names in _SOURCES.items():
        used = row.scan == CANVAS or getattr(row, field) > 0
        found = [
            getattr(p, n) for p in places for n in names if isinstance(getattr(p, n, None), int)
        ]
        if used and found:
            row = row._replace(**{field: found[0]})
    if row.advance == INDEX:
        rope = config.get_text_config().rope_parameters
        row = row._replace(axes=len(rope["mrope_section"]))
    if row.scan == CANVAS:
        row = row._replace(spatial_merge_size=2 if config.downsample_mode == "4x" else 4)
    if row.audio_window:
        row = row._replace(audio_window=config.audio_config.n_window)
    return row


def family_named(family: str | Family) -> Family:
    """The row itself, or that of a ``model_type``."""
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        checks.fail(OP, "family", repr(family), f"a Family or one of {', '.join(sorted(FAMILIES))}")
    return FAMILIES[family]
