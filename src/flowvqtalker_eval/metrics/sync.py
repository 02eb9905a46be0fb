"""Lip-sync confidence, distance and offset from embeddings of lips and sound (LSE-C and LSE-D).

As in ``joonson/syncnet_python``: each frame's video embedding is compared with the audio embeddings up to ``reach``
frames before and after it, and distances are averaged over frames for each shift. The smallest mean is the *distance*,
the median of the means minus the smallest is the *confidence*, and the shift of the smallest is the *offset*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array

__all__ = ["REACH", "SyncScore", "distance_curve", "score_curve", "sync_score"]

#: Shifts that are tried, in frames each way (``vshift`` of ``run_syncnet.py``).
REACH = 15

#: torch's ``pairwise_distance`` adds this to every difference.
_EPSILON = 1e-6


@dataclass(frozen=True)
class SyncScore:
    """How well lips and sound go together.

    Attributes:
        confidence: median minus minimum of the curve; higher is better (LSE-C if the embeddings are SyncNet's).
        distance: minimum of the curve; lower is better (LSE-D if the embeddings are SyncNet's).
        offset: frames of 1/25 s by which the sound comes before the lips; negative: the sound is late.
    """

    confidence: float
    distance: float
    offset: int


def distance_curve(
    video: Array, audio: Array, reach: int = REACH, padding: Literal["zeros", "none"] = "zeros", least: int = 5
) -> npt.NDArray[np.float64]:
    """Mean Euclidean distance (2 * reach + 1,) of video and audio embeddings for every shift of the sound.

    Element j compares frame t with the sound of frame t + j - reach.

    Arguments:
        video: (n, D), one embedding of each 25-fps frame; frames whose row is NaN (no face) do not take part.
        audio: (n, D).
        reach: largest shift in frames.
        padding: ``zeros`` surrounds the clip with zeros, as SyncNet does, so that a short clip is mostly compared with
            zeros at large shifts; ``none`` averages only frames that have sound at that shift.
        least: frames that must be compared at a shift without padding; shifts with fewer are NaN.

    Raises:
        UserError: if the shapes do not fit, or no frame can be compared.
    """
    video, audio = np.asarray(video, np.float64), np.asarray(audio, np.float64)
    if video.ndim != 2 or video.shape != audio.shape:
        raise UserError(f"video and audio embeddings must both be (n, D), got {video.shape} and {audio.shape}")
    if reach < 0:
        raise UserError(f"the reach must not be negative, got {reach}")
    seen = np.isfinite(video).all(1)
    if not seen.any():
        raise UserError(f"none of {len(video)} frames has a face, so lips and sound cannot be compared")
    if not np.isfinite(audio).all():
        raise UserError("audio embeddings must be finite; check the sound")
    padded = np.pad(audio, ((reach, reach), (0, 0)))
    inside = np.pad(np.ones(len(audio), bool), reach)
    curve = np.full(2 * reach + 1, np.nan)
    for shift in range(len(curve)):
        use = seen if padding == "zeros" else seen & inside[shift : shift + len(video)]
        if padding == "zeros" or use.sum() >= min(least, int(seen.sum())):
            difference = video[use] - padded[shift : shift + len(video)][use] + _EPSILON
            curve[shift] = np.sqrt(np.square(difference).sum(1)).mean()
    return curve


def score_curve(curve: Array) -> SyncScore:
    """Score of a curve (2 * reach + 1,) of :func:`distance_curve`; shifts that are NaN were not tried."""
    means = np.asarray(curve, np.float64)
    if means.ndim != 1 or len(means) % 2 == 0 or not np.isfinite(means).any():
        raise UserError(f"a curve of odd length with known distances is needed, got shape {means.shape}")
    best = int(np.nanargmin(means))
    distance = float(means[best])
    return SyncScore(float(np.nanmedian(means)) - distance, distance, len(means) // 2 - best)


def sync_score(
    video: Array, audio: Array, reach: int = REACH, padding: Literal["zeros", "none"] = "zeros"
) -> SyncScore:
    """Score of one clip; see :func:`distance_curve` for the arguments."""
    return score_curve(distance_curve(video, audio, reach, padding))
