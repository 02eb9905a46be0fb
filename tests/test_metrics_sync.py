"""Lips and sound: scores from embeddings, SyncNet's network and front end, mouth crops, the sync expert, its stage."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.data.shards import SAMPLES, Shard, ShardWriter
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.media import VideoWriter
from flowvqtalker.train.config import ConfigError, LoopConfig, load_yaml, to_dict
from flowvqtalker.train.loop import fit
from flowvqtalker_eval.evaluators import sync_training as stage
from flowvqtalker_eval.evaluators.mouths import (
    HEIGHT,
    WIDTH,
    MouthsConfig,
    cut_mouths,
    mouth_matrices,
    mouths_of,
    write_mouths,
)
from flowvqtalker_eval.evaluators.speech_clips import Spoken, StretchConfig, StretchDataset, load_spoken
from flowvqtalker_eval.evaluators.sync_expert import (
    MouthExtractor,
    SyncExpert,
    SyncExpertConfig,
    SyncExpertExtractor,
    band_energies,
    load_sync_expert,
    sync_expert_score,
)
from flowvqtalker_eval.metrics import syncnet, syncnet_input
from flowvqtalker_eval.metrics.sync import distance_curve, score_curve, sync_score

from .conftest import babble
from .test_data_shards import make_clip

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


# Mouths


def mesh(frames: int, scale: float = 1.0, angle: float = 0.0, centre: tuple[float, float] = (150, 120)) -> np.ndarray:
    """Landmarks (frames, 478, 3) of which only the corners of eyes and mouth are meant."""
    points = np.zeros((frames, 478, 3))
    for number, place in ((33, (-50, -60)), (263, (50, -60)), (61, (-25, 0)), (291, (25, 0))):
        points[:, number, :2] = place
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    points[..., :2] = scale * (points[..., :2] @ turn.T + centre)
    return points


def picture(size: tuple[int, int] = (300, 240), seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 255, (24, 30), dtype=np.uint8)
    return np.repeat(cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC)[..., None], 3, axis=2)


def test_mouth_crop_has_its_size_and_place():
    matrix = mouth_matrices(mesh(1))[0]
    # One eye distance (100 pixels) is the width; the corners lie a twentieth of it above the middle.
    assert np.allclose(matrix[:, :2], np.eye(2) * 0.96)
    assert np.allclose(matrix @ [150, 120, 1], [48, 24 - 0.05 * 96])
    crop = cut_mouths([picture()], mesh(1))[0]
    u, v = 70, 30  # the centre of a pixel of the crop, looked up in the frame by hand
    x, y = np.linalg.solve(matrix[:, :2], np.array([u + 0.5, v + 0.5]) - matrix[:, 2]) - 0.5
    whole = cv2.getRectSubPix(picture()[..., 0], (1, 1), (float(x), float(y)))
    assert abs(int(crop[v, u]) - int(whole[0, 0])) <= 2


def test_mouth_crop_does_not_depend_on_size_or_roll():
    plain = cut_mouths([picture()], mesh(1))[0].astype(float)
    large = cv2.resize(picture(), None, fx=4, fy=4, interpolation=cv2.INTER_LINEAR)
    assert np.abs(cut_mouths([large], mesh(1, 4.0))[0] - plain).mean() < 2
    turn = cv2.getRotationMatrix2D((150 - 0.5, 120 - 0.5), -20, 1)
    rolled = cv2.warpAffine(picture(), turn, (300, 240), flags=cv2.INTER_CUBIC)
    assert np.abs(cut_mouths([rolled], mesh(1, angle=math.radians(20)))[0] - plain).mean() < 3
    grey = picture()[..., 0]
    assert np.abs(cut_mouths([grey], mesh(1))[0] - plain).max() <= 1


def test_a_turned_head_keeps_its_scale():
    points = mesh(1)
    points[0, 33], points[0, 263] = (120, 60, 40), (180, 60, -40)  # 60 to the side, 80 in depth: 100
    assert np.hypot(*mouth_matrices(points)[0, 0, :2]) == pytest.approx(0.96)


def test_mouths_without_a_face_or_outside_of_the_frame():
    points = mesh(3)
    points[1] = np.nan
    points[2, :, 0] += 400
    crops = cut_mouths([picture()] * 3, points)
    assert crops[0].any() and not crops[1].any()
    assert crops.shape == (3, HEIGHT, WIDTH)
    assert np.array_equal(MouthExtractor()(np.stack([picture()] * 3), {"mesh": points})["mouth"], crops)
    with pytest.raises(UserError, match="same length"):
        cut_mouths([picture()], points)
    with pytest.raises(UserError, match="478"):
        mouth_matrices(points[:, :68])


@pytest.fixture
def shard(tmp_path) -> Path:
    """A shard of two clips with speech and one picture, and the clip of one of them on disk."""
    folder = tmp_path / "material"
    folder.mkdir()
    with VideoWriter(folder / "said.mp4") as writer:
        for t in range(6):
            writer.write(np.roll(picture(), 3 * t, axis=1))
    clips = [make_clip("said.mp4", 6, 0), make_clip("gone.mp4", 5, 1), make_clip("still.png", 1, 2, picture=True)]
    points = mesh(6).astype(np.float32)
    points[3] = np.nan
    crop = np.array([[1.5, 0, 11], [0, 1.5, 7]])
    points[..., :2] = points[..., :2] * 1.5 + crop[:, 2]
    points[..., 2] *= 1.5
    clips[0] = replace(clips[0], landmarks=points, crop=crop, split="train", lag=0.0)
    with ShardWriter(folder / "shard") as writer:
        for clip in clips:
            writer.add(clip)
    return folder / "shard"


def test_mouths_beside_a_shard(shard, tmp_path):
    with pytest.raises(UserError, match=r"data\.mouths"):
        mouths_of(Shard(shard))
    assert write_mouths(MouthsConfig(shard.parent, shard)) == 6
    stored = mouths_of(Shard(shard))
    assert list(stored) == [0]
    wanted = cut_mouths([np.roll(picture(), 3 * t, axis=1) for t in range(6)], mesh(6))
    assert np.abs(stored[0].astype(float) - wanted).mean() < 4  # the frames were compressed
    assert stored[0][3].any()  # a frame without a face takes its neighbours' place
    (tmp_path / "other").mkdir()
    cv2.imwrite(str(tmp_path / "other" / "a.png"), picture())
    with pytest.raises(UserError, match="no clip with speech"):
        write_mouths(MouthsConfig(tmp_path / "other", shard))


# The sync expert


def test_band_energies_follow_the_frames():
    wave = babble(1.0, seed=3).astype(np.float32)[: 24 * SAMPLES]
    columns = band_energies(wave)
    assert columns.shape == (96, 40)
    later = band_energies(wave[2 * SAMPLES :])
    inner = slice(2, 80)
    drift = columns[8:][inner] - later[inner]
    assert np.abs(drift - np.median(drift)).max() < 1e-4  # the same but for the level
    assert np.allclose(band_energies(0.1 * wave)[inner], columns[inner], atol=2e-2)
    click = np.zeros(10 * SAMPLES)
    click[5 * SAMPLES + 80] = 1  # the middle of the first column of frame 5
    assert int(band_energies(click).sum(1).argmax()) == 20
    assert band_energies(np.zeros(100)).shape == (0, 40)
    assert np.isfinite(band_energies(np.zeros(SAMPLES))).all()
    with pytest.raises(UserError, match="shape"):
        band_energies(np.zeros((2, 640)))


def test_expert_embeds_windows_of_five_frames():
    torch.manual_seed(0)
    expert = SyncExpert(TINY).eval()
    rng = np.random.default_rng(0)
    mouths = rng.integers(1, 255, (13, HEIGHT, WIDTH), dtype=np.uint8)
    wave = rng.normal(size=12 * SAMPLES) * 0.1
    video, audio = expert.embed(mouths, wave)
    assert video.shape == audio.shape == (8, 16)
    assert np.allclose(np.linalg.norm(video, axis=1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(audio, axis=1), 1, atol=1e-5)
    for batch in (1, 3):
        again = expert.embed(mouths, wave, batch)
        assert np.allclose(again[0], video, atol=1e-5) and np.allclose(again[1], audio, atol=1e-5)
    changed = mouths.copy()
    changed[7] = 255 - changed[7]
    differs = np.abs(expert.embed(changed, wave)[0] - video).max(1) > 1e-4
    assert differs.tolist() == [False] * 3 + [True] * 5
    changed[7] = 0  # no face
    assert np.isnan(expert.embed(changed, wave)[0]).all(1).tolist() == differs.tolist()
    lighter = np.clip(mouths * 0.5 + 60, 0, 255).astype(np.uint8)
    assert np.abs(expert.embed(lighter, wave)[0] - video).max() < 0.15
    with pytest.raises(UserError, match="5 frames or more, this clip has 4"):
        expert.embed(mouths[:4], wave)
    with pytest.raises(ValueError, match="mouths of shape"):
        expert.video(torch.zeros(1, 4, HEIGHT, WIDTH))
    with pytest.raises(ValueError, match="sound of shape"):
        expert.audio(torch.zeros(1, 20, 80))


def test_expert_from_a_folder_of_weights(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="train sync"):
        load_sync_expert(tmp_path)
    torch.manual_seed(0)
    expert = SyncExpert(TINY).eval()
    state = {k: v.contiguous() for k, v in expert.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "raw")
    weights.add(tmp_path / "raw", "sync", path=tmp_path, config=to_dict(TINY), data="nothing", steps=0)
    extractor = SyncExpertExtractor(tmp_path)
    assert extractor.settings()["weights"] == weights.manifest(tmp_path)["sync.safetensors"].sha256
    rng = np.random.default_rng(0)
    mouths = rng.integers(1, 255, (9, HEIGHT, WIDTH), dtype=np.uint8)
    wave = (rng.normal(size=9 * SAMPLES) * 0.1).astype(np.float32)
    found = extractor({"mouth": mouths}, wave)
    video, audio = expert.embed(mouths, wave)
    assert np.allclose(found["sync_expert_video"], video, atol=5e-3)  # stored as float16
    assert np.allclose(found["sync_expert_audio"], audio, atol=5e-3)
    assert extractor({"mouth": mouths}, None)["sync_expert_video"].shape == (0, 16)
    assert extractor({"mouth": mouths[:3]}, wave)["sync_expert_audio"].shape == (0, 16)


# The stage


def spoken(number: int, frames: int = 40) -> Spoken:
    """A mouth that is as dark as the sound is loud."""
    rng = np.random.default_rng(number)
    loud = np.repeat(rng.uniform(0, 1, frames // 2), 2)
    mouths = np.full((frames, HEIGHT, WIDTH), 160, np.uint8)
    for t in range(frames):
        cv2.ellipse(mouths[t], (48, 22), (18, 1 + int(14 * loud[t])), 0, 0, 360, 40, -1)
    gain = np.interp(np.arange(frames * SAMPLES) / SAMPLES - 0.5, np.arange(frames), loud)
    wave = (rng.normal(size=frames * SAMPLES) * 6000 * (0.02 + gain)).clip(-32768, 32767).astype(np.int16)
    energies = band_energies(wave / 32768).astype(np.float16)
    return Spoken(mouths, wave, energies, f"person {number % 3}")


LOOP = LoopConfig(steps=30, batch_size=4, lr=3e-3, ema=0.5, device="cpu", log_every=10, save_every=30, validate_every=0)


def test_items_are_pure_functions_and_keep_lips_and_sound_together():
    clips = [spoken(n) for n in range(4)]
    plain = StretchDataset(clips, StretchConfig(frames=12, augment=False), seed=5)
    for i in (0, 7, 123456):
        item = plain[i]
        where = [
            (n, t)
            for n, clip in enumerate(clips)
            for t in range(29)
            if np.array_equal(clip.mouths[t : t + 12], item["mouths"].numpy())
        ]
        sounds = [clips[n].energies[4 * t : 4 * t + 48].astype(np.float32) for n, t in where]
        assert any(np.array_equal(sound, item["sound"].numpy()) for sound in sounds)
    varied = StretchDataset(clips, StretchConfig(frames=12), seed=5)
    a, b = varied[3], varied[3]
    assert torch.equal(a["mouths"], b["mouths"]) and torch.equal(a["sound"], b["sound"])
    assert a["mouths"].shape == (12, HEIGHT, WIDTH) and a["mouths"].dtype == torch.uint8
    assert torch.isfinite(a["sound"]).all()
    with pytest.raises(UserError, match="no clips"):
        StretchDataset([], StretchConfig())
    with pytest.raises(ConfigError, match="frames must be at least"):
        StretchConfig(frames=5)


def test_sound_can_be_delayed_by_a_known_offset():
    """An expert that reads loudness from both tells the offset that was made, with its sign."""
    clip = spoken(1, 60)

    class Loudness(SyncExpert):
        def video(self, mouths):
            return self._point((mouths < 80).float().mean((2, 3)).unfold(1, 5, 1))

        def audio(self, energies):
            return self._point((energies.float().mean(2).exp()).unfold(1, 20, 4).unflatten(-1, (5, 4)).mean(-1))

        def _point(self, values):
            return torch.nn.functional.normalize(values - values.mean(-1, keepdim=True), dim=-1)

    expert = Loudness(TINY)
    for late in (-8, -1, 0, 5):
        assert stage.offset_scores(expert, clip, late).offset == -late


def test_a_few_steps_lower_the_loss(tmp_path):
    clips = [spoken(n) for n in range(6)]
    config = stage.Config(expert=TINY, stretch=StretchConfig(frames=22, augment=False), loop=LOOP, slack_from=20)
    made = stage.SyncStage(config, clips, clips[:3])
    batch = torch.utils.data.default_collate([made.data[i] for i in range(900, 908)])
    before = float(made.loss("expert", batch, 0)[0].detach())
    results = fit(made, LOOP, tmp_path)
    after = float(made.loss("expert", batch, 0)[0].detach())
    assert after < 0.7 * before
    assert results["clips"] == 3
    assert results["chance"] == pytest.approx(3 / 31)
    assert results["found"] == pytest.approx(1 - results["miss"])
    assert results["found_added"] > results["chance"]
    assert results["confidence"] > results["confidence_exchanged"]
    weights.add(tmp_path, "sync", path=tmp_path / "weights")
    loaded = load_sync_expert(tmp_path / "weights")
    assert loaded.config == TINY
    score = sync_expert_score(*loaded.embed(clips[0].mouths, clips[0].sound()))
    assert abs(score.offset) <= 1


def test_neighbouring_windows_are_no_negatives():
    config = stage.Config(expert=TINY, stretch=StretchConfig(frames=22), loop=LOOP)
    made = stage.SyncStage(config, [spoken(0)], [])
    torch.manual_seed(0)
    one = torch.nn.functional.normalize(torch.randn(2, 18, 16), dim=-1)
    loss, logs = made._contrast(one, one)
    assert float(logs["found"]) == 1
    near = one.clone()
    near[:, 1] = one[:, 0]  # two equal neighbours cost nothing in the contrast of either
    other = one.clone()
    other[:, 9] = one[:, 0]
    assert float(made._contrast(near, near)[1]["within"]) < float(made._contrast(other, other)[1]["within"])
    assert torch.isfinite(loss)


def test_slack_takes_the_best_shift_of_each_stretch():
    torch.manual_seed(0)
    video = torch.nn.functional.normalize(torch.randn(3, 20, 16), dim=-1)
    audio = torch.stack([torch.roll(one, k, 0) for one, k in zip(video, (-2, 0, 1), strict=True)])
    lips, sound = stage._aligned(video, audio, 2)
    assert lips.shape == sound.shape == (3, 16, 16)
    assert torch.equal(lips, sound)
    assert torch.equal(lips, video[:, 2:18])
    assert stage._aligned(video, audio, 0) == (video, audio)
    far = torch.stack([torch.roll(one, 5, 0) for one in video])  # beyond the slack
    assert not torch.equal(*stage._aligned(video, far, 2))
    with pytest.raises(ConfigError, match="slack must be between 0 and 5"):
        stage.Config(stretch=StretchConfig(frames=22), slack=6)


def test_build_reads_a_shard_and_says_what_is_missing(shard, tmp_path):
    config = load_yaml(stage.Config, Path(__file__).parents[1] / "configs" / "sync.yaml")
    assert config.loop.steps > 0
    with pytest.raises(UserError, match=r"index\.npz"):
        stage.build(stage.Config(shards=(tmp_path / "none",)))
    with pytest.raises(ConfigError, match="no shards"):
        stage.Config(shards=())
    write_mouths(MouthsConfig(shard.parent, shard))
    clips = load_spoken([shard], "train", 1)
    assert len(clips) == 1
    assert len(clips[0].mouths) == 4  # one frame at each end is cut off
    assert len(clips[0].wave) == 4 * SAMPLES and clips[0].energies.shape == (16, 40)
    assert np.array_equal(clips[0].wave, np.round(Shard(shard).wave(0) * 32768)[SAMPLES:-SAMPLES])
    assert load_spoken([shard], "val", 1) == []
