"""What all figures share: widths, colours that colour-blind readers tell apart, how they are written."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reference_model.files import written_whole

COLUMN, PAGE = 3.3, 6.9
"""Widths of one column and of both, inches."""

# Okabe and Ito's, in an order that keeps neighbours apart in lightness too.
TRUTH = (230, 159, 0)
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (240, 228, 66))
HEAT = "cividis"
"""Colour map of weights and scores: even steps of lightness, the same to all kinds of colour vision."""

_STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # letters stay text
    "image.interpolation": "nearest",
    "text.parse_math": False,  # "$" in a sentence is a dollar
}
Arguments = ParamSpec("Arguments")


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Draw in the style of all figures, whatever the caller's own settings are."""

    @wraps(draw)
    def inside(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with matplotlib.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            for axes in figure.axes:  # ticks made later, by whoever shows it, have this size too
                axes.tick_params(labelsize=_STYLE["xtick.labelsize"])
            # Ticks are made and all is laid out now, in this style, and once, not when somebody shows it.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            return figure

    return inside


def unit(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """Turn 0..255 into matplotlib's 0..1."""
    return (colour[0] / 255, colour[1] / 255, colour[2] / 255)


def bare(axes: Axes) -> None:
    """Take ticks and frame off a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def save(figure: Figure, stem: str | Path) -> tuple[Path, Path]:
    """Write STEM.png, 300 dots per inch, and STEM.pdf; the same figure gives the same bytes.

    Raises:
        InputError: The place cannot be written.
    """
    paths = (Path(f"{stem}.png"), Path(f"{stem}.pdf"))
    for path, metadata in zip(paths, ({"Software": None}, {"CreationDate": None, "Producer": None})):
        with written_whole(path) as fresh, matplotlib.rc_context(_STYLE):
            figure.savefig(fresh, format=path.suffix[1:], dpi=300, metadata=metadata)
    return paths
