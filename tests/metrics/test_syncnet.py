"""SyncNet: its front end against slow definitions, its crops, the names of the published file, whole clips."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics import syncnet, syncnet_input
from flowvqtalker_eval.metrics.sync import distance_curve


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
def test_native_crop_equals_the_padded_image(frames):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 255, (frames, 150, 200, 3), dtype=np.uint8)
    points = face68(frames)
    points[1] = np.nan
    crops = list(syncnet_input.face_crops(images, points, "native"))
    assert len(crops) == frames  # short clips are not dropped
    for image, crop, (x, y, half) in zip(
        images, crops, syncnet_input._native_boxes(syncnet_input._filled(points)), strict=True
    ):
        pad = int(half * 1.8)
        whole = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=110)
        my, mx = y + pad, x + pad
        part = whole[int(my - half) : int(my + half * 1.8), int(mx - half * 1.4) : int(mx + half * 1.4)]
        assert np.array_equal(crop, cv2.resize(part, (224, 224)))


def test_bad_faces_are_refused():
    images = np.zeros((3, 50, 50, 3), np.uint8)
    for points, crop, message in (
        (face68(3), "wide", "choose eat or native"),
        (np.full((3, 68, 2), np.nan), "eat", "none of 3 frames has a face"),
        (face68(2), "eat", "more frames"),
        (face68(4), "eat", "3 frames but landmarks of 4"),
        (np.zeros((3, 5, 2)), "eat", "68"),
    ):
        with pytest.raises(UserError, match=message):
            list(syncnet_input.face_crops(images, points, crop))


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


def test_a_clip_through_synthetic_weights(synthetic, monkeypatch):
    """Windows, their order, BGR and 0..255, against the network called window by window."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (8, 90, 100, 3), dtype=np.uint8)
    wave = (rng.integers(-9000, 9000, 8 * 640) / 32768).astype(np.float32)
    model = syncnet.load_syncnet(synthetic)
    monkeypatch.setattr(syncnet, "_BATCH", 2)
    points = face68(8)
    video, audio = syncnet.embed(model, syncnet_input.face_crops(frames, points), wave)
    assert video.shape == audio.shape == (3, 1024)  # 8 - 5
    faces = np.stack(list(syncnet_input.face_crops(frames, points)))[..., ::-1].transpose(3, 0, 1, 2)
    cepstra = syncnet_input.mfcc(wave * 32768).T
    i = 2
    with torch.no_grad():
        lips = model.video(torch.tensor(faces[None, :, i : i + 5].astype(np.float32)))
        sound = model.audio(torch.tensor(cepstra[None, None, :, 4 * i : 4 * i + 20], dtype=torch.float32))
    assert np.allclose(video[i], lips[0], atol=1e-4)
    assert np.allclose(audio[i], sound[0], atol=1e-4)

    monkeypatch.setattr(syncnet, "WEIGHTS", replace(syncnet.WEIGHTS, digest=""))
    extractor = syncnet.SyncNetExtractor(synthetic)
    assert extractor.settings() == {"weights": weights.sha256(synthetic)[:16], "crop": "eat", "reach": 15}
    curve = extractor(frames, {"landmarks68": points}, wave)["syncnet_curve"]
    assert np.allclose(curve, distance_curve(video, audio), atol=1e-4) and curve.shape == (31,)
    lost = {"landmarks68": np.full_like(points, np.nan)}
    for few, known, sound in (
        (frames[:5], {"landmarks68": points[:5]}, wave),
        (frames, lost, wave),
        (frames, lost, None),
    ):
        assert len(extractor(few, known, sound)["syncnet_curve"]) == 0
