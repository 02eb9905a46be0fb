"""What the figures share: look, colours, arguments, and files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.io.atomic import atomic_write, check_output

# fmt: off
__all__ = [
    "EMOTION_COLOURS", "EMOTION_MARKERS", "check_figure", "hide_axes", "look", "new", "save", "subplots",
]
# fmt: on

#: A figure is written in both formats, whichever is given.
_SUFFIXES = (".png", ".pdf")

#: Paul Tol's "muted" scheme, the common colour-blind-safe scheme with nine members.
_TOL = ("#882255", "#999933", "#117733", "#332288", "#DDCC77", "#44AA99", "#88CCEE", "#CC6677", "#AA4499")
EMOTION_COLOURS = dict(zip(EMOTIONS, _TOL, strict=True))
#: Markers tell the emotions apart in grey print.
EMOTION_MARKERS = dict(zip(EMOTIONS, "vP^sodXD*", strict=True))

# fmt: off
_LOOK = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so a figure is the same on every machine
    "font.size": 8.0, "axes.titlesize": 9.0, "axes.labelsize": 8.0, "legend.fontsize": 7.0,
    "xtick.labelsize": 7.0, "ytick.labelsize": 7.0, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.2,
    "legend.frameon": False, "image.cmap": "viridis", "image.interpolation": "nearest",
    "figure.dpi": 100.0, "savefig.dpi": 200.0,
    "pdf.fonttype": 42,  # embed fonts, so that text stays text
}
# fmt: on


@contextmanager
def look() -> Iterator[None]:
    """Draw in the common look within the block; nothing outside changes."""
    with matplotlib.rc_context(_LOOK):  # type: ignore[arg-type]
        yield


def new(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, drawn by Agg so that no display is needed. Call it within :func:`look`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def subplots(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure and its array of axes (rows, columns), each ``width`` by ``height`` inches.

    ``options`` go to :meth:`matplotlib.figure.Figure.subplots`. Call it within :func:`look`.
    """
    figure = new(width * columns, height * rows)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def hide_axes(axes: Axes) -> None:
    """Remove ticks and frame from axes that hold an image."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def check_figure(path: str | Path) -> Path:
    """Check, before any work is done, that a figure can be written to a path.

    Raises:
        UserError: if the suffix is neither .png nor .pdf, or the folder is missing or not writable.
    """
    path = check_output(path, _SUFFIXES)
    for suffix in _SUFFIXES:
        check_output(path.with_suffix(suffix), _SUFFIXES)
    return path


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write a figure as PNG and as PDF beside each other, and return both paths.

    Arguments:
        figure: from any ``make``.
        path: ends in .png or .pdf.
    """
    path = check_figure(path)
    png, pdf = (path.with_suffix(suffix) for suffix in _SUFFIXES)
    with look():
        atomic_write(png, lambda part: figure.savefig(part, format="png"))
        # Without a date, the same figure gives the same file.
        atomic_write(pdf, lambda part: figure.savefig(part, format="pdf", metadata={"CreationDate": None}))
    return png, pdf
