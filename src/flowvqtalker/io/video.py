"""Read and write video: frames stream through, and nothing holds more than a few of them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowvqtalker.constants import FPS
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.atomic import VIDEO_SUFFIXES, atomic_path, check_output
from flowvqtalker.io.audio import Speech, resampled, sound_format
from flowvqtalker.io.format import DEFAULT_VIDEO, VideoFormat
from flowvqtalker.io.frames import FrameReader, deinterlaced
from flowvqtalker.io.image import ImageArray, animation_length, image_size, read_animation, read_image
from flowvqtalker.io.media import (
    Timeline,
    audio_track,
    decoded_frames,
    error_text,
    existing_file,
    open_media,
    video_track,
)

__all__ = ["MediaInfo", "Result", "VideoWriter", "probe", "read_video", "write_video"]

logger = logging.getLogger(__name__)

# FFmpeg's names of the containers.
_CONTAINERS = dict(zip(VIDEO_SUFFIXES, ("mp4", "mp4", "mov", "matroska"), strict=True))
_LONGEST_LAST = 0.1  # seconds
_SOUND_BLOCK = 1024  # samples, one AAC frame: the sound never runs ahead of the picture by more


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        width: pixels, as displayed.
        height: pixels, likewise.
        fps: frames per second of the file (0 for an image).
        seconds: length as the file states it (0 for an image or where it is unknown).
        sound: whether there is an audio track.
    """

    kind: str
    width: int
    height: int
    fps: float = 0.0
    seconds: float = 0.0
    sound: bool = False


def probe(path: str | Path) -> MediaInfo:
    """Tell an image from a video and measure it; decodes one frame at most. An animated image is a video.

    Raises:
        UserError: if the file does not exist or is neither.
    """
    path = existing_file(path, "input")
    size = image_size(path)
    if size is not None:
        return MediaInfo("image", *size)
    if (animation := animation_length(path)) is not None:
        height, width = read_image(path).shape[:2]
        return MediaInfo("video", width, height, animation[0] / animation[1], animation[1])
    import av

    try:
        with open_media(path) as container:
            stream = video_track(container)
            if stream is None:
                raise UserError(f"{path} is neither an image nor a video; give for instance a JPEG, PNG or MP4 file")
            frame = next(container.decode(stream), None)
            if frame is None:
                raise UserError(f"{path} holds no frame; give a complete video file")
            height, width = FrameReader(stream).shape(frame)
            length = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
            sound = bool(container.streams.audio)
            return MediaInfo("video", width, height, float(stream.average_rate or 0), length, sound)
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} is neither an image nor a video ({error_text(error)}); give for instance a JPEG, PNG or MP4 file"
        ) from error


def read_video(path: str | Path, fps: float = FPS) -> Iterator[ImageArray]:
    """Frames of a video at a constant rate, as FFmpeg's ``fps`` filter gives them.

    Each source frame goes to the output frame nearest to its time stamp; gaps repeat the last frame, surplus frames are
    dropped. Where the file's sound begins before its picture, so does the output, with the first frame.

    Arguments:
        path: any video that FFmpeg reads, or an animated image; what it says of orientation, pixel shape and colours
            is applied.
        fps: frames per second of the output.

    Yields:
        (H, W, 3) uint8 sRGB, all of the size of the first.

    Raises:
        UserError: if the file does not exist or has no video.
    """
    path = existing_file(path, "video")
    import av

    try:
        shown = read_animation(path) if animation_length(path) else _decoded(path, fps)
        last: ImageArray | Callable[[], ImageArray] | None = None
        written = 0  # output frames so far
        end = 0.0
        for time, length, frame in shown:
            end = max(end, time + length)
            last = frame if last is None else last
            while written < int(np.floor(time * fps + 0.5)):
                last = last() if callable(last) else last
                yield last
                written += 1
            last = frame
        if last is None:
            raise UserError(f"{path} holds no frame; give a complete video file")
        last = last() if callable(last) else last
        while written < max(1, int(np.floor(end * fps + 0.5))):
            yield last
            written += 1
    except (av.FFmpegError, OSError) as error:
        reason = error_text(error)
        raise UserError(f"{path} cannot be read as video ({reason}); give for instance an MP4 file") from error


