"""Aligned face crops: a similarity transform brings landmarks onto a template."""

from __future__ import annotations

from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["similarity", "warp"]

Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]


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
