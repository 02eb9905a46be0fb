"""Beats of motion and sound: closed forms, chance, tones, bad input."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.loading import load_face_model
from flowvqtalker_eval.metrics import beats


def test_beats_on_each_other_align_and_others_do_not() -> None:
    exact = np.array([10.0, 35.0, 61.5])
    assert beats.beat_alignment(exact, exact) == 1
    assert beats.beat_alignment(exact, exact + 100) == pytest.approx(0, abs=1e-12)
    assert beats.beat_alignment(exact, exact + beats.TOLERANCE) == pytest.approx(math.exp(-0.5))
    assert beats.beat_alignment(exact, np.append(exact, [20.0, 50.0])) == 1  # further motion costs nothing
    assert beats.beat_alignment(exact, exact[:1]) == pytest.approx(1 / 3)
    assert beats.beat_alignment(exact, np.zeros(0)) == 0
    assert math.isnan(beats.beat_alignment(np.zeros(0), exact))


def test_the_definition_is_bailandos_at_25_frames_a_second() -> None:
    assert pytest.approx(1.25) == beats.TOLERANCE
    assert pytest.approx(25 / 12) == beats.SMOOTHING


def test_motion_beats_are_where_the_motion_rests() -> None:
    t = np.arange(200)
    speed = 1 - np.cos(2 * np.pi * (t + 0.5 - 10) / 40)  # of the interval t to t + 1; at rest at 10, 50, 90, ...
    found = beats.motion_beats(speed)
    assert found == pytest.approx([10, 50, 90, 130, 170], abs=0.51)
    speed[[60, 61]] = np.nan
    assert len(beats.motion_beats(speed)) == 5
    assert len(beats.motion_beats(np.zeros(50))) == 0  # a head that never moves has no beat
    for bad in (np.zeros(0), np.full(5, np.nan), np.zeros((5, 2))):
        with pytest.raises(UserError, match="speed"):
            beats.motion_beats(bad)


def test_chance_is_the_mean_over_all_shifts() -> None:
    audio, moved = np.array([5.0, 40.0]), np.array([20.0])
    brute = np.mean([beats.beat_alignment(audio, np.array([float(shift)])) for shift in range(80)])
    assert beats.chance(audio, moved, 80) == pytest.approx(brute)
    assert beats.chance(audio, np.zeros(0), 80) == 0


def test_head_speed_leaves_the_lips_out() -> None:
    pose = np.zeros((5, 6), np.float32)
    pose[:, 3] = np.arange(5) * 0.02
    assert beats.head_speed(load_face_model(), pose) == pytest.approx(np.full(4, 0.02), rel=1e-4)


def test_audio_beats_are_the_onsets_of_clicks() -> None:
    pytest.importorskip("librosa")
    rng = np.random.default_rng(0)
    wave = 1e-4 * rng.standard_normal(16000 * 4).astype(np.float32)
    places = np.array([0.5, 1.3, 2.2, 3.1])
    burst = rng.standard_normal(800).astype(np.float32) * np.exp(-np.arange(800) / 150)
    for place in places:
        start = int(place * 16000)
        wave[start : start + 800] += 0.5 * burst
    found = beats.audio_beats(wave)
    assert found == pytest.approx(places * 25, abs=1.0)  # 40 ms
    assert beats.beat_alignment(found, places * 25) > 0.7
    assert len(beats.audio_beats(np.zeros(16000))) == 0


def test_loudness_and_pitch_of_a_tone() -> None:
    pytest.importorskip("librosa")
    t = np.arange(16000 + 100) / 16000
    wave = 0.5 * np.sin(2 * np.pi * 130 * t) + 0.2 * np.sin(2 * np.pi * 260 * t)
    wave[:6400] = 0
    level = beats.loudness(wave)
    assert len(level) == 26
    assert level[12:24] == pytest.approx(np.full(12, 10 * math.log10(0.145)), abs=0.3)
    assert level[:10].max() == pytest.approx(level.max() - 40)
    tone = beats.pitch(wave)
    assert len(tone) == 26
    assert np.isnan(tone[:8]).all()
    assert np.nanmedian(tone[14:22]) == pytest.approx(12, abs=0.3)  # an octave above 65 Hz


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros((5, 2)), np.full(700, np.nan)])
def test_bad_speech_is_refused(wave) -> None:
    with pytest.raises(UserError, match="speech"):
        beats.loudness(wave)


def test_a_missing_librosa_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(MissingDependency, match=r"pip install 'flowvqtalker\[eval\]'"):
        beats.audio_beats(np.ones(1000))
