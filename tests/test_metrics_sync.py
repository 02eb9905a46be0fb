"""Lips and sound: scores from embeddings, SyncNet's network and front end, mouth crops, the sync expert, its stage."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.evaluators.sync_expert import (
    SyncExpertConfig,
)
from flowvqtalker_eval.metrics import syncnet, syncnet_input
from flowvqtalker_eval.metrics.sync import distance_curve, score_curve, sync_score

TINY = SyncExpertConfig(video=(8, 8, 8, 8, 8), audio=(16, 16, 16), dim=16, dropout=0.0)


def embeddings(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim))


# Scores


@pytest.mark.parametrize("reach", [0, 3, 15])
def test_curve_equals_brute_force(reach):
    """The plain definition: pad the sound with zeros, torch's pairwise distance of each frame to each shift."""
    video, audio = embeddings(20), embeddings(20, seed=1)
    padded = torch.nn.functional.pad(torch.tensor(audio), (0, 0, reach, reach))
    rows = []
    for i, frame in enumerate(torch.tensor(video)):
        rows.append(torch.nn.functional.pairwise_distance(frame[None], padded[i : i + 2 * reach + 1]))
    mean = torch.stack(rows).mean(0)
    assert np.allclose(distance_curve(video, audio, reach), mean.numpy(), atol=1e-12)
    score = sync_score(video, audio, reach)
    assert score.distance == pytest.approx(float(mean.min()))
    assert score.confidence == pytest.approx(float(mean.median() - mean.min()))
    assert score.offset == reach - int(mean.argmin())
    assert score.frames == 20


@pytest.mark.parametrize("padding", ["zeros", "none"])
@pytest.mark.parametrize("late", [-15, -4, 0, 1, 9])
def test_offset_of_a_shifted_signal_is_found(late, padding):
    whole = embeddings(120, 32)
    video, audio = whole[30:90], whole[30 - late : 90 - late]  # the sound of frame t comes at t + late
    score = sync_score(video, audio, padding=padding)
    assert score.offset == -late
    assert score.confidence > 1


def test_equal_embeddings_have_no_distance():
    same = embeddings(30)
    assert sync_score(same, same).distance == pytest.approx(1e-6 * math.sqrt(8))
    far = sync_score(np.zeros((30, 4)), np.full((30, 4), 3.0), padding="none")
    assert far.distance == pytest.approx(6.0, abs=1e-5)
    assert far.confidence == pytest.approx(0.0, abs=1e-12)


def test_frames_without_a_face_take_no_part():
    video, audio = embeddings(40), embeddings(40, seed=1)
    some = video.copy()
    some[[0, 7, 39]] = np.nan
    seen = np.isfinite(some).all(1)
    padded = np.pad(audio, ((15, 15), (0, 0)))
    wanted = [np.linalg.norm(video - padded[s : s + 40] + 1e-6, axis=1)[seen].mean() for s in range(31)]
    assert np.allclose(distance_curve(some, audio), wanted)
    assert sync_score(some, audio).frames == 37


def test_without_padding_only_the_overlap_counts():
    video, audio = embeddings(18), embeddings(18, seed=1)
    curve = distance_curve(video, audio, 15, "none")
    for shift in range(-15, 16):
        t = [t for t in range(18) if 0 <= t + shift < 18]
        if len(t) < 5:
            assert np.isnan(curve[15 + shift])
        else:
            wanted = np.mean([np.linalg.norm(video[i] - audio[i + shift] + 1e-6) for i in t])
            assert curve[15 + shift] == pytest.approx(wanted)
    assert np.isfinite(sync_score(video, audio, padding="none").confidence)


def test_bad_embeddings_are_refused():
    good = embeddings(10)
    with pytest.raises(UserError, match=r"must both be \(n, D\)"):
        distance_curve(good, good[:9])
    with pytest.raises(UserError, match="none of 10 frames has a face"):
        distance_curve(np.full((10, 8), np.nan), good)
    with pytest.raises(UserError, match="finite"):
        distance_curve(good, np.full((10, 8), np.inf))
    with pytest.raises(UserError, match="negative"):
        distance_curve(good, good, -1)
    with pytest.raises(UserError, match="odd length"):
        score_curve(np.zeros(4), 1)


# SyncNet's front end