def _decoded(path: Path, fps: float) -> Iterator[tuple[float, float, Callable[[], ImageArray]]]:
    """When each frame of a video is shown and for how long, in seconds, and what makes its image."""
    with open_media(path) as container:
        stream = video_track(container)
        if stream is None:
            raise UserError(f"{path} has no video track; give for instance an MP4 file")
        stream.thread_type = "AUTO"
        source_fps = float(stream.average_rate or stream.guessed_rate or fps)
        sound = audio_track(container, path) if container.streams.audio else None
        timeline, reader = Timeline(container, stream, sound), FrameReader(stream)
        end = shown = 0.0
        for frame in deinterlaced(decoded_frames(container, stream, path)):
            time = timeline.place(frame.time, end)
            interval, shown = time - shown, time
            stated = getattr(frame, "duration", 0)
            length = float(stated * frame.time_base) if stated else 1.0 / source_fps
            # With a variable rate, the stated length of the last frame may be one tick of the clock.
            # And a damaged file may state centuries.
            length = min(max(length, min(interval, _LONGEST_LAST)), timeline.longest)
            end = time + length
            yield time, length, functools.partial(reader.image, frame)


@dataclass(frozen=True)
class Result:
    """What was written.

    Attributes:
        path: the video.
        frames: number of frames.
        width: pixels.
        height: pixels.
    """

    path: Path
    frames: int
    width: int
    height: int


