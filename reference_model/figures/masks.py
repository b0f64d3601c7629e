"""Masks over pictures, and grids of what models make of sentences (METRIS Fig. 4, 7 and 8)."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from reference_model.figures.style import COLOURS, PAGE, TRUTH, bare, styled


def tinted(
    image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int] = COLOURS[0], *, opacity: float = 0.6
) -> np.ndarray:
    """Lay a colour over the masked part of a picture: there ``(1 - opacity) · image + opacity · colour``.

    Args:
        image: (h, w, 3) uint8.
        mask: (h, w) bool, True inside.
        colour: Red, green, blue, 0 to 255.
        opacity: Share of the colour, 0 to 1; outside of the mask nothing changes.

    Returns:
        (h, w, 3) uint8.

    Raises:
        ValueError: Picture and mask differ in size, or the mask is not bool.
    """
    image, mask = np.asarray(image), np.asarray(mask)
    if image.ndim != 3 or image.shape[2] != 3 or mask.shape != image.shape[:2]:
        raise ValueError(
            f"tinted: image has shape {image.shape}, mask {mask.shape}, expected (h, w, 3) and (h, w)"
        )
    if mask.dtype != bool:
        raise ValueError(f"tinted: mask must be bool, got {mask.dtype}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"tinted: opacity must be in [0, 1], got {opacity:g}")
    shown = image.copy()
    mixed = (1 - opacity) * image[mask].astype(np.float32) + opacity * np.asarray(colour, dtype=np.float32)
    shown[mask] = mixed.round().astype(np.uint8)
    return shown


@styled
def comparison(
    images: Sequence[np.ndarray],
    sentences: Sequence[str],
    truths: Sequence[np.ndarray],
    predictions: Mapping[str, Sequence[np.ndarray]],
    *,
    title: str = "What each sentence finds",
) -> Figure:
    """Draw a row for each sentence: the picture, the truth, and what each model predicts, with its IoU.

    Args:
        images: k pictures (h, w, 3) uint8; rows may repeat one.
        sentences: k sentences.
        truths: k masks (h, w) bool.
        predictions: Name of a model -> k masks (h, w) bool.
        title: Of the figure.

    Raises:
        ValueError: Their counts differ.
    """
    counts = {len(images), len(sentences), len(truths), *map(len, predictions.values())}
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"comparison: got {sorted(counts)} rows, expected one count of all arguments, not 0")
    names = ["image", "truth", *predictions]
    side = PAGE / max(len(names), 4)
    rows = len(images)
    titles = [fill(name, round(13 * side)) for name in names]
    height = 0.35 + 0.13 * max(title.count("\n") for title in titles) + rows * (side * 0.93 + 0.26)
    figure = Figure(figsize=(side * len(names), height), layout="constrained")
    grid = figure.subplots(rows, len(names), squeeze=False)
    for row, cells in enumerate(grid):
        masks = [None, truths[row], *(found[row] for found in predictions.values())]
        for column, (axes, mask) in enumerate(zip(cells, masks)):
            colour = TRUTH if column == 1 else COLOURS[(column - 2) % len(COLOURS)]
            axes.imshow(images[row] if mask is None else marked(images[row], mask, colour))
            bare(axes)
            if row == 0:
                axes.set_title(titles[column])
            if column > 1:
                axes.set_xlabel(f"IoU {iou(mask, truths[row]):.2f}")
        cells[0].set_xlabel(fill(f"“{sentences[row]}”", 20), fontstyle="italic")
    figure.suptitle(title)
    return figure


def marked(image: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Tint the masked part of a picture and show the rest grey: no mark is taken for an object's colour.

    Args:
        image: (h, w, 3) uint8.
        mask: (h, w) bool.
        colour: Red, green, blue, 0 to 255.

    Returns:
        (h, w, 3) uint8.
    """
    grey = 96 + 0.6 * np.asarray(image).mean(axis=2, keepdims=True)
    return tinted(np.repeat(grey.astype(np.uint8), 3, axis=2), mask, colour, opacity=0.75)


def iou(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks; 1 where both are empty."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0
