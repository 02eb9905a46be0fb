"""Landmarks, alignment and landmark distances: on a real face, closed forms, no face, bad input."""

from __future__ import annotations

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics import landmarks68
from flowvqtalker_eval.metrics.align import SIZE, TEMPLATE, AlignedFaces, align68, similarity, warp
from flowvqtalker_eval.metrics.landmarks68 import MESH68, Dlib68, Mesh68, find_dlib_model, mesh68
from flowvqtalker_eval.metrics.motion import landmark_distance

pytest.importorskip("dlib")


@pytest.fixture(scope="module")
def frames(astronaut: np.ndarray) -> np.ndarray:
    """The astronaut, her moved by (20, 8) pixels, and a wall: (3, 512, 512, 3)."""
    moved = np.roll(astronaut, (8, 20), (0, 1))
    return np.stack([astronaut, moved, np.full_like(astronaut, 128)])


@pytest.fixture(scope="module")
def found(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Landmarks and crops of those frames."""
    known = Dlib68()(frames, {})
    return {**known, **AlignedFaces()(frames, known)}


def moved_template(scale: float, turn: float, shift: tuple[float, float]) -> np.ndarray:
    rotation = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return TEMPLATE @ rotation.T + shift


# ---------------------------------------------------------------------------------------------------------- landmarks


def test_real_face(astronaut: np.ndarray, found: dict[str, np.ndarray]) -> None:
    points = found["landmarks68"]
    assert points.shape == (3, 68, 2)
    assert points.dtype == np.float32
    assert np.isnan(points[2]).all()
    assert np.linalg.norm(points[1] - points[0] - [20, 8], axis=1).mean() < 1.5
    left_eye, right_eye, mouth = points[0, 36:42].mean(0), points[0, 42:48].mean(0), points[0, 48:].mean(0)
    assert np.linalg.norm(left_eye - [203, 102]) < 4
    assert right_eye[0] - left_eye[0] > 25
    assert mouth[1] - left_eye[1] > 25


def test_face_is_the_largest_and_small_ones_are_found(astronaut: np.ndarray) -> None:
    small = cv2.resize(astronaut[0:256, 100:356], (400, 400))
    wide = np.full((600, 1400, 3), 90, np.uint8)
    wide[100:500, 900:1300] = small
    wide[300:556, 100:356] = astronaut[0:256, 100:356]
    points = Dlib68()(wide[None], {})["landmarks68"][0]
    assert points[:, 0].min() > 900


def test_mesh_stands_in(astronaut: np.ndarray, found: dict[str, np.ndarray]) -> None:
    from flowvqtalker.face.tracker import FaceTracker

    with FaceTracker() as tracker:
        mesh = tracker.detect(astronaut)[0].landmarks
    points = Mesh68()(astronaut[None], {"mesh": mesh[None]})["landmarks68"]
    assert points.shape == (1, 68, 2)
    aligned = align68(np.stack([points[0], found["landmarks68"][0]]))
    apart = np.linalg.norm(aligned[0] - aligned[1], axis=1)
    assert apart.mean() < 4  # of 128 pixels, on a turned head
    assert apart[36:48].mean() < 2
    assert len(set(MESH68.tolist())) == 68
    assert mesh68(mesh[:, :2]).shape == (68, 2)
    with pytest.raises(UserError, match=r"\(468, 3\)"):
        mesh68(mesh[:468])


def test_missing_or_wrong_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "shape_predictor_68_face_landmarks.dat"
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(MissingDependency, match=r"has sha256 .*expected fbdc2cb8"):
        find_dlib_model(name, tmp_path)
    monkeypatch.setattr(landmarks68.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'flowvqtalker\[eval\]'"):
        find_dlib_model(name, tmp_path / "nowhere")
    monkeypatch.setitem(__import__("sys").modules, "dlib", None)
    with pytest.raises(MissingDependency, match="dlib cannot be loaded"):
        Dlib68(tmp_path)(np.zeros((1, 64, 64, 3), np.uint8), {})


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="float32"):
        Dlib68()(np.zeros((1, 64, 64, 3), np.float32), {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\(1, 64, 64\)"):
        Dlib68()(np.zeros((1, 64, 64), np.uint8), {})


def test_extractors_travel_to_other_processes(frames: np.ndarray, found: dict[str, np.ndarray]) -> None:
    used = Dlib68()
    used.detect(np.zeros((64, 64), np.uint8))
    again = pickle.loads(pickle.dumps(used))(frames[:1], {})
    assert np.array_equal(again["landmarks68"], found["landmarks68"][:1])
    assert pickle.loads(pickle.dumps(AlignedFaces())).settings() == AlignedFaces().settings()


# ---------------------------------------------------------------------------------------------------------- alignment


def test_similarity_is_least_squares() -> None:
    points = moved_template(2.3, 0.4, (200, 150))[None] + np.random.default_rng(0).normal(0, 3, (4, 68, 2))
    for matrix, target in zip(similarity(points), points, strict=True):
        wanted = SimilarityTransform.from_estimate(TEMPLATE[27:45], target[27:45])
        assert np.allclose(matrix, wanted.params[:2], atol=1e-9)
    exact = similarity(moved_template(2.3, 0.4, (200, 150))[None])
    assert np.allclose(exact[0, :, 2], [200, 150])
    assert np.allclose(align68(moved_template(0.4, -1.0, (9, 5))[None]), TEMPLATE, atol=1e-4)
    assert np.isnan(align68(np.full((2, 68, 2), np.nan))).all()
    with pytest.raises(UserError, match=r"\(68, 2\)"):
        similarity(TEMPLATE)


def test_crop_shows_what_the_matrix_says(frames: np.ndarray) -> None:
    """A dot painted into the frame turns up where the alignment puts it."""
    points = moved_template(2.0, 0.3, (180, 120)).astype(np.float32)[None]
    frame = np.zeros((512, 512, 3), np.uint8)
    for x, y in points[0, [8, 30, 48]]:
        cv2.circle(frame, (round(float(x)), round(float(y))), 4, (255, 255, 255), -1)
    crop = warp(frame, similarity(points)[0])
    assert crop.shape == (SIZE, SIZE, 3)
    for x, y in align68(points)[0, [8, 30, 48]]:
        assert crop[round(float(y)), round(float(x)), 0] > 200
    assert (crop > 0).mean() < 0.02


def test_aligned_face_lies_on_the_template(found: dict[str, np.ndarray]) -> None:
    aligned, points = found["aligned"], found["aligned68"]
    assert aligned.dtype == np.uint8
    assert not aligned[2].any()
    assert np.isnan(points[2]).all()
    assert np.linalg.norm(points[0] - TEMPLATE, axis=1)[27:45].mean() < 5
    assert points[:2].min() > 0
    assert points[:2].max() < SIZE
    # Moving the picture moves nothing in the crop but the landmarks' own noise.
    assert np.abs(aligned[0].astype(int) - aligned[1]).mean() < 12
    # Predicted on the crop or transformed from the frame: the same face.
    assert np.linalg.norm(points[:2] - align68(found["landmarks68"])[:2], axis=-1).mean() < 2.5


def test_landmarks_of_the_frame_can_be_kept(frames: np.ndarray, found: dict[str, np.ndarray]) -> None:
    kept = AlignedFaces("frame")
    made = kept(frames, found)
    assert np.array_equal(made["aligned"], found["aligned"])
    assert np.array_equal(made["aligned68"], align68(found["landmarks68"]), equal_nan=True)
    assert kept.settings() != AlignedFaces().settings()
    assert kept.name != AlignedFaces().name


# ---------------------------------------------------------------------------------------------------------- distances


def test_shifted_face_has_no_distance() -> None:
    real = TEMPLATE[None].repeat(5, 0) + np.random.default_rng(0).normal(0, 2, (5, 68, 2))
    shifted = real + np.arange(10).reshape(5, 1, 2)
    assert landmark_distance(real, shifted) == pytest.approx((0, 0), abs=1e-12)


def test_distance_has_a_closed_form() -> None:
    """The points of the mouth move apart by k pixels: half of them left, half right, so that the mean stays."""
    real = TEMPLATE[None].repeat(3, 0)
    moved = real.copy()
    moved[:, 48:68:2, 0] += 3
    moved[:, 49:68:2, 0] -= 3
    mouth, face = landmark_distance(real, moved)
    assert mouth == pytest.approx(3)
    assert face == pytest.approx(3 * 20 / 68)
    scaled = (real - 64) * 1.1 + 64  # nothing is scaled back
    assert landmark_distance(real, scaled)[1] > 2


def test_frames_without_a_face_do_not_count_but_show() -> None:
    real, made = TEMPLATE[None].repeat(4, 0), TEMPLATE[None].repeat(4, 0)
    made[:, 48:68:2, 0] += 2
    made[:, 49:68:2, 0] -= 2
    real[0], made[2] = np.nan, np.nan
    made[1, 48:] = real[1, 48:]
    assert landmark_distance(real, made)[0] == pytest.approx(1.0)  # frames 1 and 3
    assert np.isnan(landmark_distance(np.full((2, 68, 2), np.nan), made[:2])).all()


def test_bad_distances_are_named() -> None:
    points = TEMPLATE[None].repeat(4, 0)
    with pytest.raises(UserError, match="pair the frames first"):
        landmark_distance(points, points[:3])
    with pytest.raises(UserError, match=r"\(4, 20, 2\)"):
        landmark_distance(points[:, 48:], points[:, 48:])
