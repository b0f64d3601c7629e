"""Pixels and guidance tokens in one space (METRIS Fig. 2a): t-SNE, and how well target pixels cluster."""

from collections.abc import Mapping
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from reference_model.figures.style import COLOURS, COLUMN, PAGE, TRUTH, styled, unit


class Embeddings(NamedTuple):
    """One model's embeddings of one picture and sentence, all in one space."""

    pixels: np.ndarray
    """(n, d)."""
    target: np.ndarray
    """(n) bool; True = a pixel of the target."""
    language: np.ndarray
    """(l, d) linguistic expression tokens, or (0, d)."""
    visual: np.ndarray
    """(v, d) visual expression tokens, or (0, d)."""


def silhouette(pixels: np.ndarray, target: np.ndarray) -> float:
    """How well target pixels are set apart from the others: mean silhouette by cosine distance, -1 to 1.

    Args:
        pixels: (n, d) embeddings.
        target: (n) bool.

    Raises:
        ValueError: One of the two kinds has no pixel, or all are of one kind.
    """
    from sklearn.metrics import silhouette_score

    inside = int(np.count_nonzero(target))
    if not 0 < inside < len(target) or len(target) < 3:
        raise ValueError(
            f"silhouette: {inside} of {len(target)} pixels are the target's, expected some of each"
        )
    return float(silhouette_score(pixels, target, metric="cosine"))


def positions(embeddings: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Bring (n, d) embeddings to (n, 2) by t-SNE: exact, on the sphere, from the principal axes.

    Raises:
        ValueError: There are fewer than 4.
    """
    from sklearn.manifold import TSNE

    if len(embeddings) < 4:
        raise ValueError(f"positions: got {len(embeddings)} embeddings, expected at least 4")
    # On the sphere squared Euclidean distance is twice the cosine's, and the principal axes can start it.
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    sphere = embeddings / np.maximum(length, 1e-12)
    perplexity = min(30.0, (len(sphere) - 1) / 3)
    found: np.ndarray = TSNE(
        init="pca", method="exact", perplexity=perplexity, random_state=seed
    ).fit_transform(sphere.astype(np.float64))
    return found


@styled
def embedding_map(
    models: Mapping[str, Embeddings], *, title: str = "Pixels and guidance tokens (t-SNE)", seed: int = 0
) -> Figure:
    """Draw target and other pixels with LE and VE tokens, a panel for each model (METRIS Fig. 2a).

    Args:
        models: Name -> its embeddings; the silhouette of its target pixels stands above its panel.
        title: Of the figure.
        seed: Of t-SNE.
    """
    columns = min(len(models), _MOST_COLUMNS)
    rows = -(-len(models) // columns)
    width = COLUMN if columns == 1 else PAGE
    side = min(width / columns, COLUMN)
    letters = round(15 * side)
    figure = Figure(figsize=(width, rows * (side + 0.2) + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in panels[len(models) :]:
        spare.remove()
    for axes, (name, found) in zip(panels, models.items()):
        kinds = (found.pixels[~found.target], found.pixels[found.target], found.language, found.visual)
        ends = np.cumsum([len(kind) for kind in kinds])
        at = np.split(positions(np.concatenate(kinds), seed=seed), ends[:-1])
        for where, label, looks in zip(at, ("other pixels", "target pixels", "LE", "VE"), _LOOKS):
            if len(where):
                axes.scatter(where[:, 0], where[:, 1], label=label, **looks)
        axes.set_title(f"{fill(name, letters)}\nsilhouette {silhouette(found.pixels, found.target):+.2f}")
        axes.set(xticks=[], yticks=[], xlabel="t-SNE axis 1 (no unit)", ylabel="t-SNE axis 2 (no unit)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, columnspacing=1, handletextpad=0.3)
    figure.suptitle("\n".join(fill(line, round(15 * width)) for line in title.splitlines()))
    return figure


_MOST_COLUMNS = 3
_LOOKS = (
    {"s": 5, "color": "0.7", "linewidths": 0},
    {"s": 7, "color": unit(TRUTH), "linewidths": 0},
    {"s": 34, "color": unit(COLOURS[0]), "marker": "s", "edgecolors": "white", "linewidths": 0.6},
    {"s": 60, "color": unit(COLOURS[1]), "marker": "*", "edgecolors": "white", "linewidths": 0.6},
)
