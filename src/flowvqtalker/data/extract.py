"""One source of a shard: track or read its landmarks, resample, crop, fit, align the sound, choose and cut pictures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import CROP
from flowvqtalker.data import lip_sync as sync
from flowvqtalker.data import sources as material
from flowvqtalker.data.identity import Describer
from flowvqtalker.data.sources import Source, Tracker
from flowvqtalker.errors import UserError

__all__ = ["PrepareConfig", "Tools", "choose_frames", "cut_pictures", "describe_source", "fit_source", "split_jpegs"]

# Outer ends of the face mesh (left and right in the picture), which a turned head moves in depth.
_CHEEKS = (234, 454)

Floats = npt.NDArray[np.float32]
MakeTracker = Callable[[], AbstractContextManager[Tracker]]


@dataclass(frozen=True)
class PrepareConfig:
    """What is read and what is kept of it."""

    data: Path
    """Folder with clips.csv, clips/, faces.csv, faces/, or with videos and pictures."""
    out: Path
    """Folder of the shard."""
    model: Path
    """Face model to fit, as `flowvqtalker train face-model` writes it."""
    tracks: Path | None = None
    """Folder of raw landmarks: read where they are there, written where they are not."""
    workers: int = 1
    """Processes."""
    frames: int = 10
    """Pictures kept of a clip."""
    frame_clips: int = 60
    """Clips of one person of which pictures are kept."""
    min_native: float = 160.0
    """Pictures are kept of clips whose crop was made from at least so many pixels a side."""
    quality: int = 95
    """JPEG quality."""
    min_length: int = 12
    """Shorter clips (frames at 25 fps) are left out."""
    max_missing: float = 0.2
    """Clips in whose larger share of the frames no face is found are left out."""
    max_residual: float = 0.06
    """Clips and pictures with a larger mean reprojection error (eye distances) are left out."""
    smooth: bool = True
    """Smooth the coefficients of clips over time."""
    natural: tuple[str, ...] = ("HDTF", "HDTF-like")
    """Collections whose `neutral` clips are natural speech, the ninth class."""
    min_shift: float = 0.25
    """The sound is moved where the lips are at least so many frames away from it."""
    limit: int = 0
    """Only the first so many sources; 0: all."""


class Tools:
    """What a process needs for its sources, made once and when first needed."""

    def __init__(
        self, config: PrepareConfig, make_tracker: MakeTracker | None = None, fit: Callable[..., Any] | None = None
    ) -> None:
        self.config = config
        self._make_tracker = make_tracker
        self._fit = fit
        self._describer: Describer | None = None
        self._model: Any = None

    def tracker(self) -> AbstractContextManager[Tracker]:
        """A new tracker."""
        if self._make_tracker is not None:
            return self._make_tracker()
        from flowvqtalker.face.tracker import FaceTracker

        return FaceTracker()

    def fit(self, landmarks: Floats, smooth: bool) -> Any:
        """Coefficients of one clip, see :func:`flowvqtalker.face.fit.fit`."""
        if self._fit is not None:
            return self._fit(landmarks, smooth)
        from flowvqtalker.face.fit import fit
        from flowvqtalker.face.model import FaceModel

        if self._model is None:
            self._model = FaceModel.load(self.config.model)
        return fit(self._model, landmarks, smooth=smooth)

    @property
    def describer(self) -> Describer:
        """What tells people apart."""
        if self._describer is None:
            self._describer = Describer()
        return self._describer


def fit_source(source: Source, tools: Tools) -> dict[str, Any]:
    """Everything about a source except its pictures and its descriptor."""
    from flowvqtalker.face.crop import crop_box

    config = tools.config
    raw = material.track_source(source, config.tracks, tools.tracker)
    if source.is_image:
        height, width = material.read_picture(source.path).shape[:2]
        nearest, away, start, ticks = np.zeros(1, np.int64), np.zeros(1, np.float32), 0.0, 1
    else:
        timing = material.read_timing(source.path)
        (height, width), start, ticks = timing.size, timing.start, timing.ticks
        if ticks < config.min_length:
            raise UserError(f"only {ticks} frames")
        times = timing.times
        if len(times) != len(raw.landmarks):  # frames that were dropped or doubled in decoding
            times = np.arange(len(raw.landmarks)) * (times[-1] / max(1, len(times) - 1))
        raw, nearest, away = material.resample(raw, times, ticks)
    seen = np.isfinite(raw.landmarks).all((1, 2))
    if seen.mean() < 1 - config.max_missing:
        raise UserError("no face found" if source.is_image else f"no face in {1 - seen.mean():.0%} of the frames")
    crop = crop_box(raw.landmarks)
    landmarks = crop.points(raw.landmarks).astype(np.float32)
    fitted = tools.fit(landmarks, config.smooth and not source.is_image)
    error = float(np.nanmean(fitted.residual))
    if error > config.max_residual:
        raise UserError(f"the face model fits badly ({error:.3f} eye distances)")
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    audio = None if source.is_image else material.read_audio(source.path, start, ticks)
    part: dict[str, Any] = {
        "identity_shape": fitted.identity,
        "expression": fitted.expression,
        "pose": fitted.pose,
        "residual": fitted.residual,
        "blendshapes": raw.blendshapes,
        "landmarks": landmarks,
        "nearest": nearest,
        "away": away,
        "crop": crop.matrix,
        "valid": crop.points(corners).astype(np.float32),
        "native": CROP / crop.scale,
    }
    if audio is not None:
        part["audio"] = audio
        if source.speech:
            part["lips"] = sync.lip_opening(landmarks)
            part["sound"] = sync.sound_features(audio)
    return part


def describe_source(source: Source, tools: Tools) -> dict[str, Any]:
    """The descriptor of a face, from the frame that looks straightest into the camera."""
    raw = material.track_source(source, tools.config.tracks, tools.tracker)
    cheeks = raw.landmarks[:, list(_CHEEKS)]
    turned = np.abs(np.arctan2(cheeks[:, 1, 2] - cheeks[:, 0, 2], cheeks[:, 1, 0] - cheeks[:, 0, 0]))
    if not np.isfinite(turned).any():
        raise UserError("no face found")
    number = int(np.nanargmin(turned))
    image = _own_frames(source, {number})[number]
    return {"descriptor": tools.describer(image, raw.landmarks[number]), "kind": tools.describer.name}


def _own_frames(source: Source, wanted: set[int]) -> dict[int, npt.NDArray[np.uint8]]:
    if source.is_image:
        return {0: material.read_picture(source.path)}
    return dict(material.read_frames(source.path, wanted))


def choose_frames(part: dict[str, Any], count: int) -> npt.NDArray[np.int64]:
    """Frames of a clip to keep as pictures: seen, near a frame of the input in time, fitted well, unlike each other.

    The first is the most ordinary one; each next is the farthest from those taken in expression, pose and time.
    """
    residual = np.asarray(part["residual"], np.float32)
    away = np.abs(part["away"])
    good = np.isfinite(residual) & (away <= max(0.002, float(np.quantile(away, 0.15))))
    if good.sum() > 2 * count:
        good &= residual <= np.quantile(residual[good], 0.9)
    candidates = np.flatnonzero(good)
    if len(candidates) <= count:
        return candidates
    time = np.linspace(0, 1, len(residual), dtype=np.float32)[:, None]
    features = np.concatenate([part["expression"] / 8.0, part["pose"][:, :3] / 0.15, time], 1)[candidates]
    taken = [int(np.linalg.norm(features - np.median(features, 0), axis=1).argmin())]
    distance = np.linalg.norm(features - features[taken[0]], axis=1)
    while len(taken) < count:
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(features - features[taken[-1]], axis=1))
    return np.sort(candidates[taken])


def cut_pictures(source: Source, part: dict[str, Any], config: PrepareConfig) -> dict[str, Any]:
    """JPEGs of the chosen frames' crops, back to back, with their numbers and sizes."""
    from flowvqtalker.face.crop import Crop

    crop = Crop(np.asarray(part["crop"], np.float64))
    chosen = choose_frames(part, config.frames)
    own = part["nearest"][chosen]
    frames = _own_frames(source, {int(n) for n in own})
    jpegs: list[bytes] = []
    for number in own:
        picture = crop.apply(frames[int(number)])
        done, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, config.quality])
        if not done:
            raise UserError("a picture could not be encoded")
        jpegs.append(data.tobytes())
    sizes = np.array([len(jpeg) for jpeg in jpegs], np.int64)
    return {"frames": chosen, "sizes": sizes, "data": np.frombuffer(b"".join(jpegs), np.uint8)}


def split_jpegs(cut: dict[str, Any]) -> list[tuple[int, bytes]]:
    """(frame, JPEG) pairs of what :func:`cut_pictures` made."""
    ends = np.cumsum(cut["sizes"])
    data = cut["data"].tobytes()
    return [(int(f), data[end - size : end]) for f, size, end in zip(cut["frames"], cut["sizes"], ends, strict=True)]
