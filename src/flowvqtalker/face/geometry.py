"""Geometry of landmarks: unprojection to 3D points, similarity alignment, rotations (numpy, batched)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flowvqtalker.face.model import CENTRE, FOCAL

__all__ = ["Floats", "align", "angles_of", "fill_gaps", "rodrigues", "rotation_vectors", "tangents", "unproject"]

Floats = npt.NDArray[np.floating]


def unproject(landmarks: Floats) -> Floats:
    """3D points whose pinhole projection is exactly the landmarks.

    MediaPipe's z is relative depth in the scale of x. The unit here is one pixel at depth FOCAL, so a landmark with
    relative depth z lies at depth FOCAL + z on the ray through its pixel. The alignment that follows divides out the
    scale.

    Arguments:
        landmarks: (..., 478, 3) in pixels of the crop.

    Returns:
        (..., 478, 3), units of one pixel at depth FOCAL.
    """
    depth = landmarks[..., 2:] + landmarks.dtype.type(FOCAL)
    rays = (landmarks[..., :2] - landmarks.dtype.type(CENTRE)) / landmarks.dtype.type(FOCAL)
    return np.concatenate([rays * depth, depth], axis=-1)


def fill_gaps(values: Floats, seen: npt.NDArray[np.bool_]) -> Floats:
    """Values (N, ...) of the N frames that were seen -> (T, ...) of all: gaps interpolated linearly, ends held.

    NaN if no frame was seen.
    """
    if not len(values):
        return np.full((len(seen), *values.shape[1:]), np.nan, values.dtype)
    times, known = np.arange(len(seen)), np.flatnonzero(seen)
    columns = values.reshape(len(values), -1).T
    filled = np.stack([np.interp(times, known, column) for column in columns], axis=1)
    return filled.reshape(len(seen), *values.shape[1:]).astype(values.dtype)


def align(points: Floats, target: Floats, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """Least-squares similarity from ``target`` to ``points`` (Umeyama 1991), batched.

    Arguments:
        points: (T, V, 3).
        target: (V, 3) or (T, V, 3).
        weights: (V,) non-negative.

    Returns:
        scale (T,), rotation (T, 3, 3), shift (T, 3) with points ≈ scale · target Rᵀ + shift.
    """
    weights = (weights / weights.sum()).astype(points.dtype)
    used = weights > 0
    weights, points, target = weights[used, None], points[:, used], target[..., used, :]
    centre, origin = (weights * points).sum(-2), (weights * target).sum(-2)
    moved, rest = points - centre[:, None], target - origin[..., None, :]
    covariance = np.swapaxes(moved * weights, -1, -2) @ rest
    left, singular, right = np.linalg.svd(covariance)
    sign = np.ones_like(singular)
    sign[:, 2] = np.sign(np.linalg.det(left) * np.linalg.det(right))
    rotation = (left * sign[:, None]) @ right
    scale = (singular * sign).sum(-1) / (weights * rest**2).sum((-1, -2))
    shift = centre - scale[:, None] * (rotation @ np.broadcast_to(origin, centre.shape)[..., None])[..., 0]
    return scale, rotation, shift


def rodrigues(vectors: Floats) -> Floats:
    """Rotation matrices (..., 3, 3) of rotation vectors (..., 3)."""
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    small = np.maximum(angle, 1e-8)
    x, y, z = np.moveaxis(vectors, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], axis=-1).reshape(*x.shape, 3, 3)
    turn: Floats = np.eye(3, dtype=vectors.dtype) + np.sin(angle) / small * cross
    turn += (1 - np.cos(angle)) / small**2 * (cross @ cross)
    return turn


def rotation_vectors(rotation: Floats) -> Floats:
    """Rotation vectors (..., 3) of matrices (..., 3, 3) with angles below pi."""
    cosine = np.clip((np.trace(rotation, axis1=-2, axis2=-1) - 1) / 2, -1, 1)
    angle = np.arccos(cosine)[..., None]
    axis = np.stack(
        [
            rotation[..., 2, 1] - rotation[..., 1, 2],
            rotation[..., 0, 2] - rotation[..., 2, 0],
            rotation[..., 1, 0] - rotation[..., 0, 1],
        ],
        axis=-1,
    )
    length = np.linalg.norm(axis, axis=-1, keepdims=True)
    # At small angles the arc cosine is inexact; the sine from the antisymmetric part is not.
    angle = np.where(length < 0.1, np.arcsin(np.minimum(length / 2, 1)), angle)
    vectors: Floats = axis / np.maximum(length, 1e-12) * angle
    return vectors


def tangents(shape: Floats) -> Floats:
    """Derivatives (7, V * 3) of ``shape`` (V, 3) by three rotations, three translations and a scaling."""
    x, y, z = shape.T
    zero, one = np.zeros_like(x), np.ones_like(x)
    columns = [
        *((zero, -z, y), (z, zero, -x), (-y, x, zero)),
        *((one, zero, zero), (zero, one, zero), (zero, zero, one)),
        (x, y, z),
    ]
    return np.stack([np.stack(column, axis=1).ravel() for column in columns])


def angles_of(rotation: Floats) -> Floats:
    """(pitch, yaw, roll) (..., 3) in radians of R = Rz Ry Rx; the inverse of :func:`model.rotation_matrix`."""
    pitch = np.arctan2(rotation[..., 2, 1], rotation[..., 2, 2])
    yaw = np.arcsin(np.clip(-rotation[..., 2, 0], -1, 1))
    roll = np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])
    return np.stack([pitch, yaw, roll], axis=-1)
