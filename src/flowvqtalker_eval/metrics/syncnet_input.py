"""What SyncNet is fed: cepstra of the sound and 224x224 crops of the face.

Two crops. ``eat``: faces aligned as PC-AVS does (``align_68.py``), which EAT and the papers after it give to SyncNet
without its tracker. ``native``: the crop of ``run_pipeline.py`` (box, ``crop_scale`` 0.4, grey 110 around the image).
Deviations: faces come from the 68 landmarks instead of face-alignment (``eat``) or S3FD (``native``), images are not
compressed in between, and clips shorter than 100 frames are kept, which ``run_pipeline.py`` drops silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, cast

import cv2
import numpy as np
import numpy.typing as npt
from scipy.fft import dct
from scipy.ndimage import median_filter
from scipy.signal import medfilt

from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import similarity
from flowvqtalker.face.geometry import fill_gaps
from flowvqtalker_eval.metrics.analysis import Array, Frames

__all__ = ["Crop", "face_crops", "mfcc"]

_SIZE = 224
_EPSILON = float(np.finfo(float).eps)

# Where PC-AVS puts the middles of the eyes and of the inner lips.
_EYES_AND_MOUTH = np.array([[87, 59], [137, 59], [112, 120]], float)
_SCALE, _GREY, _MEDIAN = 0.4, 110, 13
# S3FD's boxes reach above the brows: by this share of the height of the 68 points (our estimate).
_FOREHEAD = 0.25

Crop = Literal["eat", "native"]
Floats = npt.NDArray[np.float64]


@lru_cache(maxsize=1)
def _mel_filters() -> Floats:
    """Triangular filters (257, 26) whose corners are rounded down to bins, from 0 to 8000 Hz."""
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    corners = np.floor(513 * 700 * (10 ** (mel / 2595) - 1) / 16_000)
    low, centre, high = corners[:-2], corners[1:-1], corners[2:]
    bins = np.arange(257)[:, None]
    rising = np.where((bins >= low) & (bins < centre), (bins - low) / np.maximum(centre - low, 1), 0)
    falling = np.where((bins >= centre) & (bins < high), (high - bins) / np.maximum(high - centre, 1), 0)
    return rising + falling


def mfcc(samples: Array) -> Floats:
    """13 cepstral coefficients (m, 13) of samples (n,) at 16 kHz in the range of int16, one column every 10 ms.

    The defaults of ``python_speech_features.mfcc``: pre-emphasis 0.97, 25 ms without a window function, 512 bins, 26
    mel bands, orthonormal DCT, lifter 22, the first coefficient replaced by the log of the frame's energy.
    """
    signal = np.asarray(samples, np.float64)
    if signal.ndim != 1 or len(signal) == 0:
        raise UserError(f"sound of shape (n,) with n > 0 is needed, got {signal.shape}")
    signal = np.concatenate([signal[:1], signal[1:] - 0.97 * signal[:-1]])
    count = 1 + max(0, -(-(len(signal) - 400) // 160))
    signal = np.pad(signal, (0, (count - 1) * 160 + 400 - min(len(signal), (count - 1) * 160 + 400)))
    frames = np.lib.stride_tricks.sliding_window_view(signal, 400)[::160][:count]
    power = np.abs(np.fft.rfft(frames, 512)) ** 2 / 512
    energy = power.sum(1)
    bands = power @ _mel_filters()
    bands = np.log(np.where(bands == 0, _EPSILON, bands))
    cepstra = dct(bands, type=2, axis=1, norm="ortho")[:, :13] * (1 + 11 * np.sin(np.pi * np.arange(13) / 22))
    cepstra[:, 0] = np.log(np.where(energy == 0, _EPSILON, energy))
    return np.asarray(cepstra, np.float64)


def _filled(landmarks: Array) -> Floats:
    """Landmarks (T, 68, 2) with frames without a face interpolated between their neighbours."""
    points = np.array(landmarks, np.float64)
    if points.ndim != 3 or points.shape[1:] != (68, 2):
        raise UserError(f"landmarks of shape (T, 68, 2) are needed, got {points.shape}")
    seen = np.asarray(np.isfinite(points).all((1, 2)))
    if not seen.any():
        raise UserError(f"none of {len(points)} frames has a face, so lips and sound cannot be compared")
    return fill_gaps(points[seen], seen).astype(np.float64)


def _eat_matrices(points: Floats) -> Floats:
    """Maps (T, 2, 3) of PC-AVS: one rotation and scale for the clip, the mouth held in place by a smoothed shift."""
    parts = (slice(36, 42), slice(42, 48), slice(60, 68))
    three = np.stack([points[:, part].mean(1) for part in parts], axis=1)  # (T, 3, 2)
    matrix = similarity(three.mean(0, keepdims=True), _EYES_AND_MOUTH)[0]
    away = _EYES_AND_MOUTH[2] - (three[:, 2] @ matrix[:, :2].T + matrix[:, 2])
    matrices = np.repeat(matrix[None], len(points), axis=0)
    smooth = away[0]
    for number, shift in enumerate(away):
        smooth = 0.2 * smooth + 0.8 * shift
        matrices[number, :, 2] += smooth
    return matrices


def _native_boxes(points: Floats) -> Floats:
    """Middle and half side (T, 3) of the faces' boxes, filtered by a running median as ``run_pipeline.py`` does."""
    low, high = points.min(1), points.max(1)
    low[:, 1] -= _FOREHEAD * (high - low)[:, 1]
    boxes = np.concatenate([(low + high) / 2, (high - low).max(1, keepdims=True) / 2], axis=1)
    if len(boxes) < _MEDIAN:  # medfilt's zeros beyond the ends would fill most of the window
        return np.asarray(median_filter(boxes, size=(_MEDIAN, 1), mode="nearest"))
    return np.stack([medfilt(column, _MEDIAN) for column in boxes.T], axis=1)


