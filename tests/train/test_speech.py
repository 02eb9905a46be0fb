"""Speech sets and the stage that teaches the audio encoder to listen."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.data.speech_sets import CURVES, TEACHER, UNITS, PrepareSpeech, Recording, SpeechSet, write
from flowvqtalker.data.splits import split_of
from flowvqtalker.data.teacher import Teacher, read_variables, whisper_mel
from flowvqtalker.errors import UserError
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.features import log_mel
from flowvqtalker.train import speech
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loop import fit

SPEECH_ENCODER = SpeechEncoderConfig(dim=8, heads=2, attention=1, back=3, ahead=1, reach=((1, 1),), width=8)


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


def test_degraded_recordings_keep_the_targets_of_the_original(folder, tmp_path):
    write(tmp_path / "set", (), folder, listen)
    one = SpeechSet(tmp_path / "set")
    names = [str(name) for name in one.index["name"]]
    degraded = [n for n, name in enumerate(names) if name.endswith(" degraded")]
    assert len(degraded) == 4 and all(one.split[n] == "train" for n in degraded)
    changed = 0
    for n in degraded:
        plain = names.index(names[n].removesuffix(" degraded"))
        a, b = (slice(int(one.start[i]), int(one.start[i] + one.length[i])) for i in (n, plain))
        assert np.array_equal(one.teacher[a], one.teacher[b]) and one.length[n] == one.length[plain]
        assert np.array_equal(one.units[a], one.units[b], equal_nan=True)
        columns = [slice(int(s), int(s + m)) for s, m in zip(one.mel_start, one.mel_length, strict=True)]
        changed += not np.array_equal(one.mel[columns[n]], one.mel[columns[plain]])
    assert changed >= 2


def test_a_set_holds_every_recording_as_it_is_and_at_another_rate(folder, tmp_path):
    write(tmp_path / "set", (), folder, listen, degraded=False)
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


def test_the_stage_learns_from_the_teacher(folder, tmp_path):
    write(tmp_path / "set", (), folder, listen)
    times = {"steps": 60, "log_every": 20, "validate_every": 60, "save_every": 60}
    loop = LoopConfig(**times, batch_size=4, lr=1e-2, device="cpu", ema=0)
    config = speech.Config(sets=(tmp_path / "set",), speech_encoder=SPEECH_ENCODER, frames=16, augment=0.0, loop=loop)
    lips, gap = torch.randn(64, 16), torch.randn(64)
    stage = speech.SpeechStage(config, [SpeechSet(tmp_path / "set")], lips, gap)
    first, second = stage.train_data[5], stage.train_data[5]
    assert all(torch.equal(first[key].nan_to_num(), second[key].nan_to_num()) for key in first)
    assert first["windows"].shape == (SPEECH_ENCODER.lookback + 16 + SPEECH_ENCODER.lookahead, 80, 7)
    scores = fit(stage, loop, tmp_path / "run")
    with open(tmp_path / "run" / "validation.csv", encoding="utf-8") as file:
        start = next(csv.DictReader(file))
    assert scores["teacher"] < 0.8 * float(start["teacher"])
    state, settings = stage.export()
    assert {key.split(".")[0] for key in state} == {"audio", "lip_prior"}
    assert SpeechEncoderConfig(**settings) == SPEECH_ENCODER


def test_windows_equal_those_of_the_front_end(folder, tmp_path):
    from flowvqtalker.io import audio as decode
    from flowvqtalker.speech.features import windows

    write(tmp_path / "set", (), folder, listen)
    one = SpeechSet(tmp_path / "set")
    wave = decode.load(folder / "speech" / "r0.wav")
    assert np.allclose(one.mel[: one.mel_length[0]], log_mel(wave, "whisper"), atol=3e-3)
    config = speech.Config(sets=(tmp_path / "set",), speech_encoder=SPEECH_ENCODER, frames=20, augment=0.0)
    items = speech.SpeechStage(config, [one], torch.randn(64, 4), torch.randn(64)).train_data
    item = items.item(0, 0, 10, 20, np.random.default_rng(0))
    whole = windows(wave, "whisper")
    assert torch.allclose(
        item["windows"], whole[10 - SPEECH_ENCODER.lookback : 30 + SPEECH_ENCODER.lookahead], atol=3e-3
    )


def variables(dim: int, layers: int) -> dict[str, torch.Tensor]:
    """What a Whisper encoder of some width holds."""
    torch.manual_seed(1)
    shapes = {"conv1": (dim, 80, 3), "conv2": (dim, dim, 3)}
    found = {f"encoder/{name}/weight": 0.1 * torch.randn(shape) for name, shape in shapes.items()}
    found |= {f"encoder/{name}/bias": torch.randn(dim) for name in shapes}
    found["encoder/position_encodings/encodings"] = torch.zeros(12, dim)
    for layer in range(layers):
        for part, linears in (("self_attention", (3 * dim, dim)), ("ffn", (4 * dim, dim))):
            place = f"encoder/layer_{layer}/{part}"
            found[f"{place}/layer_norm/gamma"], found[f"{place}/layer_norm/beta"] = torch.randn(2, dim)
            for number, size in enumerate(linears):
                rows = dim if (part, number) != ("ffn", 1) else 4 * dim
                found[f"{place}/linear_{number}/weight"] = 0.3 * torch.randn(size, rows)
                found[f"{place}/linear_{number}/bias"] = torch.randn(size)
    return found


def test_a_started_speech_encoder_computes_what_whisper_does():
    """With a reach as long as the clip and without positions, the layers are Whisper's."""
    dim, heads, frames = 8, 2, 6
    config = SpeechEncoderConfig(dim=dim, heads=heads, attention=1, back=frames, ahead=frames, reach=(), width=4)
    speech_encoder, given = SpeechEncoder(config).eval(), variables(dim, 1)
    speech_encoder.start_from_whisper(given)
    mel = torch.randn(1, 80, 4 * frames + 3)
    windows = torch.stack([mel[0, :, 4 * t : 4 * t + 7] for t in range(frames)])
    gelu, layer = torch.nn.functional.gelu, {k.removeprefix("encoder/layer_0/"): v for k, v in given.items()}
    x = gelu(torch.conv1d(mel, given["encoder/conv1/weight"], given["encoder/conv1/bias"]))
    x = gelu(torch.conv1d(x, given["encoder/conv2/weight"], given["encoder/conv2/bias"], stride=2)).mT
    steps = speech_encoder.embed(windows)
    assert torch.allclose(steps.flatten(0, 1), x[0], atol=1e-5)

    def part(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ layer[f"{name}/weight"].mT + layer[f"{name}/bias"]

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return torch.layer_norm(value, (dim,), layer[f"{name}/layer_norm/gamma"], layer[f"{name}/layer_norm/beta"])

    q, k, v = part("self_attention/linear_0", norm("self_attention", x)).view(2 * frames, 3, heads, -1).unbind(1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / (dim / heads) ** 0.5
    found = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(1, 2 * frames, dim)
    x = x + part("self_attention/linear_1", found)
    x = x + part("ffn/linear_1", gelu(part("ffn/linear_0", norm("ffn", x))))
    block = speech_encoder.blocks[0]
    ours = [block.complete(steps[None, t : t + 1], _attend(block, steps, t))[0, 0] for t in range(frames)]
    assert torch.allclose(torch.cat(ours), x[0], atol=1e-4)
    with pytest.raises(UserError, match="do not fit the speech encoder"):
        speech_encoder.start_from_whisper(variables(16, 1))


def _attend(block: torch.nn.Module, steps: torch.Tensor, frame: int) -> torch.Tensor:
    query, key, value = block.project(steps[None])
    mine = query[:, :, 2 * frame : 2 * frame + 2]
    return torch.nn.functional.scaled_dot_product_attention(mine, key, value)


def test_variables_are_read_from_the_binary_format(tmp_path):
    import struct

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    weight = np.arange(6, dtype=np.float16).reshape(2, 3)
    body = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, 2)
    body += text("decoder/x") + struct.pack("<BBI", 0, 1, 1) + b"\1"
    body += text("encoder/conv1/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, weight.nbytes) + weight.tobytes()
    (tmp_path / "model.bin").write_bytes(body)
    found = read_variables(tmp_path)
    assert list(found) == ["encoder/conv1/weight"]
    assert torch.equal(found["encoder/conv1/weight"], torch.from_numpy(weight))
    (tmp_path / "model.bin").write_bytes(body[:-4])
    with pytest.raises(UserError, match="cannot be read"):
        read_variables(tmp_path)
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 6) + text("Transformer") + body[20:])
    with pytest.raises(UserError, match="no Whisper model"):
        read_variables(tmp_path)
