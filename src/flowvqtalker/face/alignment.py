"""Aligned face crops: a similarity transform brings rigid landmarks onto a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import EYE_CORNERS, RIGID, VERTICES

__all__ = ["SIZE", "align_faces", "face_template", "similarity", "warp"]

#: Side in pixels of an aligned face.
SIZE = 112

# Distance between the outer eye corners and their height, as fractions of the crop.
_EYES, _DOWN = 0.5, 0.40

Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]


def face_template(face: FaceModel, size: int = SIZE) -> Tensor:
    """Positions (46, 2) of a mean face's rigid vertices (:data:`flowvqtalker.face.topology.RIGID`) in a crop."""
    mean = face.mean[:, :2]
    left, right = mean[EYE_CORNERS[0]], mean[EYE_CORNERS[1]]
    scale = _EYES * size / float((right - left).norm())
    return (mean[list(RIGID)] - (left + right) / 2) * scale + torch.tensor([0.5 * size, _DOWN * size])


def align_faces(frames: Sequence[Pixels] | Pixels, mesh: Floats, template: Floats, size: int = SIZE) -> Pixels:
    """Aligned faces (T, size, size, 3) of frames (T, H, W, 3); zeros where there is no face.

    Arguments:
        frames: uint8 RGB.
        mesh: (T, 478, 2 or 3) in pixels of the frames, NaN where there is no face.
        template: (46, 2) of :func:`face_template` for a crop of :data:`SIZE`; a larger ``size`` adds a border.

    Raises:
        UserError: if the shapes do not fit.
    """
    if len(frames) != len(mesh) or mesh.ndim != 3 or mesh.shape[1] != VERTICES:
        raise UserError(
            f"a mesh of shape ({len(frames)}, {VERTICES}, 3) is needed for as many frames, got {mesh.shape}"
        )
    if not len(frames):
        return np.zeros((0, size, size, 3), np.uint8)
    matrices = similarity(mesh[:, list(RIGID), :2], np.asarray(template) + (size - SIZE) / 2)
    return np.stack([warp(frame, matrix, size) for frame, matrix in zip(frames, matrices, strict=True)])


def similarity(points: Floats, places: Floats) -> npt.NDArray[np.float64]:
    """Similarity transforms (T, 2, 3) that bring points (T, K, 2) closest to places (K, 2).

    Least squares in complex numbers: place ≈ a · point + b. NaN points give a NaN matrix.
    """
    p = points[..., 0].astype(np.float64) + 1j * points[..., 1]
    q = np.asarray(places, np.float64) @ np.array([1, 1j])
    middle, target = p.mean(1, keepdims=True), q.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        a = (np.conj(p - middle) * (q - target)).sum(1) / (np.abs(p - middle) ** 2).sum(1)
    b = target - a * middle[:, 0]
    rows = np.stack([a.real, -a.imag, b.real, a.imag, a.real, b.imag], axis=1)
    return rows.reshape(-1, 2, 3)


def warp(frame: Pixels, matrix: npt.NDArray[np.float64], size: int) -> Pixels:
    """The square crop (size, size, 3) of a frame by a matrix from frame to crop pixels; zeros for a NaN matrix.

    Coordinates are continuous (a pixel's centre is at 0.5). Frames that shrink by more than half are averaged first.
    """
    linear, shift = matrix[:, :2], matrix[:, 2]
    if not np.isfinite(matrix).all() or abs(np.linalg.det(linear)) < 1e-8:
        return np.zeros((size, size, 3), np.uint8)
    factor = int(1 / max(float(np.hypot(*linear[:, 0])), 1e-6))
    if factor >= 2:
        low = np.clip(np.floor(_corners(matrix, size).min(1)).astype(int) - 2 * factor, 0, None)
        high = np.ceil(_corners(matrix, size).max(1)).astype(int) + 2 * factor
        part = frame[low[1] : max(high[1], 0), low[0] : max(high[0], 0)]
        rows, columns = part.shape[0] // factor, part.shape[1] // factor
        if rows and columns:
            part = part[: rows * factor, : columns * factor]  # whole blocks keep the scale exact
            frame = cast(Pixels, cv2.resize(part, (columns, rows), interpolation=cv2.INTER_AREA))
            shift = shift + linear @ low
            linear = linear * factor
    shift = shift + linear @ [0.5, 0.5] - 0.5  # OpenCV's origin is the centre of the first pixel
    whole = np.concatenate([linear, shift[:, None]], axis=1)
    return cast(Pixels, cv2.warpAffine(frame, whole, (size, size), flags=cv2.INTER_LINEAR))


def _corners(matrix: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    corners = inverse @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]], float)
    return cast("npt.NDArray[np.float64]", corners[:2])
