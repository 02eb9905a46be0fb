"""Preparation of shards: timing, sound, synchrony, identities, resumption. A fake tracker stands in for MediaPipe."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest

from flowvqtalker import EMOTIONS
from flowvqtalker.data import lip_sync
from flowvqtalker.data.extract import PrepareConfig, Raw, choose_frames, resample
from flowvqtalker.data.identity import Describer, cluster, merge_known
from flowvqtalker.data.layouts import catalogue
from flowvqtalker.data.prepare import prepare
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.data.sources import read_audio, read_frames, read_timing
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import EYES, MOUTH_CORNERS
from flowvqtalker.io.video import VideoWriter

from ..conftest import babble, write_wav

SIDE = 160
# The toy pictures are flat, and few clips of noise say nothing about lips.
LENIENT: dict[str, Any] = {"min_sharpness": 0.0, "min_sync": -1.0}


def face(opening: float = 2.0, shift: float = 0.0) -> np.ndarray:
    """Landmarks of an upright face in a picture of 160 pixels."""
    points = np.random.default_rng(0).uniform([50, 50, -10], [110, 125, 10], (478, 3)).astype(np.float32)
    for indices, place in zip(
        (*EYES, *((i,) for i in MOUTH_CORNERS)), ((62, 70), (98, 70), (68, 108), (92, 108)), strict=True
    ):
        points[list(indices), :2] = place
    points[33], points[263] = (56, 70, 0), (104, 70, 0)
    points[13], points[14] = (80, 108 - opening / 2, 0), (80, 108 + opening / 2, 0)
    points[234], points[454] = (48, 80, 0), (112, 80, 0)
    points[:, 0] += shift
    return points


def openings(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.abs(np.convolve(rng.normal(size=count + 2), np.ones(3) / 3, "valid")) * 12 + 1


def write_video(path: Path, rate: int, lips: np.ndarray, sound: bool = True) -> None:
    """A clip whose corner tells the frame number and whose sound is as loud as the lips are open."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=rate)
        video.width = video.height = SIDE
        video.pix_fmt = "bgr0"
        track = container.add_stream("pcm_s16le", rate=16_000, layout="mono") if sound else None
        for number in range(len(lips)):
            pixels = np.full((SIDE, SIDE, 3), 90, np.uint8)
            pixels[:8, :8] = number
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if track is not None:
            times = np.arange(int(len(lips) / rate * 16_000)) / 16_000
            level = np.interp(times, np.arange(len(lips)) / rate, lips)
            noise = np.random.default_rng(1).normal(size=len(times)) * level * 100
            frame = av.AudioFrame.from_ndarray(noise.astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(track.encode(frame))
            container.mux(track.encode())


class FakeTracker:
    """Knows the opening of the lips of each clip by the clip's length; a black picture holds no face, one with a white
    corner two, and the face jumps where that is grey."""

    def __init__(self, by_length: dict[int, np.ndarray]) -> None:
        self.by_length, self.calls = by_length, 0

    @contextmanager
    def __call__(self, max_faces: int) -> Iterator[Any]:
        self.calls += max_faces == 1
        yield self

    def detect(self, image: np.ndarray) -> list[Any]:
        return [SimpleNamespace(area=area) for area in ((90, 80) if image[-1, -1].min() > 240 else (90, 20))]

    def track(self, frames: Iterable[np.ndarray]) -> Iterator[Any]:
        pixels = list(frames)
        lips = self.by_length.get(len(pixels), np.full(len(pixels), 2.0))
        for image, opening in zip(pixels, lips, strict=True):
            if image.max() == 0:
                yield None
            else:
                shift = 40.0 if 110 < image[-1, -1].max() < 140 else 0.0
                yield SimpleNamespace(landmarks=face(float(opening), shift), blendshapes=np.full(52, 0.25, np.float32))


def fake_fit(landmarks: np.ndarray, smooth: bool) -> Any:
    count = len(landmarks)
    seen = np.isfinite(landmarks).all((1, 2))
    expression = np.zeros((count, 64), np.float32)
    expression[:, 0] = np.nan_to_num(lip_sync.lip_opening(landmarks))
    residual = np.where(seen, 0.01, np.nan).astype(np.float32)
    return SimpleNamespace(
        identity=np.zeros(80, np.float32),
        expression=expression,
        pose=np.zeros((count, 6), np.float32),
        residual=residual,
    )


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, FakeTracker]:
    root = tmp_path / "data"
    (root / "clips").mkdir(parents=True)
    (root / "faces").mkdir()
    lips = {60: openings(60, 2), 75: openings(75, 3), 50: openings(50, 4), 45: openings(45, 5)}
    write_video(root / "clips" / "a.mkv", 30, lips[60])
    write_video(root / "clips" / "b.mkv", 25, lips[75])
    write_video(root / "clips" / "c.mkv", 25, lips[50], sound=False)
    write_video(root / "clips" / "d.mkv", 25, lips[45])
    (root / "clips" / "broken.mkv").write_bytes(b"no video")
    cv2.imwrite(str(root / "faces" / "p.png"), np.full((SIDE, SIDE, 3), 80, np.uint8))
    cv2.imwrite(str(root / "faces" / "black.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    with open(root / "clips.csv", "w", newline="") as file:
        rows = [
            ("a.mkv", "web", "Ann", "happy", "yes"),
            ("b.mkv", "HDTF", "Bob", "neutral", "yes"),
            ("c.mkv", "web", "web_unknown", "unlabelled", "yes"),
            ("d.mkv", "web", "web_unknown", "sad", "no"),
            ("broken.mkv", "web", "Ann", "sad", "yes"),
        ]
        csv.writer(file).writerows([("file", "source", "identity", "emotion", "speech"), *rows])
    with open(root / "faces.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "source", "identity"), ("p.png", "stills", "Cay"), ("black.png", "stills", "Dan")]
        )
    return root, FakeTracker(lips)


def test_prepare_makes_a_shard(tmp_path: Path, data: tuple[Path, FakeTracker]) -> None:
    root, tracker = data
    config = PrepareConfig(
        root, tmp_path / "shard", tmp_path / "none", tracks=tmp_path / "tracks", frames=4, min_native=100, **LENIENT
    )
    report = prepare(config, make_tracker=tracker, fit=fake_fit)
    assert (report.clips, report.images, report.people) == (4, 1, 1)
    assert sorted(report.dropped) == ["black.png", "broken.mkv"]
    assert report.dropped["black.png"] == ("no_face", "no face found")
    assert report.dropped["broken.mkv"][0] == "error"

    shard = Shard(tmp_path / "shard")
    assert list(shard.name) == ["a.mkv", "b.mkv", "c.mkv", "d.mkv", "p.png"]
    assert list(shard.length) == [50, 75, 50, 45, 1]
    assert [EMOTIONS[e] if e >= 0 else "" for e in shard.emotion] == ["happy", "natural", "", "sad", ""]
    assert list(shard.speech) == [True, True, False, False, False]
    assert list(shard.sound) == [True, True, False, True, False]
    assert list(shard.identity) == ["Ann", "Bob", "web_000", "web_000", "Cay"]
    assert [str(s) for s in shard.split] == [split_of(str(i)) for i in shard.identity]
    assert report.crops == len(shard.image_row) == 4 * 4 + 1
    assert np.isnan(shard.lag[2:]).all()
    assert (np.abs(shard.shifted) <= lip_sync.REACH).all()
    assert set(report.lags) == {"web", "HDTF"}
    # The crop of a.mkv: which frames they are can be read from the corner, which lies at its place in the crop.
    for number in shard.images_of(np.array([0])):
        row = int(shard.image_row[number] - shard.start[0])
        corner = shard.crop[0] @ [4, 4, 1]
        if (corner > 2).all():
            seen = shard.image(number)[int(corner[1]), int(corner[0])].mean()
            assert abs(seen - round(row * 30 / 25)) < 3
    assert shard.valid_mask(0).mean() > 0.3
    with open(tmp_path / "shard" / "dropped.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert listed[0] == {"file": "black.png", "reason": "no_face", "detail": "no face found"}
    assert [row["file"] for row in listed] == ["black.png", "broken.mkv"]

    # Again: raw tracks and parts are read, and only what could not be read is tried.
    calls = tracker.calls
    again = prepare(config, make_tracker=tracker, fit=fake_fit)
    assert again.crops == report.crops
    assert tracker.calls == calls + 1
    (tmp_path / "shard.parts" / "clip_a.mkv.fit.npz").unlink()
    prepare(config, make_tracker=tracker, fit=fake_fit)
    assert tracker.calls == calls + 2  # broken.mkv each time; a.mkv's raw track was kept


def test_prepare_of_a_plain_folder(tmp_path: Path) -> None:
    (tmp_path / "data" / "Eve").mkdir(parents=True)
    write_video(tmp_path / "data" / "Eve" / "x.mkv", 25, openings(30, 1))
    write_video(tmp_path / "data" / "y.mkv", 25, openings(30, 1))
    tracker = FakeTracker({})
    config = PrepareConfig(tmp_path / "data", tmp_path / "out", tmp_path / "none", **LENIENT)
    prepare(config, make_tracker=tracker, fit=fake_fit)
    assert list(Shard(tmp_path / "out").identity) == ["Eve", "y"]


def test_catalogue_refuses_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        catalogue(tmp_path / "none")
    with pytest.raises(UserError, match="no clips"):
        catalogue(tmp_path)
    (tmp_path / "clips.csv").write_text("file,source,identity,emotion,speech\nx.mp4,s,i,happy,yes\n")
    with pytest.raises(UserError, match=r"x\.mp4"):
        catalogue(tmp_path)
    (tmp_path / "clips.csv").write_text("file,source\nx.mp4,s\n")
    with pytest.raises(UserError, match="identity, emotion, speech"):
        catalogue(tmp_path)


def test_timing_and_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mkv", 30, np.ones(60))
    timing = read_timing(tmp_path / "v.mkv")
    assert len(timing.times) == 60
    assert timing.ticks == 50
    assert timing.size == (SIDE, SIDE)
    got = dict(read_frames(tmp_path / "v.mkv", {3, 41}))
    assert {number: int(image[2, 2].mean()) for number, image in got.items()} == {3: 3, 41: 41}


def test_audio_is_aligned_to_the_frames(tmp_path: Path) -> None:
    lips = np.zeros(50)
    lips[20] = 50  # loud around 0.8 s
    write_video(tmp_path / "v.mkv", 25, lips)
    for start, frame in ((0.0, 20), (0.4, 10), (-0.2, 25)):
        wave = read_audio(tmp_path / "v.mkv", start, 50)
        assert wave is not None
        assert wave.shape == (50 * SAMPLES,)
        energy = np.square(wave.astype(np.float64))
        centre = (energy * np.arange(len(wave))).sum() / energy.sum() / SAMPLES
        assert centre == pytest.approx(frame, abs=0.2)


def test_resampling_keeps_fast_movement() -> None:
    times = np.arange(90) / 30
    wave = np.sin(2 * np.pi * 4 * times).astype(np.float32)  # a blink lasts about as long as half a period
    raw = Raw(np.broadcast_to(wave[:, None, None], (90, 478, 3)).copy(), np.full((90, 52), 0.5, np.float32))
    raw.landmarks[40:45] = np.nan
    result, nearest, away = resample(raw, times, 75)
    wanted = np.arange(75) / 25
    truth = np.sin(2 * np.pi * 4 * wanted)
    linear = np.interp(wanted, times, wave)
    gone = np.isnan(result.landmarks[:, 0, 0])
    assert gone.sum() == 5
    assert np.abs(wanted[gone] - 42 / 30).max() < 0.1
    far = np.abs(wanted - 42 / 30) > 0.25
    error = np.abs(result.landmarks[far, 0, 0] - truth[far]).max()
    assert error < 0.35 * np.abs(linear[far] - truth[far]).max()
    assert nearest[5] == 6
    assert np.abs(away).max() <= 1 / 60 + 1e-6
    same, nearest, away = resample(Raw(raw.landmarks, raw.blendshapes), np.arange(90) / 25, 90)
    np.testing.assert_array_equal(same.landmarks, raw.landmarks)
    assert (nearest == np.arange(90)).all()
    assert np.abs(away).max() == 0


def speaking(collection: str, frames: int, lag: float, seed: int, noise: float = 1.0) -> lip_sync.LipClip:
    """Lips and sound features that follow each other ``lag`` frames apart."""
    rng = np.random.default_rng(seed)
    times = np.arange(-20, frames + 20)
    movement = np.convolve(rng.normal(size=len(times)), np.hanning(5), "same")
    columns = np.arange(round(frames * 3.2)) / 3.2
    direction = np.random.default_rng(99).normal(size=20)
    sound = np.interp(columns + lag, times, movement)[:, None] * direction
    sound = sound + noise * rng.normal(size=sound.shape)
    return lip_sync.LipClip(collection, 0.1 + 0.01 * movement[20 : 20 + frames], sound.astype(np.float16))


def test_lags_of_collections_and_clips() -> None:
    clips = [speaking("a", 60, 0.0, i) for i in range(20)] + [speaking("b", 60, 0.0, 30 + i) for i in range(20)]
    clips += [speaking("c", 50, 4.0, 60 + i) for i in range(8)]
    clips += [speaking("d", 150, -3.0, 80 + i) for i in range(3)] + [speaking("d", 150, 2.0, 90)]
    rng = np.random.default_rng(5)
    clips.append(lip_sync.LipClip("c", rng.normal(size=50), clips[45].sound))  # lips that are not the sound's
    found = lip_sync.align(clips)
    lags = np.array([f.lag for f in found])
    np.testing.assert_allclose(lags[:40], 0, atol=0.3)
    np.testing.assert_allclose(lags[40:48], 4, atol=0.3)
    np.testing.assert_allclose(lags[48:52], [-3, -3, -3, 2], atol=0.3)
    assert [f.own for f in found[48:52]] == [False, False, False, True]
    assert min(f.correlation for f in found[:52]) > 0.6
    assert abs(found[52].correlation) < 0.4
    assert all(f.known for f in found)


def test_lag_without_evidence_is_unknown() -> None:
    still = lip_sync.LipClip("a", np.full(60, 0.1), np.zeros((192, 20), np.float16))
    unseen = lip_sync.LipClip("b", np.full(60, np.nan), speaking("b", 60, 0, 1).sound)
    for found in lip_sync.align([still, unseen]):
        assert not found.known
        assert np.isnan(found.correlation)
        assert found.lag == 0
    assert lip_sync.align([]) == []


@pytest.mark.parametrize("frames", [-2, 0, 3, 0.5])
def test_shifted_audio(frames: float) -> None:
    wave = np.arange(1, 10 * SAMPLES + 1).astype(np.int16)
    moved = lip_sync.shift_audio(wave, frames)
    samples = round(frames * SAMPLES)
    assert moved.shape == wave.shape
    if samples >= 0:
        assert not moved[:samples].any()
        np.testing.assert_array_equal(moved[samples:], wave[: len(wave) - samples])
    else:
        assert not moved[samples:].any()
        np.testing.assert_array_equal(moved[:samples], wave[-samples:])


def test_sound_features_follow_the_sound() -> None:
    lips = np.repeat([1.0, 30.0], 25)
    wave = (np.random.default_rng(0).normal(size=50 * SAMPLES) * np.repeat(lips, SAMPLES) * 100).astype(np.int16)
    features = lip_sync.sound_features(wave).astype(np.float32)
    assert features.shape[1] == 20
    assert abs(len(features) - 160) <= 2
    assert features[90:].mean() - features[:70].mean() > 1


def test_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 128)) / 11
    owner = rng.permutation([0] * 20 + [1] * 10 + [2] * 5)
    points = centres[owner] + rng.normal(size=(35, 128)) * 0.01
    labels = cluster(points, 0.45)
    assert [int(np.unique(labels[owner == k]).item()) for k in range(3)] == [0, 1, 2]
    assert cluster(points[:1], 0.45).tolist() == [0]
    names = ["x" if o == 0 else f"y{i % 2}" if o == 1 else "z" for i, o in enumerate(owner)]
    assert [pair[:2] for pair in merge_known(names, points, 0.45)] == [("y0", "y1")]


def test_describer_gives_close_descriptors_for_one_face() -> None:
    describer = Describer()
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    other = cv2.resize(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    near = np.linalg.norm(describer(image, face()) - describer(np.roll(image, 5, 1), face(shift=5)))
    far = np.linalg.norm(describer(image, face()) - describer(other, face()))
    assert near < 0.3 * far


def test_chosen_frames_differ_and_are_good() -> None:
    rng = np.random.default_rng(0)
    part = {
        "expression": rng.normal(size=(100, 64)).astype(np.float32),
        "pose": np.zeros((100, 6), np.float32),
        "residual": np.full(100, 0.01, np.float32),
        "away": np.where(np.arange(100) % 5 == 0, 0, 0.008).astype(np.float32),
    }
    part["residual"][50] = np.nan
    part["expression"][30] = 20
    chosen = choose_frames(part, 6)
    assert len(set(chosen)) == 6
    assert (chosen % 5 == 0).all()
    assert 50 not in chosen
    assert 30 in chosen
    assert len(choose_frames(part, 50)) == 19


@pytest.mark.slow
def test_prepare_real_clips(astronaut: np.ndarray, tmp_path: Path) -> None:
    """With the real tracker and fit, in a worker process."""
    from flowvqtalker import weights  # imports torch, which the workers of test_layouts do without

    model = weights.folder() / "face_model.safetensors"
    (tmp_path / "data").mkdir()
    speech = write_wav(tmp_path / "speech.wav", babble(0.6))
    for clip in range(2):
        with VideoWriter(tmp_path / "data" / f"{clip}.mp4", speech) as writer:
            for shift in range(15):
                writer.write(np.roll(astronaut, (shift, 4 * clip * shift), (0, 1)))
    report = prepare(PrepareConfig(tmp_path / "data", tmp_path / "out", model, frames=3, min_sync=-1.0))
    shard = Shard(tmp_path / "out")
    assert (report.clips, report.dropped) == (2, {})
    assert report.crops == 6
    assert np.nanmean(shard.residual[:].astype(np.float32)) < 0.03
    for clip in range(2):
        points = shard.landmarks(shard.rows(clip))
        eyes = points[:, list(EYES[0]) + list(EYES[1]), :2].mean((0, 1))
        assert np.abs(eyes - [256, 240]).max() < 40