def _native_crop(frame: Frames, box: Floats) -> Frames:
    x, y, half = box
    pad = int(half * (1 + 2 * _SCALE))
    top, bottom = int(y + pad - half) - pad, int(y + pad + half * (1 + 2 * _SCALE)) - pad
    left, right = int(x + pad - half * (1 + _SCALE)) - pad, int(x + pad + half * (1 + _SCALE)) - pad
    inside = frame[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    canvas = np.full((max(1, bottom - top), max(1, right - left), 3), _GREY, np.uint8)
    canvas[max(-top, 0) :, max(-left, 0) :][: inside.shape[0], : inside.shape[1]] = inside
    return cast(Frames, cv2.resize(canvas, (_SIZE, _SIZE)))


def face_crops(frames: Iterable[Frames], landmarks: Array, crop: Crop = "eat") -> Iterator[Frames]:
    """Faces (224, 224, 3) uint8 RGB of the frames of a clip, one at a time.

    Arguments:
        frames: (H, W, 3) uint8 RGB at 25 fps.
        landmarks: (T, 68, 2) in pixels, NaN where no face was found (interpolated between neighbours).
        crop: ``eat`` or ``native``, see the module.

    Raises:
        UserError: if there is no face at all, the crop is unknown, or frames and landmarks are not equally many.
    """
    if crop not in ("eat", "native"):
        raise UserError(f"unknown SyncNet crop {crop!r}; choose eat or native")
    points = _filled(landmarks)
    places = _eat_matrices(points) if crop == "eat" else _native_boxes(points)
    count = 0
    for frame in frames:
        if count >= len(places):
            raise UserError(f"there are more frames than the {len(places)} with landmarks")
        if crop == "eat":
            yield cast(Frames, cv2.warpAffine(frame, places[count], (_SIZE, _SIZE), borderValue=(0, 0, 0)))
        else:
            yield _native_crop(frame, places[count])
        count += 1
    if count != len(places):
        raise UserError(f"there are {count} frames but landmarks of {len(places)}")
