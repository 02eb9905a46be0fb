"""What preparation does to one source: track, resample, crop, fit, read the sound, choose and cut images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import CROP, FPS
from flowvqtalker.data.identity import Describer
from flowvqtalker.data.lip_sync import lip_opening, sound_features
from flowvqtalker.data.sources import Source
from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import Crop, crop_box
from flowvqtalker.face.topology import EYE_CORNERS
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.image import ImageArray

__all__ = [
    "PrepareConfig",
    "Raw",
    "Tools",
    "choose_frames",
    "cut_images",
    "describe_source",
    "fit_source",
    "resample",
    "save_npz",
    "split_jpegs",
    "track_source",
]

# Outermost vertices (left and right in the image): the difference of their depths tells how far the head is turned.
_CHEEKS = (234, 454)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Raw:
    """What the tracker found, frame by frame, at the clip's own rate.

    Attributes:
        landmarks: (n, 478, 3) float32 in pixels of the input; NaN where no face was found.
        blendshapes: (n, 52) float32.
    """

    landmarks: Floats
    blendshapes: Floats


class Tracker(Protocol):
    """What is needed of :class:`flowvqtalker.face.tracker.FaceTracker`."""

    def track(self, frames: Iterable[ImageArray]) -> Iterator[Any]:
        """The face of each frame, or None."""

    def detect(self, image: ImageArray) -> list[Any]:
        """The faces of one image, largest first."""


#: Maximum number of faces per image -> a tracker.
MakeTracker = Callable[[int], AbstractContextManager[Tracker]]


@dataclass(frozen=True)
class PrepareConfig:
    """What to read and what to keep of it."""

    data: Path
    """Folder with clips.csv, clips/, faces.csv, faces/, or of a data set as its authors ship it, also in archives."""
    out: Path
    """Folder of the shard to write."""
    model: Path
    """Face model to fit, as `flowvqtalker train face-model` writes it."""
    tracks: Path | None = None
    """Folder of raw landmarks: read where present, written where not."""
    workers: int = 1
    """Number of processes."""
    frames: int = 10
    """Images to keep per clip."""
    frame_clips: int = 60
    """Clips per person of which images are kept."""
    min_native: float = 160.0
    """Images are kept of clips whose crop covers at least this many input pixels a side."""
    quality: int = 95
    """JPEG quality of the images."""
    min_length: int = 12
    """Leave out clips of fewer frames at 25 fps."""
    max_missing: float = 0.2
    """Leave out clips with a larger fraction of frames without a face."""
    max_residual: float = 0.06
    """Leave out clips and images with a larger mean reprojection error (in distances of the outer eye corners)."""
    smooth: bool = True
    """Smooth the coefficients of clips over time."""
    held_out: tuple[str, ...] = ()
    """People who are never trained on (MEAD_M003 of a published test list), beside one in ten of the others."""
    natural: tuple[str, ...] = ("HDTF", "HDTF-like")
    """Collections whose `neutral` clips are natural speech, the ninth class."""
    min_shift: float = 0.25
    """Move the sound where it is at least this many frames away from the lips."""
    layout: str = "auto"
    """Layout of the folder: tables, mead, hdtf, ravdess, cremad, ffhq, celebv or folders; auto takes what it finds."""
    views: tuple[str, ...] = ("front",)
    """Cameras of MEAD to use."""
    max_jump: float = 0.5
    """Leave out clips whose face jumps by more distances of the outer eye corners between two frames: a cut."""
    min_sharpness: float = 0.08
    """Leave out blurred faces: deviation of the crop's Laplacian, relative to the image's."""
    max_other_face: float = 0.5
    """Leave out what shows a second face of more than this fraction of the first one's area."""
    min_sync: float = -0.1
    """Leave out speech whose sound and lips correlate less."""
    ray: str | None = None
    """Run on a Ray cluster: auto, its address, or local. All nodes must see the folders."""
    part: str | None = None
    """Only track and fit the I-th of N parts (I/N) of the sources; a run without it then writes the shard."""
    limit: int = 0
    """Use only the first N sources; 0 uses all."""


class Tools:
    """Tracker, face model and descriptor of one process, made when first needed."""

    def __init__(
        self, config: PrepareConfig, make_tracker: MakeTracker | None = None, fit: Callable[..., Any] | None = None
    ) -> None:
        self.config = config
        self._make_tracker = make_tracker
        self._fit = fit
        self._describer: Describer | None = None
        self._two_faces: Tracker | None = None
        self.open = ExitStack()
        self._model: Any = None

    def tracker(self, max_faces: int = 1) -> AbstractContextManager[Tracker]:
        """A new tracker."""
        if self._make_tracker is not None:
            return self._make_tracker(max_faces)
        from flowvqtalker.face.tracker import FaceTracker

        return FaceTracker(max_faces=max_faces)

    @property
    def two_faces(self) -> Tracker:
        """A tracker that finds a second face; it stays open until :attr:`open` is closed."""
        if self._two_faces is None:
            self._two_faces = self.open.enter_context(self.tracker(2))
        return self._two_faces

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
        """The face descriptor."""
        if self._describer is None:
            self._describer = Describer()
        return self._describer


