# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: held-out questions with the model's answers, and the loss of every stage."""

import io
import re
import textwrap
from typing import Any

import torch

from mmkernels.train.evaluate import Exam, Score
from mmkernels.train.sample import Sample

ROWS, COLUMNS = 3, 8


def draw_figure(exam: Exam, score: Score, losses: dict[str, list[float]]) -> bytes:
    """A PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 11), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(ROWS + 1, COLUMNS)
    shown = min(ROWS * COLUMNS, len(exam.questions))
    for i in range(shown):
        axes = figure.add_subplot(grid[i // COLUMNS, i % COLUMNS])
        axes.imshow(exam.pixel_values[i].permute(1, 2, 0).numpy())
        axes.set_axis_off()
        question, right = exam.questions[i], score.right[i]
        verdict = "(right)" if right else f"(wrong: is {question.answer})"
        answer = "".join(c if c.isprintable() else "?" for c in score.answers[i])
        title = f"{textwrap.fill(question.text, 24)}\n{answer} {verdict}"
        axes.set_title(
            title, fontsize=9, color="darkgreen" if right else "crimson", parse_math=False
        )
    for i, (stage, values) in enumerate(losses.items()):
        axes = figure.add_subplot(
            grid[ROWS, i * COLUMNS // len(losses) : (i + 1) * COLUMNS // len(losses)]
        )
        axes.plot(values, linewidth=0.8)
        axes.set_yscale("log")
        axes.set_title(f"{stage}: loss", fontsize=9)
        axes.set_xlabel("step")
    figure.suptitle(f"held-out digits, exact match {score.exact_match:.1%}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def draw_page(
    shown: list[tuple[Sample, str]],
    pictures: torch.Tensor,
    losses: dict[str, list[float]],
    scores: str,
) -> bytes:
    """A PNG: questions about every modality with answers, drawn digits ``[10·k, 1, H, H]``, losses, the scores."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 16), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(6, 6)
    for i, (sample, said) in enumerate(shown[:18]):
        axes = figure.add_subplot(grid[i // 6, i % 6])
        axes.set_axis_off()
        _show(axes, sample)
        right = said == sample.answer
        said = "".join(c if c.isprintable() else "?" for c in said)
        verdict = "right" if right else f"wrong: is {sample.answer}"
        text = re.sub("<[a-z]+>", "", sample.prompt)
        axes.set_title(
            f"{textwrap.fill(text, 30)}\n{said} ({verdict})", fontsize=8,
            color="darkgreen" if right else "crimson", parse_math=False,
        )  # fmt: skip
    each = len(pictures) // 10
    rows = pictures.view(10, each, *pictures.shape[2:]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    axes = figure.add_subplot(grid[3:5, :3])
    axes.imshow(rows.numpy(), cmap="gray")
    axes.set_axis_off()
    axes.set_title("drawn: a row a digit", fontsize=9)
    axes = figure.add_subplot(grid[3:5, 3:])
    axes.set_axis_off()
    axes.text(0, 1, scores, family="monospace", fontsize=7.5, va="top")
    below = grid[5, :].subgridspec(1, len(losses))
    for i, (stage, values) in enumerate(losses.items()):
        axes = figure.add_subplot(below[0, i])
        axes.plot(values, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_title(f"{stage}: loss", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()


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
