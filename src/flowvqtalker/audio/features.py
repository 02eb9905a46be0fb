"""Log-mel features, one window of 16 columns for each 25-fps video frame, whole or block by block.

The front end of Wav2Lip and SadTalker (``SadTalker:src/utils/hparams.py``, ``src/generate_batch.py``): 16 kHz,
pre-emphasis 0.97, 800-sample Hann frames every 200 samples (80 columns a second), magnitude, 80 Slaney mel bands from
55 to 7600 Hz, decibels with 20 dB reference and -100 dB floor, scaled and clipped to +-4. Everything is computed in
float64 and rounded once, so that the features of a stream equal those of the whole file whatever the blocks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.audio.decode import SAMPLE_RATE, video_frames

__all__ = ["COLUMNS", "MELS", "FeatureStream", "log_mel", "mel_filters", "stream_windows", "windows"]

#: Mel bands.
MELS = 80
#: Columns (1/80 s each) in the window of one video frame.
COLUMNS = 16

_WINDOW = 800
_HOP = 200
_PREEMPHASIS = 0.97
_LOWEST, _HIGHEST = 55.0, 7600.0
_FLOOR_DB, _REFERENCE_DB, _CLIP = -100.0, 20.0, 4.0
_COLUMNS_PER_SECOND = SAMPLE_RATE // _HOP
_FPS = 25

_Array = npt.NDArray[np.float64]


def _hz_to_mel(hz: _Array) -> _Array:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    linear = hz * 3.0 / 200.0
    return np.where(hz < 1000.0, linear, 15.0 + np.log(np.maximum(hz, 1e-9) / 1000.0) * 27.0 / np.log(6.4))


def _mel_to_hz(mel: _Array) -> _Array:
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))


@lru_cache(maxsize=1)
def mel_filters() -> _Array:
    """Triangular mel filters of unit area (Slaney): (401, 80) float64, magnitude spectrum @ filters = mel bands."""
    bins = np.linspace(0.0, SAMPLE_RATE / 2, _WINDOW // 2 + 1)
    ends = _hz_to_mel(np.array([_LOWEST, _HIGHEST]))
    edges = _mel_to_hz(np.linspace(ends[0], ends[1], MELS + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (centre - low)
    falling = (high - bins[:, None]) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


class FeatureStream:
    """Features of a recording that arrives in blocks of any size.

    Call :meth:`push` with each block, then :meth:`finish` once. What they return, put together, equals
    ``windows(whole)``.
    Video frame ``i`` is returned as soon as its last column is known, 0.22 s after its own time.

    Memory: about 0.3 s of sound, whatever the length of the recording.
    """

    def __init__(self) -> None:
        self._hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
        self._last = 0.0  # the last raw sample, for the pre-emphasis
        # Half a window of zeros before the first sample centres column c on sample 200 c.
        self._wave: _Array = np.zeros(_WINDOW // 2)
        self._mel: npt.NDArray[np.float32] = np.zeros((0, MELS), dtype=np.float32)
        self._first = 0  # index of the first column still held
        self._frame = 0  # index of the next video frame
        self._samples = 0
        self._finished = False

    def push(self, wave: npt.NDArray[np.float32]) -> torch.Tensor:
        """Take the next samples, (n,) at 16 kHz; returns the windows they complete, (t, 80, 16) float32, t >= 0."""
        self.push_columns(wave)
        # Column int(3.2 (i - 2)) + 15 must be there.
        ready = self._frame
        while _first_column(ready) + COLUMNS <= self._first + len(self._mel):
            ready += 1
        return self._take(ready)

    def finish(self) -> torch.Tensor:
        """End the recording; returns the remaining windows, (t, 80, 16) float32, columns clamped to the last one."""
        self.finish_columns()
        return self._take(video_frames(self._samples))

    def push_columns(self, wave: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """As :meth:`push`, but returns the new columns, (m, 80)."""
        if self._finished:
            raise RuntimeError("the stream is finished; make a new FeatureStream")
        if wave.ndim != 1:
            raise ValueError(f"samples of shape (n,) are needed, got {wave.shape}")
        if len(wave) == 0:
            return np.zeros((0, MELS), dtype=np.float32)
        samples = wave.astype(np.float64)
        emphasised = samples - _PREEMPHASIS * np.concatenate([[self._last], samples[:-1]])
        self._last = float(samples[-1])
        self._samples += len(samples)
        return self._analyse(emphasised)

    def finish_columns(self) -> npt.NDArray[np.float32]:
        """As :meth:`finish`, but returns the last columns, (m, 80)."""
        if self._finished:
            raise RuntimeError("the stream is finished; make a new FeatureStream")
        self._finished = True
        return self._analyse(np.zeros(_WINDOW // 2)) if self._samples else np.zeros((0, MELS), dtype=np.float32)

    def _analyse(self, emphasised: _Array) -> npt.NDArray[np.float32]:
        self._wave = np.concatenate([self._wave, emphasised])
        count = (len(self._wave) - _WINDOW) // _HOP + 1
        if count <= 0:
            return np.zeros((0, MELS), dtype=np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(self._wave, _WINDOW)[: count * _HOP : _HOP]
        columns = np.concatenate([self._log_mel(frames[i : i + 512]) for i in range(0, count, 512)])
        self._wave = self._wave[count * _HOP :].copy()
        self._mel = np.concatenate([self._mel, columns])
        return columns

    def _log_mel(self, frames: _Array) -> npt.NDArray[np.float32]:
        magnitude = np.abs(np.fft.rfft(frames * self._hann, axis=-1))
        decibels = 20.0 * np.log10(np.maximum(magnitude @ mel_filters(), 10.0 ** (_FLOOR_DB / 20))) - _REFERENCE_DB
        scaled = 2 * _CLIP * (decibels - _FLOOR_DB) / -_FLOOR_DB - _CLIP
        clipped: npt.NDArray[np.float32] = np.clip(scaled, -_CLIP, _CLIP).astype(np.float32)
        return clipped

    def _take(self, end: int) -> torch.Tensor:
        frames = np.arange(self._frame, max(end, self._frame))
        starts = np.array([_first_column(int(i)) for i in frames], dtype=np.int64)
        columns = np.clip(starts[:, None] + np.arange(COLUMNS), 0, self._first + len(self._mel) - 1) - self._first
        taken = self._mel[columns] if len(frames) else np.zeros((0, COLUMNS, MELS), dtype=np.float32)
        self._frame = max(end, self._frame)
        unneeded = max(0, _first_column(self._frame) - self._first)
        # One column stays in any case: the clamp of the last frames points to it.
        unneeded = min(unneeded, max(0, len(self._mel) - 1))
        self._mel = self._mel[unneeded:].copy()
        self._first += unneeded
        return torch.from_numpy(np.ascontiguousarray(taken.transpose(0, 2, 1)))


def _first_column(frame: int) -> int:
    """First column of the window of a video frame; rounds towards zero as the code that it follows does."""
    return int(_COLUMNS_PER_SECOND * (frame - 2) / _FPS)


def log_mel(wave: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Log-mel spectrogram of samples (n,) at 16 kHz: (1 + n // 200, 80) float32 in [-4, 4], 80 columns a second."""
    stream = FeatureStream()
    return np.concatenate([stream.push_columns(wave), stream.finish_columns()])


def windows(wave: npt.NDArray[np.float32]) -> torch.Tensor:
    """Windows of samples (n,) at 16 kHz: (T, 80, 16) float32, T = ceil(n / 640), one for each 25-fps video frame."""
    stream = FeatureStream()
    return torch.cat([stream.push(wave), stream.finish()])


def stream_windows(blocks: Iterable[npt.NDArray[np.float32]]) -> Iterator[torch.Tensor]:
    """Windows of a recording that comes in blocks, for instance from :func:`flowvqtalker.audio.decode.stream`.

    Yields:
        (t, 80, 16) float32 with t >= 1; together as many as ``windows`` of the whole gives.
    """
    stream = FeatureStream()
    for block in blocks:
        ready = stream.push(block)
        if len(ready):
            yield ready
    rest = stream.finish()
    if len(rest):
        yield rest
