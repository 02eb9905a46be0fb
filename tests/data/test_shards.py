"""Shards, splits and orders of data."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from flowvqtalker.data.shards import LAGS, SAMPLES, Clip, Shard, ShardWriter
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError


def make_clip(name: str, length: int, seed: int, is_image: bool = False, images: tuple[int, ...] = ()) -> Clip:
    rng = np.random.default_rng(seed)
    landmarks = rng.uniform(-100, 600, (length, 478, 3)).astype(np.float32)
    if length > 2:
        landmarks[1] = np.nan
    smooth = cv2.resize(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8), (512, 512))
    jpeg = cv2.imencode(".jpg", smooth, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return Clip(
        name=name,
        source="test",
        identity=f"person {seed}",
        split=split_of(f"person {seed}"),
        emotion=seed - 1,
        speech=not is_image,
        is_image=is_image,
        identity_shape=rng.normal(size=80).astype(np.float32),
        expression=rng.normal(size=(length, 64)).astype(np.float32),
        pose=rng.normal(size=(length, 6)).astype(np.float32),
        blendshapes=rng.uniform(size=(length, 52)).astype(np.float32),
        landmarks=landmarks,
        residual=rng.uniform(size=length).astype(np.float32),
        audio=None if is_image else rng.integers(-9999, 9999, length * SAMPLES).astype(np.int16),
        crop=np.array([[1.0, 0, 5], [0, 1.0, 7]]),
        valid=np.array([[128, 0], [512, 0], [512, 512], [128, 512]], np.float32),
        native=300.0 + seed,
        images=[(frame, jpeg) for frame in images],
    )


def test_round_trip(tmp_path: Path) -> None:
    photo = make_clip("b", 1, 1, is_image=True, images=(0,))
    clips = [make_clip("a", 5, 0, images=(0, 3)), photo, make_clip("c", 9, 2)]
    with ShardWriter(tmp_path / "shard", about="made by a test") as writer:
        for clip in clips:
            writer.add(clip)
        assert not (tmp_path / "shard").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["shard"]
    shard = pickle.loads(pickle.dumps(Shard(tmp_path / "shard")))
    assert len(shard) == 3
    assert shard.about == "made by a test"
    assert list(shard.name) == ["a", "b", "c"]
    for number, clip in enumerate(clips):
        rows = shard.rows(number)
        np.testing.assert_array_equal(shard.expression[rows], clip.expression)
        np.testing.assert_array_equal(shard.pose[rows], clip.pose)
        np.testing.assert_allclose(shard.blendshapes[rows], clip.blendshapes, atol=1e-3)
        np.testing.assert_allclose(shard.landmarks(rows), clip.landmarks, atol=1 / 64 + 1e-4)
        np.testing.assert_array_equal(shard.identity_shape[number], clip.identity_shape)
        expected = np.zeros(len(clip.pose) * SAMPLES) if clip.audio is None else clip.audio / 32768
        np.testing.assert_array_equal(shard.wave(number), expected.astype(np.float32))
        assert shard.native[number] == clip.native
    assert list(shard.image_clip) == [0, 0, 1]
    assert list(shard.image_row) == [0, 3, 5]
    decoded = cv2.imdecode(np.frombuffer(clips[1].images[0][1], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(shard.image(2), decoded)
    assert shard.image(2, 64).shape == (64, 64, 3)
    assert list(shard.images_of(np.array([0]))) == [0, 1]
    assert list(shard.select(is_image=False, min_length=6)) == [2]
    assert list(shard.select("val")) == [i for i in range(3) if split_of(f"person {i}") == "val"]


def test_valid_mask(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s") as writer:
        writer.add(make_clip("a", 3, 0))
    mask = Shard(tmp_path / "s").valid_mask(0)
    assert not mask[:, :127].any()
    assert mask[:, 129:].all()
    assert Shard(tmp_path / "s").valid_mask(0, 128).mean() == pytest.approx(0.75, abs=0.02)


def test_a_failure_leaves_the_old_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s") as writer:
        writer.add(make_clip("old", 3, 0))
    bad = make_clip("bad", 3, 1)
    bad.expression[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"), ShardWriter(tmp_path / "s") as writer:
        writer.add(bad)
    assert list(Shard(tmp_path / "s").name) == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.npz"):
        Shard(tmp_path)
    with ShardWriter(tmp_path / "s") as writer:
        writer.add(make_clip("a", 3, 0))
    (tmp_path / "s" / "landmarks.npy").unlink()
    shard = Shard(tmp_path / "s")
    assert shard.expression.shape == (3, 64)
    with pytest.raises(UserError, match=r"landmarks\.npy"):
        shard.landmarks(0)


def test_splits_are_by_identity() -> None:
    names = [f"person {i}" for i in range(2000)]
    counts = Counter(map(split_of, names))
    assert 130 < counts["val"] < 270
    assert counts["val"] + counts["train"] == 2000
    assert split_of("person 1") == split_of("person 1")


def test_speech_is_moved_by_lags_that_are_sure(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    with ShardWriter(path) as writer:
        for number in range(3):
            writer.add(make_clip(f"clip {number}", 12, number))
    shard = Shard(path)
    assert not shard.lags.any()
    np.savez(path / LAGS, offset=np.array([2, -1, 3]), confidence=np.array([0.3, 0.3, 0.05], np.float32))
    shard = Shard(path)
    assert shard.lags.tolist() == [2, -1, 0]
    for number, late in enumerate((2, -1, 0)):
        moved, stored = shard.wave(number), shard.wave(number, stored=True)
        assert moved.shape == stored.shape
        for frame in range(12):
            there = 0 <= frame - late < 12
            want = stored[(frame - late) * 640 : (frame - late + 1) * 640] if there else np.zeros(640)
            assert np.array_equal(moved[frame * 640 : (frame + 1) * 640], want)
    np.savez(path / LAGS, offset=np.zeros(5, np.int64), confidence=np.zeros(5, np.float32))
    with pytest.raises(UserError, match="of another shard"):
        _ = Shard(path).lags