def save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an uncompressed ``.npz`` that appears whole or not at all."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **cast(Any, arrays))

    atomic_write(path, write)


def track_source(
    source: Source, cache: Path | None, make_tracker: Callable[[], AbstractContextManager[Tracker]]
) -> Raw:
    """Raw landmarks of a source: read from ``cache/KEY.npz`` (keys lm, bs, fps), or tracked and stored there."""
    file = cache / f"{source.key}.npz" if cache is not None else None
    if file is not None and file.is_file():
        with np.load(file) as stored:
            return Raw(stored["lm"].astype(np.float32), stored["bs"].astype(np.float32))
    frames = (frame for _, frame in source.frames())
    landmarks, blendshapes = [], []
    with make_tracker() as tracker:
        for face in tracker.track(frames):
            landmarks.append(np.full((478, 3), np.nan, np.float32) if face is None else face.landmarks)
            blendshapes.append(np.full(52, np.nan, np.float32) if face is None else face.blendshapes)
    raw = Raw(np.stack(landmarks), np.stack(blendshapes))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        rate = 0.0 if source.is_image else 1 / float(np.median(np.diff(source.timing().times)))
        save_npz(file, {"lm": raw.landmarks, "bs": raw.blendshapes.astype(np.float16), "fps": rate})
    return raw


def resample(raw: Raw, times: npt.NDArray[np.float64], ticks: int) -> tuple[Raw, npt.NDArray[np.int64], Floats]:
    """Landmarks at 25 fps from landmarks at a clip's own timestamps.

    A cubic spline, since linear interpolation flattens blinks and lips. Frames further than a frame's length from the
    next face found are NaN. A clip at 25 fps passes through unchanged.

    Arguments:
        raw: n frames.
        times: (n,) seconds after the first frame.
        ticks: T.

    Returns:
        T frames; (T,) index of the nearest stored frame of each; (T,) float32 seconds between the two.
    """
    if len(times) != len(raw.landmarks):
        raise ValueError(f"{len(raw.landmarks)} frames were tracked but {len(times)} have a timestamp")
    wanted = np.arange(ticks) / FPS
    nearest = np.abs(times[None] - wanted[:, None]).argmin(1)
    away = (wanted - times[nearest]).astype(np.float32)
    if np.abs(away).max() < 0.002:
        return Raw(raw.landmarks[nearest], raw.blendshapes[nearest]), nearest, away
    from scipy.interpolate import CubicSpline

    seen = np.isfinite(raw.landmarks).all((1, 2))
    landmarks = np.full((ticks, 478, 3), np.nan, np.float32)
    blendshapes = np.full((ticks, 52), np.nan, np.float32)
    if seen.sum() >= 2:
        known = times[seen]
        step = float(np.median(np.diff(times)))
        after = np.searchsorted(known, wanted).clip(0, len(known) - 1)
        before = (np.searchsorted(known, wanted, side="right") - 1).clip(0)
        gap = np.maximum(known[after] - wanted, wanted - known[before])
        keep = gap < 1.5 * step
        landmarks[keep] = CubicSpline(known, raw.landmarks[seen])(wanted[keep])
        shapes = CubicSpline(known, raw.blendshapes[seen])(wanted[keep])
        blendshapes[keep] = shapes.clip(0, 1)
    return Raw(landmarks, blendshapes), nearest, away


def fit_source(source: Source, tools: Tools) -> dict[str, Any]:
    """Everything about a source except its images and its descriptor.

    Raises:
        UserError: if it is too short, shows no face, or the face model fits badly.
    """
    config = tools.config
    raw = tracked = track_source(source, config.tracks, tools.tracker)
    timing = None if source.is_image else source.timing()
    if timing is None:
        height, width = next(source.frames())[1].shape[:2]
        nearest, away = np.zeros(1, np.int64), np.zeros(1, np.float32)
    else:
        height, width = timing.size
        if timing.ticks < config.min_length:
            raise UserError(f"only {timing.ticks} frames", code="too_short")
        times = timing.times
        if len(times) != len(raw.landmarks):  # frames that were dropped or doubled in decoding
            times = np.arange(len(raw.landmarks)) * (times[-1] / max(1, len(times) - 1))
        raw, nearest, away = resample(raw, times, timing.ticks)
    seen = np.isfinite(raw.landmarks).all((1, 2))
    if seen.mean() < 1 - config.max_missing:
        text = "no face found" if source.is_image else f"no face in {1 - seen.mean():.0%} of the frames"
        raise UserError(text, code="no_face")
    crop = crop_box(raw.landmarks)
    landmarks = crop.points(raw.landmarks).astype(np.float32)
    check_frames(source, tracked, crop, tools)
    fitted = tools.fit(landmarks, config.smooth and not source.is_image)
    error = float(np.nanmean(fitted.residual))
    if error > config.max_residual:
        raise UserError(f"the face model fits badly ({error:.3f} eye distances)", code="bad_fit")
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    audio = None if timing is None else source.audio(timing)
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
            part["lips"] = lip_opening(landmarks)
            part["sound"] = sound_features(audio)
    return part


