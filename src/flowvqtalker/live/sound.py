"""Incoming sound: any rate, any blocks, at any pace; out of it comes one block per tick of the clock."""

from __future__ import annotations

import threading
from collections import deque
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError

__all__ = ["MAX_SECONDS", "Resampler", "SoundQueue", "as_samples"]

Floats = npt.NDArray[np.float32]

#: Seconds of speech that may wait to be spoken.
MAX_SECONDS = 600.0
_RATES = (8_000, 192_000)
#: Seconds that a late block may delay the speech: the jitter buffer grows by a step with every gap, up to the most.
_STEP, _MOST = 0.01, 0.2
# Below this a block is a pause (-50 dBFS).
_QUIET = 0.003
# A float this large was not scaled to [-1, 1].
_UNSCALED = 8.0


def as_samples(pcm: npt.NDArray[Any]) -> Floats:
    """(n,) float32 in [-1, 1] of int16 or floating point samples, (n,) or (n, channels); clipped, channels averaged.

    Raises:
        UserError: for another type or shape, samples that are not finite, or a scale other than [-1, 1].
    """
    wave = np.asarray(pcm)
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and not 1 <= wave.shape[1] <= 8):
        raise UserError(f"samples must be (n,) or (n, channels), got {wave.shape}")
    if wave.dtype == np.int16:
        wave = wave.astype(np.float32) / np.float32(32768)
    elif not np.issubdtype(wave.dtype, np.floating):
        raise UserError(f"samples must be int16, or floating point in [-1, 1], got {wave.dtype}")
    if wave.ndim == 2:
        wave = wave.mean(1)
    if not np.isfinite(wave).all():
        raise UserError(f"{int((~np.isfinite(wave)).sum())} of {len(wave)} samples are NaN or infinite; leave them out")
    peak = float(np.abs(wave).max(initial=0.0))
    if peak > _UNSCALED:
        raise UserError(
            f"samples reach {peak:g}, floating point ones must lie in [-1, 1]; divide int16 values by 32768"
        )
    clipped: Floats = np.clip(wave, -1, 1).astype(np.float32)
    return clipped


class Resampler:
    """Changes the rate of mono sound that arrives in blocks."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target = source, target
        self._resampler: Any = None
        if source != target:
            import av

            self._resampler = av.AudioResampler(format="fltp", layout="mono", rate=target)

    def __call__(self, wave: Floats | None) -> Floats:
        """The samples that the next ones, (n,), complete; None ends the sound."""
        if self._resampler is None:
            return np.zeros(0, np.float32) if wave is None else wave
        frame: Any = None
        if wave is not None:
            if not len(wave):
                return wave
            import av

            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None]), format="fltp", layout="mono")
            frame.sample_rate, frame.time_base = self.source, Fraction(1, self.source)
        parts = [done.to_ndarray()[0] for done in self._resampler.resample(frame)]
        return np.concatenate([np.zeros(0, np.float32), *parts])


class SoundQueue:
    """Speech that waits to be spoken, with a jitter buffer. Thread-safe.

    Speech begins once a tick's block is there, plus a reserve that starts at nothing and grows by 10 ms each time the
    sound runs dry within an utterance: so a steady source is delayed as little as it allows.

    Arguments:
        rate: samples per second that come out.
    """

    def __init__(self, rate: int) -> None:
        if rate % FPS or not _RATES[0] <= rate <= _RATES[1]:
            raise UserError(f"audio_rate must be a multiple of {FPS} from {_RATES[0]} to {_RATES[1]}, got {rate}")
        self.rate, self.block = rate, rate // FPS
        self._lock = threading.Lock()
        self._blocks: deque[Floats] = deque()
        self._count = self._reserve = 0
        self._lag = 0
        self._flowing = self._ended = False
        self._resampler: Resampler | None = None
        #: Samples of speech that :meth:`take` has given in all.
        self.taken = 0

    @property
    def pushed(self) -> int:
        """Samples that were taken or wait; what was cleared does not count."""
        with self._lock:
            return self.taken + self._count

    @property
    def seconds(self) -> float:
        """Length of what waits."""
        return self._count / self.rate

    def push(self, pcm: npt.NDArray[Any], rate: int) -> None:
        """Append samples, see :func:`as_samples`.

        Raises:
            UserError: for samples or a rate that cannot be, or when more than :data:`MAX_SECONDS` would wait.
        """
        if isinstance(rate, bool) or int(rate) != rate or not _RATES[0] <= rate <= _RATES[1]:
            raise UserError(f"sample_rate must be a whole number from {_RATES[0]} to {_RATES[1]}, got {rate}")
        wave = as_samples(pcm)
        with self._lock:
            if self.seconds + len(wave) / rate > MAX_SECONDS:
                raise UserError(
                    f"more than {MAX_SECONDS:g} seconds of speech would wait; push it as it is spoken, or interrupt()"
                )
            if self._resampler is None or self._resampler.source != rate:
                self._flush()
                self._resampler = Resampler(int(rate), self.rate)
            self._append(self._resampler(wave))
            self._ended = False

    def end(self) -> None:
        """The utterance is complete: what waits is spoken without a reserve."""
        with self._lock:
            self._flush()
            self._ended = True

    def clear(self) -> None:
        """Drop what waits."""
        with self._lock:
            self._blocks.clear()
            self._count, self._lag, self._resampler = 0, 0, None
            self._flowing, self._ended = False, True

    def skip_pauses(self, seconds: float) -> None:
        """After a stop of the clock: leave out as much of the coming pauses, or a microphone stays late for ever."""
        with self._lock:
            self._lag += round(seconds * self.rate)

    def take(self) -> Floats:
        """The block (rate / 25,) of the next tick; silence where there is no speech."""
        with self._lock:
            if not self._flowing:
                self._flowing = self._count > 0 and (self._ended or self._count >= self.block + self._reserve)
            if not self._flowing:
                return np.zeros(self.block, np.float32)
            taken = self._pop(self.block)
            while self._lag >= self.block <= self._count and np.abs(taken).max() < _QUIET:
                taken = self._pop(self.block)
                self._lag -= self.block
            if len(taken) < self.block:
                self._flowing = False
                if not self._ended:
                    self._reserve = min(self._reserve + round(_STEP * self.rate), round(_MOST * self.rate))
                taken = np.pad(taken, (0, self.block - len(taken)))
            return taken

    def _append(self, wave: Floats) -> None:
        if len(wave):
            self._blocks.append(wave)
            self._count += len(wave)

    def _flush(self) -> None:
        if self._resampler is not None:
            self._append(self._resampler(None))
            self._resampler = None

    def _pop(self, count: int) -> Floats:
        parts, missing = [np.zeros(0, np.float32)], count
        while missing and self._blocks:
            first = self._blocks.popleft()
            parts.append(first[:missing])
            if len(first) > missing:
                self._blocks.appendleft(first[missing:])
            missing -= len(parts[-1])
        self._count -= count - missing
        self.taken += count - missing
        return np.concatenate(parts)
