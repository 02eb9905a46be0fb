"""Faces aligned by a similarity transform of their landmarks."""

from __future__ import annotations

import numpy as np
import pytest

from flowvqtalker.face.alignment import similarity, warp


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
