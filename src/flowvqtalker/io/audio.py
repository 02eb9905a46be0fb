"""Decode audio: any file with sound -> 16 kHz mono float32, whole or in blocks of constant memory (PyAV)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.errors import MissingDependency, UserError

__all__ = [
    "SILENCE_DBFS",
    "Speech",
    "audio_frames",
    "decoded_frames",
    "error_text",
    "load",
    "open_media",
    "resampled",
    "scan",
    "stream",
    "video_frames",
]

logger = logging.getLogger(__name__)

#: Files whose peak stays below this level are refused as silent; the hiss of a quiet microphone is louder.
SILENCE_DBFS = -60.0

_SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
_ALLOWED = "give a file such as WAV, MP3, FLAC, OGG, or a video with sound"


@dataclass(frozen=True)
class Speech:
    """Length and level of a speech file.

    Attributes:
        path: the file.
        samples: length at 16 kHz.
        peak: largest absolute sample, 1.0 = full scale.
    """

    path: Path
    samples: int
    peak: float

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.samples / SAMPLE_RATE

    @property
    def frames(self) -> int:
        """Number of video frames of this speech, see :func:`video_frames`."""
        return video_frames(self.samples)


def video_frames(samples: int) -> int:
    """Number of 25-fps frames of a recording of ``samples`` at 16 kHz: ceil(samples / 640)."""
    return -(-samples // _SAMPLES_PER_FRAME)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependency("PyAV is not installed; run `pip install 'av>=13'`") from error
    return av


def open_media(path: str | Path) -> Any:
    """Open a file with PyAV; a context manager.

    As a ``file:`` URL, since FFmpeg takes what stands before the colon of ``12:30.wav`` for a protocol.
    """
    return _av().open(f"file:{path}", metadata_errors="ignore")


def decoded_frames(container: Any, stream: Any, path: str | Path) -> Iterator[Any]:
    """Decoded frames of a stream in order; damaged packets are skipped with one warning."""
    av = _av()
    damaged = False
    packets = container.demux(stream)
    while True:
        try:
            decoded = next(packets).decode()
        except StopIteration:
            return
        except (av.FFmpegError, OSError) as error:  # an error of demuxing also ends the iterator
            if not damaged:
                logger.warning("%s: damaged %s was skipped (%s)", path, stream.type, error_text(error))
            damaged = True
            continue
        yield from decoded


def error_text(error: Exception) -> str:
    """The short text of an FFmpeg error, without its number and the file name."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).splitlines()[0]


def audio_frames(path: str | Path) -> Iterator[Any]:
    """Decode the first audio track of a file, in its own format and rate.

    Damaged packets are skipped with one warning.

    Yields:
        ``av.AudioFrame`` in order. Count samples instead of using their timestamps, which may start anywhere.

    Raises:
        UserError: if the file does not exist, cannot be read, or has no audio track.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder or a pipe" if path.exists() else "does not exist"
        raise UserError(f"speech file {path} {problem}; give an audio or video file, for instance speech.wav")
    av = _av()
    try:
        container = open_media(path)
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as audio ({error_text(error)}); {_ALLOWED}", code="not_audio"
        ) from error
    with container:
        if not container.streams.audio:
            raise UserError(f"{path} has no audio track; {_ALLOWED}", code="not_audio")
        yield from decoded_frames(container, container.streams.audio[0], path)


def resampled(
    path: str | Path, rate: int = SAMPLE_RATE, layout: str = "mono", samples: int | None = None
) -> Iterator[Any]:
    """Decode a file to planar float, a few milliseconds at a time.

    Arguments:
        path: any file that FFmpeg reads.
        rate: samples per second.
        layout: ``mono`` or ``stereo``.
        samples: length of each frame; None leaves it to the decoder.

    Yields:
        ``av.AudioFrame`` with ``pts`` counted in samples from 0.
    """
    import av

    resampler: Any = None
    source: Any = None
    position = 0

    def counted(frames: list[Any]) -> Iterator[Any]:
        nonlocal position
        for frame in frames:
            frame.pts, frame.time_base = position, Fraction(1, rate)
            position += frame.samples
            yield frame

    for frame in audio_frames(path):
        frame.pts = None
        described = (frame.format.name, frame.layout.name, frame.sample_rate)
        if described != source:  # at the start, or where the file changes its format
            if resampler is not None:
                yield from counted(resampler.resample(None))
            source = described
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=samples)
        yield from counted(resampler.resample(frame))
    if resampler is not None:
        yield from counted(resampler.resample(None))


def stream(path: str | Path, seconds: float = 1.0) -> Iterator[npt.NDArray[np.float32]]:
    """Decode a file to 16 kHz mono in blocks.

    Arguments:
        path: any file that FFmpeg reads.
        seconds: length of a block; only the last may be shorter.

    Yields:
        (n,) float32; NaN becomes 0.
    """
    size = max(1, round(seconds * SAMPLE_RATE))
    waiting: list[npt.NDArray[np.float32]] = []
    held = 0
    for frame in resampled(path):
        piece = np.nan_to_num(frame.to_ndarray()[0], nan=0.0, posinf=1.0, neginf=-1.0).astype(np.float32, copy=False)
        waiting.append(piece)
        held += len(piece)
        if held >= size:
            block = np.concatenate(waiting)
            full = held - held % size
            for start in range(0, full, size):
                yield block[start : start + size]
            waiting, held = [block[full:].copy()], held - full
    if held:
        yield np.concatenate(waiting)


def scan(path: str | Path) -> Speech:
    """Measure a speech file in one pass, in constant memory.

    Raises:
        UserError: if there is no audio, or it is empty or silent (peak below :data:`SILENCE_DBFS`).
    """
    samples, peak = 0, 0.0
    for block in stream(path, seconds=10.0):
        samples += len(block)
        peak = max(peak, float(np.abs(block).max()))
    if samples == 0:
        raise UserError(f"{path} holds no sound (0 seconds); give a recording of speech", code="audio_too_short")
    if peak < 10 ** (SILENCE_DBFS / 20):
        level = f"peak {20 * math.log10(peak):.0f} dBFS" if peak > 0 else "digital silence"
        raise UserError(
            f"{path} is silent throughout ({level}, {SILENCE_DBFS:.0f} dBFS needed); give a recording of speech",
            code="audio_silent",
        )
    return Speech(Path(path), samples, peak)


def load(path: str | Path) -> npt.NDArray[np.float32]:
    """Decode a whole file to 16 kHz mono, (n,) float32. Use :func:`stream` for long recordings.

    Raises:
        UserError: if there is no audio, it is empty, or silent.
    """
    scan(path)
    return np.concatenate(list(stream(path, seconds=10.0)))
