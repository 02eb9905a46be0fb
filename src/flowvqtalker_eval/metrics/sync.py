"""Are lips and sound in step? Confidence, distance and offset from embeddings of both (LSE-C, LSE-D of the field).

As in ``joonson/syncnet_python``: the distance of every frame's video embedding to the audio embeddings up to ``reach``
frames before and after it; the mean over the frames for each shift; the smallest mean is the *distance*, the median of
the means less the smallest is the *confidence*, and where it is smallest is the *offset*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["REACH", "SyncScore", "distance_curve", "score_curve", "sync_score"]

#: Shifts that are tried, in frames each way (``vshift`` of ``run_syncnet.py``).
REACH = 15

#: torch's ``pairwise_distance`` adds this to every difference.
_EPSILON = 1e-6

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SyncScore:
    """How well lips and sound go together.

    Attributes:
        confidence: median less minimum of the curve; higher is better (LSE-C if the embeddings are SyncNet's).
        distance: minimum of the curve; lower is better (LSE-D if the embeddings are SyncNet's).
        offset: frames of 1/25 s by which the sound comes before the lips; negative: the sound is late.
        curve: (2 * reach + 1,) mean distance for each shift; the sound of frame t + j - reach belongs to element j.
        frames: how many frames took part.
    """

    confidence: float
    distance: float
    offset: int
    curve: npt.NDArray[np.float64]
    frames: int


def distance_curve(
    video: Floats, audio: Floats, reach: int = REACH, padding: Literal["zeros", "none"] = "zeros", least: int = 5
) -> npt.NDArray[np.float64]:
    """Mean Euclidean distance (2 * reach + 1,) of video and audio embeddings for every shift of the sound.

    Arguments:
        video: (n, D), one embedding of each 25-fps frame; frames whose row is NaN (no face) do not take part.
        audio: (n, D).
        reach: largest shift in frames.
        padding: what lies outside of the clip: ``zeros``, as SyncNet has it, so that a short clip is mostly compared
            with zeros at large shifts; or ``none``: only frames that have sound at that shift are averaged.
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


def score_curve(curve: Floats, frames: int) -> SyncScore:
    """Confidence, distance and offset of a curve (2 * reach + 1,); shifts that are NaN were not tried."""
    means: npt.NDArray[np.float64] = np.asarray(curve, np.float64)
    if means.ndim != 1 or len(means) % 2 == 0 or not np.isfinite(means).any():
        raise UserError(f"a curve of odd length with known distances is needed, got shape {means.shape}")
    best = int(np.nanargmin(means))
    distance = float(means[best])
    return SyncScore(float(np.nanmedian(means)) - distance, distance, len(means) // 2 - best, means, frames)


def sync_score(
    video: Floats, audio: Floats, reach: int = REACH, padding: Literal["zeros", "none"] = "zeros"
) -> SyncScore:
    """Score of one clip; see :func:`distance_curve` for the arguments."""
    curve = distance_curve(video, audio, reach, padding)
    return score_curve(curve, int(np.isfinite(video).all(1).sum()))
