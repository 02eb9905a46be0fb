"""Motion files: round trips, other rates, and what wrong files say."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Coefficients


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


def waving(fps: float, seconds: float = 2.0) -> Coefficients:
    """Smooth motion within a head's range."""
    time = np.arange(round(seconds * fps))[:, None] / fps
    wave = np.sin(2 * np.pi * time * np.linspace(0.2, 2.0, 70) + np.arange(70)).astype(np.float32)
    return Coefficients(wave[:, :64], wave[:, 64:] * 0.5, np.zeros(80, np.float32), fps)


def test_another_rate_keeps_the_frames_that_it_shares():
    motion = waving(30.0)
    moved = motion.at(25)
    assert (len(moved), moved.fps) == (50, 25)
    np.testing.assert_allclose(moved.pose[::5], motion.pose[::6], atol=1e-5)
    np.testing.assert_allclose(moved.expression[::5], motion.expression[::6], atol=1e-5)
    assert motion.at(30) is motion


@pytest.mark.parametrize("fps", [30.0, 60.0])
def test_more_frames_lie_on_the_same_smooth_curve(fps):
    slow, true = waving(25.0), waving(fps)
    fast = slow.at(fps)
    assert len(fast) == len(true)
    inside = slice(0, round(49 / 25 * fps))  # after the last frame the face holds
    np.testing.assert_allclose(fast.pose[inside], true.pose[inside], atol=0.02)
    np.testing.assert_allclose(fast.expression[inside], true.expression[inside], atol=0.04)
    assert fast.expression.max() <= slow.expression.max() + 1e-6  # no overshoot
    assert not np.diff(fast.pose[round(49 / 25 * fps) + 1 :], axis=0).any()


def test_between_the_frames_there_are_no_corners():
    slow, count = waving(25.0), 49 * 8
    fast = slow.at(200)
    times, frames = np.arange(count) / 200, np.arange(50) / 25
    straight = np.stack([np.interp(times, frames, column) for column in slow.expression.T], axis=1)

    def corner(x: np.ndarray) -> float:
        return float(np.abs(np.diff(x[:count], n=2, axis=0)).max())

    assert corner(fast.expression) < 0.5 * corner(straight)
    assert corner(fast.pose[:, :3]) < 1.5 * corner(waving(200.0).pose[:, :3])


def test_a_steady_turn_about_a_tilted_axis_stays_steady():
    """Angle by angle it would wobble."""
    from scipy.spatial.transform import Rotation

    axis = np.array([0.48, 0.6, 0.64])
    turns = Rotation.from_rotvec(np.linspace(-0.9, 0.9, 13)[:, None] * axis)
    angles = turns.as_euler("ZYX")[:, ::-1]
    pose = np.concatenate([angles, np.zeros((13, 3))], axis=1).astype(np.float32)
    moved = Coefficients(np.zeros((13, 64), np.float32), pose, np.zeros(80, np.float32)).at(60)
    there = Rotation.from_euler("ZYX", moved.pose[:28, 2::-1])
    expected = Rotation.from_rotvec(
        np.interp(np.arange(28) / 60, np.arange(13) / 25, np.linspace(-0.9, 0.9, 13))[:, None] * axis
    )
    assert (there * expected.inv()).magnitude().max() < 1e-4


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


def test_damaged_files_are_user_errors(tmp_path):
    """Truncated and mutated files load, or fail with a message; one escaped as an IndexError once."""
    some(2).save(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    random = np.random.default_rng(0)
    for number in range(300):
        content = bytearray(whole)
        if number < 50:
            del content[int(random.integers(len(whole))) :]
        # Most bytes are compressed values; the headers at both ends are where a change does most.
        for place in random.integers(0, [len(content) + 1, 200, 400][number % 3], 4):
            if place < len(content):
                content[int(place) if number % 3 < 2 else -int(place)] = int(random.integers(256))
        (tmp_path / "b.npz").write_bytes(content)
        with contextlib.suppress(UserError):
            Coefficients.load(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expression": np.float32(1)}, r"expression has shape \(\), \(T, 64\) is needed"),
        ({"identity": np.zeros(3)}, r"identity has shape \(3,\), \(80,\) is needed"),
        ({"fps": np.zeros(2)}, r"fps has shape \(2,\)"),
        ({"fps": np.float32(0)}, "fps is 0"),
        ({"landmarks": np.zeros((3, 478, 3))}, r"landmarks has shape \(3, 478, 3\), \(T, 478, 3\) is needed"),
    ],
)
def test_arrays_that_do_not_match_are_named(tmp_path, changes, message):
    arrays = {"expression": np.zeros((2, 64)), "pose": np.zeros((2, 6)), **changes}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        Coefficients.load(tmp_path / "a.npz")
