"""Beats: whether heads move with the speech (beat alignment), and what is heard at each frame.

Definition of Bailando (Siyao et al. 2022, section 4.2 and ``beat_align_score.py``): motion beats are the local minima
of the Gaussian-smoothed mean speed, and the score is the mean over the audio's beats of exp(-Δ² / 2σ²), Δ the distance
to the nearest motion beat. It is defined at 60 fps, with a smoothing of 5 frames and σ of 3 frames. Here the frames are
25 a second, so both are shortened to keep the same time: 2.08 frames (83 ms) and 1.25 frames (50 ms). The audio's beats
are librosa's onsets. A score depends on how many motion beats there are, so :func:`chance` gives what unrelated
motion of as many beats would get.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.audio import SAMPLE_RATE
from flowvqtalker.io.media import FPS

__all__ = [
    "SMOOTHING",
    "TOLERANCE",
    "audio_beats",
    "beat_alignment",
    "chance",
    "head_speed",
    "loudness",
    "motion_beats",
    "pitch",
    "point_speed",
]

Array = npt.NDArray[np.floating[Any]]

#: σ of the score in frames at 25 fps: 3 frames at 60 fps.
TOLERANCE = 3 * FPS / 60
#: σ of the smoothing of the speed in frames at 25 fps: 5 frames at 60 fps.
SMOOTHING = 5 * FPS / 60

_HOP = 160
_SAMPLES = SAMPLE_RATE // FPS
#: Quietest level that counts, below the loudest frame.
_FLOOR_DB = 40.0
_LOWEST_HZ, _HIGHEST_HZ = 65.0, 500.0


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise MissingDependency(
            "beats and pitch need librosa, which is not installed; run pip install 'flowvqtalker[eval]'"
        ) from error
    return librosa


# ------------------------------------------------------------------------------------------------------------- sound


def audio_beats(wave: Array) -> Array:
    """Times of the onsets in speech (S,) at 16 kHz, (n,) in video frames, not rounded.

    librosa's ``onset_detect`` with its defaults, on a hop of 10 ms.
    """
    wave = _wave(wave)
    if np.abs(wave).max() == 0:
        return np.zeros(0)
    times = _librosa().onset.onset_detect(y=wave, sr=SAMPLE_RATE, hop_length=_HOP, units="time")
    return np.asarray(times, np.float64) * FPS


def loudness(wave: Array) -> Array:
    """(T,) root mean square of each video frame's samples in dB, floored 40 dB below the loudest; the last frame may be
    shorter."""
    wave = _wave(wave)
    padded = np.zeros(-(-len(wave) // _SAMPLES) * _SAMPLES)
    padded[: len(wave)] = wave
    power = 10 * np.log10(np.square(padded.reshape(-1, _SAMPLES)).mean(1) + 1e-10)
    level: Array = np.maximum(power, power.max() - _FLOOR_DB)
    return level


def pitch(wave: Array) -> Array:
    """(T,) fundamental frequency of each video frame in semitones above 65 Hz, NaN where there is no voice (librosa's
    probabilistic YIN, 65 to 500 Hz)."""
    wave = _wave(wave)
    count = -(-len(wave) // _SAMPLES)
    hertz, _, _ = _librosa().pyin(
        wave, fmin=_LOWEST_HZ, fmax=_HIGHEST_HZ, sr=SAMPLE_RATE, frame_length=1280, hop_length=_SAMPLES
    )
    found = np.full(count, np.nan)
    found[: min(count, len(hertz))] = hertz[:count]
    semitones: Array = 12 * np.log2(found / _LOWEST_HZ)
    return semitones


def _wave(wave: Array) -> npt.NDArray[np.float32]:
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or len(wave) == 0:
        raise UserError(f"speech (S,) at 16 kHz is needed, got an array of shape {wave.shape}")
    if not np.isfinite(wave).all():
        raise UserError("the speech holds values that are not numbers")
    return wave


# ------------------------------------------------------------------------------------------------------------ motion


def point_speed(points: Array) -> Array:
    """(T - 1,) mean over points of the distance that each of (T, V, 2 or 3) moves in a frame, NaN beside a frame
    without a face."""
    moved: Array = np.linalg.norm(np.diff(np.asarray(points, np.float64), axis=0), axis=-1).mean(-1)
    return moved


def head_speed(face: FaceModel, rho: Array) -> Array:
    """(T - 1,) mean speed of the mean face's vertices under the poses ρ (T, 6): of the head alone, not of the lips."""
    import torch

    from flowvqtalker.face.model import rotation_matrix

    with torch.inference_mode():
        pose = torch.as_tensor(np.asarray(rho, np.float32))
        points = face.mean @ rotation_matrix(pose[:, :3]).mT + pose[:, None, 3:]
    return point_speed(points.numpy())


def motion_beats(speed: Array, smoothing: float = SMOOTHING) -> Array:
    """Frames (n,) at which a motion comes to rest before it goes on: local minima of its smoothed speed.

    Arguments:
        speed: (T - 1,), entry t between frames t and t + 1; NaN is filled in linearly.
        smoothing: σ of the Gaussian in frames.
    """
    from scipy.ndimage import gaussian_filter1d

    speed = np.asarray(speed, np.float64)
    found = np.isfinite(speed)
    if speed.ndim != 1 or not found.any():
        raise UserError(f"the speed (T - 1,) of a motion of at least two frames is needed, got shape {speed.shape}")
    speed = np.interp(np.arange(len(speed)), np.flatnonzero(found), speed[found])
    smooth = gaussian_filter1d(speed, smoothing, mode="nearest") if smoothing > 0 else speed
    inner = smooth[1:-1]
    low = (inner < smooth[:-2]) & (inner <= smooth[2:])
    return np.flatnonzero(low) + 1.5  # the speed of an interval belongs to its middle


def beat_alignment(audio: Array, motion: Array, tolerance: float = TOLERANCE) -> float:
    """Beat alignment score: mean over the audio's beats of exp(-Δ² / 2σ²), Δ to the nearest motion beat.

    Arguments:
        audio: (n,) frames of the audio's beats.
        motion: (m,) frames of the motion's beats.
        tolerance: σ in frames.

    Returns:
        0 (no motion beat near any beat) to 1 (one on every beat); NaN without a beat in the audio.
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    audio, motion = np.asarray(audio, np.float64), np.asarray(motion, np.float64)
    if len(audio) == 0:
        return float("nan")
    if len(motion) == 0:
        return 0.0
    nearest = np.abs(audio[:, None] - motion).min(1)
    return float(np.exp(-np.square(nearest) / (2 * tolerance**2)).mean())


def chance(audio: Array, motion: Array, frames: int, tolerance: float = TOLERANCE) -> float:
    """The score of the same motion beats shifted (round the end) by every whole number of frames, mean: what motion
    that knows nothing of the speech would get.

    Arguments:
        audio, motion, tolerance: see :func:`beat_alignment`.
        frames: T of the clip.
    """
    if len(motion) == 0:
        return beat_alignment(audio, motion, tolerance)
    shifts = (np.asarray(motion, np.float64) + np.arange(frames)[:, None]) % frames
    return float(np.mean([beat_alignment(audio, shifted, tolerance) for shifted in shifts]))
