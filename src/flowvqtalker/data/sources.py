"""Source material on disk: what there is, its timing, frames and sound, and its raw landmarks (PyAV, tracker)."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import EMOTIONS, FPS
from flowvqtalker.data.shards import SAMPLES
from flowvqtalker.errors import UserError

__all__ = [
    "Raw",
    "Source",
    "Timing",
    "catalogue",
    "read_audio",
    "read_frames",
    "read_picture",
    "read_timing",
    "resample",
    "track_source",
]

_VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".m4v"}
_PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
_RATE = FPS * SAMPLES

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """One clip or picture that is to be prepared.

    Attributes:
        name: file name, unique among the sources of its kind.
        path: the file.
        collection: where it comes from (MEAD, GRID ...).
        identity: who it is; None where unknown.
        emotion: number in :data:`flowvqtalker.EMOTIONS`, -1 where unknown.
        speech: whether its sound is the speech of its face.
        is_image: whether it is a single image.
    """

    name: str
    path: Path
    collection: str
    identity: str | None
    emotion: int
    speech: bool
    is_image: bool

    @property
    def key(self) -> str:
        """Name of the files kept about it."""
        return ("pic_" if self.is_image else "clip_") + self.name.replace("/", "_")


def catalogue(data: str | Path) -> list[Source]:
    """Everything to prepare in a folder, in a fixed order.

    Two layouts are read. Tables: ``clips.csv`` (columns file, source, identity, emotion, speech; files in ``clips/``)
    and ``faces.csv`` (file, source, identity; files in ``faces/``); either may be missing. Plain: any videos and
    pictures below the folder; the identity is the name of the sub-folder, or else the file's own.

    Raises:
        UserError: if nothing is found or a table lacks a column or names a missing file.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"no folder {data}; give one with clips.csv and clips/, or one with videos")
    sources = [*_table(data, "clips", is_image=False), *_table(data, "faces", is_image=True)]
    if not sources:
        for path in sorted(p for p in data.rglob("*") if p.suffix.lower() in _VIDEOS | _PICTURES):
            inside = path.relative_to(data)
            identity = inside.parts[0] if len(inside.parts) > 1 else path.stem
            picture = path.suffix.lower() in _PICTURES
            sources.append(Source(str(inside), path, data.name, identity, -1, not picture, picture))
    if not sources:
        raise UserError(
            f"no clips in {data}; give a folder with clips.csv and clips/, or with videos ({_list(_VIDEOS)})"
        )
    return sources


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _table(data: Path, kind: str, is_image: bool) -> list[Source]:
    table = data / f"{kind}.csv"
    if not table.is_file():
        return []
    with open(table, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    needed = ("file", "source", "identity") if is_image else ("file", "source", "identity", "emotion", "speech")
    missing = [column for column in needed if rows and column not in rows[0]]
    if missing:
        raise UserError(f"{table} lacks the columns {', '.join(missing)}")
    absent = [row["file"] for row in rows if not (data / kind / row["file"]).is_file()]
    if absent:
        raise UserError(f"{table} names {len(absent)} files that are not in {data / kind}, the first: {absent[0]}")
    return [
        Source(
            name=row["file"],
            path=data / kind / row["file"],
            collection=row["source"],
            identity=None if row["identity"].endswith("unknown") else row["identity"],
            emotion=EMOTIONS.index(row["emotion"]) if row.get("emotion") in EMOTIONS else -1,
            speech=row.get("speech") == "yes",
            is_image=is_image,
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Timing:
    """When a clip's frames are shown.

    Attributes:
        times: (n,) seconds after the first frame, ascending.
        start: the first frame's own timestamp in seconds, on the clock of the sound.
        size: (height, width).
    """

    times: npt.NDArray[np.float64]
    start: float
    size: tuple[int, int]

    @property
    def ticks(self) -> int:
        """How many frames the clip has at 25 fps."""
        step = float(np.median(np.diff(self.times))) if len(self.times) > 1 else 1 / FPS
        return max(1, int((self.times[-1] + step) * FPS + 0.02))


def read_timing(path: str | Path) -> Timing:
    """Timestamps of a clip's frames, without decoding them."""
    import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UserError(f"{path} has no video track")
        stream = container.streams.video[0]
        stamps = [p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        if not stamps:
            raise UserError(f"{path} has no timestamps")
        base = float(stream.time_base) if stream.time_base is not None else 1.0
        times = np.sort(np.array(stamps, np.float64)) * base
        return Timing(times - times[0], float(times[0]), (stream.height, stream.width))


def read_frames(path: str | Path, wanted: set[int] | None = None) -> Iterator[tuple[int, Pixels]]:
    """Decode the frames (number, (H, W, 3) uint8 RGB) of a clip; only the wanted ones are converted."""
    import av

    last = max(wanted) if wanted else None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # many clips are read at once by processes
        for number, frame in enumerate(container.decode(stream)):
            if wanted is None or number in wanted:
                yield number, frame.to_ndarray(format="rgb24")
            if last is not None and number >= last:
                return


def read_picture(path: str | Path) -> Pixels:
    """A picture as (H, W, 3) uint8 RGB."""
    picture = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise UserError(f"{path} is no picture that OpenCV reads")
    return np.ascontiguousarray(picture[..., ::-1]).astype(np.uint8, copy=False)


def read_audio(path: str | Path, start: float, ticks: int) -> npt.NDArray[np.int16] | None:
    """Sound of a clip, 16 kHz mono, cut or padded so that sample 640 t belongs to the start of frame t.

    Arguments:
        path: the clip.
        start: timestamp of the first video frame in seconds.
        ticks: number of frames at 25 fps.

    Returns:
        (ticks * 640,) int16, or None if there is no sound.
    """
    import av

    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        resampler = av.AudioResampler(format="s16", layout="mono", rate=_RATE)
        parts: list[npt.NDArray[np.int16]] = []
        first: float | None = None
        for frame in container.decode(container.streams.audio[0]):
            if first is None:
                first = float(frame.time) if frame.time is not None else start
            parts.extend(part.to_ndarray()[0].astype(np.int16) for part in resampler.resample(frame))
        parts.extend(part.to_ndarray()[0].astype(np.int16) for part in resampler.resample(None))
    if first is None:
        return None
    wave = np.concatenate(parts)
    offset = round((first - start) * _RATE)
    wave = np.concatenate([np.zeros(offset, np.int16), wave]) if offset > 0 else wave[-offset:]
    whole = np.zeros(ticks * SAMPLES, np.int16)
    length = min(len(whole), len(wave))
    whole[:length] = wave[:length]
    return whole


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

    def track(self, frames: Iterable[Pixels]) -> Iterator[Any]:
        """The face of each frame, or None."""


def track_source(
    source: Source, cache: Path | None, make_tracker: Callable[[], AbstractContextManager[Tracker]]
) -> Raw:
    """Raw landmarks of a source: from ``cache/KEY.npz`` (keys lm, bs, fps), or tracked and kept there."""
    file = cache / f"{source.key}.npz" if cache is not None else None
    if file is not None and file.is_file():
        with np.load(file) as stored:
            return Raw(stored["lm"].astype(np.float32), stored["bs"].astype(np.float32))
    frames = [read_picture(source.path)] if source.is_image else (frame for _, frame in read_frames(source.path))
    landmarks, blendshapes = [], []
    with make_tracker() as tracker:
        for face in tracker.track(frames):
            landmarks.append(np.full((478, 3), np.nan, np.float32) if face is None else face.landmarks)
            blendshapes.append(np.full(52, np.nan, np.float32) if face is None else face.blendshapes)
    raw = Raw(np.stack(landmarks), np.stack(blendshapes))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(file.name + ".tmp.npz")
        rate = 0.0 if source.is_image else 1 / float(np.median(np.diff(read_timing(source.path).times)))
        np.savez(beside, lm=raw.landmarks, bs=raw.blendshapes.astype(np.float16), fps=rate)
        os.replace(beside, file)
    return raw


def resample(raw: Raw, times: npt.NDArray[np.float64], ticks: int) -> tuple[Raw, npt.NDArray[np.int64], Floats]:
    """Landmarks at 25 fps from landmarks at a clip's own timestamps.

    A cubic spline between the frames (a straight line between them would flatten blinks and lips); ticks further
    than a frame from the next face that was found are NaN. A clip at 25 fps passes through unchanged.

    Arguments:
        raw: n frames.
        times: (n,) seconds after the first frame.
        ticks: T.

    Returns:
        T frames; (T,) number of the nearest own frame of each tick; (T,) float32 how far from it in seconds.
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
