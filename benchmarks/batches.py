# SPDX-License-Identifier: Apache-2.0
"""Time of an image against the number of images of a call, ours and eager's: ``python -m benchmarks.batches OUT.json``.

Forward alone; what is not per image (packing the weight, absorbing shared queries, dispatching) shows at 1.
``benchmarks.report`` draws it.
"""

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.record import new_run
from benchmarks.rows import Job
from mmkernels.testing import Case, timing

NUMBERS = (1, 2, 4, 8, 16, 32)
CASES = (
    ("patch_embed", "clip_l14_336"),
    ("patch_embed", "vit_b16_224"),
    ("cross_attention", "siglip_map_head"),
    ("cross_attention", "blip2_layer"),
    ("patch_merge", "internvl"),
)


def jobs(dtype: str | None) -> list[Job]:
    return [
        job
        for job in rows.jobs()
        if (job.op, job.case.name) in CASES
        and (job.device, job.direction) == ("cpu", "fwd")
        and job.dtype == (dtype or job.dtype)
    ]


def measure(job: Job, B: int, rounds: int) -> dict[str, Any]:
    """One point: seconds of the whole call."""
    job = replace(job, case=Case(job.case.name, {**job.case.sizes, "B": B}, job.case.tags))
    inputs = rows.timed_inputs(job)
    cases = rows.cases_of(job.op)
    calls: dict[str, timing.Call] = {
        name: functools.partial(rows.step_of(run, job), inputs)
        for name, run in (("ours", cases.run), ("eager", cases.eager))
    }
    times = timing.measure(calls, "cpu", rounds)
    point = {"op": job.op, "case": job.case.name, "dtype": job.dtype, "B": B}
    point |= {n: {"median": t.median, "p20": t.p20, "p80": t.p80} for n, t in times.items()}
    return point | {"speedup": timing.ratio(times["eager"], times["ours"])}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__)
    parser.add_argument("json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    parser.add_argument("--numbers", type=int, nargs="+", default=NUMBERS)
    args = parser.parse_args(argv)
    points = []
    for job in jobs(args.dtype):
        for B in args.numbers:
            points.append(measure(job, B, args.rounds))
            print(job.name, B, f"{points[-1]['speedup']:.2f}", flush=True)
            run = asdict(new_run({"rounds": args.rounds}, [])) | {"rows": points}
            args.json.write_text(json.dumps(run, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
