"""Where a video is restless: standard deviation in time of every pixel, and one row of the picture through time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker.io.media import Picture
from flowvqtalker_eval.figures import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Video", "make"]


@dataclass(frozen=True)
class Video:
    """What is drawn of a video.

    Attributes:
        frame: (H, W, 3) one frame of it.
        deviation: (H, W) standard deviation in time, levels of 255.
        slice: (T, W, 3) row :attr:`row` of every frame.
        row: which one.
    """

    frame: Picture
    deviation: npt.NDArray[np.floating[Any]]
    slice: Picture
    row: int


def make(videos: Mapping[str, Video], *, most: float = 20.0, cell: float = 1.7) -> Figure:
    """A column for each video: a frame with the row marked, the deviations, the row through time (downwards).

    Arguments:
        videos: by name.
        most: deviation of the brightest colour, levels.
        cell: width of a column in inches.

    Raises:
        UserError: if there is no video.
    """
    if not videos:
        raise UserError("there is no video to draw; give at least one")
    with style.look():
        figure, axes = style.subplots(3, len(videos), cell, cell)
        last: Any = None
        for column, (name, video) in enumerate(videos.items()):
            top, middle, bottom = axes[:, column]
            top.imshow(video.frame)
            top.axhline(video.row, color="#F0E442", linewidth=0.7)
            top.set_title(name)
            last = middle.imshow(video.deviation, cmap="inferno", vmin=0, vmax=most)
            bottom.imshow(video.slice, aspect="auto")
            for place in (top, middle, bottom):
                style.hide_axes(place)
        for place, label in zip(axes[:, 0], ("frame", "deviation in time", "row through time"), strict=True):
            place.set_ylabel(label)
        figure.colorbar(last, ax=axes, shrink=0.3, pad=0.02, aspect=15, label="levels")
    return figure
