"""Lag of the lips behind the sound in frames, and whether the two belong together at all.

Ridge regression on log-mel around a frame predicts the lips' opening, which is correlated with the observed one. Every
large collection trains a predictor that is applied to all others; the lags between pairs of collections, weighted by
the correlation, give one lag per collection. No collection is known to be exact, so zero is their median, weighted by
length. Loudness alone is not enough: its relation to the lips differs between ways of speaking by up to three frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flowvqtalker.data.shards import SAMPLES
from flowvqtalker.face.topology import EYE_CORNERS

__all__ = ["REACH", "Alignment", "LipClip", "align", "lip_opening", "shift_audio", "sound_features"]

#: Largest lag in frames, either way.
REACH = 10

# Middles of the inner lips (upper, lower) in the face mesh.
_LIPS = (13, 14)

_COLUMNS = 3.2  # mel columns (80 a second) in a frame
_BANDS = 20
_TAPS = np.arange(-8, 9, 2)  # columns around the frame that the predictor sees
_STEPS = round(REACH * _COLUMNS)
_RIDGE = 300.0
# Frames that a collection needs to train a predictor, and to get a lag of its own.
_MIN_TRAIN, _MIN_LAG = 2000, 150
# A clip gets its own lag if it is long enough, correlates, and clearly better than at its collection's lag.
_OWN_FRAMES, _OWN_CORRELATION, _OWN_GAIN = 80, 0.35, 0.1

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class LipClip:
    """One clip with speech.

    Attributes:
        collection: data set that it comes from; its clips are assumed to share one lag.
        lips: (T,) opening of the lips at 25 fps, NaN where unknown.
        sound: (m, 20) features at 80 columns a second, see :func:`sound_features`.
    """

    collection: str
    lips: Floats
    sound: Floats


@dataclass(frozen=True)
class Alignment:
    """Lag of one clip.

    Attributes:
        lag: frames that the lips come after the sound.
        correlation: of predicted and seen lip opening at that lag; NaN where too little is known.
        own: whether the lag is the clip's own rather than its collection's.
        known: whether there is any evidence for the lag (of the clip or its collection).
    """

    lag: float
    correlation: float
    own: bool
    known: bool


def lip_opening(landmarks: Floats) -> Floats:
    """Opening of the lips (T,) in outer-eye-corner distances from landmarks (T, 478, 3); NaN where unknown."""
    gap = np.linalg.norm(landmarks[:, _LIPS[0]] - landmarks[:, _LIPS[1]], axis=-1)
    eyes = np.linalg.norm(landmarks[:, EYE_CORNERS[0]] - landmarks[:, EYE_CORNERS[1]], axis=-1)
    return np.asarray(gap / np.maximum(eyes, 1e-6))


def sound_features(wave: npt.NDArray[np.int16]) -> npt.NDArray[np.float16]:
    """(m, 20) log-mel at 80 columns a second of (n,) samples, averaged over four bands each, without its mean."""
    from flowvqtalker.speech.features import log_mel

    mel = log_mel(wave.astype(np.float32) / np.float32(32768))
    bands = np.asarray(mel).reshape(len(mel), _BANDS, -1).mean(2)
    return np.asarray(bands - bands.mean(0), np.float16)


def shift_audio(wave: npt.NDArray[np.int16], frames: float) -> npt.NDArray[np.int16]:
    """Sound (T * 640,) delayed by some frames (negative: advanced), padded with zeros."""
    moved = np.zeros_like(wave)
    samples = round(frames * SAMPLES)
    if samples >= 0:
        moved[samples:] = wave[: len(wave) - samples]
    else:
        moved[:samples] = wave[-samples:]
    return moved


def align(clips: Sequence[LipClip]) -> list[Alignment]:
    """Lag of each clip: its collection's, unless its own evidence against it is strong."""
    if not clips:
        return []
    names = sorted({clip.collection for clip in clips})
    members = {name: [i for i, clip in enumerate(clips) if clip.collection == name] for name in names}
    lengths = np.array([len(clip.lips) for clip in clips], float)
    stacked = [_stack(clip.sound) for clip in clips]
    moments = [_moments(clip, x) for clip, x in zip(clips, stacked, strict=True)]
    sums = {name: _total([moments[i] for i in members[name]]) for name in names}
    teachers = {name: sums[name] for name in names if sums[name][2] >= _MIN_TRAIN}
    if not teachers:
        teachers = {"": _total(moments)}

    # Curves of every clip for every teacher, trained without that clip.
    curves = np.empty((len(teachers), len(clips), 2 * _STEPS + 1))
    for a, (teacher, (gram, cross, _)) in enumerate(teachers.items()):
        weights = _solve(gram, cross)
        for i, clip in enumerate(clips):
            own = teacher in ("", clip.collection)
            w = _solve(gram - moments[i][0], cross - moments[i][1]) if own else weights
            curves[a, i] = _curve(clip, stacked[i] @ w)

    # Lags between collections -> a lag of each.
    lags, heights = np.zeros((len(teachers), len(names))), np.zeros((len(teachers), len(names)))
    for b, name in enumerate(names):
        for a in range(len(teachers)):
            mean = _mean(curves[a, members[name]], lengths[members[name]])
            if np.isfinite(mean).all() and sums[name][2] >= _MIN_LAG:
                lags[a, b], heights[a, b] = _top(mean)
    frames = np.array([sums[name][2] for name in names])
    places = [names.index(teacher) if teacher else -1 for teacher in teachers]
    shared = _offsets(lags, np.maximum(heights, 0), places, frames)
    known = heights.max(0) > 0.1
    shared = np.where(known, shared, 0.0)

    results: list[Alignment] = []
    for i, clip in enumerate(clips):
        b = names.index(clip.collection)
        # Shift each teacher's curve by the teacher's own lag.
        moved = [_moved(curves[a, i], shared[place] if place >= 0 else 0.0) for a, place in enumerate(places)]
        trust = np.maximum(heights[:, b], 0.01) ** 2
        results.append(_decide(_mean(np.stack(moved), trust), float(shared[b]), bool(known[b]), len(clip.lips)))
    return results


