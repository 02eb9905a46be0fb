"""Warnings about portraits that come out badly, and none about one that does not."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.crop import crop_box
from flowvqtalker.face.quality import covered_mouth, flaws, sharpness, shut_eyes
from flowvqtalker.face.tracker import FaceTracker

_OUTLINE = (227, 137, 177, 215, 136, 150, 149, 176, 148, 152, 377, 400, 378, 379, 365, 435, 401, 366, 447, 280, 197, 50)


@pytest.fixture(scope="module")
def found(astronaut):
    """The crop of the portrait, its landmarks and blendshapes."""
    with FaceTracker() as tracker:
        face = tracker.detect(astronaut)[0]
    crop = crop_box(face.landmarks)
    return crop.apply(astronaut), crop.points(face.landmarks), face.blendshapes


def masked(crop: np.ndarray, landmarks: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    mask = np.zeros(crop.shape[:2], np.float32)
    cv2.fillPoly(mask, [landmarks[list(_OUTLINE), :2].round().astype(np.int32)], 1)
    cloth = np.array(colour) * (1 + 0.06 * np.sin(np.arange(512) / 9))[:, None, None]
    mask = cv2.GaussianBlur(mask, (0, 0), 1.5)[..., None]
    return (crop * (1 - mask) + cloth * mask).astype(np.uint8)


def test_a_good_portrait_has_no_flaws(found):
    assert list(flaws(*found, 200)) == []


@pytest.mark.parametrize("colour", [(165, 200, 215), (45, 45, 50), (225, 225, 225)])
def test_masks_are_noticed(found, colour):
    crop, landmarks, blendshapes = found
    (warning,) = flaws(masked(crop, landmarks, colour), landmarks, blendshapes, 200)
    assert (
        warning % "a.png"
        == "something covers the mouth in a.png; lips are painted onto it; give an image that shows the mouth"
    )


def test_grey_and_dark_portraits_are_not_called_masked(found):
    crop, landmarks, _ = found
    grey = np.repeat(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[..., None], 3, 2)
    assert not covered_mouth(grey, landmarks)
    assert not covered_mouth((crop * 0.25).astype(np.uint8), landmarks)


def test_strong_blur_is_noticed_in_large_faces(found):
    crop, landmarks, blendshapes = found
    blurred = cv2.GaussianBlur(crop, (0, 0), 8)
    assert sharpness(blurred, landmarks) < 0.44 < sharpness(crop, landmarks)
    assert "blurred" in next(flaws(blurred, landmarks, blendshapes, 200))
    assert list(flaws(blurred, landmarks, blendshapes, 100)) == []  # that it is small is said already


def test_shut_eyes_are_noticed_by_lids_and_tracker_together(found):
    crop, landmarks, blendshapes = found
    shut, blinking = landmarks.copy(), blendshapes.copy()
    for upper, lower in ((159, 145), (386, 374)):
        shut[upper] = shut[lower]
    blinking[[arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]] = 0.6
    assert shut_eyes(shut, blinking)
    assert not shut_eyes(landmarks, blinking) and not shut_eyes(shut, blendshapes)
    assert any("are shut" in text for text in flaws(crop, shut, blinking, 200))
