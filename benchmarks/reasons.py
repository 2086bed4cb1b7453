# SPDX-License-Identifier: Apache-2.0
"""What stands between a row and its goal, measured: ``python -m benchmarks.reasons OUT.json``.

Two kinds of reasons. *FLOPs*: how many fewer ours needs than eager, and the speed both run at, as a share of a GEMM of
the same rounds. *Part*: something the call cannot do without, timed alone in the same rounds. ``benchmarks.goals``
shows the newest beside a missed goal of the same case.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import resampler, rows
from benchmarks.record import new_run
from benchmarks.rows import DTYPES, Job
from mmkernels.ops.cross_attention import flops  # noqa: F401 (registers the op's formula)
from mmkernels.testing import Case, timing

ABSORBED = (  # case, direction, frozen
    ("siglip_map_head", "fwd", ""),
    ("blip2_layer", "fwd", ""),
    ("video_qformer", "fwd", ""),
    ("granite_window", "fwd", ""),
    ("blip2_layer", "fwdbwd", "context"),
)
# The same call on nearly nothing: what it costs whatever its size.
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("rope_write_kv", "qwen3_vl_8b_decode"): {"T": 1},
    ("mrope_positions", "qwen2_5_vl_video"): {"B": 1, "images": (), "videos": (), "gap": 1},
}
KEYS = ("op", "case", "dtype", "direction", "frozen")


def job_of(op: str, case: str, dtype: str, direction: str, frozen: str = "") -> Job:
    wanted = (op, case, dtype, direction, frozen)
    return next(
        j for j in rows.jobs() if (j.op, j.case.name, j.dtype, j.direction, j.frozen) == wanted
    )


def head_of(job: Job) -> dict[str, Any]:
    named = (job.op, job.case.name, job.dtype, job.direction, job.frozen)
    return dict(zip(KEYS, named, strict=True))


def counted(call: timing.Call) -> int:
    """FLOPs of matrix products; attention in its plain form, which the counter knows on every device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def by_flops(
    head: dict[str, Any], ours: timing.Call, eager: timing.Call, rounds: int
) -> dict[str, Any]:
    """Times and FLOPs of both."""
    calls = {"ours": ours, "eager": eager}
    limits = timing.ceilings(DTYPES[head["dtype"]], "cpu")
    times = timing.measure({**calls, "gemm": limits["gemm"]}, "cpu", rounds)
    gemm = timing.gemm_flops_per_s(times["gemm"], "cpu")
    row: dict[str, Any] = {**head, "kind": "FLOPs", "gemm_flops_per_s": gemm}
    for name, call in calls.items():
        row[name] = {"flops": counted(call), "median": times[name].median}
    return row


def by_part(
    head: dict[str, Any], ours: timing.Call, part: str, alone: timing.Call, rounds: int
) -> dict[str, Any]:
    """The share of ours that the part takes alone."""
    times = timing.measure({"ours": ours, "part": alone}, "cpu", rounds)
    share = 1 / timing.ratio(times["ours"], times["part"])
    return {
        **head,
        "kind": "part",
        "part": part,
        "share": share,
        "ours": {"median": times["ours"].median},
    }


def absorbed(rounds: int) -> Iterator[dict[str, Any]]:
    for case, direction, frozen in ABSORBED:
        job = job_of("cross_attention", case, "fp32", direction, frozen)
        cases, inputs = rows.cases_of(job.op), rows.timed_inputs(job)
        ours = functools.partial(rows.step_of(cases.run, job), {**inputs, "algorithm": "absorbed"})
        eager = functools.partial(rows.step_of(cases.eager, job), inputs)
        yield by_flops(head_of(job), ours, eager, rounds)


def resamplers(rounds: int) -> Iterator[dict[str, Any]]:
    for name in resampler.LAYERS:
        head = dict(zip(KEYS, ("resampler", name, "fp32", "fwd", ""), strict=True))
        with torch.inference_mode():
            calls, _ = resampler.calls_of(name, "fp32")
            row = by_flops(head, calls["folded"], calls["eager"], rounds)
        yield row


def cleared(rounds: int) -> Iterator[dict[str, Any]]:
    """The gradient of an embedding is dense, new memory of zeros before a row is added."""
    job = job_of("merge_embeddings", "llava_7b", "fp32", "fwdbwd")
    inputs = rows.timed_inputs(job)
    ours = functools.partial(rows.step_of(rows.cases_of(job.op).run, job), inputs)
    weight = inputs["embed_weight"]
    part = "clearing the dense gradient of the embedding"
    yield by_part(head_of(job), ours, part, lambda: torch.zeros(weight.shape), rounds)


def small(rounds: int) -> Iterator[dict[str, Any]]:
    for (op, case), less in SMALL.items():
        dtype = "int64" if op == "mrope_positions" else "fp32"
        job = job_of(op, case, dtype, "fwd")
        tiny = replace(job, case=Case(case, {**job.case.sizes, **less}, job.case.tags))
        step = rows.step_of(rows.cases_of(op).run, job)
        ours, alone = (functools.partial(step, rows.timed_inputs(j)) for j in (job, tiny))
        yield by_part(head_of(job), ours, "the call itself (timed on one token)", alone, rounds)


def said(row: dict[str, Any]) -> str:
    """In words."""
    if row["kind"] == "part":
        return f"{row['part']} takes {row['share']:.0%} of it"
    ours, eager = (
        row[n]["flops"] / row[n]["median"] / row["gemm_flops_per_s"] for n in ("ours", "eager")
    )
    fewer = row["eager"]["flops"] / row["ours"]["flops"]
    return (
        f"absorption needs {fewer:.2f} × fewer FLOPs, at {ours:.0%} of a GEMM's speed,"
        f" eager's at {eager:.0%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reasons", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(argv)
    found = []
    for rows_of in (absorbed, resamplers, small, cleared):
        for row in rows_of(args.rounds):
            found.append(row)
            print(row["op"], row["case"], said(row), flush=True)
            run = asdict(new_run({"rounds": args.rounds}, [])) | {"rows": found}
            args.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
