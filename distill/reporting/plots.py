"""The report's pictures, as SVG text that takes its ink from the page around it, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from distill.measure.intervals import Estimate
from distill.reporting.measured import ModelResult

_INK = "#010203"  # replaced by currentColor
_COLOURS = {"base": "#9aa3ad", "student": "#2f7ed8", "teacher": "#e08a1e"}
_WITH_COUNTS, _LONGEST_LABEL = 12, 24  # labels of a square with numbers in it; characters of one
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def accuracy_bars(results: list[ModelResult]) -> str:
    """A bar a model with its interval."""
    with _style("accuracy"):
        figure, axes = _figure(0.75 + 0.36 * len(results))
        places = np.arange(len(results))[::-1]
        values = [100 * (result.accuracy.value or 0) for result in results]
        axes.barh(places, values, color=[_COLOURS[result.role] for result in results], height=0.62)
        for place, result, value in zip(places, results, values, strict=True):
            low, high = result.accuracy.low, result.accuracy.high
            if low is not None and high is not None:
                axes.plot([100 * low, 100 * high], [place, place], color=_INK, linewidth=1.4, marker="|", markersize=9)
            axes.text(100 * (high or 0) + 1.5, place, f"{value:.1f} %", va="center")
        axes.set(yticks=places, yticklabels=[result.role for result in results], xlim=(0, 122))
        axes.set(xticks=range(0, 101, 20), xlabel="held-out prompts answered correctly, %")
        axes.spines["bottom"].set_bounds(0, 100)
        return _svg(figure, "accuracy", "Bars: share of held-out prompts that each model answers correctly, with its interval")


def confusion_square(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """How often each label (a row) was answered by each (a column, the last for none): the darker, the larger its share of the row.

    Args:
        name: Of the set, which keeps the ids of several pictures apart.
        labels: Of the rows.
        counts: A column more than labels.
    """
    with _style(f"confusion-{name}"):
        figure, axes = _figure(1.6 + 0.22 * len(labels))
        table = np.array(counts, float)
        shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
        axes.pcolormesh(shares, cmap=LinearSegmentedColormap.from_list("share", ["#2f7ed800", "#2f7ed8ff"]), vmin=0, vmax=1)
        if len(labels) <= _WITH_COUNTS:
            for row, column in zip(*table.nonzero(), strict=True):
                axes.text(column + 0.5, row + 0.5, f"{int(table[row, column]):,}", ha="center", va="center", fontsize=8)
        shown = [label if len(label) <= _LONGEST_LABEL else f"{label[: _LONGEST_LABEL - 1]}…" for label in [*labels, "none"]]
        axes.set_xticks(np.arange(len(shown)) + 0.5, shown, rotation=90, fontsize=8)
        axes.set_yticks(np.arange(len(labels)) + 0.5, shown[:-1], fontsize=8)
        axes.set(xlabel="answered", ylabel="right")
        axes.invert_yaxis()
        return _svg(figure, f"confusion-{name}", "Squares: how often each label was answered by each, as a share of its row")


def runs_bars(runs: Sequence[tuple[str, Estimate]]) -> str:
    """A bar a run, named, with its student's accuracy and its interval: a picture that stands alone."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": "runs", **dict.fromkeys(_INKED, "#444444")}):
        figure, axes = _figure(0.75 + 0.36 * len(runs))
        places = np.arange(len(runs))[::-1]
        axes.barh(places, [100 * (accuracy.value or 0) for _, accuracy in runs], color=_COLOURS["student"], height=0.62)
        for place, (_, accuracy) in zip(places, runs, strict=True):
            if accuracy.low is not None and accuracy.high is not None:
                axes.plot([100 * accuracy.low, 100 * accuracy.high], [place, place], color="#444444", marker="|", markersize=9)
        axes.set(yticks=places, yticklabels=[name for name, _ in runs], xlim=(0, 100))
        axes.set(xlabel="held-out prompts that the student answers correctly, %")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return text.getvalue()


Series = Sequence[tuple[int, float]]
"""A value at each logged optimizer step."""


def loss_curve(losses: Series, divergences: Series = ()) -> str:
    """Training loss over optimizer steps, and the divergence from the teacher where it was logged: as logged, with running means."""
    with _style("loss"):
        figure, axes = _figure(2.3)
        drawn = [("student", "loss", losses)]
        if divergences:
            drawn.append(("teacher", "forward KL from the teacher, at least", divergences))
        for colour, name, series in drawn:
            steps, values = [step for step, _ in series], [value for _, value in series]
            axes.plot(steps, values, color=_COLOURS[colour], alpha=0.4, linewidth=1, marker="." if len(steps) == 1 else "")
            window = max(1, len(values) // 25)
            smooth = np.convolve(values, np.ones(window) / window, mode="valid")
            axes.plot(steps[window - 1 :], smooth, color=_COLOURS[colour], linewidth=2, label=name)
        if divergences:
            axes.legend(frameon=False)
        values = [value for _, _, series in drawn for _, value in series]
        axes.set(xlabel="optimizer step", ylabel="nats a token", ylim=(min(0, 1.05 * min(values)), 1.05 * max(values) or 1))
        return _svg(figure, "loss", "Line: training loss over optimizer steps")


def funnel_bars(steps: list[tuple[str, int]]) -> str:
    """What is left after each step of the curation."""
    with _style("funnel"):
        figure, axes = _figure(0.3 + 0.3 * len(steps))
        places = np.arange(len(steps))[::-1]
        counts = [count for _, count in steps]
        axes.barh(places, counts, color=[_COLOURS["base"]] + [_COLOURS["student"]] * (len(steps) - 1), height=0.66)
        for place, count in zip(places, counts, strict=True):
            axes.text(count + max(counts) * 0.012, place, f"{count:,}", va="center")
        axes.set(yticks=places, yticklabels=[name for name, _ in steps], xlim=(0, max(counts) * 1.12), xticks=[])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, "funnel", "Bars: prompts, traces, and what is left of the traces after each check")


def _style(salt: str) -> AbstractContextManager[None]:
    """The look of all pictures; without a salt their ids would differ from run to run."""
    return mpl.rc_context(_STYLE | {"svg.hashsalt": salt})


def _figure(height: float) -> tuple[Figure, Axes]:
    """A figure as wide as a telephone, with its height in inches: so its text can still be read there."""
    figure = Figure(figsize=(5.2, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, description: str) -> str:
    """A figure as SVG that scales with the page; the name keeps the ids of several pictures on one page apart."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)  # the viewBox alone
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
