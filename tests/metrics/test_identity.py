"""CSIM: closed forms on arrays, a real face and its changes, no face."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.identity import FaceIdentity, cosine, csim, same_person
from flowvqtalker_eval.metrics.landmarks68 import Dlib68

pytest.importorskip("dlib")


def test_cosine() -> None:
    a = np.array([[1.0, 0], [0, 2], [3, 3], [np.nan, 0]])
    b = np.array([[2.0, 0], [3, 0], [-1, -1], [1, 1]])
    assert np.allclose(cosine(a, b), [1, 0, -1, np.nan], equal_nan=True)
    assert csim(a, b) == pytest.approx(0)
    assert csim(np.array([1.0, 0]), a) == pytest.approx((1 + 0 + np.sqrt(0.5)) / 3)
    assert np.isnan(csim(np.array([1.0, 0]), a[3:]))
    assert same_person(np.zeros(2), np.array([[0.1, 0], [0.7, 0], [np.nan, 0]])) == 0.5


def test_bad_embeddings_are_named() -> None:
    with pytest.raises(UserError, match=r"\(3, 4\) and \(3, 5\)"):
        cosine(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(UserError, match="3 and 2 frames"):
        csim(np.ones((3, 4)), np.ones((2, 4)))
    with pytest.raises(UserError, match="got 0"):
        FaceIdentity(every=0)


@pytest.fixture(scope="module")
def embedded(astronaut: np.ndarray) -> tuple[FaceIdentity, np.ndarray, np.ndarray]:
    """Six frames in runs of two: the same, mirrored, reduced; no face at all; no face in the first of a run."""
    wall = np.full_like(astronaut, 128)
    small = cv2.resize(cv2.resize(astronaut, (300, 300), interpolation=cv2.INTER_AREA), (512, 512))
    dark = (astronaut * 0.7).astype(np.uint8)
    frames = np.stack([astronaut, small, wall, wall, wall, dark])
    known = Dlib68()(frames, {})
    extractor = FaceIdentity(every=2)
    return extractor, frames, extractor(frames, known)["identity_embedding"]


def test_same_face_is_the_same_person(
    embedded: tuple[FaceIdentity, np.ndarray, np.ndarray], astronaut: np.ndarray
) -> None:
    extractor, _, found = embedded
    assert found.shape == (6, 128)
    assert np.isnan(found).all(1).tolist() == [False, False, True, True, True, False]
    assert np.array_equal(found[0], found[1])  # one embedding for the run
    portrait = extractor.portrait(astronaut)
    assert np.allclose(portrait, found[0], atol=1e-6)
    assert csim(portrait, found) > 0.97
    assert same_person(portrait, found) == 1.0


def test_no_face(embedded: tuple[FaceIdentity, np.ndarray, np.ndarray]) -> None:
    extractor, frames, _ = embedded
    known = {"landmarks68": np.full((2, 68, 2), np.nan, np.float32)}
    assert np.isnan(extractor(frames[2:4], known)["identity_embedding"]).all()
    with pytest.raises(UserError, match="no face found"):
        extractor.portrait(frames[2])
