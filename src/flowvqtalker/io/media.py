"""Pictures and video in, video out: frames stream through, and nothing holds more than a few of them."""

from __future__ import annotations

import logging
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.audio import resampled

__all__ = ["FPS", "MediaInfo", "Picture", "VideoWriter", "check_output", "probe", "read_image", "read_video"]

logger = logging.getLogger(__name__)

#: Frames per second of everything inside.
FPS = 25

#: One RGB picture, (H, W, 3) uint8.
Picture = npt.NDArray[np.uint8]

_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
_LONGEST_LAST = 0.1  # seconds
_SOUND_BLOCK = 1024  # samples, one AAC frame: the sound never runs ahead of the picture by more
_AUDIO_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000)


@dataclass(frozen=True)
class MediaInfo:
    """What a file holds.

    Attributes:
        kind: ``"picture"`` or ``"video"``.
        width: pixels, as displayed.
        height: pixels, as displayed.
        fps: frames per second of the file (0 for a picture).
        seconds: length as the file states it (0 for a picture or where it is unknown).
        sound: whether there is an audio track.
    """

    kind: str
    width: int
    height: int
    fps: float = 0.0
    seconds: float = 0.0
    sound: bool = False


def _existing(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"{what} {path} {problem}; check the name")
    return path


def probe(path: str | Path) -> MediaInfo:
    """Tell a picture from a video and measure it; decodes one frame at most.

    Raises:
        UserError: if the file does not exist or is neither.
    """
    path = _existing(path, "input")
    from PIL import Image, UnidentifiedImageError

    try:
        with _large_pictures(), Image.open(path) as image:
            if getattr(image, "n_frames", 1) == 1:
                return MediaInfo("picture", image.width, image.height)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        pass
    import av

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError(f"{path} is neither a picture nor a video; give for instance a JPEG, PNG or MP4 file")
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                width, height = frame.width, frame.height
                if getattr(frame, "rotation", 0) % 180:
                    width, height = height, width
                break
            else:
                raise UserError(f"{path} holds no frame; give a complete video file")
            length = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
            sound = bool(container.streams.audio)
            return MediaInfo("video", width, height, float(stream.average_rate or 0), length, sound)
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"{path} is neither a picture nor a video ({reason}); give for instance a JPEG, PNG or MP4 file"
        ) from error


def read_image(path: str | Path) -> Picture:
    """Read a picture as (H, W, 3) uint8 RGB.

    The camera's orientation (EXIF) is applied, transparency is laid on white, grey and 16-bit pictures become 8-bit
    RGB. Of an animation the first frame is taken. Pictures of up to 178 million pixels are read.

    Raises:
        UserError: if the file does not exist, is no picture, or is damaged.
    """
    path = _existing(path, "picture")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with _large_pictures(), Image.open(path) as opened:
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "I;16", "I;16B", "I;16L"):
                deep = np.asarray(image).astype(np.float64) / 257.0
                image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
            elif image.mode == "F":
                deep = np.nan_to_num(np.asarray(image)) * (255 if np.nanmax(np.asarray(image)) <= 1 else 1)
                image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return np.asarray(image.convert("RGB")).copy()
    except UnidentifiedImageError as error:
        what = "a HEIC picture, which cannot be read" if _is_heic(path) else "not a picture that can be read"
        raise UserError(f"{path} is {what}; give a JPEG, PNG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has too many pixels; scale it down, 512 to 4096 pixels a side are plenty") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is a damaged picture ({error}); give a complete JPEG, PNG or WebP file") from error


