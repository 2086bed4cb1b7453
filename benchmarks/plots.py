# SPDX-License-Identifier: Apache-2.0
"""Pictures of a device's results, as SVG beside the JSON: speed-ups, roofline, time against queries and images.

The same numbers give the same bytes: no date, ids from a fixed salt, letters as text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.record import Row
from benchmarks.stored import Device

STYLE: Any = {
    "svg.hashsalt": "mmkernels",
    "svg.fonttype": "none",
    "font.size": 7,
    "figure.constrained_layout.use": True,
}
DTYPES = ("fp32", "bf16")
WON, LOST = "tab:blue", "tab:red"
Draw = Callable[[], Any]


def of(device: Device) -> dict[str, Draw]:
    """The pictures there are numbers for, by name."""
    rows = [row for row in device.rows if not row.failure]
    points, images = (
        [p for file in device.files if file.path.stem == stem for p in file.found]
        for stem in ("queries", "batches")
    )
    compared = [row for row in rows if "eager" in row.speedup]
    found: dict[str, Draw] = {}
    if compared:
        found["speedups"] = lambda: speedups(compared)
    if any(row.fraction is not None for row in rows):
        found["roofline"] = lambda: roofline([row for row in rows if row.fraction is not None])
    if points:
        found["queries"] = lambda: queries(points)
    if images:
        found["batches"] = lambda: batches(images)
    return found


def write(draw: Draw, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)


def speedups(rows: Sequence[Row]) -> Any:
    """A bar a row, from 1 on: eager's time over ours. What runs in integers stands beside fp32."""
    columns = {
        d: [r for r in rows if ("bf16" if r.dtype == "bf16" else "fp32") == d] for d in DTYPES
    }
    tallest = max(map(len, columns.values()))
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 1 + 0.14 * tallest))
    for axis, (dtype, these) in zip(axes, columns.items(), strict=True):
        names = [f"{r.op} {r.named} {r.direction}".strip() for r in these]
        times = [r.speedup["eager"] for r in these]
        places = range(len(these))
        axis.barh(
            places, [t - 1 for t in times], left=1, color=[WON if t >= 1 else LOST for t in times]
        )
        axis.set_yticks(places, names)
        axis.set(
            xscale="log",
            ylim=(tallest - 0.5, -0.5),
            title=f"{dtype}: times as fast as eager (log); red is slower",
        )
        axis.set_xlim(right=2 * max(1, *times))  # room for the numbers
        axis.axvline(1, color="black", linewidth=0.8)
        for place, t in zip(places, times, strict=True):
            axis.text(max(t, 1), place, f" {t:.2f}", va="center", fontsize=6)
    return figure


def roofline(rows: Sequence[Row]) -> Any:
    """Forward rows under the median ceilings of their rounds: what multiplies by FLOP/s, what only moves by bytes/s."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), width_ratios=(2, 1))
    for (left, right), dtype in zip(axes, DTYPES, strict=True):
        these = [r for r in rows if r.dtype == dtype]
        copy, gemm = (
            _median([r.machine[f"{n}_per_s"] for r in these]) for n in ("copy_bytes", "gemm_flops")
        )
        _multiplying(left, [r for r in these if r.flops_per_s], copy, gemm)
        _moving(right, [r for r in these if not r.flops_per_s], copy)
        left.set(title=f"{dtype}: FLOP/s", xlabel="FLOP a byte", xscale="log", yscale="log")
        right.set(title=f"{dtype}: GB/s of what only moves")
    return figure


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 1.0


def _multiplying(axis: Any, rows: Sequence[Row], copy: float, gemm: float) -> None:
    """Points by op under the roof."""
    for op in dict.fromkeys(row.op for row in rows):
        points = [(r.flops_per_s, r.bytes_per_s) for r in rows if r.op == op]
        axis.plot(
            [f / b for f, b in points if f and b],
            [f for f, _ in points],
            "o",
            markersize=4,
            label=op,
        )
    low, high = axis.get_xlim()
    edges = sorted({max(low, 0.1), gemm / copy, max(high, 2 * gemm / copy)})
    axis.plot(edges, [min(gemm, copy * x) for x in edges], color="black", linewidth=0.8)
    if rows:
        axis.legend()


def _moving(axis: Any, rows: Sequence[Row], copy: float) -> None:
    """A bar a row beside the copy."""
    axis.barh(range(len(rows)), [(r.bytes_per_s or 0) / 1e9 for r in rows], color=WON)
    axis.set_yticks(range(len(rows)), [f"{r.op} {r.case}" for r in rows])
    axis.axvline(copy / 1e9, color="black", linewidth=0.8)


def queries(points: Sequence[dict[str, Any]]) -> Any:
    """A panel a shape, dtype and direction: both algorithms against the number of queries; dots are auto's choice."""
    lines = list(dict.fromkeys((p["direction"], p["dtype"]) for p in points))
    shapes = list(dict.fromkeys(p["shape"] for p in points))
    figure, axes = pyplot.subplots(
        len(lines), len(shapes), figsize=(12, 2.4 * len(lines)), squeeze=False
    )
    for i, (direction, dtype) in enumerate(lines):
        for j, shape in enumerate(shapes):
            here = [
                p
                for p in points
                if (p["shape"], p["dtype"], p["direction"]) == (shape, dtype, direction)
            ]
            _panel(axes[i][j], here)
            axes[i][j].set(title=f"{shape}, {dtype} {direction}", xlabel="queries", ylabel="ms")
    axes[0][0].legend(title="dots: auto's choice")
    return figure


def _panel(axis: Any, points: Sequence[dict[str, Any]]) -> None:
    numbers = [p["Q"] for p in points]
    for algorithm, colour in (("absorbed", "tab:blue"), ("projected", "tab:orange")):
        axis.plot(
            numbers, [1e3 * p[algorithm]["median"] for p in points], color=colour, label=algorithm
        )
        taken = [p for p in points if p["auto"] == algorithm]
        axis.plot(
            [p["Q"] for p in taken],
            [1e3 * p[algorithm]["median"] for p in taken],
            "o",
            color=colour,
        )
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(numbers, [str(q) for q in numbers])
    axis.minorticks_off()


def batches(points: Sequence[dict[str, Any]]) -> Any:
    """A panel a case and dtype: milliseconds an image against the images of a call."""
    names = list(dict.fromkeys((p["op"], p["case"]) for p in points))
    figure, axes = pyplot.subplots(2, len(names), figsize=(2.6 * len(names), 5), squeeze=False)
    for i, dtype in enumerate(DTYPES):
        for j, (op, case) in enumerate(names):
            here = [p for p in points if (p["op"], p["case"], p["dtype"]) == (op, case, dtype)]
            numbers = [p["B"] for p in here]
            for name, colour in (("ours", WON), ("eager", "tab:orange")):
                times = [1e3 * p[name]["median"] / p["B"] for p in here]
                axes[i][j].plot(numbers, times, "o-", markersize=3, color=colour, label=name)
            axes[i][j].set(
                title=f"{op}\n{case}, {dtype}", xlabel="images", xscale="log", ylim=(0, None)
            )
            axes[i][j].set_xticks(numbers, [str(n) for n in numbers])
            axes[i][j].minorticks_off()
        axes[i][0].set(ylabel="ms an image")
    axes[0][0].legend()
    return figure
