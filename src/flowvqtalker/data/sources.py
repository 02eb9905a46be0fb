"""Clips and images on disk: which there are, and their timing, frames and sound."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import EMOTIONS, FPS, SAMPLE_RATE
from flowvqtalker.data.shards import SAMPLES
from flowvqtalker.errors import UserError
from flowvqtalker.io.frames import FrameReader
from flowvqtalker.io.image import ImageArray
from flowvqtalker.io.media import audio_track, open_media, video_track

__all__ = ["Source", "Timing", "catalogue", "read_audio", "read_frames", "read_timing"]

_VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".m4v"}
_IMAGES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Source:
    """One clip or image to prepare.

    Attributes:
        name: file name, unique among the sources of its kind.
        path: the file.
        collection: data set that it comes from (MEAD, GRID ...).
        identity: the person; None where unknown.
        emotion: index in :data:`flowvqtalker.constants.EMOTIONS`, -1 where unknown.
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
        """Stem of the files that preparation keeps about it."""
        return ("pic_" if self.is_image else "clip_") + self.name.replace("/", "_")


def catalogue(data: str | Path) -> list[Source]:
    """Everything to prepare in a folder, in a fixed order.

    Two layouts are read. Tables: ``clips.csv`` (columns file, source, identity, emotion, speech; files in ``clips/``)
    and ``faces.csv`` (file, source, identity; files in ``faces/``); either may be missing. Plain: all videos and images
    below the folder; the identity is the name of the sub-folder, or else of the file.

    Raises:
        UserError: if nothing is found or a table lacks a column or names a missing file.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"no folder {data}; give one with clips.csv and clips/, or one with videos")
    sources = [*_table(data, "clips", is_image=False), *_table(data, "faces", is_image=True)]
    if not sources:
        for path in sorted(p for p in data.rglob("*") if p.suffix.lower() in _VIDEOS | _IMAGES):
            inside = path.relative_to(data)
            identity = inside.parts[0] if len(inside.parts) > 1 else path.stem
            image = path.suffix.lower() in _IMAGES
            sources.append(Source(str(inside), path, data.name, identity, -1, not image, image))
    if not sources:
        suffixes = ", ".join(sorted(_VIDEOS))
        raise UserError(f"no clips in {data}; give a folder with clips.csv and clips/, or with videos ({suffixes})")
    return sources


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
    """Timestamps of a clip's frames; only the first is decoded."""
    with open_media(path) as container:
        stream = video_track(container)
        if stream is None:
            raise UserError(f"{path} has no video track")
        stamps = [p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        if not stamps:
            raise UserError(f"{path} has no timestamps")
        base = float(stream.time_base) if stream.time_base is not None else 1.0
        times = np.sort(np.array(stamps, np.float64)) * base
    with open_media(path) as container:
        stream = video_track(container)
        return Timing(times - times[0], float(times[0]), FrameReader(stream).shape(next(container.decode(stream))))


def read_frames(path: str | Path, wanted: set[int] | None = None) -> Iterator[tuple[int, ImageArray]]:
    """Decode the frames (number, (H, W, 3) uint8 RGB) of a clip; only the wanted ones are converted."""
    last = max(wanted) if wanted else None
    with open_media(path) as container:
        stream = video_track(container)
        if stream is None:
            raise UserError(f"{path} has no video track")
        reader = FrameReader(stream)
        stream.thread_type = "NONE"  # many clips are read at once by processes
        for number, frame in enumerate(container.decode(stream)):
            if wanted is None or number in wanted:
                yield number, reader.image(frame)
            if last is not None and number >= last:
                return


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

    with open_media(path) as container:
        if not container.streams.audio:
            return None
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE)
        parts: list[npt.NDArray[np.int16]] = []
        first: float | None = None
        for frame in container.decode(audio_track(container, path)):
            if first is None:
                first = float(frame.time) if frame.time is not None else start
            parts.extend(part.to_ndarray()[0].astype(np.int16) for part in resampler.resample(frame))
        parts.extend(part.to_ndarray()[0].astype(np.int16) for part in resampler.resample(None))
    if first is None:
        return None
    wave = np.concatenate(parts)
    offset = round((first - start) * SAMPLE_RATE)
    wave = np.concatenate([np.zeros(offset, np.int16), wave]) if offset > 0 else wave[-offset:]
    whole = np.zeros(ticks * SAMPLES, np.int16)
    length = min(len(whole), len(wave))
    whole[:length] = wave[:length]
    return whole
