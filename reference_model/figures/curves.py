"""Curves: precision over recall (METRIS Fig. 5), a score over r (Fig. 6), losses over steps."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from reference_model.figures.style import COLOURS, COLUMN, PAGE, styled, unit

_MARKERS = "osD^vP"
_LINES = ("-", "--", "-.", ":")
_LABEL = 52
"""Letters of a legend across a column."""


@styled
def precision_recall(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "Precision and recall of all pixels"
) -> Figure:
    """Draw the precision-recall curves of several models, the area under each in the legend (METRIS Fig. 5).

    Args:
        curves: Name of a model -> precision (k) and recall (k), at rising thresholds, so that recall falls.
        title: Of the figure.

    The lines are steps: no precision is promised between two thresholds, and the area under what is drawn is
    the number in the legend.
    """
    labels = [
        fill(f"{name}, AUC {100 * average_precision(*curve):.1f} %", _LABEL) for name, curve in curves.items()
    ]
    lines = 1 + sum(label.count("\n") + 1 for label in labels)
    figure = Figure(figsize=(COLUMN, 0.9 * COLUMN + 0.13 * lines), layout="constrained")
    axes = figure.subplots()
    for i, (precision, recall) in enumerate(curves.values()):
        axes.step(
            np.append(recall, 0.0),
            np.append(precision, precision[-1]),
            where="post",
            color=unit(COLOURS[i % len(COLOURS)]),
            linestyle=_LINES[i % len(_LINES)],
            label=labels[i],
        )
    axes.set(xlabel="recall (share of true pixels)", ylabel="precision (share of predicted pixels)")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), title=fill(title, _LABEL))
    axes.grid(alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center")  # of any number of runs, below what it would else cover
    return figure


def average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Area under the steps of `precision_recall`: Σ precision · step of recall, 0 to 1."""
    return float(-np.sum(np.diff(recall, append=0.0) * precision))


@styled
def score_by_ratio(
    series: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float] | None]],
    *,
    score: str = "oIoU",
    chosen: float | None = None,
    title: str = "Share of curated tokens",
) -> Figure:
    """Draw a score against r, the share of visual tokens that a word curates (METRIS Fig. 6).

    Args:
        series: Name -> r in (0, 1], the score as a fraction 0 to 1, and half its 95 % interval, or None.
        score: Name of the score.
        chosen: The r that a model was trained with, marked; None marks nothing.
        title: Of the figure.
    """
    figure = Figure(figsize=(COLUMN, 0.75 * COLUMN), layout="constrained")
    axes = figure.subplots()
    for i, (name, (ratios, scores, halves)) in enumerate(series.items()):
        axes.errorbar(
            100 * np.asarray(ratios),
            100 * np.asarray(scores),
            None if halves is None else 100 * np.asarray(halves),
            color=unit(COLOURS[i % len(COLOURS)]),
            marker=_MARKERS[i % len(_MARKERS)],
            linestyle=_LINES[i % len(_LINES)],
            markersize=4,
            capsize=2,
            label=name,
        )
    if chosen is not None:
        axes.axvline(100 * chosen, color="0.5", linewidth=0.8, linestyle=":")
        axes.annotate(
            f"r = {100 * chosen:g} %",
            (100 * chosen, 0.03),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            color="0.35",
            fontsize=7,
        )
    axes.set(xlabel="r (% of visual tokens curated)", ylabel=f"{score} (%)", title=title)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.margins(y=0.25)
    axes.legend(loc="lower right")
    return figure


@styled
def training_curves(
    steps: np.ndarray, losses: Mapping[str, np.ndarray], *, title: str = "Losses of the training run"
) -> Figure:
    """Draw losses over optimiser steps.

    Args:
        steps: (k) rising.
        losses: Name -> (k) values; NaN where a step did not log it.
        title: Of the figure.
    """
    figure = Figure(figsize=(PAGE, 2.2), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(losses.items()):
        kept = np.isfinite(values)
        axes.plot(
            np.asarray(steps)[kept],
            np.asarray(values)[kept],
            color=unit(COLOURS[i % len(COLOURS)]),
            linestyle=_LINES[i % len(_LINES)],
            label=name,
        )
    axes.set(xlabel="step (optimiser updates)", ylabel="loss (nats)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.legend()
    return figure
