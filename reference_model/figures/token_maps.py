"""What words see: relevance, curated tokens, and the decoder's attention (METRIS Fig. 2, 7b and 15)."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from reference_model.figures.masks import marked
from reference_model.figures.style import COLOURS, COLUMN, HEAT, PAGE, TRUTH, bare, styled

_MOST_COLUMNS = 6


@styled
def relevance(
    image: np.ndarray,
    words: Sequence[str],
    scores: np.ndarray,
    *,
    title: str = "Relevance of each visual token",
) -> Figure:
    """Draw, for each word, the relevance S_c of every visual token over the picture (METRIS Eq. 2).

    Args:
        image: (h, w, 3) uint8.
        words: l words; the first is the global cue.
        scores: (l, gh, gw) cosines, the grid laid over the whole picture. One scale serves all words.
        title: Of the figure.

    Raises:
        ValueError: The counts of words and of rows differ.
    """
    scores = _checked("relevance", words, scores)
    figure, cells = _panels([len(words)], image.shape, title)
    for axes, word, row in zip(cells, words, scores):
        drawn = _heat(axes, image, row, float(scores.min()), float(scores.max()))
        axes.set_title(word)
    figure.colorbar(drawn, ax=cells, label="relevance (cosine)", shrink=0.8)
    return figure


@styled
def curated_tokens(
    image: np.ndarray, words: Sequence[str], curated: np.ndarray, *, title: str = "Curated visual tokens"
) -> Figure:
    """Draw, for each word, the visual tokens it curates, the others dimmed (METRIS Eq. 3).

    Args:
        image: (h, w, 3) uint8.
        words: l words; the first is the global cue.
        curated: (l, gh, gw) bool, the grid laid over the whole picture.
        title: Of the figure.

    Raises:
        ValueError: The counts of words and of rows differ.
    """
    curated = _checked("curated_tokens", words, curated)
    figure, cells = _panels([len(words)], image.shape, title)
    for axes, word, row in zip(cells, words, curated):
        axes.imshow(dimmed(image, spread(row, *image.shape[:2])))
        bare(axes)
        axes.set_title(f"{word}: {int(row.sum())} of {row.size}")
    return figure


@styled
def attention_to_words(
    image: np.ndarray,
    words: Sequence[str],
    to_language: np.ndarray | None,
    to_visual: np.ndarray | None,
    *,
    visual_words: Sequence[str] | None = None,
    title: str = "Share of a pixel's attention that each guidance token gets",
) -> Figure:
    """Draw where pixels attend to each word's linguistic (LE) and visual expression (VE) token.

    Args:
        image: (h, w, 3) uint8.
        words: l words; the first is the global cue.
        to_language: (l, gh, gw) weights, or None in a model without LE; over both arrays each cell sums to 1.
        to_visual: (v, gh, gw), the same of VE, or None.
        visual_words: v words, those that have a VE token. None: all.
        title: Of the figure.

    Raises:
        ValueError: Neither is given, or both are empty, or the counts of words and of rows differ.
    """
    named = {"LE": words, "VE": words if visual_words is None else visual_words}
    rows = {
        name: _checked("attention_to_words", named[name], maps)
        for name, maps in (("LE", to_language), ("VE", to_visual))
        if maps is not None and len(maps)
    }
    if not rows:
        raise ValueError("attention_to_words: got neither to_language nor to_visual, expected one of them")
    most = max(float(maps.max()) for maps in rows.values())
    figure, cells = _panels([len(maps) for maps in rows.values()], image.shape, title)
    free = iter(cells)
    for name, maps in rows.items():
        for word, row in zip(named[name], maps):
            axes = next(free)
            drawn = _heat(axes, image, row, 0.0, most)
            axes.set_title(f"{name} {word}: {row.mean():.0%}")
    figure.colorbar(drawn, ax=cells, label="share of attention", shrink=0.8)
    return figure


@styled
def attention_sums(
    images: Sequence[np.ndarray],
    sentences: Sequence[str],
    truths: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    to_language: Sequence[np.ndarray],
    to_visual: Sequence[np.ndarray],
    *,
    title: str = "Attention of pixels to LE and VE tokens; the two add up to 1",
) -> Figure:
    """Draw a row for each sentence: truth, prediction, and each pixel's attention to all of LE and all of VE.

    Args:
        images: k pictures (h, w, 3) uint8.
        sentences: k sentences.
        truths: k masks (h, w) bool.
        predictions: k masks (h, w) bool.
        to_language: k maps (gh, gw), the weights of the LE tokens added up.
        to_visual: k maps (gh, gw) of VE; with the former 1 in each cell. Each map has its own scale, from its
            least to its most, as the two would else be each other's negative in one colour.
        title: Of the figure.
    """
    rows = list(zip(images, sentences, truths, predictions, to_language, to_visual, strict=True))
    side = PAGE / 4.3
    figure = Figure(figsize=(PAGE, 0.4 + len(rows) * (side * 0.92 + 0.2)), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for cells, (image, sentence, truth, prediction, language, visual) in zip(grid, rows):
        cells[0].imshow(marked(image, truth, TRUTH))
        cells[0].set_xlabel(fill(f"“{sentence}”", 20), fontstyle="italic")
        cells[1].imshow(marked(image, prediction, COLOURS[0]))
        for axes, weights in ((cells[2], language), (cells[3], visual)):
            drawn = _heat(axes, image, weights, float(weights.min()), float(weights.max()))
            bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02)
            bar.ax.tick_params(labelsize=6)
        for axes in cells[:2]:
            bare(axes)
    for axes, name in zip(grid[0], ("truth", "prediction", "to LE (share)", "to VE (share)")):
        axes.set_title(name)
    figure.suptitle(title)
    return figure


def spread(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bring a (gh, gw) grid to (height, width) pixels: each has the value of the cell around its centre."""
    rows = ((np.arange(height) + 0.5) * grid.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * grid.shape[1] / width).astype(int)
    return grid[rows[:, None], columns]


