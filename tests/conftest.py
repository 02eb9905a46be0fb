"""What several test files use."""

from __future__ import annotations

import wave
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """Write (n,) or (n, channels) samples in [-1, 1] as 16-bit WAV."""
    samples = np.atleast_2d(samples.T).T
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def babble(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Something with the loudness contour of speech: (n,) float64."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    voice = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 12))
    return 0.2 * voice * (0.5 + 0.5 * np.sin(2 * np.pi * 4 * time)) + 0.01 * generator.standard_normal(len(time))


@pytest.fixture(scope="session")
def sample_speech() -> Path:
    """The bundled ten seconds of speech."""
    return Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg"))


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """One second of babble."""
    return write_wav(tmp_path / "speech.wav", babble(1.0))
