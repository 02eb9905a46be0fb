"""What the figures have in common: look, colours, and files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowvqtalker import EMOTIONS
from flowvqtalker.errors import MissingDependency
from flowvqtalker.io.coefficients import write_whole
from flowvqtalker.io.media import check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "EMOTION_COLOURS",
    "EMOTION_MARKERS",
    "SUFFIXES",
    "bare",
    "check_figure",
    "look",
    "new",
    "panels",
    "save",
]

#: Names that a figure may be written under; both files are written whichever is given.
SUFFIXES = (".png", ".pdf")

#: Methods, in order: Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that vanishes on
#: white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

#: The nine emotions: Paul Tol's "muted" scheme, the only common colour-blind-safe one with nine members.
EMOTION_COLOURS = dict(
    zip(
        EMOTIONS,
        ("#882255", "#999933", "#117733", "#332288", "#DDCC77", "#44AA99", "#88CCEE", "#CC6677", "#AA4499"),
        strict=True,
    )
)
#: A second sign beside the colour, for print in grey.
EMOTION_MARKERS = dict(zip(EMOTIONS, "vP^sodXD*", strict=True))

_LOOK = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a figure is the same on every machine
    "font.size": 8.0,
    "axes.titlesize": 9.0,
    "axes.labelsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "figure.dpi": 100.0,
    "savefig.dpi": 200.0,
    "pdf.fonttype": 42,  # text stays text
}


@contextmanager
def look() -> Iterator[None]:
    """Within the block, figures and axes are made in the common look; nothing outside changes.

    Raises:
        MissingDependency: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependency(
            "figures need matplotlib, which is not installed; run pip install 'flowvqtalker[eval]'"
        ) from error
    with matplotlib.rc_context(_LOOK):  # type: ignore[arg-type]
        yield


def new(width: float = 7.0, height: float = 4.0) -> Figure:
    """An empty figure of a size in inches, drawn by Agg whatever display there is. Call it within :func:`look`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(rows: int, columns: int, width: float = 2.2, height: float = 2.2, **options: Any) -> tuple[Figure, Any]:
    """A figure with a grid of axes, each ``width`` by ``height`` inches: the figure and an array (rows, columns).

    ``options`` go to :meth:`matplotlib.figure.Figure.subplots`. Call it within :func:`look`.
    """
    figure = new(width * columns, height * rows)
    axes: Any = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


def bare(axes: Axes) -> None:
    """Take ticks and frame off axes that hold a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def check_figure(path: str | Path) -> Path:
    """Make sure that a figure can be written under a name, before any work is done.

    Raises:
        UserError: if the suffix is neither .png nor .pdf, or the folder is missing or not writable.
    """
    path = check_output(path, SUFFIXES)
    for suffix in SUFFIXES:
        check_output(path.with_suffix(suffix), SUFFIXES)
    return path


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Write a figure as PNG and as PDF; each file appears whole or not at all.

    Arguments:
        figure: from any ``make``.
        path: name that ends in .png or .pdf; the other file lies beside it.

    Returns:
        the PNG's and the PDF's path.
    """
    path = check_figure(path)
    png, pdf = (path.with_suffix(suffix) for suffix in SUFFIXES)
    with look():
        write_whole(png, lambda part: figure.savefig(part, format="png"))
        # Without the date the same figure gives the same file.
        write_whole(pdf, lambda part: figure.savefig(part, format="pdf", metadata={"CreationDate": None}))
    return png, pdf
