# SPDX-License-Identifier: Apache-2.0
"""The demos' pictures: held-out questions with the model's answers, the loss of every stage, what it has drawn."""

import io
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from mmkernels.train.evaluate import Answered
from mmkernels.train.sample import Sample

ROWS, COLUMNS = 3, 8


def draw_figure(answered: Answered, losses: dict[str, list[float]], title: str) -> bytes:
    """A PNG: pictures and losses."""
    figure = _figure(15, 11)
    grid = figure.add_gridspec(ROWS + 1, COLUMNS)
    _questions(figure, grid, answered, ROWS, COLUMNS)
    _losses(figure, grid[ROWS, :], losses)
    figure.suptitle(title)
    return _png(figure, 90)


def draw_page(
    answered: Answered, pictures: torch.Tensor, losses: dict[str, list[float]], scores: str
) -> bytes:
    """A PNG: questions about every modality with answers, drawn digits ``[10·k, 1, H, H]``, losses, the scores."""
    figure = _figure(17, 16)
    grid = figure.add_gridspec(6, 6)
    _questions(figure, grid, answered, 3, 6)
    each = len(pictures) // 10
    rows = pictures.view(10, each, *pictures.shape[2:]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    axes = figure.add_subplot(grid[3:5, :3])
    axes.imshow(rows.numpy(), cmap="gray")
    axes.set_axis_off()
    axes.set_title("drawn: a row a digit", fontsize=9)
    axes = figure.add_subplot(grid[3:5, 3:])
    axes.set_axis_off()
    axes.text(0, 1, scores, family="monospace", fontsize=7.5, va="top")
    _losses(figure, grid[5, :], losses)
    return _png(figure, 80)


def throughput(path: Path) -> str:
    """What ``benchmarks.end_to_end`` has measured, if it has: packed through the kernels beside padded eager."""
    if not path.exists():
        return ""
    lines = []
    for row in json.loads(path.read_text())["rows"]:
        unit = next(k for k in row["ours"] if k.endswith("_per_s"))
        each = ", ".join(
            f"{name} {row[name][unit]:.2f} (ours {times:.2f} x)"
            for name, times in row["speedup"].items()
        )
        what = unit.removesuffix("_per_s")
        lines.append(f"{row['row']}, {row['dtype']}: {row['ours'][unit]:.2f} {what}/s; {each}")
    return "\n".join(lines)


def _figure(width: int, height: int) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _questions(figure: Any, grid: Any, answered: Answered, rows: int, columns: int) -> None:
    """The first that fit, with question, answer and verdict above each."""
    shown = zip(answered.samples[: rows * columns], answered.said, answered.right, strict=False)
    for i, (sample, said, right) in enumerate(shown):
        axes = figure.add_subplot(grid[i // columns, i % columns])
        axes.set_axis_off()
        _show(axes, sample)
        said = "".join(c if c.isprintable() else "?" for c in said)
        text = textwrap.fill(re.sub("<[a-z]+>", "", sample.prompt), 26)
        verdict = "right" if right else f"wrong: is {sample.answer}"
        color = "darkgreen" if right else "crimson"
        axes.set_title(f"{text}\n{said} ({verdict})", fontsize=8, color=color, parse_math=False)


def _show(axes: Any, sample: Sample) -> None:
    """Pictures side by side; of sound its waveform beneath."""
    frames = []
    for modality, medium in sample.media:
        assert isinstance(medium, torch.Tensor)
        if modality == "audio":
            axes.inset_axes((0, -0.15, 1, 0.3)).plot(medium[::8].numpy(), linewidth=0.4)
        else:
            frames += list(medium[None] if medium.dim() == 3 else medium)
    if frames:
        axes.imshow(torch.cat(frames, 2).permute(1, 2, 0).numpy())


def _losses(figure: Any, place: Any, losses: dict[str, list[float]]) -> None:
    below = place.subgridspec(1, max(1, len(losses)))
    for i, (stage, values) in enumerate(losses.items()):
        axes = figure.add_subplot(below[0, i])
        axes.plot(values, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_title(f"{stage}: loss", fontsize=9)
        axes.set_xlabel("step")


def _png(figure: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
