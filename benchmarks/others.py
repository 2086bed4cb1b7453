# SPDX-License-Identifier: Apache-2.0
"""What the other measurements wrote: models, end to end, resamplers, numbers of queries and of images, reasons. Each as
rows, which are counted, judged and drawn beside those of ``benchmarks.run``, and as a table of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import reasons
from benchmarks.models import CASES, PARTS
from benchmarks.record import Row
from benchmarks.tables import markdown, ms

Found = Sequence[dict[str, Any]]


def model_rows(found: Found) -> Iterator[Row]:
    """A model patched, and each part's calls in its forward."""
    for row in found:
        if "failure" in row:
            yield Row("patch", row["model"], row["dtype"], "", "cpu", failure=row["failure"])
        for direction, speedup in row.get("speedup", {}).items():
            told = {"eager": speedup["patched"]}
            yield Row("patch", row["model"], row["dtype"], direction, "cpu", speedup=told)
        for part, times in row.get("parts", {}).items():
            told = {"eager": times["speedup"]}
            yield Row("patch", f"{row['model']}, {part}", row["dtype"], "fwd", "cpu", speedup=told)


def model_table(found: Found) -> str:
    """Two lines a model, and which models are missing."""
    header = (
        "model", "dtype", "", "rounds", "× patched", "× calls of each part (eager ms)", "compiled", "eager ms",
        "peak MB (eager)",
    )  # fmt: skip
    lines = [line for row in found for line in _model_lines(row)]
    names = {
        dtype: {r["model"] for r in found if r["dtype"] == dtype} for dtype in ("fp32", "bf16")
    }
    missing = [f"{n} {d}" for d, there in names.items() for n in CASES if n not in there]
    told = f"\n\nNot measured: {', '.join(missing)}." if missing else ""
    return markdown(header, lines, 7) + told


def _model_lines(row: dict[str, Any]) -> Iterator[list[str]]:
    head = [row["model"], row["dtype"]]
    if "failure" in row:
        yield [*head, "", "", f"FAILED {row['failure']}", *[""] * 4]
    for direction, speedup in row.get("speedup", {}).items():
        eager, peak = row["times_s"][direction]["eager"], row["peak_bytes"][direction]
        spread = (eager["p80"] - eager["p20"]) / eager["median"]
        told = row.get("parts", {}) if direction == "fwd" else {}
        parts = ", ".join(
            f"{p} {told[p]['speedup']:.2f} ({ms(told[p]['eager_s'])})" for p in PARTS if p in told
        )
        compiled = ", ".join(f"{n} {s:.2f}" for n, s in speedup.items() if "compile" in n)
        yield [
            *head, direction, str(row["rounds"]), f"{speedup['patched']:.2f}", parts or "–", compiled or "–",
            f"{1e3 * eager['median']:.0f} ±{spread / 2:.0%}",
            f"{peak['patched'] / 1e6:.0f} ({peak['eager'] / 1e6:.0f})",
        ]  # fmt: skip


def end_to_end_rows(found: Found) -> Iterator[Row]:
    for row in found:
        times = {n: row[n] for n in ("ours", *row["speedup"])}
        yield Row("end_to_end", row["row"], row["dtype"], "", "cpu", times_s=times, speedup=row["speedup"])  # fmt: skip


def end_to_end_table(found: Found) -> str:
    """What was done, how much of it a second, and how many times faster than each other way."""
    lines = []
    for row in found:
        unit = next(k for k in row["ours"] if k.endswith("_per_s"))
        spread = (row["ours"]["p80"] - row["ours"]["p20"]) / row["ours"]["median"]
        times = ", ".join(f"{name} {x:.2f}" for name, x in row["speedup"].items())
        each = ", ".join(f"{name} {row[name][unit]:.2f}" for name in row["speedup"])
        lines.append([row["row"], row["dtype"], unit.removesuffix("_per_s"),
                      f"{row['ours'][unit]:.2f} ±{spread / 2:.0%}", each, times])  # fmt: skip
    return markdown(("", "dtype", "a second", "ours", "others", "× faster than"), lines, 3)


def resampler_rows(found: Found) -> Iterator[Row]:
    for row in found:
        for variant, told in (("folded", ""), ("unfolded", ", not folded")):
            times = {"ours": row[variant], "eager": row["eager"]}
            yield Row("resampler", row["layer"] + told, row["dtype"], "fwd", "cpu", times_s=times,
                      speedup={"eager": row[variant]["vs_eager"]})  # fmt: skip


def resampler_table(found: Found) -> str:
    """Time, times eager, and the largest error against fp64."""
    names = ("folded", "unfolded", "eager")
    header = ("layer", "dtype", "tokens", *(f"{n} ms (× eager, error)" for n in names))
    lines = [
        [row["layer"], row["dtype"], str(row["tokens"])]
        + [
            f"{ms(row[n]['median'])} ({row[n]['vs_eager']:.2f}, {row[n]['error']:.1e})"
            for n in names
        ]
        for row in found
    ]
    return markdown(header, lines, 2)


def queries_table(found: Found) -> str:
    """A column a number of queries: absorbed and projected, auto's choice in bold."""
    numbers = sorted({point["Q"] for point in found})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for p in found:
        both = (
            f"**{ms(p[a]['median'])}**" if a == p["auto"] else ms(p[a]["median"])
            for a in ("absorbed", "projected")
        )
        lines.setdefault((p["shape"], p["dtype"], p["direction"]), {})[p["Q"]] = " / ".join(both)
    header = ("shape", "dtype", "", *(f"{q} queries" for q in numbers))
    cells = [[*key, *(line.get(q, "–") for q in numbers)] for key, line in lines.items()]
    told = 'Milliseconds, absorbed / projected; bold is what `algorithm="auto"` takes.'
    return f"{told}\n\n{markdown(header, cells, 3)}"


def batches_table(found: Found) -> str:
    """A column a number of images: ours, and how many times as fast as eager."""
    numbers = sorted({point["B"] for point in found})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for p in found:
        told = f"{ms(p['ours']['median'])} ({p['speedup']:.2f})"
        lines.setdefault((p["op"], p["case"], p["dtype"]), {})[p["B"]] = told
    header = ("op", "case", "dtype", *(f"{n} images" for n in numbers))
    cells = [[*key, *(line.get(n, "–") for n in numbers)] for key, line in lines.items()]
    return f"Milliseconds of a call (× eager).\n\n{markdown(header, cells, 3)}"


def reasons_table(found: Found) -> str:
    header = ("op", "case", "dtype", "", "measured here")
    lines = [
        [r["op"], r["case"] + (f" ({r['frozen']} frozen)" if r["frozen"] else ""), r["dtype"], r["direction"],
         reasons.said(r)] for r in found
    ]  # fmt: skip
    return markdown(header, lines, 5)


def no_rows(found: Found) -> Iterator[Row]:
    return iter(())


class Kind(NamedTuple):
    rows: Callable[[Found], Iterator[Row]]
    table: Callable[[Found], str]


KINDS = {  # by the name of the JSON file
    "models": Kind(model_rows, model_table),
    "end_to_end": Kind(end_to_end_rows, end_to_end_table),
    "resampler": Kind(resampler_rows, resampler_table),
    "queries": Kind(no_rows, queries_table),
    "batches": Kind(no_rows, batches_table),
    "reasons": Kind(no_rows, reasons_table),
}
