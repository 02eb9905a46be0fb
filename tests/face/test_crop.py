"""The crop: where it lies, how it is sampled."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from flowvqtalker.constants import CROP
from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import Crop, crop_box
from flowvqtalker.face.topology import EYES, MOUTH_CORNERS


def made_landmarks(
    across: float, down: float, turn: float = 0.0, centre: tuple[float, float] = (300, 200)
) -> np.ndarray:
    """Landmarks whose eyes are ``across`` apart, with the mouth ``down`` below, turned by ``turn`` radians."""
    landmarks = np.zeros((478, 3))
    landmarks[list(EYES[0]), 0] = -across / 2
    landmarks[list(EYES[1]), 0] = across / 2
    landmarks[list(MOUTH_CORNERS), 1] = down
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    landmarks[:, :2] = landmarks[:, :2] @ rotation.T + centre
    return landmarks


def ffhq_quad(landmarks: np.ndarray) -> np.ndarray:
    """Corners (upper left, lower left, lower right, upper right) by the formula of FFHQ's alignment."""
    left, right = (landmarks[list(eye), :2].mean(0) for eye in EYES)
    mouth = landmarks[list(MOUTH_CORNERS), :2].mean(0)
    eyes, eye_to_eye = (left + right) / 2, right - left
    eye_to_mouth = mouth - eyes
    x = eye_to_eye - np.flipud(eye_to_mouth) * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8)
    y = np.flipud(x) * [-1, 1]
    c = eyes + eye_to_mouth * 0.1
    return np.stack([c - x - y, c - x + y, c + x + y, c + x - y])


@pytest.mark.parametrize(("across", "down", "turn"), [(60, 70, 0), (60, 50, 0.3), (40, 80, -1.2), (60, 60, 3.0)])
def test_crop_is_that_of_ffhq(across: float, down: float, turn: float) -> None:
    landmarks = made_landmarks(across, down, turn)
    landmarks[list(MOUTH_CORNERS), 0] += 5  # not symmetric
    crop = crop_box(landmarks)
    corners = np.array([[0, 0], [0, CROP], [CROP, CROP], [CROP, 0]], dtype=float)
    assert np.allclose(crop.points(ffhq_quad(landmarks)), corners, atol=1e-6)
    assert np.allclose(crop.points_back(corners), ffhq_quad(landmarks), atol=1e-6)


def test_points_scale_depth() -> None:
    landmarks = made_landmarks(60, 70, 0.4)
    landmarks[:, 2] = np.arange(478)
    crop = crop_box(landmarks)
    moved = crop.points(landmarks.astype(np.float32))
    assert moved.dtype == np.float32
    assert np.allclose(moved[:, 2], landmarks[:, 2] * crop.scale, rtol=1e-5)
    assert np.allclose(moved[:, :2], crop.points(landmarks[:, :2]), atol=1e-3)
    assert np.allclose(crop.points_back(moved), landmarks, atol=1e-2)
    eyes = moved[list(EYES[1]), :2].mean(0) - moved[list(EYES[0]), :2].mean(0)
    assert eyes[1] == pytest.approx(0, abs=1e-3)  # upright
    assert eyes[0] == pytest.approx(60 * crop.scale, rel=1e-4)


def test_clip_has_one_crop_from_its_median() -> None:
    clip = np.stack([made_landmarks(60, 70, 0.0, (300 + shift, 200)) for shift in (-3, 0, 0, 1, 400)])
    clip[3] = np.nan
    assert np.allclose(crop_box(clip).matrix, crop_box(made_landmarks(60, 70)).matrix)


def test_crop_fails_with_a_reason() -> None:
    with pytest.raises(UserError, match="no face"):
        crop_box(np.full((2, 478, 3), np.nan))
    with pytest.raises(UserError, match=r"got \(468, 3\)"):
        crop_box(np.zeros((468, 3)))
    with pytest.raises(UserError, match="coincide"):
        crop_box(np.zeros((478, 3)))
    with pytest.raises(UserError, match="uint8"):
        crop_box(made_landmarks(60, 70)).apply(np.zeros((9, 9, 3)))


def test_whole_crop_is_the_picture(astronaut: np.ndarray) -> None:
    same = Crop(np.array([[1.0, 0, 0], [0, 1, 0]]))
    assert np.array_equal(same.apply(astronaut), astronaut)


def test_pixels_land_where_points_say() -> None:
    picture = np.zeros((400, 600, 3), np.uint8)
    cv2.circle(picture, (330, 180), 4, (255, 255, 255), -1)
    crop = crop_box(made_landmarks(60, 70, 0.35))
    image = crop.apply(picture)[..., 0].astype(float)
    y, x = np.mgrid[:CROP, :CROP] + 0.5
    centre = np.array([(image * x).sum(), (image * y).sum()]) / image.sum()
    assert np.allclose(centre, crop.points(np.array([330.5, 180.5])), atol=0.1)


def test_large_pictures_do_not_alias() -> None:
    stripes = np.zeros((4096, 4096, 3), np.uint8)
    stripes[:, ::2] = 255  # averages to grey; taking single pixels would give black, white or moiré
    crop = Crop(np.array([[0.125, 0, 0], [0, 0.125, 0]]))
    inner = crop.apply(stripes)[8:-8, 8:-8].astype(int)
    assert np.abs(inner - 128).max() <= 3
    turned = Crop(0.13 * np.array([[np.cos(0.2), np.sin(0.2), -700], [-np.sin(0.2), np.cos(0.2), 700]]))
    assert np.abs(turned.apply(stripes)[64:-64, 64:-64].astype(int) - 128).max() <= 12


def test_outside_is_mirrored_and_blurred() -> None:
    generator = np.random.default_rng(0)
    picture = generator.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    image = Crop(np.array([[1.0, 0, 256], [0, 1, 0]])).apply(picture)
    assert np.array_equal(image[:, 256:], picture[:, :256])
    assert image[:, :128].std() < 0.2 * picture.std()
    assert abs(image[:, :128].mean() - picture.mean()) < 5