def _total(parts: Sequence[tuple[Floats, Floats, float]]) -> tuple[Floats, Floats, float]:
    return np.sum([p[0] for p in parts], axis=0), np.sum([p[1] for p in parts], axis=0), float(sum(p[2] for p in parts))


def _solve(gram: Floats, cross: Floats) -> Floats:
    return np.asarray(np.linalg.solve(gram + _RIDGE * np.eye(len(gram)), cross))


def _offsets(lags: Floats, heights: Floats, places: Sequence[int], frames: Floats) -> Floats:
    """Lag of each collection from the lags (A, B) of collections against teachers: least absolute differences.

    Arguments:
        lags: of collection b against teacher a.
        heights: their correlations.
        places: index of each teacher among the collections, -1 for a teacher trained on all of them.
        frames: (B,) frames of each collection.
    """
    count = len(frames)
    rows, values, worth = [], [], []
    for a, place in enumerate(places):
        for b in range(count):
            if b != place and heights[a, b] > 0:
                row = np.zeros(count)
                row[b] = 1
                if place >= 0:
                    row[place] = -1
                rows.append(row)
                values.append(lags[a, b])
                worth.append(heights[a, b] ** 2 * min(1.0, frames[b] / _MIN_TRAIN))
    if not rows:
        return np.zeros(count)
    matrix, target, weights = np.array(rows), np.array(values), np.array(worth)
    offsets = np.zeros(count)
    scale = weights.copy()
    for _ in range(30):
        system = matrix.T @ (matrix * scale[:, None]) + 1e-6 * np.eye(count)
        offsets = np.linalg.solve(system, matrix.T @ (scale * target))
        scale = weights / np.maximum(np.abs(matrix @ offsets - target), 0.5 * _COLUMNS)
    return np.asarray(offsets - (_median(list(offsets), list(frames)) if count > 1 else 0.0))


def _moved(curve: Floats, lag: float) -> Floats:
    """A curve shifted to a teacher without lag."""
    steps = np.arange(len(curve), dtype=float)
    return np.asarray(np.interp(steps - lag, steps, curve, left=np.nan, right=np.nan))


