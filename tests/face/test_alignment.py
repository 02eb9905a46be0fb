"""Faces aligned by a similarity transform of their landmarks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import align_faces, face_template, similarity, warp
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import RIGID


@pytest.fixture(scope="module")
def face() -> FaceModel:
    generator = torch.Generator().manual_seed(0)
    triangles = torch.zeros(2, 3, dtype=torch.int64)
    return FaceModel(
        mean=torch.randn(478, 3, generator=generator),
        identity=torch.zeros(80, 478, 3),
        expression=torch.randn(64, 478, 3, generator=generator),
        arkit=torch.randn(52, 65, generator=generator) * 0.1,
        triangles=triangles,
        mouth_triangles=triangles,
        eye_triangles=triangles,
    )


def test_similarity_finds_a_known_map_and_keeps_nan():
    points = np.random.default_rng(0).normal(size=(1, 7, 2)) * 30
    angle, scale, shift = 0.4, 1.7, np.array([5.0, -3.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity(points, points[0] @ turn.T + shift)
    assert np.allclose(matrix[0], np.concatenate([turn, shift[:, None]], 1))
    assert np.isnan(similarity(points * np.nan, points[0])).all()
    nothing = similarity(points, np.zeros_like(points[0]))[0]  # all points in one place
    assert not warp(np.full((9, 9, 3), 255, np.uint8), nothing, 8).any()


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0, 2.0])
def test_warp_keeps_places_at_every_scale(scale):
    side = round(112 / scale)
    y, x = np.mgrid[:side, :side] + 0.5
    frame = np.stack([x, y, x], 2) * (200 / side)
    matrix = np.array([[scale, 0, 0], [0, scale, 0]], float)
    small = warp(frame.astype(np.uint8), matrix, 112).astype(float)
    wanted = (np.arange(112) + 0.5) * 200 / 112
    assert np.abs(small[56, 5:-5, 0] - wanted[5:-5]).max() < 3
    assert np.abs(small[5:-5, 56, 1] - wanted[5:-5]).max() < 3


def test_aligned_faces_put_bone_points_on_the_template(face):
    template = face_template(face).numpy()
    mesh = np.zeros((2, 478, 3), np.float32)
    mesh[0, list(RIGID), :2] = template * 3 + [40, 20]
    mesh[1] = np.nan
    frame = np.zeros((400, 400, 3), np.uint8)
    x, y = (template[0] * 3 + [40, 20]).astype(int)
    frame[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = 255
    for size in (112, 144):
        crops = align_faces([frame, frame], mesh, template, size)
        assert crops.shape == (2, size, size, 3) and not crops[1].any()
        u, v = np.floor(template[0] + (size - 112) / 2).astype(int)
        if 0 <= u < size and 0 <= v < size and 0 <= x < 400 and 0 <= y < 400:
            assert crops[0, v, u].max() > 100
    with pytest.raises(UserError, match="mesh of shape"):
        align_faces([frame], mesh, template)