@contextmanager
def _large_pictures() -> Iterator[None]:
    """Pillow warns of pictures from 89 million pixels on and refuses those of twice as many: no warning here."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _is_heic(path: Path) -> bool:
    """Whether a file says of itself that it holds HEIF pictures; Pillow reads them only with a plugin."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def read_video(path: str | Path, fps: float = FPS) -> Iterator[Picture]:
    """Frames of a video at a steady rate, whatever the rate of the file.

    Each source frame is put at the output frame nearest to its timestamp; gaps repeat the frame before, crowded frames
    are dropped (as FFmpeg's ``fps`` filter does).

    Arguments:
        path: any video that FFmpeg reads; rotated video is turned upright.
        fps: rate of the frames that come out.

    Yields:
        (H, W, 3) uint8 RGB, all of the size of the first.

    Raises:
        UserError: if the file does not exist or has no video.
    """
    path = _existing(path, "video")
    import av
    from av.video.reformatter import VideoReformatter

    converter = VideoReformatter()

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video track; give for instance an MP4 file")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            source_fps = float(stream.average_rate or stream.guessed_rate or fps)
            last: Picture | None = None
            size: tuple[int, int] | None = None
            written = 0  # output frames so far
            start: float | None = None
            end = shown = 0.0
            for frame in _video_frames(container, stream, path):
                time = frame.time if frame.time is not None else end + (start or 0.0)
                start = time if start is None else start
                time -= start
                interval, shown = time - shown, time
                due = int(np.floor(time * fps + 0.5))
                while last is not None and written < due:
                    yield last
                    written += 1
                size = size or (frame.width, frame.height)
                picture = converter.reformat(frame, size[0], size[1], "rgb24").to_ndarray()
                last = np.ascontiguousarray(np.rot90(picture, (getattr(frame, "rotation", 0) // 90) % 4))
                stated = getattr(frame, "duration", 0)
                length = float(stated * frame.time_base) if stated else 1.0 / source_fps
                # Where the rate varies, the stated length of the last frame may be a tick of the clock.
                end = max(end, time + max(length, min(interval, _LONGEST_LAST)))
            if last is None:
                raise UserError(f"{path} holds no frame; give a complete video file")
            while written < max(1, int(np.floor(end * fps + 0.5))):
                yield last
                written += 1
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(f"{path} cannot be read as video ({reason}); give for instance an MP4 file") from error


def _video_frames(container: Any, stream: Any, path: Path) -> Iterator[Any]:
    """Decoded frames; damaged packets are skipped with one warning."""
    import av

    damaged = False
    packets = container.demux(stream)
    while True:
        try:
            decoded = next(packets).decode()
        except StopIteration:
            return
        except (av.FFmpegError, OSError) as error:  # an error of demuxing ends the iterator, this loop as well
            if not damaged:
                logger.warning("%s: damaged video was skipped (%s)", path, error.strerror)
            damaged = True
            continue
        yield from decoded


def check_output(path: str | Path, suffixes: tuple[str, ...] = tuple(_CONTAINERS)) -> Path:
    """Make sure that a file can be written, before any work is done.

    Raises:
        UserError: if the suffix is unknown, the folder is missing or not writable, or the path is a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"output {path}: the name must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"output {path} is a folder; give a file name")
    if not path.parent.is_dir():
        raise UserError(f"output {path} cannot be written: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise UserError(f"output {path} cannot be written: permission denied; choose another folder")
    return path


class VideoWriter:
    """Writes frames to H.264 (yuv420p) with AAC sound as they are made.

    A context manager. The file grows under a temporary name beside ``path`` and takes its place when the block ends
    without an error; after any error or interrupt nothing is left behind.

    Arguments:
        path: ``.mp4``, ``.mov`` or ``.mkv``.
        speech: file whose sound goes in; decoded a second time, in constant memory, as the picture advances.
        fps: frames per second.
        crf: quality of x264 (18 is visually lossless).
        preset: speed of x264.

    Raises:
        UserError: if the file cannot be written.
        MissingDependency: if this PyAV has no libx264 or AAC encoder.
    """

    def __init__(
        self,
        path: str | Path,
        speech: str | Path | None = None,
        *,
        fps: int = FPS,
        crf: int = 18,
        preset: str = "veryfast",
    ) -> None:
        self.path = check_output(path)
        self.frames = 0
        self._speech = speech
        self._fps = fps
        self._options = {"crf": str(crf), "preset": preset}
        self._temporary = self.path.with_name(f".{self.path.stem}.{uuid.uuid4().hex[:8]}.part")
        self._container: Any = None
        self._video: Any = None
        self._converter: Any = None
        self._audio: Any = None
        self._sound: Iterator[Any] = iter(())
        self._next_sound: Any = None

    def __enter__(self) -> VideoWriter:
        import av

        container_format = _CONTAINERS[self.path.suffix.lower()]
        options = {"movflags": "+faststart"} if container_format in ("mp4", "mov") else {}
        try:
            self._container = av.open(str(self._temporary), "w", format=container_format, options=options)
        except (av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error
        return self

    def _begin(self, height: int, width: int) -> None:
        """Add the tracks; the first frame gives the size."""
        import av
        from av.video.reformatter import VideoReformatter

        try:
            self._video = self._container.add_stream("libx264", rate=self._fps, options=self._options)
            if self._speech is not None:
                rate, layout = _sound_format(self._speech)
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
        context.time_base = Fraction(1, self._fps)
        # One for all frames: setting up a conversion takes twenty times as long as converting.
        self._converter = VideoReformatter()
        # Tagged and converted as BT.709, so that every player shows the colours that were rendered.
        context.color_primaries = context.color_trc = context.colorspace = 1
        context.color_range = 1

    def write(self, frame: Picture) -> None:
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
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = self._converter.reformat(picture, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = self.frames, Fraction(1, self._fps)
        try:
            self._container.mux(self._video.encode(picture))
            self.frames += 1
            self._write_sound(self.frames / self._fps)
        except (av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def _write_sound(self, until: float) -> None:
        """Encode sound up to a time, so that both tracks advance together."""
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
            os.replace(self._temporary, self.path)
        except (av.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            close = getattr(self._sound, "close", None)
            if close is not None:
                close()
            try:
                self._container.close()
            except Exception as error:  # the writing already failed and its own error is on its way
                logger.debug("closing %s: %s", self._temporary, error)
            self._temporary.unlink(missing_ok=True)

    def _unwritable(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return UserError(
            f"output {self.path} cannot be written ({reason}); check the disk and the folder's permissions"
        )


def _sound_format(path: str | Path) -> tuple[int, str]:
    """Rate and layout for the AAC track: those of the file where AAC has them."""
    import av

    with av.open(str(path), metadata_errors="ignore") as container:
        context = container.streams.audio[0].codec_context
        rate = context.sample_rate if context.sample_rate in _AUDIO_RATES else 48_000
        return rate, "mono" if context.layout.nb_channels == 1 else "stereo"