def _stack(sound: Floats) -> Floats:
    """(m, 181): features at the taps around each column, and 1."""
    index = np.clip(np.arange(len(sound))[:, None] + _TAPS, 0, len(sound) - 1)
    taps = np.asarray(sound, np.float32)[index].reshape(len(sound), -1)
    return np.concatenate([taps, np.ones((len(sound), 1), np.float32)], axis=1)


def _target(lips: Floats) -> Floats:
    """Lip opening with zero mean and unit variance."""
    known = lips[np.isfinite(lips)]
    return np.asarray((lips - known.mean()) / max(float(known.std()), 1e-3)) if len(known) else lips


def _moments(clip: LipClip, stacked: Floats) -> tuple[Floats, Floats, float]:
    """Gram matrix, cross moments and number of frames of one clip."""
    index = np.round(np.arange(len(clip.lips)) * _COLUMNS).astype(np.int64)
    use = (index < len(stacked)) & np.isfinite(clip.lips)
    x = stacked[index[use]].astype(np.float64)
    y = _target(clip.lips)[use]
    return x.T @ x, x.T @ y, float(use.sum())


def _curve(clip: LipClip, predicted: Floats) -> Floats:
    """Correlation (2 * _STEPS + 1,) of the lips with the predicted opening at each lag in columns."""
    steps = np.arange(-_STEPS, _STEPS + 1)
    index = np.round(np.arange(len(clip.lips)) * _COLUMNS).astype(np.int64)[:, None] - steps
    use = (index >= 0) & (index < len(predicted)) & np.isfinite(clip.lips)[:, None]
    count = np.maximum(use.sum(0), 1)
    a = np.where(use, np.nan_to_num(clip.lips)[:, None], 0.0)
    b = np.where(use, predicted[index.clip(0, len(predicted) - 1)], 0.0)
    a, b = np.where(use, a - a.sum(0) / count, 0.0), np.where(use, b - b.sum(0) / count, 0.0)
    spread = np.sqrt((a * a).sum(0) * (b * b).sum(0)) / count
    with np.errstate(invalid="ignore", divide="ignore"):
        curve = (a * b).sum(0) / count / spread
    return np.asarray(np.where((count >= 12) & (spread > 1e-7), curve, np.nan))


def _mean(curves: Floats, lengths: Floats) -> Floats:
    known = np.isfinite(curves)
    weight = known * lengths[:, None]
    with np.errstate(invalid="ignore"):
        return np.asarray((np.where(known, curves, 0) * weight).sum(0) / weight.sum(0))


def _median(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted median; interpolates between the two middle values."""
    order = np.argsort(values)
    ranks = np.cumsum(np.asarray(weights)[order]) - 0.5 * np.asarray(weights)[order]
    return float(np.interp(0.5 * np.sum(weights), ranks, np.asarray(values)[order]))


def _top(curve: Floats) -> tuple[float, float]:
    """Lag in columns and height of a curve's maximum; a parabola interpolates between the grid points."""
    best = int(np.nanargmax(curve))
    height = float(curve[best])
    if 0 < best < len(curve) - 1 and np.isfinite(curve[best - 1 : best + 2]).all():
        before, after = float(curve[best - 1]), float(curve[best + 1])
        bend = before - 2 * height + after
        return best - _STEPS + (0.5 * (before - after) / bend if bend < 0 else 0.0), height
    return float(best - _STEPS), height


def _decide(curve: Floats, shared: float, known: bool, length: int) -> Alignment:
    """Lag of one clip from its curve and its collection's lag in columns."""
    if not np.isfinite(curve).any():
        return Alignment(shared / _COLUMNS, float("nan"), False, known)
    near = np.clip(np.arange(-2, 3) + round(shared) + _STEPS, 0, len(curve) - 1)
    there = float(np.nanmax(curve[near])) if np.isfinite(curve[near]).any() else float("nan")
    lag, height = _top(curve)
    strong = length >= _OWN_FRAMES and height >= _OWN_CORRELATION and abs(lag) < _STEPS - 2
    if strong and (not known or not height - there < _OWN_GAIN):
        return Alignment(lag / _COLUMNS, height, True, True)
    return Alignment(shared / _COLUMNS, there, False, known)
