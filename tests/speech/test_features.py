"""Log-mel features: the definition, and streams equal to the whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from flowvqtalker.speech import features

from ..conftest import babble


def reference_log_mel(wave: np.ndarray) -> np.ndarray:
    """The same spectrogram from torch's own STFT."""
    samples = torch.from_numpy(wave).double()
    emphasised = samples.clone()
    emphasised[1:] -= 0.97 * samples[:-1]
    window = torch.hann_window(800, dtype=torch.float64)
    spectrum = torch.stft(
        emphasised, 800, 200, window=window, center=True, pad_mode="constant", return_complex=True
    ).abs()
    decibels = 20 * torch.log10((spectrum.T @ torch.from_numpy(features.mel_filters())).clamp_min(1e-5)) - 20
    return ((decibels + 100) * 0.08 - 4).clamp(-4, 4).numpy()


def test_log_mel_is_what_the_definition_says():
    wave = babble(1.3).astype(np.float32)
    mel = features.log_mel(wave)
    assert mel.shape == (1 + len(wave) // 200, 80)
    np.testing.assert_allclose(mel, reference_log_mel(wave), atol=1e-5)


def test_mel_filters_follow_slaney():
    filters = features.mel_filters()
    assert filters.shape == (401, 80)
    np.testing.assert_allclose(filters.sum(0)[20:] * 20.0, 1.0, atol=0.06)  # unit area, bins are 20 Hz apart
    peaks = filters.argmax(0) * 20
    assert np.all(np.diff(peaks) >= 0)
    assert filters[: 55 // 20 + 1].sum() == 0
    assert filters[7600 // 20 + 1 :].sum() == 0
    below = np.diff(peaks[peaks < 1000])
    assert below.max() - below.min() <= 20  # evenly spaced below 1 kHz


def test_a_tone_lights_its_band():
    time = np.arange(16_000) / 16_000
    band = features.log_mel((0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32))[40].argmax()
    assert abs(int(features.mel_filters()[:, band].argmax()) * 20 - 1000) <= 40


def test_silence_is_the_floor():
    assert np.all(features.log_mel(np.zeros(8_000, np.float32)) == -4)


@pytest.mark.parametrize("samples", [1, 100, 639, 640, 641, 16_000, 16_001])
def test_one_window_for_each_video_frame(samples):
    wave = babble(1.1)[:samples].astype(np.float32)
    windows = features.windows(wave)
    assert windows.shape == (-(-samples // 640), 80, 16)
    assert windows.dtype == torch.float32
    mel = features.log_mel(wave)
    for frame in (0, 1, 2, len(windows) // 2, len(windows) - 1):
        if frame < len(windows):
            start = int(80 * ((frame - 2) / 25))
            columns = [min(max(c, 0), len(mel) - 1) for c in range(start, start + 16)]
            assert torch.equal(windows[frame], torch.from_numpy(mel[columns].T.copy()))


@pytest.mark.parametrize("size", [1, 7, 199, 200, 640, 3333, 16_000])
def test_features_of_a_stream_are_those_of_the_whole(size):
    wave = babble(0.3 if size == 1 else 2.2)[3:].astype(np.float32)
    blocks = [wave[start : start + size] for start in range(0, len(wave), size)]
    stream = features.FeatureStream()
    assert torch.equal(torch.cat([*map(stream.push, blocks), stream.finish()]), features.windows(wave))


def test_a_stream_is_early():
    stream = features.FeatureStream()
    wave = babble(1.0).astype(np.float32)
    assert len(stream.push(wave)) >= 25 - 6  # everything but the last 0.24 s
    stream.finish()
    with pytest.raises(RuntimeError, match="finished"):
        stream.push(wave)


def test_memory_of_a_stream_does_not_grow():
    def peak(seconds: int) -> int:
        block = babble(1.0).astype(np.float32)
        tracemalloc.start()
        stream = features.FeatureStream()
        count = sum(len(stream.push(block)) for _ in range(seconds)) + len(stream.finish())
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == seconds * 25
        return top

    features.mel_filters()
    assert peak(120) < 1.2 * peak(10)