def slow_mfcc(signal: np.ndarray) -> np.ndarray:
    """python_speech_features.mfcc from its definition, coefficient by coefficient."""
    emphasised = [signal[0]] + [signal[i] - 0.97 * signal[i - 1] for i in range(1, len(signal))]
    count = 1 if len(signal) <= 400 else 1 + math.ceil((len(signal) - 400) / 160)
    emphasised += [0.0] * (400 + 160 * (count - 1) - len(emphasised))
    mel = np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 28)
    corner = [math.floor(513 * 700 * (10 ** (m / 2595) - 1) / 16000) for m in mel]
    bank = np.zeros((26, 257))
    for j in range(26):
        for i in range(corner[j], corner[j + 1]):
            bank[j, i] = (i - corner[j]) / (corner[j + 1] - corner[j])
        for i in range(corner[j + 1], corner[j + 2]):
            bank[j, i] = (corner[j + 2] - i) / (corner[j + 2] - corner[j + 1])
    turn = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
    rows = []
    for c in range(count):
        power = np.abs(turn @ emphasised[160 * c : 160 * c + 400]) ** 2 / 512
        logs = np.log(np.maximum(bank @ power, np.finfo(float).eps))
        row = []
        for k in range(13):
            total = sum(logs[n] * math.cos(math.pi * k * (2 * n + 1) / 52) for n in range(26))
            row.append(total * math.sqrt((1 if k == 0 else 2) / 26) * (1 + 11 * math.sin(math.pi * k / 22)))
        row[0] = math.log(max(power.sum(), np.finfo(float).eps))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("length", [1, 300, 400, 401, 560, 3201])
def test_mfcc_equals_the_slow_definition(length):
    signal = np.round(9000 * np.random.default_rng(length).normal(size=length))
    assert np.allclose(syncnet_input.mfcc(signal), slow_mfcc(signal), atol=1e-6)


def test_mfcc_of_silence_is_finite_and_of_nothing_refused():
    assert np.isfinite(syncnet_input.mfcc(np.zeros(1600, np.int16))).all()
    with pytest.raises(UserError, match="n > 0"):
        syncnet_input.mfcc(np.zeros(0))


def face68(frames: int, seed: int = 0) -> np.ndarray:
    """Landmarks (frames, 68, 2) of a roughly face-shaped cloud that wanders."""
    rng = np.random.default_rng(seed)
    face = rng.uniform(-40, 40, (68, 2))
    face[36:42], face[42:48], face[60:68] = [-20, -25], [20, -25], [0, 25]
    return face + np.array([120, 100]) + np.cumsum(rng.normal(size=(frames, 1, 2)), axis=0)


def test_eat_crop_puts_eyes_and_mouth_in_place():
    points = face68(9)
    matrices = syncnet_input._eat_matrices(points)
    mouth = np.einsum("tij,tj->ti", matrices[:, :, :2], points[:, 60:68].mean(1)) + matrices[:, :, 2]
    assert np.allclose(mouth[0], [112, 120])  # the first shift is not smoothed
    assert np.abs(mouth - [112, 120]).max() < 1.5
    assert np.ptp(matrices[:, :, :2], axis=0).max() == 0
    # Points that already lie on the template are left alone.
    fixed = np.zeros((2, 68, 2))
    fixed[:, 36:42], fixed[:, 42:48], fixed[:, 60:68] = [87, 59], [137, 59], [112, 120]
    assert np.allclose(syncnet_input._eat_matrices(fixed), [[1, 0, 0], [0, 1, 0]], atol=1e-9)


@pytest.mark.parametrize("frames", [4, 20])
def test_native_crop_equals_the_padded_picture(frames):
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 255, (frames, 150, 200, 3), dtype=np.uint8)
    points = face68(frames)
    points[1] = np.nan
    crops = list(syncnet_input.face_crops(pictures, points, "native"))
    assert len(crops) == frames  # short clips are not dropped
    for picture, crop, (x, y, half) in zip(
        pictures, crops, syncnet_input._native_boxes(syncnet_input._filled(points)), strict=True
    ):
        pad = int(half * 1.8)
        whole = np.pad(picture, ((pad, pad), (pad, pad), (0, 0)), constant_values=110)
        my, mx = y + pad, x + pad
        part = whole[int(my - half) : int(my + half * 1.8), int(mx - half * 1.4) : int(mx + half * 1.4)]
        assert np.array_equal(crop, cv2.resize(part, (224, 224)))


def test_bad_faces_are_refused():
    pictures = np.zeros((3, 50, 50, 3), np.uint8)
    for points, crop, message in (
        (face68(3), "wide", "choose eat or native"),
        (np.full((3, 68, 2), np.nan), "eat", "none of 3 frames has a face"),
        (face68(2), "eat", "more frames"),
        (face68(4), "eat", "3 frames but landmarks of 4"),
        (np.zeros((3, 5, 2)), "eat", "68"),
    ):
        with pytest.raises(UserError, match=message):
            list(syncnet_input.face_crops(pictures, points, crop))


