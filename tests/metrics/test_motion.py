"""Metrics of motion: closed forms, frames without a face, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import EYE_CORNERS, LIPS, RIGID
from flowvqtalker.loading import load_face_model
from flowvqtalker_eval.metrics import motion


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return load_face_model()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------ coefficients


def test_expression_distance_is_the_mean_absolute_difference(rng) -> None:
    real = rng.standard_normal((7, 64))
    assert motion.expression_distance(real, real) == 0
    assert motion.expression_distance(real, real - 0.25) == pytest.approx(0.25)
    assert motion.expression_distance(real, real - 0.25, norm=2) == pytest.approx(0.25 * 8)


def test_pose_distance_takes_angles_and_lengths_apart() -> None:
    real = np.zeros((4, 6))
    made = real + np.array([0.1, -0.1, 0.1, 0.02, 0.04, -0.06])
    found = motion.pose_distance(real, made)
    assert found.angles == pytest.approx(math.degrees(0.1))
    assert found.translation == pytest.approx(0.04)
    turned = real + np.array([2 * math.pi - 0.1, 0, 0, 0, 0, 0])
    assert motion.pose_distance(real, turned).angles == pytest.approx(math.degrees(0.1) / 3)


def test_frames_without_a_face_are_left_out(rng) -> None:
    real = rng.standard_normal((5, 64))
    made = real + 0.5
    made[2] = np.nan
    real[4] = np.nan
    assert motion.expression_distance(real, made) == pytest.approx(0.5)
    assert math.isnan(motion.expression_distance(np.full((3, 64), np.nan), np.zeros((3, 64))))
    pose = rng.standard_normal((50, 6))
    assert np.allclose(motion.head_deviation(pose), motion.head_deviation(np.insert(pose, 9, np.nan, axis=0)))


@pytest.mark.parametrize("shapes", [((5, 64), (6, 64)), ((5, 63), (5, 63)), ((0, 64), (0, 64))])
def test_motion_that_does_not_fit_together_is_refused(shapes) -> None:
    with pytest.raises(UserError, match="pair the frames"):
        motion.expression_distance(*map(np.zeros, shapes))


def test_head_deviation_of_known_motion() -> None:
    t = np.arange(1000)
    pose = np.zeros((1000, 6))
    pose[:, 1] = 0.2 * np.sin(2 * np.pi * t / 100)
    assert motion.head_deviation(pose) == pytest.approx([0, math.degrees(0.2) / math.sqrt(2), 0])


def test_diversity(rng) -> None:
    take = rng.standard_normal((20, 6))
    moved = take + np.array([3, 4, 0, 0, 0, 0])
    assert motion.diversity([take] * 4) == 0
    assert motion.diversity([take, moved]) == pytest.approx(5)
    assert motion.diversity([take, moved[:12]]) == pytest.approx(5)  # what both have
    assert motion.diversity([np.zeros(9), np.ones(9), np.zeros(9)]) == pytest.approx(2 / 3)  # of closures (T,)
    assert math.isnan(motion.diversity([take]))


# ---------------------------------------------------------------------------------------------------------- vertices


def test_lip_vertex_error_of_a_known_displacement(face) -> None:
    real = np.repeat(motion.shape(face, np.zeros((1, 64))), 6, axis=0)
    eyes = np.linalg.norm(real[0, EYE_CORNERS[0]] - real[0, EYE_CORNERS[1]])
    made = real.copy()
    made[:, LIPS[3]] += np.array([0, 0.03, 0.04]) * eyes
    made[:, LIPS[8]] += np.array([0.01, 0, 0]) * eyes  # smaller, so it does not count
    made[:, RIGID[0]] += 1.0  # not of the lips
    assert motion.lip_vertex_error(real, real) == 0
    assert motion.lip_vertex_error(real, made) == pytest.approx(5.0, rel=1e-5)
    made[:3] = real[:3]
    assert motion.lip_vertex_error(real, made) == pytest.approx(2.5, rel=1e-5)
    assert motion.lip_vertex_error(7 * real, 7 * made) == pytest.approx(2.5, rel=1e-5)  # whatever the unit
    with pytest.raises(UserError, match="478"):
        motion.lip_vertex_error(real[:, :68], real[:, :68])


def test_shape_has_the_true_identity(face, rng) -> None:
    beta, alpha = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal(80).astype(np.float32)
    brute = face.mean.numpy() + np.einsum("i,ivc->vc", alpha, face.identity.numpy())
    brute = brute + np.einsum("tk,kvc->tvc", beta, face.expression.numpy())
    assert np.allclose(motion.shape(face, beta, alpha), brute, atol=1e-5)


def test_constant_and_uniform_motion_have_no_jitter(rng) -> None:
    still = np.repeat(rng.standard_normal((1, 10, 3)), 8, axis=0)
    assert motion.jitter(still) == motion.jitter(still, 3) == 0
    moving = still + np.arange(8)[:, None, None] * 0.3
    assert (motion.jitter(moving), motion.jitter(moving, 3)) == pytest.approx((0, 0), abs=1e-8)


def test_jitter_of_a_parabola_is_its_acceleration() -> None:
    t = np.arange(12) / 25
    points = np.zeros((12, 5, 2))
    points[:, :, 0] = (0.5 * 3.0 * t**2)[:, None]
    assert motion.jitter(points) == pytest.approx(3.0)
    assert motion.jitter(points, 3) == pytest.approx(0, abs=1e-6)
    points[6] = np.nan
    assert motion.jitter(points) == pytest.approx(3.0)
    assert math.isnan(motion.jitter(points[:2]))


# --------------------------------------------------------------------------------------------------------- landmarks


@pytest.fixture(scope="module")
def mesh(face) -> np.ndarray:
    """(40, 478, 3) landmarks of a face that turns, moves and grows in the picture plane, in pixels."""
    base = face.mean.numpy()[None, :, :2] * 150
    t = np.arange(40)[:, None]
    angle, size = 0.2 * np.sin(t / 5), 1 + 0.1 * np.cos(t / 7)
    x = size * (np.cos(angle) * base[..., 0] - np.sin(angle) * base[..., 1]) + 250 + 10 * np.sin(t / 6)
    y = size * (np.sin(angle) * base[..., 0] + np.cos(angle) * base[..., 1]) + 240 + 8 * np.cos(t / 4)
    return np.stack([x, y, np.zeros_like(x)], axis=-1)


def test_a_head_that_moves_in_the_plane_is_still_in_its_own_frame(mesh) -> None:
    assert motion.landmark_jitter(mesh) == pytest.approx({"face": 0, "bone": 0}, abs=1e-6)
    frame = motion.face_frame(mesh)
    assert np.linalg.norm(frame[:, 33] - frame[:, 263], axis=-1) == pytest.approx(np.ones(40))


def test_noise_over_bone_is_found_and_gaps_are_left_out(mesh, rng) -> None:
    noisy = mesh + rng.normal(0, 0.5, mesh.shape)
    noisy[17] = np.nan
    found = motion.landmark_jitter(noisy)
    # Second differences of noise of variance s² have variance 6 s² a coordinate; the length of two is Rayleigh's.
    sigma = 0.5 / 150 * math.sqrt(6) * 25**2  # the mean eye distance is 150 pixels
    assert found["face"] == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.12)
    assert found["bone"] == pytest.approx(found["face"], rel=0.2)
    with pytest.raises(UserError, match="no frame has a face"):
        motion.landmark_jitter(np.full((4, 478, 3), np.nan))


def test_eye_aspect_ratio_of_a_drawn_eye() -> None:
    points = np.zeros((2, 478, 2))
    for outer, upper, upper2, inner, lower2, lower in (motion.EYES[0], motion.EYES[1]):
        points[:, outer], points[:, inner] = (0, 0), (40, 0)
        points[0, upper], points[0, lower] = (12, -6), (12, 6)
        points[0, upper2], points[0, lower2] = (28, -6), (28, 6)
        points[1, upper], points[1, lower] = (12, 0), (12, 0)
        points[1, upper2], points[1, lower2] = (28, 0), (28, 0)
    assert motion.eye_aspect_ratio(points) == pytest.approx([0.3, 0.0])


# ------------------------------------------------------------------------------------------------------------ blinks


def closure(places: list[int], length: int) -> np.ndarray:
    """(T,) with a blink at each place."""
    t = np.arange(length)
    return 0.1 + sum((0.8 * np.exp(-0.5 * ((t - place) / 1.2) ** 2) for place in places), np.zeros(length))


def test_blinks_are_counted_in_the_time_in_which_they_can_be_seen() -> None:
    assert motion.blink_rate([closure([100, 300, 450], 512)]) == pytest.approx(3 / (500 / 25 / 60))
    # The same minutes in pieces of which each shows one blink less than it should at its ends.
    pieces = [closure([12], 24), closure([], 24), np.zeros(5)]
    assert motion.blink_rate(pieces) == pytest.approx(1 / (24 / 25 / 60))
    assert motion.blink_rate([closure([], 100)]) == 0
    assert math.isnan(motion.blink_rate([np.zeros(12)]))


def test_blinks_of_landmarks(mesh) -> None:
    points = np.repeat(mesh[:1], 200, axis=0)
    shut = closure([50, 120], 200)
    for eye in motion.EYES:
        _, upper, upper2, _, lower2, lower = eye
        for high, low in ((upper, lower), (upper2, lower2)):
            points[:, high, 1] = points[:, low, 1] - (1 - shut) * 12
    points[80] = np.nan
    assert motion.blink_rate([motion.eye_closure_of_landmarks(points)]) == pytest.approx(2 / (188 / 25 / 60))
    with pytest.raises(UserError, match="no frame has a face"):
        motion.eye_closure_of_landmarks(np.full((4, 478, 3), np.nan))