class VideoWriter:
    """Write frames to H.264 (yuv420p) with AAC sound as they are made.

    A context manager. The file appears at ``path`` when the block ends without an error; after any error or interrupt
    nothing is left behind (:func:`~flowvqtalker.io.atomic.atomic_path`).

    Arguments:
        path: ``.mp4``, ``.mov`` or ``.mkv``.
        speech: file whose sound to add; decoded in constant memory as the frames advance.
        fps: frames per second.
        crf: x264 quality (18 is visually lossless).
        preset: x264 speed.
        mark: called with each frame's luma plane (H, W) uint8, to change in place.
        seal: called with the complete file under its temporary path, and ``path``, before the file gets its name.

    Raises:
        UserError: if the file cannot be written.
        MissingDependency: if this PyAV has no libx264 or AAC encoder.
    """

    def __init__(
        self,
        path: str | Path,
        speech: str | Path | Speech | None = None,
        *,
        fps: float | Fraction = FPS,
        crf: int = 18,
        preset: str = "superfast",
        mark: Callable[[NDArray[np.uint8]], None] | None = None,
        seal: Callable[[Path, Path], None] | None = None,
    ) -> None:
        self.path = check_output(path)
        self.frames = 0
        self._mark, self._seal = mark, seal
        self._temporary = self.path
        self._speech = speech
        self._fps = Fraction(fps)
        # superfast leaves out mbtree. With it and a short look-ahead files are nearly as small as veryfast's (by 7 %)
        # for half of the time.
        self._options = {"crf": str(crf), "preset": preset, "mbtree": "1", "rc-lookahead": "10"}
        self._file = contextlib.ExitStack()
        self._container: Any = None
        self._video: Any = None
        self._converter: Any = None
        self._audio: Any = None
        self._sound: Iterator[Any] = iter(())
        self._next_sound: Any = None

    def __enter__(self) -> VideoWriter:
        import av

        container = _CONTAINERS[self.path.suffix.lower()]
        options = {"movflags": "+faststart"} if container in ("mp4", "mov") else {}
        self._temporary = self._file.enter_context(atomic_path(self.path))
        try:
            self._container = av.open(f"file:{self._temporary}", "w", format=container, options=options)
        except (av.FFmpegError, OSError) as error:
            self._file.__exit__(type(error), error, error.__traceback__)
            raise self._unwritable(error) from error
        return self

    def _begin(self, height: int, width: int) -> None:
        """Add the tracks; the first frame sets the size."""
        import av
        from av.video.reformatter import VideoReformatter

        try:
            self._video = self._container.add_stream("libx264", rate=self._fps, options=self._options)
            if self._speech is not None:
                rate, layout = sound_format(self._speech)
                self._audio = self._container.add_stream("aac", rate=rate, layout=layout)
                self._audio.bit_rate = 96_000 if layout == "mono" else 160_000
                self._sound = resampled(self._speech, rate=rate, layout=layout, samples=_SOUND_BLOCK)
                self._next_sound = next(self._sound, None)
        except (av.codec.codec.UnknownCodecError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise MissingDependency(
                f"this PyAV lacks an encoder ({error}); run `pip install --force-reinstall --only-binary av av`"
            ) from error
        context = self._video.codec_context
        context.width, context.height = width + width % 2, height + height % 2  # yuv420p needs even sides
        context.pix_fmt = "yuv420p"
        context.time_base = 1 / self._fps
        self._converter = VideoReformatter()  # one for all frames, see FrameReader
        # Convert to and tag as BT.709, so that every player shows the rendered colours.
        context.color_primaries = context.color_trc = context.colorspace = 1
        context.color_range = 1

    def write(self, frame: ImageArray) -> None:
        """Append one frame, (H, W, 3) uint8 RGB; all frames have the size of the first."""
        import av

        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame is (H, W, 3) uint8, got {frame.shape} {frame.dtype}")
        height, width = frame.shape[:2]
        if self._video is None:
            self._begin(height, width)
        context = self._video.codec_context
        if (context.width, context.height) != (width + width % 2, height + height % 2):
            raise ValueError(
                f"frame {self.frames} is {width}x{height}, the ones before are {context.width}x{context.height}"
            )
        if width % 2 or height % 2:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        image = self._converter.reformat(image, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        if self._mark is not None:
            luma = image.planes[0]
            self._mark(np.frombuffer(luma, np.uint8).reshape(luma.height, luma.line_size)[:height, :width])
        image.pts, image.time_base = self.frames, 1 / self._fps
        try:
            self._container.mux(self._video.encode(image))
            self.frames += 1
            self._write_sound(float(self.frames / self._fps))
        except (av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def _write_sound(self, until: float) -> None:
        """Encode sound up to a time in seconds, so that both tracks advance together."""
        while self._next_sound is not None and self._next_sound.pts / self._next_sound.sample_rate < until:
            self._container.mux(self._audio.encode(self._next_sound))
            self._next_sound = next(self._sound, None)

    def _finish(self) -> None:
        import av

        if self._video is None:
            raise UserError(f"output {self.path}: there is no frame to write")
        try:
            self._container.mux(self._video.encode(None))
            if self._audio is not None:
                self._container.mux(self._audio.encode(None))
            self._container.close()
            if self._seal is not None:
                self._seal(self._temporary, self.path)
        except (av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as error:
            self._close()
            self._file.__exit__(type(error), error, error.__traceback__)
            raise
        self._close()
        try:
            self._file.__exit__(kind, value, trace)  # gives the file its name, or drops it after an error
        except OSError as error:
            raise self._unwritable(error) from error

    def _close(self) -> None:
        close = getattr(self._sound, "close", None)
        if close is not None:
            close()
        try:
            self._container.close()
        except Exception as error:  # writing has already failed with its own error
            logger.debug("closing %s: %s", self.path, error)

    def _unwritable(self, error: Exception) -> UserError:
        return UserError(
            f"output {self.path} cannot be written ({error_text(error)}); check the disk and the folder's permissions"
        )


def write_video(
    frames: Iterable[ImageArray],
    path: Path,
    speech: str | Path | Speech | None,
    total: int,
    progress: Callable[[int, int], None] | None = None,
    video: VideoFormat = DEFAULT_VIDEO,
    *,
    mark: Callable[[NDArray[np.uint8]], None] | None = None,
    seal: Callable[[Path, Path], None] | None = None,
) -> Result:
    """Stream frames into a file; see :class:`VideoWriter`."""
    height = width = 0
    with VideoWriter(path, speech, fps=video.rate, preset=video.x264, mark=mark, seal=seal) as writer:
        for frame in frames:
            height, width = frame.shape[:2]
            writer.write(frame)
            if progress is not None:
                progress(writer.frames, total)
    return Result(path, writer.frames, width, height)
