"""A clip or image on disk: its timing, frames and sound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.data.shards import SAMPLES
from flowvqtalker.errors import UserError
from flowvqtalker.io.frames import FrameReader, deinterlaced
from flowvqtalker.io.image import ImageArray, read_image
from flowvqtalker.io.media import audio_track, open_media, video_track

__all__ = ["Box", "Source", "Timing", "read_audio", "read_frames", "read_timing"]

Span = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle of the frames, in pixels of frames of a height; other frames scale it.

    Attributes:
        left, top, width, height: the rectangle.
        frame_height: height of the frames in which it was measured.
    """

    left: int
    top: int
    width: int
    height: int
    frame_height: int

    def crop(self, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of frames of a size.

        Raises:
            UserError: if it lies outside of them.
        """
        scale = height / self.frame_height
        top, left = round(self.top * scale), round(self.left * scale)
        rows = slice(top, min(height, top + round(self.height * scale)))
        columns = slice(left, min(width, left + round(self.width * scale)))
        if rows.stop - rows.start < 1 or columns.stop - columns.start < 1:
            raise UserError(f"the crop {self} lies outside of frames of {width}x{height}")
        return rows, columns


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
        sound: file that holds its sound, from the same start; None if the clip does.
        span: seconds of the file at which the clip begins and ends; None is all of it.
        box: part of the frames to look at; None is all.
    """

    name: str
    path: Path
    collection: str
    identity: str | None
    emotion: int
    speech: bool
    is_image: bool
    sound: Path | None = None
    span: Span | None = None
    box: Box | None = None

    @property
    def key(self) -> str:
        """Stem of the files that preparation keeps about it."""
        return ("pic_" if self.is_image else "clip_") + self.name.replace("/", "_")

    def timing(self) -> Timing:
        """When the clip's frames are shown."""
        timing = read_timing(self.path, self.span)
        if self.box is None:
            return timing
        rows, columns = self.box.crop(*timing.size)
        return replace(timing, size=(rows.stop - rows.start, columns.stop - columns.start))

    def frames(self, wanted: set[int] | None = None) -> Iterator[tuple[int, ImageArray]]:
        """Frames (number, (H, W, 3) uint8 RGB) of a clip, or the image as the only one; all, or the wanted ones."""
        if self.is_image:
            yield 0, read_image(self.path)
            return
        for number, frame in read_frames(self.path, wanted, self.span):
            yield number, frame if self.box is None else frame[self.box.crop(*frame.shape[:2])]

    def audio(self, timing: Timing) -> npt.NDArray[np.int16] | None:
        """Sound of a clip, see :func:`read_audio`."""
        if self.sound is None:
            return read_audio(self.path, timing.start, timing.ticks)
        return read_audio(self.sound, self.span[0] if self.span else 0.0, timing.ticks)


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


def read_timing(path: str | Path, span: Span | None = None) -> Timing:
    """Timestamps of the frames of a clip, or of a span of it; only the first is decoded."""
    with open_media(path) as container:
        stream = _video(container, path)
        stamps = [p.pts for p in container.demux(stream) if p.pts is not None and not p.is_discard]
        if not stamps:
            raise UserError(f"{path} has no timestamps")
        base = float(stream.time_base) if stream.time_base is not None else 1.0
        times = np.sort(np.array(stamps, np.float64)) * base
        if span is not None:
            start, end = _limits(span, _first(stream))
            times = times[(times >= start) & (times < end)]
            if not len(times):
                raise UserError(f"{path} has no frames from {span[0]:g} to {span[1]:g} s")
    with open_media(path) as container:
        stream = video_track(container)
        return Timing(times - times[0], float(times[0]), FrameReader(stream).shape(next(container.decode(stream))))


def _video(container: Any, path: str | Path) -> Any:
    stream = video_track(container)
    if stream is None:
        raise UserError(f"{path} has no video track")
    return stream


def _first(stream: Any) -> float:
    """Timestamp at which a stream begins, in seconds."""
    return float((stream.start_time or 0) * stream.time_base) if stream.time_base is not None else 0.0


def _limits(span: Span, first: float) -> Span:
    """First timestamp of a span, and the first one after it; a millisecond earlier, for rounded timestamps."""
    return first + span[0] - 1e-3, first + span[1] - 1e-3


def read_frames(
    path: str | Path, wanted: set[int] | None = None, span: Span | None = None
) -> Iterator[tuple[int, ImageArray]]:
    """Decode the frames (number, (H, W, 3) uint8 RGB) of a clip or of a span of it; only the wanted ones are
    converted."""
    last = max(wanted) if wanted else None
    with open_media(path) as container:
        stream = _video(container, path)
        reader = FrameReader(stream)
        stream.thread_type = "NONE"  # many clips are read at once by processes
        frames = deinterlaced(container.decode(stream))
        if span is not None and stream.time_base is not None:
            start, end = _limits(span, _first(stream))
            container.seek(int(start / stream.time_base), stream=stream)  # to the key frame before
            after = itertools.dropwhile(lambda frame: (frame.time or 0.0) < start, frames)
            frames = itertools.takewhile(lambda frame: (frame.time or 0.0) < end, after)
        for number, frame in enumerate(frames):
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