# SyncNet's network and loader


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    """A file as the published one: a state dict without the counters of the batch norms."""
    torch.manual_seed(0)
    state = {k: v for k, v in syncnet.SyncNetModel().state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("syncnet") / "syncnet_v2.model"
    torch.save(state, path)
    return path


def test_names_and_shapes_are_those_of_the_published_network():
    state = syncnet.SyncNetModel().state_dict()
    shapes = {
        "netcnnaud.0.weight": (64, 1, 3, 3),
        "netcnnaud.4.weight": (192, 64, 3, 3),
        "netcnnaud.8.weight": (384, 192, 3, 3),
        "netcnnaud.11.weight": (256, 384, 3, 3),
        "netcnnaud.14.weight": (256, 256, 3, 3),
        "netcnnaud.18.weight": (512, 256, 5, 4),
        "netcnnaud.19.running_var": (512,),
        "netfcaud.0.weight": (512, 512),
        "netfcaud.3.bias": (1024,),
        "netfclip.1.running_mean": (512,),
        "netfclip.3.weight": (1024, 512),
        "netcnnlip.0.weight": (96, 3, 5, 7, 7),
        "netcnnlip.4.weight": (256, 96, 1, 5, 5),
        "netcnnlip.8.weight": (256, 256, 1, 3, 3),
        "netcnnlip.11.weight": (256, 256, 1, 3, 3),
        "netcnnlip.14.weight": (256, 256, 1, 3, 3),
        "netcnnlip.18.weight": (512, 256, 1, 6, 6),
        "netcnnlip.19.weight": (512,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    convolutions = [key for key, value in state.items() if key.endswith("weight") and value.ndim > 2]
    assert len(convolutions) == 12


def test_a_clip_through_synthetic_weights(synthetic):
    """Windows, their order, BGR and 0..255, against the network called window by window."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 90, 100, 3), dtype=np.uint8)
    wave = (rng.integers(-9000, 9000, 8 * 640) / 32768).astype(np.float32)
    net = syncnet.SyncNet(synthetic, sha256=None, batch=2)
    points = face68(8)
    video, audio = net.embed(syncnet_input.face_crops(frames, points), wave)
    assert video.shape == audio.shape == (3, 1024)  # 8 - 5
    faces = np.stack(list(syncnet_input.face_crops(frames, points)))[..., ::-1].transpose(3, 0, 1, 2)
    cepstra = syncnet_input.mfcc(wave * 32768).T
    i = 2
    with torch.no_grad():
        lips = net.model.video(torch.tensor(faces[None, :, i : i + 5].astype(np.float32)))
        sound = net.model.audio(torch.tensor(cepstra[None, None, :, 4 * i : 4 * i + 20], dtype=torch.float32))
    assert np.allclose(video[i], lips[0], atol=1e-4)
    assert np.allclose(audio[i], sound[0], atol=1e-4)
    assert net.settings() == {"weights": weights.sha256(synthetic), "crop": "eat", "reach": 15}
    score = net.score(frames[:7], points[:7], wave)
    assert score.frames == 2
    assert np.isfinite([score.confidence, score.distance]).all()
    with pytest.raises(UserError, match="more than 5 frames"):
        net.score(frames[:5], points[:5], wave)


def test_weights_are_looked_for_and_checked(synthetic, tmp_path, monkeypatch):
    monkeypatch.delenv(syncnet.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(MissingDependency, match=r"robots\.ox\.ac\.uk"):
        syncnet.find_syncnet()
    with pytest.raises(MissingDependency, match="sha256"):
        syncnet.find_syncnet(synthetic)  # it is not the published file
    with pytest.raises(MissingDependency, match="not found at"):
        syncnet.find_syncnet(tmp_path / "none")
    monkeypatch.setenv(syncnet.VARIABLE, str(synthetic))
    digest = weights.sha256(synthetic)
    assert syncnet.find_syncnet(sha256=digest) == (synthetic, digest)
    monkeypatch.delenv(syncnet.VARIABLE)
    assert syncnet.download_syncnet(synthetic.as_uri(), digest) == tmp_path / "flowvqtalker" / "syncnet_v2.model"
    assert syncnet.find_syncnet(sha256=digest)[1] == digest
    with pytest.raises(MissingDependency, match="cannot be downloaded"):
        syncnet.download_syncnet((tmp_path / "nowhere").as_uri())
    with pytest.raises(MissingDependency, match="sha256"):
        syncnet.download_syncnet(synthetic.as_uri())
    assert not list((tmp_path / "flowvqtalker").glob("*.part"))


def test_files_that_are_something_else_are_refused(synthetic, tmp_path):
    state = torch.load(synthetic, weights_only=True)
    assert syncnet.load_model(synthetic).training is False
    for change, message in (
        (lambda s: s.pop("netfcaud.0.weight"), "netfcaud.0.weight is missing"),
        (lambda s: s.update(more=torch.zeros(1)), "more is unknown"),
        (lambda s: s.update({"netfcaud.0.bias": torch.zeros(3)}), r"has shape \(3,\), not \(512,\)"),
    ):
        changed = dict(state)
        change(changed)
        torch.save(changed, tmp_path / "changed")
        with pytest.raises(UserError, match=message):
            syncnet.load_model(tmp_path / "changed")
    torch.save([1, 2], tmp_path / "list")
    with pytest.raises(UserError, match="no state dict"):
        syncnet.load_model(tmp_path / "list")
    (tmp_path / "text").write_text("404 not found")
    with pytest.raises(UserError, match="cannot be read"):
        syncnet.load_model(tmp_path / "text")
