"""Landmark distances of the mouth (M-LMD) and the whole face (F-LMD), as ``yuangan/evaluation_eat`` computes them.

The 68 points are those on the aligned crop of 128 pixels. Of the 20 points of the mouth (48..67), or all 68, the mean
is subtracted, nothing is scaled, and the distances between real and generated points are averaged over points and then
over the frames in which both faces were found. Unit: pixels of the crop. The table averages over clips.

ATVGnet (Chen et al. 2019) sums over the points of the mouth instead of averaging: numbers 20 times as large
(``scale="atvg"``; for the face, where it has none, 68 times).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["MOUTH", "detection_rate", "distances", "landmark_distance"]

MOUTH = slice(48, 68)

Floats = npt.NDArray[np.floating[Any]]


def _checked(points: Floats) -> Floats:
    if points.ndim != 3 or points.shape[1:] != (68, 2):
        raise UserError(f"landmarks must have shape (T, 68, 2), got {points.shape}")
    return np.asarray(points, np.float64)


def distances(
    real: Floats, generated: Floats, scale: Literal["eat", "atvg"] = "eat"
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Distance of the mouth and of the face in each frame, NaN where one of the faces was not found.

    Arguments:
        real, generated: (T, 68, 2) landmarks on the crop, frame by frame.
        scale: ``eat`` averages over the points, ``atvg`` sums.

    Returns:
        two arrays (T,).

    Raises:
        UserError: if shapes do not fit.
    """
    real, generated = _checked(real), _checked(generated)
    if len(real) != len(generated):
        raise UserError(
            f"real and generated landmarks must be equally long, got {len(real)} and {len(generated)} frames; "
            "pair the frames first"
        )
    if scale not in ("eat", "atvg"):
        raise UserError(f"scale {scale!r}: choose eat or atvg")
    found = []
    for part in (MOUTH, slice(None)):
        a, b = real[:, part], generated[:, part]
        apart = np.linalg.norm((a - a.mean(1, keepdims=True)) - (b - b.mean(1, keepdims=True)), axis=-1)
        found.append(apart.mean(1) if scale == "eat" else apart.sum(1))
    return found[0], found[1]


def landmark_distance(real: Floats, generated: Floats, scale: Literal["eat", "atvg"] = "eat") -> tuple[float, float]:
    """M-LMD and F-LMD of one clip: means of :func:`distances` over the frames in which both faces were found.

    NaN if there is no such frame.
    """
    mouth, face = distances(real, generated, scale)
    both = np.isfinite(face)
    if not both.any():
        return float("nan"), float("nan")
    return float(mouth[both].mean()), float(face[both].mean())


def detection_rate(*points: Floats) -> float:
    """Share of the frames in which the face was found, in all of the given (T, 68, 2) landmarks; NaN without frames."""
    found = [np.asarray(np.isfinite(_checked(p)).all((1, 2))) for p in points]
    if len({len(f) for f in found}) > 1:
        raise UserError(f"landmarks must be equally long, got {', '.join(str(len(f)) for f in found)} frames")
    return float(np.logical_and.reduce(found).mean()) if found and len(found[0]) else float("nan")
