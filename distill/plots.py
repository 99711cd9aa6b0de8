"""The report's pictures, as SVG text that takes its ink from the page around it, light or dark."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill.summary import ModelResult

_INK = "#010203"  # replaced by currentColor
_COLOURS = {"base": "#9aa3ad", "student": "#2f7ed8", "teacher": "#e08a1e"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
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
    figure, axes = _figure("accuracy", 2.0 + 0.2 * len(results))
    places = np.arange(len(results))[::-1]
    values = [100 * (result.accuracy.value or 0) for result in results]
    axes.barh(places, values, color=[_COLOURS[result.role] for result in results], height=0.62)
    for place, result, value in zip(places, results, values, strict=True):
        estimate = result.accuracy
        if estimate.low is not None and estimate.high is not None:
            axes.plot([100 * estimate.low, 100 * estimate.high], [place, place], color=_INK, linewidth=1.4, marker="|", markersize=9)
        axes.text(min(100 * (estimate.high or 0) + 1.5, 101), place, f"{value:.1f} %", va="center")
    axes.set(yticks=places, yticklabels=[result.role for result in results], xlim=(0, 112), xlabel="held-out prompts answered correctly, %")
    axes.set_xticks(range(0, 101, 20))
    return _svg(figure, "accuracy")


def loss_curve(steps: list[int], losses: list[float]) -> str:
    """Training loss over optimizer steps: as logged, and its running mean."""
    figure, axes = _figure("loss", 2.9)
    axes.plot(steps, losses, color=_COLOURS["student"], alpha=0.3, linewidth=1)
    window = max(1, len(losses) // 25)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color=_COLOURS["student"], linewidth=2)
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.set_ylim(bottom=0)
    return _svg(figure, "loss")


def funnel_bars(steps: list[tuple[str, int]]) -> str:
    """What is left after each step of the curation."""
    figure, axes = _figure("funnel", 1.0 + 0.38 * len(steps))
    places = np.arange(len(steps))[::-1]
    counts = [count for _, count in steps]
    axes.barh(places, counts, color=[_COLOURS["base"]] + [_COLOURS["student"]] * (len(steps) - 1), height=0.66)
    for place, count in zip(places, counts, strict=True):
        axes.text(count + max(counts) * 0.012, place, f"{count:,}", va="center")
    axes.set(yticks=places, yticklabels=[name for name, _ in steps], xlim=(0, max(counts) * 1.12), xticks=[])
    axes.spines["bottom"].set_visible(False)
    return _svg(figure, "funnel")


def _figure(salt: str, height: float) -> tuple[Figure, Axes]:
    """A transparent figure; the salt keeps the ids of several pictures on a page apart."""
    with mpl.rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
    return figure, axes


def _svg(figure: Figure, salt: str) -> str:
    text = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": salt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()[text.getvalue().index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)  # the viewBox alone: it scales with the page
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
