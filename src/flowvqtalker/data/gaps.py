"""How far lips and lids are open, measured on landmarks: what training pairs are chosen by."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.face.topology import INNER_LIPS, LEFT_EYE, LIPS, RIGHT_EYE

__all__ = ["EYES_OPEN", "EYES_SHUT", "LIPS_OPEN", "eye_gap", "feature_centres", "lip_gap"]

#: Gap between the lips (:func:`lip_gap`) from which on they count as open.
LIPS_OPEN = 0.12
#: Gaps between the lids (:func:`eye_gap`) up to which an eye is shut, and from which on it is open.
EYES_SHUT, EYES_OPEN = 0.12, 0.2

Floats = npt.NDArray[np.floating[Any]]


def lip_gap(landmarks: Floats) -> Floats:
    """Height of the gap between the lips (N,) of landmarks (N, 478, 3), as a fraction of the mouth's width."""
    return _gap(landmarks[:, list(INNER_LIPS), :2], 5, 15, 10)  # middles of the upper and of the lower lip


def eye_gap(landmarks: Floats) -> Floats:
    """Height of the gap between the lids (N,) of the eye that is shut further, as a fraction of the eye's width."""
    right, left = (_gap(landmarks[:, list(rim), :2], 4, 12, 8) for rim in (RIGHT_EYE, LEFT_EYE))
    return np.minimum(right, left)


def feature_centres(landmarks: Floats) -> Floats:
    """Centres (N, 3, 2) of the mouth, the right eye and the left eye of landmarks (N, 478, 2 or 3)."""
    return np.stack([landmarks[:, list(group), :2].mean(1) for group in (LIPS, RIGHT_EYE, LEFT_EYE)], 1)


def _gap(rim: Floats, upper: int, lower: int, corner: int) -> Floats:
    """Distance of two points of a rim (N, n, 2) over its width, from point 0 to ``corner``."""
    height = np.linalg.norm(rim[:, upper] - rim[:, lower], axis=-1)
    return np.asarray(height / np.linalg.norm(rim[:, 0] - rim[:, corner], axis=-1).clip(1e-6))
