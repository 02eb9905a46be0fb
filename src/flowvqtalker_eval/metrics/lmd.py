"""Landmark distances of the mouth (M-LMD) and the whole face (F-LMD), as ``yuangan/evaluation_eat`` computes them.

The 68 points are those on the aligned crop of 128 pixels. From the 20 points of the mouth (48..67), or from all 68,
their mean is subtracted; nothing is scaled. Distances of real and generated points are averaged over points, then over
frames, in pixels of the crop. ATVGnet (Chen et al. 2019) sums over the mouth's points: numbers 20 times as large.
"""

from __future__ import annotations

import numpy as np

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array

__all__ = ["landmark_distance"]

_MOUTH = slice(48, 68)


def landmark_distance(real: Array, generated: Array) -> tuple[float, float]:
    """M-LMD and F-LMD of one clip, over the frames in which both faces were found; NaN if there is none.

    Arguments:
        real, generated: (T, 68, 2) landmarks on the crop, frame by frame; NaN without a face.

    Raises:
        UserError: if shapes do not fit.
    """
    for points in (real, generated):
        if points.ndim != 3 or points.shape[1:] != (68, 2):
            raise UserError(f"landmarks must have shape (T, 68, 2), got {points.shape}")
    if len(real) != len(generated):
        raise UserError(
            f"real and generated landmarks must be equally long, got {len(real)} and {len(generated)} frames; "
            "pair the frames first"
        )
    both = np.isfinite(real).all((1, 2)) & np.isfinite(generated).all((1, 2))
    if not both.any():
        return float("nan"), float("nan")

    def distance(part: slice) -> float:
        a, b = (np.asarray(points[both][:, part], np.float64) for points in (real, generated))
        return float(np.linalg.norm((a - a.mean(1, keepdims=True)) - (b - b.mean(1, keepdims=True)), axis=-1).mean())

    return distance(_MOUTH), distance(slice(None))
