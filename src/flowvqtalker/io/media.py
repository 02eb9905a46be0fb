"""Open audio and video: which track is played, and when its frames are played."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowvqtalker.errors import MissingDependency, UserError

__all__ = ["Timeline", "audio_track", "decoded_frames", "error_text", "existing_file", "open_media", "video_track"]

logger = logging.getLogger(__name__)

# Sound that leads the picture by less is a codec's priming, and is cut. More is shown before the first frame.
_PRIMING = 0.05
# Jumps back by more, or forth by more, are damage, not gaps: no player waits that long.
_BACK, _FORTH = 0.5, 600.0


def existing_file(path: str | Path, what: str) -> Path:
    """The path, if it is a file.

    Raises:
        UserError: otherwise.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        problem = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:  # too long, not permitted, or with a zero byte
        problem = f"cannot be opened ({error_text(error)})"
    raise UserError(f"{what} {path} {problem}; check the name")


def open_media(path: str | Path) -> Any:
    """Open a file with PyAV; a context manager.

    As a ``file:`` URL, since FFmpeg takes what stands before the colon of ``12:30.wav`` for a protocol.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependency("PyAV is not installed; run `pip install 'av>=13'`") from error
    return av.open(f"file:{path}", metadata_errors="ignore")


def video_track(container: Any) -> Any | None:
    """The video track that a player shows: the default one, else the first, never a cover picture; None without one."""
    tracks = [one for one in container.streams.video if not one.disposition & one.disposition.attached_pic]
    return next((one for one in tracks if one.disposition & one.disposition.default), next(iter(tracks), None))


def audio_track(container: Any, path: str | Path, number: int | None = None) -> Any:
    """An audio track by its number from 0; None takes the one that a player plays, the default or else the first.

    Raises:
        UserError: if there is no such track.
    """
    tracks = container.streams.audio
    if not tracks:
        raise UserError(
            f"{path} has no audio track; give a file such as WAV, MP3, FLAC, OGG, or a video with sound",
            code="not_audio",
        )
    if number is None:
        return next((one for one in tracks if one.disposition & one.disposition.default), tracks[0])
    if not 0 <= number < len(tracks):
        known = ", ".join(f"{k} ({_title(one)})" for k, one in enumerate(tracks))
        raise UserError(f"{path} has no audio track {number}; choose --audio-track from {known}", code="out_of_range")
    return tracks[number]


def _title(track: Any) -> str:
    words = [track.metadata.get("title"), track.metadata.get("language"), track.codec_context and track.codec.name]
    return " ".join(str(word) for word in words if word) or "unnamed"


def decoded_frames(container: Any, stream: Any, path: str | Path, *, warn: bool = True) -> Iterator[Any]:
    """Decoded frames of a stream in order; damaged packets are skipped with one warning."""
    import av

    if stream.codec_context is None:
        raise UserError(f"{path}: its {stream.type} track has a codec that this FFmpeg does not know; convert the file")
    packets = container.demux(stream)
    while True:
        try:
            decoded = next(packets).decode()
        except StopIteration:
            return
        except (av.FFmpegError, OSError) as error:  # an error of demuxing also ends the iterator
            if warn:
                logger.warning("%s: damaged %s was skipped (%s)", path, stream.type, error_text(error))
            warn = False
            continue
        yield from decoded


def error_text(error: Exception) -> str:
    """The short text of an error, without its number and the file name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


class Timeline:
    """When decoded frames are played, in seconds after the file begins; the same for its picture and its sound.

    A file begins with its picture, or with its sound where that begins earlier. Files of sound alone begin with it.

    Arguments:
        container: the open file.
        video, audio: its tracks that are played; None where there is none.

    Attributes:
        longest: seconds that a frame or a gap may last; more is damage.
    """

    def __init__(self, container: Any, video: Any | None, audio: Any | None) -> None:
        picture, sound = (
            None if one is None or one.start_time is None else float(one.start_time * one.time_base)
            for one in (video, audio)
        )
        self._start = picture
        if picture is not None and sound is not None and sound < picture - _PRIMING:
            self._start = sound
        self.longest = min(_FORTH, container.duration / 1e6 + 1 if container.duration else _FORTH)

    def place(self, stamp: float | None, end: float) -> float:
        """When a frame is played.

        Arguments:
            stamp: its time stamp in seconds; None if it has none.
            end: when the frame before it ends, which is where it goes if its time stamp cannot be true.
        """
        if stamp is None:
            return end
        if self._start is None:
            self._start = stamp
        time = stamp - self._start
        if not end - _BACK < time < end + self.longest:
            self._start += time - end
            return end
        return time
