# SPDX-License-Identifier: Apache-2.0
"""The demo's picture: held-out questions with the model's answers, and the loss of every stage."""

import io
import textwrap

from mmkernels.train.evaluate import Exam, Score

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
