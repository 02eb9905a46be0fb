"""Speech sets and the stage that teaches the audio encoder to listen."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.audio.features import log_mel
from flowvqtalker.data.speech import CURVES, TEACHER, UNITS, PrepareSpeech, Recording, SpeechSet, write
from flowvqtalker.data.splits import split_of
from flowvqtalker.data.teacher import Teacher, whisper_mel
from flowvqtalker.errors import UserError
from flowvqtalker.motion.context import AudioConfig
from flowvqtalker.train import speech
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loop import fit

AUDIO = AudioConfig(width=8, reach=((1, 1), (2, 0)), lookahead=1, hidden=8)


def listen(wave: np.ndarray, frames: int) -> np.ndarray:
    """Stands in for the teacher: loudness and its neighbourhood."""
    power = np.log(np.square(wave[: frames * 640].reshape(frames, 640)).mean(1) + 1e-6)
    return np.stack([np.roll(power, k) for k in range(6)], axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from scipy.io import wavfile

    root = tmp_path_factory.mktemp("speech")
    (root / "speech").mkdir()
    (root / "ravdess_au").mkdir()
    speakers = [f"speaker {n}" for n in range(40)]
    chosen = [s for s in speakers if split_of(s) == "train"][:4] + [s for s in speakers if split_of(s) == "val"][:2]
    random = np.random.default_rng(0)
    with open(root / "speech.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", "speaker"])
        for n, speaker in enumerate(chosen):
            loud = np.repeat(random.uniform(0.02, 0.5, 30), 1600)
            wavfile.write(root / "speech" / f"r{n}.wav", 16000, (loud * random.normal(size=48000)).astype(np.float32))
            table.writerow([f"r{n}.wav", speaker])
    np.savez(root / "ravdess_au" / "frames.npz", names=np.array(["x"] * 17), r0=random.normal(size=(80, 17)))
    return root


def test_a_set_holds_every_recording_as_it_is_and_at_another_rate(folder, tmp_path):
    write(tmp_path / "set", (), folder, listen)
    one = SpeechSet(tmp_path / "set")
    assert len(one) == 12
    assert one.index["rate"][::2].tolist() == [1.0] * 6
    rates = one.index["rate"][1::2]
    assert ((rates > 0.84) & (rates < 1.19) & (rates != 1)).all()
    assert one.length[::2].tolist() == [75] * 6
    assert np.abs(one.length[1::2] - 75 / rates).max() <= 1
    assert one.teacher.shape == (one.length.sum(), TEACHER)
    assert one.units.shape == (one.length.sum(), UNITS) and one.curves.shape == (one.length.sum(), CURVES)
    assert np.isfinite(one.units[:66]).all() and np.isnan(one.units[one.start[2] :]).all()
    assert np.isnan(one.lips).all()
    assert {str(s) for s in one.split} == {"train", "val"}
    with pytest.raises(UserError, match="exists; remove it"):
        write(tmp_path / "set", (), folder, listen)


def test_targets_move_with_the_rate():
    values = np.linspace(0, 1, 60, dtype=np.float32)[:, None].repeat(UNITS, 1)
    one = Recording("a", "b", np.zeros(2 * 16000, np.float32), {"units": (30.0, values)})
    assert one.frames == 50
    assert np.allclose(one.target("units")[25], values[30])
    fast = one.at(1.25)
    assert fast.frames == 40
    assert np.allclose(fast.target("units")[20], values[30], atol=1e-5)
    assert np.isnan(one.target("lips")).all()


def test_principal_components_explain_the_teacher(folder, tmp_path):
    write(tmp_path / "set", (), folder, listen)
    one = SpeechSet(tmp_path / "set")
    features = listen(np.random.default_rng(1).normal(size=640 * 50).astype(np.float32), 50)
    reduced = (features - one.index["mean"]) @ one.index["components"]
    back = reduced @ np.linalg.pinv(one.index["components"]) + one.index["mean"]
    assert np.allclose(back, features, atol=1e-3)  # six dimensions fit into 256


def test_whisper_features_of_a_tone():
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    mel = whisper_mel(tone)
    assert mel.shape == (80, 100)
    assert int(np.argmax(mel[:, 50])) == 26  # 15 of 45.25 mel is at 1 kHz, so band 26 of 80
    assert mel.max() - mel.min() <= 2 + 1e-6  # eight decades over four


def test_bad_input_is_named(tmp_path, folder):
    with pytest.raises(UserError, match="no speech was given"):
        PrepareSpeech(output=tmp_path / "x", teacher=folder).run()
    with pytest.raises(UserError, match=r"no model\.bin"):
        Teacher(tmp_path)
    with pytest.raises(UserError, match=r"no speech\.csv"):
        write(tmp_path / "x", (), tmp_path, listen)
    with pytest.raises(UserError, match="not a speech set"):
        SpeechSet(tmp_path)
    with pytest.raises(UserError, match=r"no speech sets.*frames must be positive"):
        speech.Config(sets=(), frames=0)
    assert not (tmp_path / "x").exists()


def test_the_stage_learns_what_the_teacher_hears(folder, tmp_path):
    write(tmp_path / "set", (), folder, listen)
    times = {"steps": 60, "log_every": 20, "validate_every": 60, "save_every": 60}
    loop = LoopConfig(**times, batch_size=4, lr=1e-2, device="cpu", ema=0)
    config = speech.Config(sets=(tmp_path / "set",), audio=AUDIO, frames=16, vary=0.0, loop=loop)
    lips, gap = torch.randn(64, 16), torch.randn(64)
    stage = speech.SpeechStage(config, [SpeechSet(tmp_path / "set")], lips, gap)
    first, second = stage.train_data[5], stage.train_data[5]
    assert all(torch.equal(first[key].nan_to_num(), second[key].nan_to_num()) for key in first)
    assert first["windows"].shape == (AUDIO.lookback + 16 + AUDIO.lookahead, 80, 16)
    scores = fit(stage, loop, tmp_path / "run")
    with open(tmp_path / "run" / "validation.csv", encoding="utf-8") as file:
        start = next(csv.DictReader(file))
    assert scores["teacher"] < 0.8 * float(start["teacher"])
    state, settings = stage.export()
    assert {key.split(".")[0] for key in state} == {"audio", "voicing"}
    assert replace(AUDIO) == AudioConfig(**settings)


def test_windows_equal_those_of_the_front_end(folder, tmp_path):
    from flowvqtalker.audio import decode
    from flowvqtalker.audio.features import windows

    write(tmp_path / "set", (), folder, listen)
    one = SpeechSet(tmp_path / "set")
    wave = decode.load(folder / "speech" / "r0.wav")
    assert np.allclose(one.mel[: one.mel_length[0]], log_mel(wave), atol=3e-3)
    config = speech.Config(sets=(tmp_path / "set",), audio=AUDIO, frames=20, vary=0.0)
    items = speech.SpeechStage(config, [one], torch.randn(64, 4), torch.randn(64)).train_data
    item = items.item(0, 0, 10, 20, np.random.default_rng(0))
    whole = windows(wave)
    assert torch.allclose(item["windows"], whole[10 - AUDIO.lookback : 30 + AUDIO.lookahead], atol=3e-3)
