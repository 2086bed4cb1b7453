# SPDX-License-Identifier: Apache-2.0
"""A results file as a table: text for the terminal, Markdown for the README. Reads the JSON only.

``python -m benchmarks.report [--readme README.md] benchmarks/results/<device>/results.json …``
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import Row, Run

START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
HEADER = (
    "op", "case", "dtype", "direction", "ours ms", "p20–p80", "× eager", "× compile", "× library",
    "of ceiling", "rate", "extra MB (eager)", "max error (eager)", "kernel",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row under ``HEADER``."""
    case = f"{row.case} ({row.frozen} frozen)" if row.frozen else row.case
    head = [row.op, case, row.dtype, row.direction]
    if row.failure:
        return [*head, f"FAILED {row.failure}", *[""] * (len(HEADER) - len(head) - 1)]
    ours = row.times_s["ours"]
    return [
        *head,
        _ms(ours["median"]),
        f"{_ms(ours['p20'])}–{_ms(ours['p80'])}",
        *(_speedup(row, name) for name in ("eager", "compile", "library")),
        f"{row.fraction:.0%} {row.ceiling}" if row.fraction is not None else "–",
        _rate(row),
        f"{_megabytes(row, 'ours')} ({_megabytes(row, 'eager')})",
        f"{row.error:.1e} ({row.eager_error:.1e}) {row.worst}",
        _kernel(row),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _megabytes(row: Row, name: str) -> str:
    return f"{row.extra_bytes[name] / 2**20:.1f}" if name in row.extra_bytes else "–"


def _speedup(row: Row, name: str) -> str:
    if name in row.missing:
        return row.missing[name]
    return f"{row.speedup[name]:.2f}" if name in row.speedup else "–"


def _rate(row: Row) -> str:
    if row.bytes_per_s is None or row.flops_per_s is None:
        return "–"
    if row.ceiling == "copy":
        return f"{row.bytes_per_s / 1e9:.1f} GB/s"
    return f"{row.flops_per_s / 1e12:.3f} TFLOP/s"


def _kernel(row: Row) -> str:
    if not row.algorithm:
        return row.kernel
    other = "projected" if row.algorithm == "absorbed" else "absorbed"
    beside = f"; {other} {_ms(row.times_s[other]['median'])} ms" if other in row.times_s else ""
    return f"{row.kernel} {row.algorithm}{beside}"


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns; a failure runs over the empty ones."""
    lines = [list(HEADER), *(cells(row) for row in rows)]
    whole = [line for line in lines if not line[4].startswith("FAILED")]
    widths = [max(len(line[i]) for line in (lines if i < 4 else whole)) for i in range(len(HEADER))]
    padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def markdown(runs: Sequence[Run]) -> str:
    """Each run's circumstances and table."""
    parts = [_section(run) for run in runs]
    if not any(row.device == "cuda" for run in runs for row in run.rows):
        parts.append("GPU: not measured.")
    return "\n\n".join(parts)


def _section(run: Run) -> str:
    rule = ["---"] * 4 + ["---:"] * (len(HEADER) - 4)
    table = [list(HEADER), rule, *(cells(row) for row in run.rows)]
    return "\n".join([circumstances(run), "", *(f"| {' | '.join(line)} |" for line in table)])


def circumstances(run: Run) -> str:
    """Where and when, in a few lines."""
    isa = " ".join(name for name, there in run.machine["isa"].items() if there)
    gpu = f", {run.machine['gpu']}" if run.machine["gpu"] else ""
    commit = (run.git["commit"] or "unknown commit")[:12]
    dirty = " with uncommitted changes" if run.git["dirty"] else ""
    packages = ", ".join(f"{name} {number}" for name, number in run.versions.items() if number)
    limits = "; ".join(
        f"{key}: copy {m['copy_bytes_per_s'] / 1e9:.1f} GB/s, GEMM {m['gemm_flops_per_s'] / 1e12:.3f} TFLOP/s"
        for key, m in run.ceilings.items()
    )
    return (
        f"Measured on {run.machine['cpu']} (family/model {run.machine['cpu_family_model']}, {isa}){gpu}, "
        f"{run.machine['threads']} threads, {run.date}, commit {commit}{dirty}; {packages}. "
        f"Median of {run.args['rounds']} interleaved rounds; speed-ups are medians of ratios within a round, "
        f"below 1 a loss." + (f" Ceilings of the same rounds: {limits}." if limits else "")
    )


def write_readme(path: Path, text: str, start: str = START, end: str = END) -> None:
    """Replaces what stands between the two markers."""
    content = path.read_text()
    if (
        content.count(start) != 1
        or content.count(end) != 1
        or content.index(start) > content.index(end)
    ):
        raise ValueError(f"{path} must contain {start} and, after it, {end}, once each")
    before, rest = content.split(start)
    after = rest.split(end)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument(
        "--readme", type=Path, help="replace its benchmarks section; default: print"
    )
    args = parser.parse_args(argv)
    text = markdown([record.load(path) for path in args.results])
    if args.readme is None:
        print(text)
        return 0
    try:
        write_readme(args.readme, text)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
