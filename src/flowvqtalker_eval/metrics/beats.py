"""Beat alignment of head motion and speech, and what is heard at each frame.

Definition of Bailando (Siyao et al. 2022, section 4.2): motion beats are the local minima of the Gaussian-smoothed mean
speed; the score is the mean over the audio's beats of exp(-Δ² / 2σ²), Δ the distance to the nearest motion beat.
Bailando smooths with 5 frames and takes σ = 3 frames at 60 fps; here both keep their time at 25 fps. Audio beats are
librosa's onsets. The score grows with the number of motion beats, so :func:`chance` tells what unrelated motion with
as many beats would get.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.geometry import fill_gaps
from flowvqtalker.face.model import FaceModel, rotation_matrix
from flowvqtalker.loading import load_face_model
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, Settings, Wave

__all__ = [
    "SMOOTHING",
    "TOLERANCE",
    "BeatExtractor",
    "audio_beats",
    "beat_alignment",
    "chance",
    "head_speed",
    "loudness",
    "motion_beats",
    "pitch",
    "point_speed",
]

#: σ of the score and of the smoothing, in frames at 25 fps.
TOLERANCE, SMOOTHING = 3 * FPS / 60, 5 * FPS / 60

_HOP = 160
_SAMPLES = SAMPLE_RATE // FPS
#: Lowest level in dB, below the loudest frame.
_FLOOR_DB = 40.0
_LOWEST_HZ, _HIGHEST_HZ = 65.0, 500.0


def _librosa() -> Any:
    try:
        import librosa
    except ImportError as error:
        raise MissingDependency(
            "beats and pitch need librosa, which is not installed; run `pip install 'flowvqtalker[eval]'`"
        ) from error
    return librosa


def _checked(wave: Array) -> Wave:
    wave = np.asarray(wave, np.float32)
    if wave.ndim != 1 or len(wave) == 0 or not np.isfinite(wave).all():
        raise UserError(f"speech (S,) of finite samples at 16 kHz is needed, got an array of shape {wave.shape}")
    return wave


# ------------------------------------------------------------------------------------------------------------- sound


def audio_beats(wave: Array) -> Array:
    """Onsets (n,) in speech (S,) at 16 kHz, in video frames, not rounded: librosa's ``onset_detect`` with its defaults
    on a hop of 10 ms."""
    wave = _checked(wave)
    if np.abs(wave).max() == 0:
        return np.zeros(0)
    times = _librosa().onset.onset_detect(y=wave, sr=SAMPLE_RATE, hop_length=_HOP, units="time")
    return np.asarray(times, np.float64) * FPS


def loudness(wave: Array) -> Array:
    """(T,) root mean square of each video frame's samples in dB, at least 40 dB below the loudest frame's."""
    wave = _checked(wave)
    padded = np.pad(wave.astype(np.float64), (0, -len(wave) % _SAMPLES))
    power = 10 * np.log10(np.square(padded.reshape(-1, _SAMPLES)).mean(1) + 1e-10)
    return np.asarray(np.maximum(power, power.max() - _FLOOR_DB))


def pitch(wave: Array) -> Array:
    """(T,) fundamental frequency of each video frame in semitones above 65 Hz, NaN where there is no voice (librosa's
    probabilistic YIN, 65 to 500 Hz)."""
    wave = _checked(wave)
    hertz, _, _ = _librosa().pyin(
        wave, fmin=_LOWEST_HZ, fmax=_HIGHEST_HZ, sr=SAMPLE_RATE, frame_length=1280, hop_length=_SAMPLES
    )
    found = np.full(-(-len(wave) // _SAMPLES), np.nan)
    found[: len(hertz)] = hertz[: len(found)]
    return np.asarray(12 * np.log2(found / _LOWEST_HZ))


# ------------------------------------------------------------------------------------------------------------ motion


def point_speed(points: Array) -> Array:
    """(T - 1,) mean distance that points (T, V, 2 or 3) move in a frame, NaN beside a frame without a face."""
    return np.asarray(np.linalg.norm(np.diff(np.asarray(points, np.float64), axis=0), axis=-1).mean(-1))


def head_speed(face: FaceModel, rho: Array) -> Array:
    """(T - 1,) mean speed of the mean face's vertices under the poses ρ (T, 6): of the head alone, not of the lips."""
    with torch.inference_mode():
        pose = torch.as_tensor(np.asarray(rho, np.float32))
        points = face.mean @ rotation_matrix(pose[:, :3]).mT + pose[:, None, 3:]
    return point_speed(points.numpy())


def motion_beats(speed: Array, smoothing: float = SMOOTHING) -> Array:
    """Frames (n,) at which a motion comes to rest before it goes on: local minima of its smoothed speed.

    Arguments:
        speed: (T - 1,), entry t between frames t and t + 1; NaN is interpolated.
        smoothing: σ of the Gaussian in frames.
    """
    speed = np.asarray(speed, np.float64)
    found = np.isfinite(speed)
    if speed.ndim != 1 or not found.any():
        raise UserError(f"the speed (T - 1,) of a motion of at least two frames is needed, got shape {speed.shape}")
    smooth = gaussian_filter1d(fill_gaps(speed[found], found), smoothing, mode="nearest")
    inner = smooth[1:-1]
    low = (inner < smooth[:-2]) & (inner <= smooth[2:])
    return np.flatnonzero(low) + 1.5  # the speed of an interval belongs to its middle


def beat_alignment(audio: Array, motion: Array, tolerance: float = TOLERANCE) -> float:
    """Beat alignment score of beats (n,) of the audio and (m,) of the motion, in frames.

    Returns:
        0 (no motion beat near any beat of the audio) to 1 (one on each); NaN without a beat in the audio.
    """
    audio, motion = np.asarray(audio, np.float64), np.asarray(motion, np.float64)
    if len(audio) == 0:
        return float("nan")
    if len(motion) == 0:
        return 0.0
    nearest = np.abs(audio[:, None] - motion).min(1)
    return float(np.exp(-np.square(nearest) / (2 * tolerance**2)).mean())


def chance(audio: Array, motion: Array, frames: int, tolerance: float = TOLERANCE) -> float:
    """Mean score of the motion's beats shifted cyclically by every number of frames up to ``frames``: what motion that
    knows nothing of the speech would get."""
    shifts = (np.asarray(motion, np.float64) + np.arange(frames)[:, None]) % frames
    return float(np.mean([beat_alignment(audio, shifted, tolerance) for shifted in shifts]))


class BeatExtractor(ClipExtractor):
    """Beats of the sound and of the head: ``audio_beats`` (n,), ``head_beats`` (m,), in frames."""

    name = "beats"
    needs: tuple[str, ...] = ("pose",)
    gives = ("audio_beats", "head_beats")

    def __init__(self, weights: Path | None = None) -> None:
        if importlib.util.find_spec("librosa") is None:  # report it before anything is decoded
            raise MissingDependency("beats need librosa; run `pip install 'flowvqtalker[eval]'`")
        self._weights = weights

    def settings(self) -> Settings:
        return {"librosa": version("librosa"), "smoothing_frames": SMOOTHING}

    def __call__(self, known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        pose = known["pose"]
        seen = np.asarray(np.isfinite(pose).all(1))
        if wave is None or len(pose) < 3 or not (seen[1:] & seen[:-1]).any():
            return {"audio_beats": np.zeros(0), "head_beats": np.zeros(0)}
        if self._model is None:
            self._model = load_face_model(self._weights)
        speed = head_speed(self._model, pose)
        return {"audio_beats": audio_beats(wave), "head_beats": motion_beats(speed)}
