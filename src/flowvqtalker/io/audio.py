"""Decode audio: any file with sound -> 16 kHz mono float32, whole or in blocks of constant memory (PyAV)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.errors import UserError
from flowvqtalker.io.media import (
    Timeline,
    audio_track,
    decoded_frames,
    error_text,
    existing_file,
    open_media,
    video_track,
)

__all__ = ["SILENCE_DBFS", "Speech", "load", "resampled", "scan", "sound_format", "stream", "video_frames"]

logger = logging.getLogger(__name__)

#: Files whose peak stays below this level are refused as silent; the hiss of a quiet microphone is louder.
SILENCE_DBFS = -60.0

_SAMPLES_PER_FRAME = SAMPLE_RATE // FPS
_ALLOWED = "give a file such as WAV, MP3, FLAC, OGG, or a video with sound"
_AAC_RATES = (48_000, 44_100, 32_000, 24_000, 22_050, 16_000)
# Weights of FFmpeg's mix to mono. Channels that are not named here surround the listener.
_WEIGHTS = {"FL": 0.5**0.5, "FR": 0.5**0.5, "FC": 1.0, "LFE": 0.0}
_SURROUND = 0.5
# A mix with less of the loudest channel's energy has cancelled: channels of opposite phase.
_CANCELLED = 0.15
# A peak above this is not loud sound but another scale, for instance that of 16-bit numbers.
_SCALE = 4.0
# Seconds by which a time stamp may be off without a gap: recorders are late by some tens of milliseconds.
_JITTER = 0.1


@dataclass(frozen=True)
class Speech:
    """Length and level of a speech file, and how its channels become one.

    Attributes:
        path: the file.
        samples: length at 16 kHz.
        peak: largest absolute sample, 1.0 = full scale.
        track: number of the audio track; None is the one that a player plays.
        channel: the only channel to take, where the others would cancel it; None mixes all.
        gain: factor on the samples.
    """

    path: Path
    samples: int
    peak: float
    track: int | None = None
    channel: int | None = None
    gain: float = 1.0

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


@dataclass(frozen=True)
class _Block:
    """Decoded sound: (channels, n) float32 at a rate, without samples that are no numbers."""

    samples: npt.NDArray[np.float32]
    layout: Any
    rate: int


def _blocks(path: str | Path, number: int | None, *, warn: bool = False) -> Iterator[_Block]:
    """Decode an audio track in its own rate and layout, without gaps: silence stands where its time stamps skip.

    In a video, the sound begins when the picture does (:class:`~flowvqtalker.io.media.Timeline`).

    Raises:
        UserError: if the file does not exist, cannot be read, or has no such audio track.
    """
    path = existing_file(path, "speech file")
    with _opened(path) as container:
        import av

        track = audio_track(container, path, number)
        timeline, end, bad = Timeline(container, video_track(container), track), 0.0, 0
        converter: Any = None
        described: Any = None
        for frame in decoded_frames(container, track, path, warn=warn):
            time = timeline.place(frame.time, end)
            rate = frame.sample_rate
            if (frame.format.name, frame.layout.name, rate) != described:  # at the start, or where the format changes
                described = frame.format.name, frame.layout.name, rate
                converter = av.AudioResampler(format="fltp", layout=frame.layout, rate=rate)
            frame.pts = None
            for part in converter.resample(frame):
                samples = part.to_ndarray().astype(np.float32, copy=False)
                wrong = ~np.isfinite(samples)
                bad += int(wrong.sum())
                samples = np.where(wrong, np.float32(0), samples) if wrong.any() else samples
                if end == 0 and time < 0:  # before the picture
                    samples = samples[:, round(-time * rate) :]
                    time += part.samples / rate
                elif end == 0 or time - end > _JITTER:
                    for count in _split(round((time - end) * rate), rate):
                        yield _Block(np.zeros((len(samples), count), np.float32), frame.layout, rate)
                    end = time
                if samples.size:
                    end += samples.shape[1] / rate
                    yield _Block(samples, frame.layout, rate)
        if bad and warn:
            logger.warning("%s: %d samples that are not numbers are taken as silence", path, bad)


def _opened(path: Path) -> Any:
    """The open file."""
    import av

    try:
        return open_media(path)
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as audio ({error_text(error)}); {_ALLOWED}", code="not_audio"
        ) from error


def _split(count: int, most: int) -> list[int]:
    """A number in pieces of at most ``most``."""
    return [min(most, count - start) for start in range(0, count, most)]


def resampled(
    source: str | Path | Speech, rate: int = SAMPLE_RATE, layout: str = "mono", samples: int | None = None
) -> Iterator[Any]:
    """Decode a file to planar float, a few milliseconds at a time.

    Arguments:
        source: any file that FFmpeg reads, or what :func:`scan` found in it.
        rate: samples per second.
        layout: ``mono`` or ``stereo``.
        samples: length of each frame; None leaves it to the decoder.

    Yields:
        ``av.AudioFrame`` with ``pts`` counted in samples from 0.
    """
    known = source if isinstance(source, Speech) else Speech(Path(source), 0, 0.0)
    yield from _mixed(_blocks(known.path, known.track), rate, layout, samples, known.channel, known.gain)


def _mixed(
    blocks: Iterable[_Block],
    rate: int,
    layout: str,
    samples: int | None = None,
    channel: int | None = None,
    gain: float = 1.0,
) -> Iterator[Any]:
    """Blocks at another rate, and as mono or stereo; see :func:`resampled`."""
    import av

    resampler: Any = None
    described: Any = None
    position = 0

    def counted(frames: list[Any]) -> Iterator[Any]:
        nonlocal position
        for frame in frames:
            frame.pts, frame.time_base = position, Fraction(1, rate)
            position += frame.samples
            yield frame

    for block in blocks:
        values, kept, factor = block.samples, block.layout.name, gain
        if channel is not None and channel < len(values):
            values, kept = values[channel : channel + 1], "mono"
        elif layout == "stereo" and len(values) > 2:
            factor = gain / (1 + 2 * 0.5**0.5)  # FFmpeg adds centre and surround to each side, which may clip
        values = np.ascontiguousarray(values if factor == 1 else values * np.float32(factor))
        frame = av.AudioFrame.from_ndarray(values, format="fltp", layout=kept)
        frame.rate = block.rate
        if (kept, block.rate) != described:  # at the start, or where the file changes its format
            if resampler is not None:
                yield from counted(resampler.resample(None))
            described = kept, block.rate
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=samples)
        yield from counted(resampler.resample(frame))
    if resampler is not None:
        yield from counted(resampler.resample(None))


def stream(source: str | Path | Speech, seconds: float = 1.0) -> Iterator[npt.NDArray[np.float32]]:
    """Decode a file to 16 kHz mono in blocks.

    Arguments:
        source: any file that FFmpeg reads, or what :func:`scan` found in it, which knows how to mix its channels.
        seconds: length of a block; only the last may be shorter.

    Yields:
        (n,) float32, finite.
    """
    size = max(1, round(seconds * SAMPLE_RATE))
    waiting: list[npt.NDArray[np.float32]] = []
    held = 0
    for frame in resampled(source):
        piece = frame.to_ndarray()[0].astype(np.float32, copy=False)
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


def scan(path: str | Path | Speech, track: int | None = None) -> Speech:
    """Measure a speech file in one pass, in constant memory, and choose how its channels become one.

    Channels are mixed as FFmpeg does, but where they cancel (opposite phase) the loudest is taken alone. Samples on
    another scale than 1 are scaled.

    Arguments:
        path: any file that FFmpeg reads; what this function found before is returned as it is.
        track: number of the audio track from 0; None takes the one that a player plays.

    Raises:
        UserError: if there is no audio, or it is empty or silent (peak below :data:`SILENCE_DBFS`).
    """
    if isinstance(path, Speech):
        return path
    energy, peaks, weights = np.zeros((0, 0)), np.zeros(0), np.ones(1)

    def measured() -> Iterator[_Block]:
        nonlocal energy, peaks, weights
        for block in _blocks(path, track, warn=True):
            values = block.samples
            if len(values) != len(peaks):
                energy, peaks = np.zeros((len(values),) * 2), np.zeros(len(values))
                weights = np.array([_WEIGHTS.get(one.name, _SURROUND) for one in block.layout.channels])
            if len(values) > 1:
                energy += values.astype(np.float64) @ values.T.astype(np.float64)
            peaks = np.maximum(peaks, np.abs(values).max(1, initial=0))
            yield block

    samples, peak = 0, 0.0
    for frame in _mixed(measured(), SAMPLE_RATE, "mono"):
        samples += frame.samples
        peak = max(peak, float(np.abs(frame.to_ndarray()).max(initial=0)))
    if samples == 0:
        raise UserError(
            f"{path} holds no sound that can be decoded (0 seconds); give a recording of speech", code="audio_too_short"
        )
    if peaks.max() < 10 ** (SILENCE_DBFS / 20):
        raise UserError(_silent(path, track, float(peaks.max())), code="audio_silent")
    channel = None
    loudest = int(np.argmax(np.diag(energy)))
    if len(peaks) > 1 and weights @ energy @ weights < _CANCELLED * energy[loudest, loudest]:
        logger.warning("%s: its channels cancel each other when mixed; channel %d is taken alone", path, loudest)
        channel, peak = loudest, float(peaks[loudest])
    gain = 1 / float(peaks.max()) if peaks.max() > _SCALE else 1.0
    return Speech(Path(path), samples, peak * gain, track, channel, gain)


def _silent(path: str | Path, track: int | None, peak: float) -> str:
    """What is wrong with a silent file, and whether another of its tracks could help."""
    level = f"peak {20 * math.log10(peak):.0f} dBFS" if peak > 0 else "digital silence"
    with _opened(Path(path)) as container:
        tracks = container.streams.audio
        several = len(tracks) > 1
        number = list(tracks).index(audio_track(container, path, track))
    what = f"audio track {number} of {path}" if several else str(path)
    remedy = (
        f"choose another of its {len(tracks)} tracks with --audio-track" if several else "give a recording of speech"
    )
    return f"{what} is silent throughout ({level}, {SILENCE_DBFS:.0f} dBFS needed); {remedy}"


def load(path: str | Path) -> npt.NDArray[np.float32]:
    """Decode a whole file to 16 kHz mono, (n,) float32. Use :func:`stream` for long recordings.

    Raises:
        UserError: if there is no audio, it is empty, or silent.
    """
    return np.concatenate(list(stream(scan(path), seconds=10.0)))


def sound_format(source: str | Path | Speech) -> tuple[int, str]:
    """Rate and layout of an AAC track for a file's sound: its own where AAC has them."""
    known = source if isinstance(source, Speech) else Speech(Path(source), 0, 0.0)
    with _opened(known.path) as container:
        context = audio_track(container, known.path, known.track).codec_context
        rate = context.sample_rate if context.sample_rate in _AAC_RATES else 48_000
        return rate, "mono" if context.layout.nb_channels == 1 or known.channel is not None else "stereo"