def check_frames(source: Source, raw: Raw, crop: Crop, tools: Tools) -> None:
    """Check what the landmarks alone do not tell, on three frames with a face.

    Arguments:
        raw: every frame of the source.
        crop: of its face.

    Raises:
        UserError: if the clip is cut, or shows another large face, or is blurred.
    """
    config = tools.config
    seen = np.flatnonzero(np.isfinite(raw.landmarks).all((1, 2)))
    points = raw.landmarks[seen, :, :2]
    eyes = np.linalg.norm(points[:, EYE_CORNERS[0]] - points[:, EYE_CORNERS[1]], axis=-1)
    jumps = np.linalg.norm(np.diff(points.mean(1), axis=0), axis=-1)[np.diff(seen) == 1] / np.median(eyes)
    if jumps.max(initial=0) > config.max_jump:
        raise UserError(f"the face jumps by {jumps.max():.2f} eye distances between two frames", code="cut")
    images = _own_frames(source, {int(number) for number in np.quantile(seen, (0.2, 0.5, 0.8), method="nearest")})
    sharp = max(sharpness(crop.apply(image)) for image in images.values())
    if sharp < config.min_sharpness:
        raise UserError(f"the face is blurred (sharpness {sharp:.3f})", code="blurred")
    found = [tools.two_faces.detect(image) for image in images.values()]
    crowded = [len(faces) > 1 and faces[1].area > config.max_other_face * faces[0].area for faces in found]
    if sum(crowded) * 2 > len(crowded):
        raise UserError("another face is nearly as large", code="two_faces")


def sharpness(crop: ImageArray) -> float:
    """Standard deviation of the Laplacian of a face crop (512, 512, 3) at half size, relative to that of the image; the
    inner face counts, which no background disturbs."""
    half = cv2.resize(crop, (CROP // 2, CROP // 2), interpolation=cv2.INTER_AREA)[64:224, 48:208]
    grey = cv2.cvtColor(half, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(cv2.Laplacian(grey, cv2.CV_32F).std() / max(1.0, grey.std()))


def describe_source(source: Source, tools: Tools) -> dict[str, Any]:
    """Descriptor of a face, from its most frontal frame."""
    raw = track_source(source, tools.config.tracks, tools.tracker)
    cheeks = raw.landmarks[:, list(_CHEEKS)]
    turned = np.abs(np.arctan2(cheeks[:, 1, 2] - cheeks[:, 0, 2], cheeks[:, 1, 0] - cheeks[:, 0, 0]))
    if not np.isfinite(turned).any():
        raise UserError("no face found")
    number = int(np.nanargmin(turned))
    image = _own_frames(source, {number})[number]
    return {"descriptor": tools.describer(image, raw.landmarks[number]), "kind": tools.describer.name}


def _own_frames(source: Source, wanted: set[int]) -> dict[int, npt.NDArray[np.uint8]]:
    return dict(source.frames(wanted))


def choose_frames(part: dict[str, Any], count: int) -> npt.NDArray[np.int64]:
    """Frames of a clip to keep as images: detected, close to an input frame in time, fitted well, and diverse.

    Farthest point sampling over expression, pose and time, from the frame nearest to the median.
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


def cut_images(source: Source, part: dict[str, Any], config: PrepareConfig) -> dict[str, Any]:
    """Crops of the chosen frames as JPEGs, back to back, with their frame numbers and sizes."""
    from flowvqtalker.face.crop import Crop

    crop = Crop(np.asarray(part["crop"], np.float64))
    chosen = choose_frames(part, config.frames)
    own = part["nearest"][chosen]
    frames = _own_frames(source, {int(n) for n in own})
    jpegs: list[bytes] = []
    for number in own:
        image = crop.apply(frames[int(number)])
        done, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, config.quality])
        if not done:
            raise UserError("an image could not be encoded")
        jpegs.append(data.tobytes())
    sizes = np.array([len(jpeg) for jpeg in jpegs], np.int64)
    return {"frames": chosen, "sizes": sizes, "data": np.frombuffer(b"".join(jpegs), np.uint8)}


def split_jpegs(cut: dict[str, Any]) -> list[tuple[int, bytes]]:
    """(frame, JPEG) pairs of what :func:`cut_images` made."""
    ends = np.cumsum(cut["sizes"])
    data = cut["data"].tobytes()
    return [(int(f), data[end - size : end]) for f, size, end in zip(cut["frames"], cut["sizes"], ends, strict=True)]
