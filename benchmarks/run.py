# SPDX-License-Identifier: Apache-2.0
"""Checks and times the rows: ``python -m benchmarks.run --op patch_embed --dtype bf16 --json out.json``.

Exit code 1 if a row is out of its bound: such a row has no time.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import rows, tables
from benchmarks.record import Row, new_run
from benchmarks.rows import Checked, Job, Options
from mmkernels import OPS


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    chosen = [job for job in rows.jobs() if _wanted(job, args)]
    if not chosen:
        print("benchmarks.run: no row matches these options", file=sys.stderr)
        return 2
    options = Options(
        rounds=args.rounds or (5 if args.quick else 9),
        quick_check=args.quick,
        compile=not (args.quick or args.no_compile),
        cold=not args.hot,
    )
    known: dict[Job, Checked] = {}
    found: list[Row] = []
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    for job in _progress(chosen):
        found.append(rows.measure(job, options, known))
        run = new_run({**given, "rounds": options.rounds}, found)
        if args.json:  # after every row: what stops a run loses one
            run.save(args.json)
    print(f"{tables.text_table(found)}\n\n{tables.circumstances(run)}")
    return int(_summary(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--case", help="its name in cases.py")
    parser.add_argument("--dtype", choices=list(rows.DTYPES))
    parser.add_argument("--direction", choices=rows.DIRECTIONS)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help="default 9, with --quick 5")
    parser.add_argument(
        "--quick", action="store_true", help="a few rows, fewer rounds, no torch.compile"
    )
    parser.add_argument("--no-compile", action="store_true", help="without the compile baseline")
    parser.add_argument("--hot", action="store_true", help="GPU: leave the inputs in L2")
    parser.add_argument("--json", type=Path, help="write the rows and their circumstances here")
    return parser


def _wanted(job: Job, args: argparse.Namespace) -> bool:
    asked = {
        job.op: args.op,
        job.case.name: args.case,
        job.dtype: args.dtype,
        job.direction: args.direction,
        job.device: args.device,
    }
    quick = (job.case.name, job.direction) in rows.QUICK and not job.frozen
    in_scope = not args.quick or args.case or quick
    return bool(in_scope) and all(value in (None, name) for name, value in asked.items())


def _progress(chosen: list[Job]) -> Iterable[Job]:
    try:
        from tqdm import tqdm
    except ImportError:
        return _plain_progress(chosen)
    bar: Iterable[Job] = tqdm(chosen, file=sys.stderr, unit="row", desc="benchmarks")
    return bar


def _plain_progress(chosen: list[Job]) -> Iterable[Job]:
    for i, job in enumerate(chosen, 1):
        print(f"\r{i}/{len(chosen)} {job.name:<70}", end="", file=sys.stderr, flush=True)
        yield job
    print(file=sys.stderr)


def _summary(found: list[Row]) -> bool:
    """Says how many rows failed or lost; True if any failed."""
    failed = [row for row in found if row.failure]
    lost = sum(row.lost for row in found)
    print(f"{len(found)} rows: {len(failed)} failed, {lost} slower than 0.95 × eager.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
