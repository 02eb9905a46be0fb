"""Smoothing of fitted clips over time that leaves lips and lids alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.signal import savgol_filter

from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIDS, LIPS, VERTICES

if TYPE_CHECKING:
    from flowvqtalker.face.fit import Fit

__all__ = ["fast_directions", "smooth_clip"]

# Irises: the gaze jumps within one or two frames.
_IRISES = tuple(range(468, VERTICES))
# Cubic polynomials over 9 frames (0.36 s): keeps 95 % of a nod of 2 Hz, a quarter of the noise's power.
_WINDOW, _ORDER = 9, 3

Array = npt.NDArray[np.float32]


def fast_directions(model: FaceModel, share: float = 0.999) -> Array:
    """Orthonormal directions (64, K) of β that move lips, lids and irises.

    Arguments:
        share: how much of their variance (for β of unit variance) the directions hold; what is left moves them by less
            than 0.2 % of the eye distance.
    """
    quick = sorted({*LIPS, *LIDS, *_IRISES})
    basis = model.expression[:, quick].flatten(1).cpu().numpy().astype(np.float64)
    directions, sizes, _ = np.linalg.svd(basis, full_matrices=False)
    held = np.cumsum(sizes**2) / (sizes**2).sum()
    return directions[:, : int(np.searchsorted(held, share)) + 1].astype(np.float32)


def smooth_clip(model: FaceModel, fit: Fit) -> Fit:
    """Smooth pose and slow expression of a clip (Savitzky-Golay), frames in temporal order at 25 to 30 fps.

    Speech and blinks are as fast as the tracker's noise, so smoothing everything would close the mouth early and leave
    the eyes half open. Only the pose and those directions of β that move neither lips, lids nor irises are smoothed.
    """
    count = len(fit.pose)
    window = min(_WINDOW, count if count % 2 else count - 1)
    if window <= _ORDER:
        return fit
    pose = savgol_filter(fit.pose, window, _ORDER, axis=0)
    fast = fast_directions(model)
    quick = fit.expression @ fast @ fast.T
    slow = savgol_filter(fit.expression - quick, window, _ORDER, axis=0)
    return replace(fit, pose=pose.astype(np.float32), expression=(quick + slow).astype(np.float32))
