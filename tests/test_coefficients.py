"""Motion files: round trips, other rates, and what wrong files say."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from flowvqtalker.coefficients import POSE_NAMES, Coefficients
from flowvqtalker.errors import UserError


def some(frames: int = 7, fps: float = 25.0) -> Coefficients:
    generator = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape).astype(np.float32)

    return Coefficients(draw(frames, 64), draw(frames, 6), draw(80), fps, draw(frames, 478, 3))


def test_round_trip(tmp_path):
    motion = some()
    motion.save(tmp_path / "a.npz")
    again = Coefficients.load(tmp_path / "a.npz")
    for name in ("expression", "pose", "identity", "landmarks"):
        np.testing.assert_array_equal(getattr(again, name), getattr(motion, name))
    assert again.fps == 25
    assert again.blendshapes is None
    with np.load(tmp_path / "a.npz") as content:
        assert {content[name].dtype for name in content.files} == {np.dtype(np.float32)}
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_csv_has_a_row_for_each_frame(tmp_path):
    motion = some()
    shapes = np.random.default_rng(1).random((7, 3)).astype(np.float32)
    motion.save_csv(tmp_path / "a.csv", ("jawOpen", "mouthSmileLeft", "browDownLeft"), shapes)
    with open(tmp_path / "a.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert list(rows[0]) == ["frame", "time", "jawOpen", "mouthSmileLeft", "browDownLeft", *POSE_NAMES]
    assert float(rows[5]["time"]) == 0.2
    assert float(rows[3]["jawOpen"]) == pytest.approx(float(shapes[3, 0]), abs=1e-5)
    assert float(rows[3]["tz"]) == pytest.approx(float(motion.pose[3, 5]), abs=1e-5)


def test_another_rate_is_interpolated():
    motion = some(30, fps=30.0)
    moved = motion.at(25)
    assert (len(moved), moved.fps) == (25, 25)
    np.testing.assert_allclose(moved.pose[5], motion.pose[6], atol=1e-5)
    assert motion.at(30) is motion


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pose": np.zeros((3, 6))}, "has no expression"),
        ({"expression": np.zeros((3, 50)), "pose": np.zeros((3, 6))}, r"expression has shape \(3, 50\), \(T, 64\)"),
        ({"expression": np.zeros((3, 64)), "pose": np.zeros((2, 6))}, r"pose has shape \(2, 6\)"),
        ({"expression": np.zeros((0, 64)), "pose": np.zeros((0, 6))}, "expression has shape"),
        ({"expression": np.full((3, 64), np.nan), "pose": np.zeros((3, 6))}, "not numbers"),
        ({"expression": np.array("x"), "pose": np.zeros((3, 6))}, "not an .npz file of motion"),
        (b"PK nonsense", "not an .npz file of motion"),
        (b"", "not an .npz file of motion"),
        (None, "does not exist"),
    ],
)
def test_wrong_files_are_named(tmp_path, arrays, message):
    path = tmp_path / "a.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays is not None:
        path.write_bytes(arrays)
    with pytest.raises(UserError, match=message) as caught:
        Coefficients.load(path)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_after_a_failure(tmp_path, monkeypatch):
    def full(*unused, **also):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match="No space left"):
        some().save(tmp_path / "a.npz")
    assert list(tmp_path.iterdir()) == []
