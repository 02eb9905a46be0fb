"""Rooms, noise and lines, which keep the time of the wave; changes of the log-mel spectrogram."""

from __future__ import annotations

import numpy as np
import pytest

from flowvqtalker.speech.augment import (
    CODECS,
    change_voice,
    codec,
    degrade,
    noise,
    reverberate,
    room,
    spectral_augment,
    telephone,
)


def speech(seconds: float = 1.0) -> np.ndarray:
    """Syllables of a voice at 140 Hz: harmonics under an envelope that opens four times a second, with noise."""
    random = np.random.default_rng(0)
    time = np.arange(int(16000 * seconds)) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * time + k) / k for k in range(1, 40))
    envelope = np.clip(np.sin(2 * np.pi * 4 * time), 0, None)
    return (0.1 * envelope * voice + 0.001 * random.normal(size=len(time))).astype(np.float32)


def lag(a: np.ndarray, b: np.ndarray) -> int:
    spectrum = np.fft.rfft(a, 2 * len(a)) * np.conj(np.fft.rfft(b, 2 * len(a)))
    likeness = np.fft.irfft(spectrum)
    at = int(np.argmax(likeness))
    return at if at < len(a) else at - 2 * len(a)


def test_a_room_keeps_the_direct_sound_and_its_tail_decays_as_stated():
    click = np.zeros(16000, np.float32)
    click[100] = 1
    heard = room(click, np.random.default_rng(0), 0.5, 0.3)
    assert heard[100] == pytest.approx(1)
    assert np.abs(heard[:100]).max() < 1e-6 and np.abs(heard[101:175]).max() < 1e-6
    assert np.square(heard[101:]).sum() == pytest.approx(0.3, rel=1e-4)
    early, late = (np.square(heard[s : s + 800]).mean() for s in (200, 4200))  # a quarter of a second apart
    assert 10 * np.log10(early / late) == pytest.approx(30, abs=2)


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_noise_is_as_loud_and_as_coloured_as_asked(slope):
    wave = speech(4)
    added = noise(wave, np.random.default_rng(1), 12.0, slope) - wave
    assert 10 * np.log10(np.square(wave).mean() / np.square(added).mean()) == pytest.approx(12, abs=0.01)
    power = np.square(np.abs(np.fft.rfft(added)))
    bands = [power[int(4 * low) : int(8 * low)].mean() for low in (250, 2000)]  # an octave each, three octaves apart
    assert np.log2(bands[0] / bands[1]) == pytest.approx(3 * slope, abs=0.3)


def test_a_telephone_limits_the_band_and_not_the_time():
    wave = speech()
    heard = telephone(wave)
    assert lag(heard, wave) == 0
    before, after = (np.square(np.abs(np.fft.rfft(x))) for x in (wave, heard))
    assert after[5000:].sum() < 0.05 * before[5000:].sum() and after[500:3000].sum() > 0.5 * before[500:3000].sum()
    assert len(np.unique(heard)) <= 255, "eight bits"
    assert len(telephone(wave[:20])) == 20


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_keeps_length_and_time(name):
    wave = speech()
    heard = codec(wave, name, CODECS[name][3][-1])
    assert heard.shape == wave.shape and heard.dtype == np.float32
    assert abs(lag(heard, wave)) <= 8
    assert np.corrcoef(heard, wave)[0, 1] > 0.9
    assert not np.allclose(heard, wave, atol=1e-4)
    short = codec(wave[:700], name, CODECS[name][3][0])
    assert short.shape == (700,)


def test_degrading_is_a_pure_function_of_wave_and_generator():
    wave = speech()
    for seed in range(6):
        first, second = (degrade(wave, np.random.default_rng(seed), codecs=True) for _ in range(2))
        assert np.array_equal(first, second) and first.shape == wave.shape and np.isfinite(first).all()
    degraded = [degrade(wave, np.random.default_rng(seed)) for seed in range(20)]
    assert 10 < sum(not np.array_equal(one, wave) for one in degraded) <= 20
    assert len(degrade(wave[:0], np.random.default_rng(0))) == 0
    assert not degrade(np.zeros(100, np.float32), np.random.default_rng(0)).any()


def test_spectral_change_is_one_change_for_all_columns():
    flat = np.zeros((50, 80), np.float32)
    changed = [change_voice(flat, np.random.default_rng(s)) for s in range(30)]
    assert all(np.abs(x).max() <= 4 for x in changed)
    clean = [x for x in changed if np.ptp(x, axis=0).max() == 0]
    assert clean, "without noise, all columns change alike"
    assert len({float(x.mean()) for x in changed}) == 30


def test_reverberation_decays_by_sixty_decibels_in_its_time():
    burst = np.full((120, 80), -4, np.float32)
    burst[10] = 2
    tail = reverberate(burst, seconds=0.5, level=0.5)
    assert np.allclose(tail[:10], burst[:10], atol=0.15), "nothing comes before the sound"
    assert np.allclose(tail[12:40] - tail[11:39], -60 / 40 / 12.5, atol=2e-3)  # 40 columns are half a second


def test_varied_voices_differ_and_stay_in_range():
    mel = np.random.default_rng(0).normal(size=(60, 80)).clip(-4, 4).astype(np.float32)
    found = [spectral_augment(mel, np.random.default_rng(s)) for s in range(20)]
    assert all(x.shape == mel.shape and x.dtype == np.float32 and np.abs(x).max() <= 4 for x in found)
    assert len({float(x.mean()) for x in found}) == 20
