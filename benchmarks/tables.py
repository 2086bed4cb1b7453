# SPDX-License-Identifier: Apache-2.0
"""Rows of ``benchmarks.run`` as a table, text for the terminal and Markdown; and where a run was made."""

from collections.abc import Iterable, Sequence

from benchmarks.record import Row, Run

HEADER = (
    "op", "case", "dtype", "direction", "ours ms", "p20–p80", "× eager", "× compile", "× library",
    "of ceiling", "rate", "extra MB (eager)", "max error (eager)", "kernel",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """A row under ``HEADER``."""
    head = [row.op, row.named, row.dtype, row.direction]
    if row.failure:
        return [*head, f"FAILED {row.failure}", *[""] * (len(HEADER) - len(head) - 1)]
    ours = row.times_s["ours"]
    return [
        *head,
        ms(ours["median"]),
        f"{ms(ours['p20'])}–{ms(ours['p80'])}",
        *(_speedup(row, name) for name in ("eager", "compile", "library")),
        f"{row.fraction:.0%} {row.ceiling}" if row.fraction is not None else "–",
        _rate(row),
        f"{_megabytes(row, 'ours')} ({_megabytes(row, 'eager')})",
        f"{row.error:.1e} ({row.eager_error:.1e}) {row.worst}",
        _kernel(row),
    ]


def ms(seconds: float) -> str:
    """Three digits; all of them from a second on."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


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
    beside = f"; {other} {ms(row.times_s[other]['median'])} ms" if other in row.times_s else ""
    return f"{row.kernel} {row.algorithm}{beside}"


def text_table(rows: Sequence[Row]) -> str:
    """Aligned columns; a failure runs over the empty ones."""
    lines = [list(HEADER), *(cells(row) for row in rows)]
    whole = [line for line in lines if not line[4].startswith("FAILED")]
    widths = [max(len(line[i]) for line in (lines if i < 4 else whole)) for i in range(len(HEADER))]
    padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], words: int) -> str:
    """A table whose first columns are words and whose others are numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(header))]
    safe = (
        " | ".join(cell.replace("|", "\\|") for cell in line) for line in (header, rule, *lines)
    )
    return "\n".join(f"| {line} |" for line in safe)


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
