"""Do the lips belong to the sound, and how many frames apart are they? (loudness against lip opening)"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flowvqtalker.data.shards import SAMPLES

__all__ = ["REACH", "lag_curve", "lip_opening", "loudness", "peak", "shift_audio"]

#: Lags that are tried, in frames, each way.
REACH = 10

# Inner lips (upper, lower) and outer eye corners in the face mesh.
_LIPS = (13, 14)
_EYES = (33, 263)

Floats = npt.NDArray[np.floating]


def lip_opening(landmarks: Floats) -> Floats:
    """Opening of the lips (T,) in outer-eye-corner distances from landmarks (T, 478, 3); NaN where unknown."""
    gap = np.linalg.norm(landmarks[:, _LIPS[0]] - landmarks[:, _LIPS[1]], axis=-1)
    eyes = np.linalg.norm(landmarks[:, _EYES[0]] - landmarks[:, _EYES[1]], axis=-1)
    return np.asarray(gap / np.maximum(eyes, 1e-6))


def loudness(wave: npt.NDArray[np.int16]) -> Floats:
    """Loudness (T,) in dB of each frame's 640 samples of (T * 640,), no lower than 50 dB below the loudest frame.

    Low frequencies without speech (hum, rumble) are taken off by a first difference.
    """
    samples = np.diff(wave.astype(np.float32), prepend=np.float32(wave[0] if len(wave) else 0))
    level = 10 * np.log10(np.square(samples).reshape(-1, SAMPLES).mean(1) + 1.0)
    return np.asarray(np.maximum(level, level.max(initial=0.0) - 50))


def lag_curve(lips: Floats, sound: Floats, minimum: int = 15) -> Floats:
    """Correlation (2 * REACH + 1,) of the lips with the sound moved by -REACH ... REACH frames.

    Entry REACH + k compares ``lips[t]`` with ``sound[t - k]``: a peak at k > 0 means that the lips come k frames after
    the sound. NaN where fewer than ``minimum`` frames overlap or one of the two does not move.
    """
    curve = np.full(2 * REACH + 1, np.nan)
    for k in range(-REACH, REACH + 1):
        length = max(0, len(lips) - abs(k))
        a, b = lips[max(0, k) :][:length], sound[max(0, -k) :][:length]
        known = np.isfinite(a) & np.isfinite(b)
        a, b = a[known], b[known]
        if len(a) >= minimum and a.std() > 1e-4 and b.std() > 1e-2:
            curve[REACH + k] = np.corrcoef(a, b)[0, 1]
    return curve


def peak(curves: Floats | Sequence[Floats]) -> tuple[int, float]:
    """Lag and height of the peak of one curve (2 * REACH + 1,) or of the mean of several; (0, NaN) if all are NaN."""
    stack = np.atleast_2d(np.asarray(curves, np.float64))
    known = np.isfinite(stack)
    mean = np.where(known, stack, 0).sum(0) / np.maximum(known.sum(0), 1)
    mean[~known.any(0)] = -np.inf
    if not np.isfinite(mean).any():
        return 0, float("nan")
    best = int(mean.argmax())
    return best - REACH, float(mean[best])


def shift_audio(wave: npt.NDArray[np.int16], frames: int) -> npt.NDArray[np.int16]:
    """Sound (T * 640,) delayed by some frames (negative: advanced), zeros at the end that becomes free."""
    moved = np.zeros_like(wave)
    samples = frames * SAMPLES
    if samples >= 0:
        moved[samples:] = wave[: len(wave) - samples]
    else:
        moved[:samples] = wave[-samples:]
    return moved
