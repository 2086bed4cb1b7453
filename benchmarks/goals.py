# SPDX-License-Identifier: Apache-2.0
"""What the founding design asks for (its section 6), and how near the stored results come.

A goal names the rows it is judged by, and the slowest of them judges it. What no row measures is not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from benchmarks.record import Row
from benchmarks.tables import markdown

Rows = Mapping[tuple[str, ...], Row]
WORDS = ("met", "missed", "not measured")
BARE_GEMM = 1 / 1.1  # "at most 1.1 times the bare GEMM"
PACKING = (
    "packs pixels and the weight at every call and writes tokens, which the bare GEMM does not"
)
AT_CEILING = (
    "at all of the ceiling's speed it would itself be below the goal here (measured / share of it)"
)
NEW_MEMORY = "the output is new memory, the ceiling's copy goes to old memory"
FLOPS_STAY = "sharing saves bytes, not FLOPs"
SIXTEEN_BITS = (
    "absorption multiplies fp32 values (on AMX two bf16 halves), eager bf16 ones (DESIGN.md)"
)
UNSHARED = "without sharing ours takes longer than eager's padded batch (the row's `not shared`)"


@dataclass(frozen=True)
class Goal:
    """At least ``least`` times as fast as ``over``; over ``"ceiling"``, that share of it."""

    what: str
    column: str  # CPU fp32, CPU bf16 or H200 bf16
    least: float = 0.0
    over: str = "eager"
    op: str = ""
    cases: tuple[str, ...] = ()
    dtype: str = ""
    direction: str = ""
    frozen: str = ""
    or_of_ceiling: float = inf  # this share is enough where the ceiling alone is slower than eager
    demand: str = ""  # what no row tells
    why: str = ""  # of a miss, from DESIGN.md

    def keys(self) -> list[tuple[str, ...]]:
        return [(self.op, case, self.dtype, self.direction, self.frozen) for case in self.cases]

    def asked(self) -> str:
        if self.demand:
            return self.demand
        share = f"≥ {self.least:.0%} of the ceiling"
        return share if self.over == "ceiling" else f"≥ {self.least:g} × {self.over}"


@dataclass(frozen=True)
class Verdict:
    """The worst row with its value; how many rows were there; in words."""

    goal: Goal
    worst: Row | None
    values: tuple[float, ...]

    @property
    def word(self) -> str:
        return "not measured" if self.worst is None else "met" if self.met else "missed"

    @property
    def met(self) -> bool:
        goal, least = self.goal, min(self.values)
        assert self.worst is not None
        share = self.worst.fraction or 0.0
        return least >= goal.least or (share >= goal.or_of_ceiling and least < share)


def judged(goal: Goal, rows: Rows) -> Verdict:
    """By the rows that are there and have the number the goal asks for."""
    found = [
        (value, row) for k in goal.keys() if (row := rows.get(k)) for value in value_of(goal, row)
    ]
    worst = min(found, key=lambda pair: pair[0])[1] if found else None
    return Verdict(goal, worst, tuple(value for value, _ in found))


def value_of(goal: Goal, row: Row) -> list[float]:
    """The number a goal asks a row for, if it has it; a row that failed reaches nothing."""
    if row.failure:
        return [0.0]
    value = row.fraction if goal.over == "ceiling" else row.speedup.get(goal.over)
    return [] if value is None else [value]


def asks(
    what: str, op: str, cases: str, *, fp32: float = 0, bf16: float = 0, h200: float = 0, of_h200: float = 0,
    over: str = "eager", direction: str = "fwd", dtype: str = "", frozen: str = "", or_of_ceiling: float = inf,
    fp32_why: str = "", bf16_why: str = "",
) -> list[Goal]:  # fmt: skip
    """A line of the design: a goal for each of its columns that asks for something."""
    found = []
    for column, least, measure, why in (
        ("CPU fp32", fp32, over, fp32_why), ("CPU bf16", bf16, over, bf16_why), ("H200 bf16", h200, over, ""),
        ("H200 bf16", of_h200, "ceiling", ""),
    ):  # fmt: skip
        if least:
            found.append(
                Goal(what, column, least, measure, op, tuple(cases.split(",")), dtype or column[-4:], direction, frozen,
                     or_of_ceiling if column == "CPU fp32" else inf, why=why)
            )  # fmt: skip
    return found


def told_by_none(what: str, demand: str) -> list[Goal]:
    return [Goal(what, "H200 bf16", demand=demand)]


UINT8 = "clip_l14_336,siglip_so400m_384,eva_g14_224"
STILLS = "qwen2_vl_still,qwen3_vl_still"
EVERY = f"{UINT8},vit_b16_224,{STILLS},qwen2_vl_video,qwen2_vl_rows,siglip2_naflex,ast_audio,videomae_b,gemma4"
TEXTS = "llava_7b,qwen2vl_2b"
GOALS = [
    *asks("patch_embed from uint8", "patch_embed", UINT8, fp32=1.0, bf16=1.35, h200=4.5, of_h200=0.75,
          or_of_ceiling=BARE_GEMM),
    *asks("patch_embed from uint8, of the bare GEMM", "patch_embed", UINT8, bf16=BARE_GEMM, over="ceiling",
          bf16_why=PACKING),
    *asks("patch_embed from uint8", "patch_embed", UINT8, h200=2.2, over="compile"),
    *asks("patch_embed, Conv3d families, stills", "patch_embed", STILLS, fp32=5.5, bf16=5.5, h200=5, of_h200=0.75,
          fp32_why=AT_CEILING),
    *asks("patch_embed, forward and backward", "patch_embed", EVERY, fp32=1.0, bf16=1.2, h200=2.5, of_h200=0.65,
          direction="fwdbwd"),
    *asks("audio patches, overlapping", "patch_embed", "ast_audio", fp32=1.3, bf16=1.5, h200=4.5, of_h200=0.8,
          fp32_why=PACKING),
    *asks("cross_attention: MAP head, 1 query", "cross_attention", "siglip_map_head", fp32=22, bf16=25, h200=12,
          of_h200=0.85, bf16_why=SIXTEEN_BITS),
    *asks("… BLIP-2 layer", "cross_attention", "blip2_layer", fp32=1.5, bf16=1.4, h200=1.8, of_h200=0.65,
          bf16_why=SIXTEEN_BITS),
    *asks("… video Q-Former", "cross_attention", "video_qformer", fp32=1.95, bf16=1.85, h200=2.2, of_h200=0.65,
          bf16_why=SIXTEEN_BITS),
    *asks("… speech windows, 3 queries", "cross_attention", "granite_window", fp32=2.5, bf16=2.5, h200=4, of_h200=0.7,
          bf16_why=SIXTEEN_BITS),
    *asks("… MiniCPM-V resampler, folded", "resampler", "MiniCPM-V 2.6", fp32=4, bf16=4, h200=4.5, of_h200=0.72,
          bf16_why=SIXTEEN_BITS),
    *asks("… Qwen-VL resampler, folded", "resampler", "Qwen-VL", fp32=2, bf16=2, h200=2.3, of_h200=0.72,
          bf16_why=SIXTEEN_BITS),
    *asks("… forward and backward, frozen encoder, BLIP-2", "cross_attention", "blip2_layer", fp32=1.4, bf16=1.4,
          h200=1.8, direction="fwdbwd", frozen="context", bf16_why=SIXTEEN_BITS),
    *told_by_none("… forward and backward, frozen encoder, BLIP-2", "≥ 5 × less saved state"),
    *asks("merge_embeddings", "merge_embeddings", TEXTS, fp32=8, bf16=8, h200=7, of_h200=0.88,
          fp32_why=NEW_MEMORY, bf16_why=NEW_MEMORY),
    *asks("merge_embeddings, forward and backward", "merge_embeddings", TEXTS, fp32=5, bf16=5, h200=6,
          direction="fwdbwd"),
    *asks("pack_embeddings", "pack_embeddings", TEXTS, fp32=8, bf16=8, h200=7, of_h200=0.88,
          fp32_why=AT_CEILING, bf16_why=AT_CEILING),
    *asks("pack_embeddings, forward and backward", "pack_embeddings", TEXTS, fp32=5, bf16=5, h200=6,
          direction="fwdbwd"),
    *told_by_none("merge and pack", "0 syncs"),
    *asks("mrope_positions over `get_rope_index`", "mrope_positions",
          "qwen2_vl_64_images,qwen2_5_vl_video,qwen3_vl_video", fp32=50, h200=100, dtype="int64"),
    *told_by_none("mrope_positions", "one launch"),
    *asks("rope_write_kv, prefill", "rope_write_kv",
          "qwen2_5_vl_7b_prefill,qwen3_vl_8b_prefill,qwen2_5_vl_7b_prefill_int8", fp32=4, bf16=4, h200=4, of_h200=0.85),
    *asks("rope_write_kv, decode", "rope_write_kv", "qwen2_5_vl_7b_decode,qwen3_vl_8b_decode", fp32=6, bf16=6, h200=8),
    *told_by_none("rope_write_kv, decode", "one launch"),
    *asks("paged_attention, 16 questions on a prefix of 2,048, over our kernel without sharing", "paged_attention",
          "decode_qwen2_7b_16_questions", fp32=4, bf16=4, h200=4, over="library",
          fp32_why=FLOPS_STAY),
    *asks("paged_attention, 16 questions on a prefix of 2,048", "paged_attention", "decode_qwen2_7b_16_questions",
          of_h200=0.6),
    *asks("packed training over padded eager", "end_to_end", "packed training", fp32=2, bf16=2, h200=2, direction=""),
    *asks("16 questions on one image", "end_to_end", "16 questions on one image", fp32=5, bf16=5, h200=5,
          direction="", bf16_why=UNSHARED),
]  # fmt: skip


def verdicts(cpu: Rows, h200: Rows) -> list[Verdict]:
    return [judged(goal, cpu if goal.column.startswith("CPU") else h200) for goal in GOALS]


def table(found: Sequence[Verdict], reasons: Mapping[tuple[str, ...], str]) -> str:
    """A line a goal. Why it is missed: from DESIGN.md, or as measured (``reasons``, by the key of a row)."""
    header = ("goal", "where", "asked", "measured", "", "of ceiling", "why missed")
    return markdown(header, [_line(v, reasons) for v in found], 7)


def _line(verdict: Verdict, reasons: Mapping[tuple[str, ...], str]) -> list[str]:
    goal, worst = verdict.goal, verdict.worst
    head = [goal.what, goal.column, goal.asked()]
    if worst is None:
        return [*head, "–", "not measured", "–", ""]
    least, most, n = min(verdict.values), max(verdict.values), len(goal.cases)
    show = (lambda x: f"{x:.0%}") if goal.over == "ceiling" else (lambda x: f"{x:.2f}")
    measured = f"{show(least)} {worst.case}" + (
        f", worst of {n} (best {show(most)})" if n > 1 else ""
    )
    if len(verdict.values) < n:
        measured += f", {n - len(verdict.values)} not measured"
    if worst.failure:
        measured = f"FAILED {worst.case}"
    share = f"{worst.fraction:.0%} {worst.ceiling}" if worst.fraction is not None else "–"
    by = "" if verdict.met else f" by {_percent(1 - least / goal.least)}"
    key = (worst.op, worst.case, worst.dtype, worst.direction, worst.frozen)
    why = "" if verdict.met else goal.why or reasons.get(key, "")
    return [*head, measured, verdict.word + by, share, why]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"