def heated(image: np.ndarray, weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """Lay weights in the colours of `HEAT` over the picture in grey: three quarters of the former.

    Args:
        image: (h, w, 3) uint8.
        weights: (gh, gw), the grid laid over the whole picture.
        low: What gets the darkest colour, as all below.
        high: What gets the lightest, as all above.

    Returns:
        (h, w, 3) uint8.
    """
    share = np.clip((np.asarray(weights, dtype=np.float64) - low) / max(high - low, 1e-6), 0, 1)
    colours = 255 * colormaps[HEAT](share)[..., :3]
    grey = np.asarray(image, dtype=np.float32).mean(axis=2, keepdims=True)
    return (0.75 * spread(colours, *grey.shape[:2]) + 0.25 * grey).round().astype(np.uint8)


def dimmed(image: np.ndarray, keep: np.ndarray, *, light: float = 0.3) -> np.ndarray:
    """Leave (h, w, 3) uint8 as it is where ``keep`` (h, w) is True, and darken the rest to a share of it."""
    return np.where(keep[..., None], image, (image * light).astype(np.uint8))


def _checked(owner: str, words: Sequence[str], maps: np.ndarray) -> np.ndarray:
    maps = np.asarray(maps)
    if maps.ndim != 3 or len(maps) != len(words) or not len(words):
        raise ValueError(f"{owner}: {len(words)} words, maps have shape {maps.shape}, expected (l, gh, gw)")
    return maps


def _heat(axes: Axes, image: np.ndarray, weights: np.ndarray, low: float, high: float) -> Any:
    """Draw weights over the grey picture, one cell a square, and give what a colour bar needs."""
    axes.imshow(heated(image, weights, low, high))
    bare(axes)
    return ScalarMappable(Normalize(low, max(high, low + 1e-6)), HEAT)


def _panels(counts: Sequence[int], shape: Sequence[int], title: str) -> tuple[Figure, list[Axes]]:
    """Lay out groups of so many panels each, each group beginning a row; blanks are left out."""
    most = max(counts)
    columns = -(-most // -(-most // _MOST_COLUMNS))
    rows = [-(-count // columns) for count in counts]
    side = min(PAGE / (columns + 0.6), 1.7)
    height = side * shape[0] / shape[1] + 0.28
    width = max(side * columns + 0.9, COLUMN)
    figure = Figure(figsize=(width, 0.45 + sum(rows) * height), layout="constrained")
    grid = figure.subplots(sum(rows), columns, squeeze=False)
    cells, begin = [], 0
    for count, of in zip(counts, rows):
        group = list(grid[begin : begin + of].ravel())
        begin += of
        cells += group[:count]
        for spare in group[count:]:
            spare.remove()
    figure.suptitle(fill(title, 66 if width > COLUMN else 40))
    return figure, cells
