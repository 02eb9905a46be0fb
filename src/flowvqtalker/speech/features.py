"""Log-mel features: one window of columns per 25-fps video frame, whole or block by block, by two frontends.

``mel``: that of Wav2Lip and SadTalker (``SadTalker:src/utils/hparams.py``, ``src/generate_batch.py``). Windows of 16
columns; 16 kHz, pre-emphasis 0.97, 800-sample Hann frames every 200 samples (80 columns per second), magnitude, 80
Slaney mel bands from 55 to 7600 Hz, decibels with 20 dB reference and -100 dB floor, scaled and clipped to +-4.

``whisper``: that of Whisper (``openai/whisper: whisper/audio.py``). Windows of 7 columns; 400-sample Hann frames every
160 samples (100 columns per second), power, 80 Slaney mel bands from 0 to 8000 Hz, (log10 + 4) / 4. Whisper cuts off 8
decades below a recording's loudest column, which a stream does not know, so the floor is fixed at 1e-10.

Everything is computed in float64 and rounded once, so the features of a stream equal those of the whole file whatever
the size of its blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.io.audio import video_frames

__all__ = ["COLUMNS", "FRONTENDS", "MELS", "FeatureStream", "Frontend", "log_mel", "mel_filters", "windows"]

#: Mel bands.
MELS = 80
#: Columns (1/80 s each) in a window of the frontend ``mel``.
COLUMNS = 16

_WINDOW = 800
_HOP = 200
_PREEMPHASIS = 0.97
_LOWEST, _HIGHEST = 55.0, 7600.0
_FLOOR_DB, _REFERENCE_DB, _CLIP = -100.0, 20.0, 4.0
_WHISPER_WINDOW, _WHISPER_HOP = 400, 160
# Columns at a time. NumPy's BLAS shares larger products between threads, which then spin for a tenth of a second.
_FEW = 8

_Array = npt.NDArray[np.float64]
_Columns = npt.NDArray[np.float32]


def _hz_to_mel(hz: _Array) -> _Array:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    linear = hz * 3.0 / 200.0
    return np.where(hz < 1000.0, linear, 15.0 + np.log(np.maximum(hz, 1e-9) / 1000.0) * 27.0 / np.log(6.4))


def _mel_to_hz(mel: _Array) -> _Array:
    return np.where(mel < 15.0, mel * 200.0 / 3.0, 1000.0 * np.exp((mel - 15.0) * np.log(6.4) / 27.0))


@lru_cache(maxsize=4)
def mel_filters(window: int = _WINDOW, lowest: float = _LOWEST, highest: float = _HIGHEST) -> _Array:
    """Triangular mel filters of unit area (Slaney): (window // 2 + 1, 80) float64, spectrum @ filters = mel bands."""
    bins = np.linspace(0.0, SAMPLE_RATE / 2, window // 2 + 1)
    ends = _hz_to_mel(np.array([lowest, highest]))
    edges = _mel_to_hz(np.linspace(ends[0], ends[1], MELS + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins[:, None] - low) / (centre - low)
    falling = (high - bins[:, None]) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


def _scaled_decibels(spectrum: _Array) -> _Array:
    decibels = 20.0 * np.log10(np.maximum(spectrum @ mel_filters(), 10.0 ** (_FLOOR_DB / 20))) - _REFERENCE_DB
    scaled: _Array = np.clip(2 * _CLIP * (decibels - _FLOOR_DB) / -_FLOOR_DB - _CLIP, -_CLIP, _CLIP)
    return scaled


def _scaled_decades(spectrum: _Array) -> _Array:
    power = np.square(spectrum) @ mel_filters(_WHISPER_WINDOW, 0.0, SAMPLE_RATE / 2)
    return (np.log10(np.maximum(power, 1e-10)) + 4) / 4


@dataclass(frozen=True)
class Frontend:
    """A kind of log-mel features.

    Attributes:
        window: samples of a Fourier transform.
        hop: samples between two columns; column c is centred on sample c * hop.
        emphasis: factor of the pre-emphasis.
        columns: columns in the window of a frame.
        first: first column of the window of a video frame.
        scale: magnitude spectra (n, window // 2 + 1) to columns (n, 80).
    """

    window: int
    hop: int
    emphasis: float
    columns: int
    first: Callable[[int], int]
    scale: Callable[[_Array], _Array]


def _first_mel_column(frame: int) -> int:
    """First column of the window of a video frame; rounds towards zero as the original code does."""
    return int(SAMPLE_RATE // _HOP * (frame - 2) / FPS)


def _first_whisper_column(frame: int) -> int:
    """First of the columns 4 t - 2 to 4 t + 4, which Whisper's convolutions read for the two steps of a video frame."""
    return SAMPLE_RATE // _WHISPER_HOP // FPS * frame - 2


#: The frontends by name.
FRONTENDS = {
    "mel": Frontend(_WINDOW, _HOP, _PREEMPHASIS, COLUMNS, _first_mel_column, _scaled_decibels),
    "whisper": Frontend(_WHISPER_WINDOW, _WHISPER_HOP, 0.0, 7, _first_whisper_column, _scaled_decades),
}


class FeatureStream:
    """Features of a recording that arrives in blocks of any size.

    Call :meth:`push` with each block, then :meth:`finish` once; together they return ``windows(whole)``. A video frame
    is returned as soon as its last column is known. Memory: about 0.3 s of sound, however long the recording.

    Arguments:
        frontend: name of the frontend, one of :data:`FRONTENDS`.
    """

    def __init__(self, frontend: str = "mel") -> None:
        self.frontend = FRONTENDS[frontend]
        self._hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.frontend.window) / self.frontend.window)
        self._last = 0.0  # the last raw sample, for the pre-emphasis
        # Half a window of zeros before the first sample centres column c on sample c * hop.
        self._wave: _Array = np.zeros(self.frontend.window // 2)
        self._mel: _Columns = np.zeros((0, MELS), dtype=np.float32)
        self._first = 0  # index of the first column still held
        self._frame = 0  # index of the next video frame
        self._samples = 0
        self._finished = False

    def push(self, wave: npt.NDArray[np.float32]) -> torch.Tensor:
        """Take the next samples, (n,) at 16 kHz; returns the windows they complete, (t, 80, columns), t >= 0."""
        self.push_columns(wave)
        ready = self._frame
        while self.frontend.first(ready) + self.frontend.columns <= self._first + len(self._mel):
            ready += 1
        return self._take(ready)

    def finish(self) -> torch.Tensor:
        """End the recording; returns the remaining windows, (t, 80, columns), in which the last column is repeated."""
        self.finish_columns()
        return self._take(video_frames(self._samples))

    def push_columns(self, wave: npt.NDArray[np.float32]) -> _Columns:
        """As :meth:`push`, but returns the new columns, (m, 80)."""
        self._check_open()
        if wave.ndim != 1:
            raise ValueError(f"samples of shape (n,) are needed, got {wave.shape}")
        if len(wave) == 0:
            return np.zeros((0, MELS), dtype=np.float32)
        samples = wave.astype(np.float64)
        emphasised = samples - self.frontend.emphasis * np.concatenate([[self._last], samples[:-1]])
        self._last = float(samples[-1])
        self._samples += len(samples)
        return self._analyse(emphasised)

    def finish_columns(self) -> _Columns:
        """As :meth:`finish`, but returns the last columns, (m, 80)."""
        self._check_open()
        self._finished = True
        if not self._samples:
            return np.zeros((0, MELS), dtype=np.float32)
        return self._analyse(np.zeros(self.frontend.window // 2))

    def _check_open(self) -> None:
        if self._finished:
            raise RuntimeError("the stream is finished; make a new FeatureStream")

    def _analyse(self, emphasised: _Array) -> _Columns:
        self._wave = np.concatenate([self._wave, emphasised])
        window, hop = self.frontend.window, self.frontend.hop
        count = (len(self._wave) - window) // hop + 1
        if count <= 0:
            return np.zeros((0, MELS), dtype=np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(self._wave, window)[: count * hop : hop]
        columns = np.concatenate([self._log_mel(frames[i : i + _FEW]) for i in range(0, count, _FEW)])
        self._wave = self._wave[count * hop :].copy()
        self._mel = np.concatenate([self._mel, columns])
        return columns

    def _log_mel(self, frames: _Array) -> _Columns:
        spectrum = np.abs(np.fft.rfft(frames * self._hann, axis=-1))
        columns: _Columns = self.frontend.scale(spectrum).astype(np.float32)
        return columns

    def _take(self, end: int) -> torch.Tensor:
        frames = np.arange(self._frame, max(end, self._frame))
        starts = np.array([self.frontend.first(int(i)) for i in frames], dtype=np.int64)
        width = self.frontend.columns
        columns = np.clip(starts[:, None] + np.arange(width), 0, self._first + len(self._mel) - 1) - self._first
        taken = self._mel[columns] if len(frames) else np.zeros((0, width, MELS), dtype=np.float32)
        self._frame = max(end, self._frame)
        unneeded = max(0, self.frontend.first(self._frame) - self._first)
        # Keep at least one column: the clamp of the last frames points to it.
        unneeded = min(unneeded, max(0, len(self._mel) - 1))
        self._mel = self._mel[unneeded:].copy()
        self._first += unneeded
        return torch.from_numpy(np.ascontiguousarray(taken.transpose(0, 2, 1)))


def log_mel(wave: npt.NDArray[np.float32], frontend: str = "mel") -> _Columns:
    """Log-mel spectrogram of samples (n,) at 16 kHz: (1 + n // hop, 80) float32."""
    stream = FeatureStream(frontend)
    return np.concatenate([stream.push_columns(wave), stream.finish_columns()])


def windows(wave: npt.NDArray[np.float32], frontend: str = "mel") -> torch.Tensor:
    """Windows of samples (n,) at 16 kHz, one per 25-fps video frame: (ceil(n / 640), 80, 16 or 7) float32."""
    stream = FeatureStream(frontend)
    return torch.cat([stream.push(wave), stream.finish()])
