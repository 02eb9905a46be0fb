"""SSIM (Wang et al. 2004) and PSNR of pictures in 8-bit RGB, many at a time.

Two windows, several hundredths apart, so that the setting is printed with each number:

- ``uniform7``: 7x7 box, sample covariance: what ``skimage.metrics.structural_similarity(channel_axis=-1)`` computes by
  default, and with it the tables of this field.
- ``gaussian11``: 11x11 Gaussian, σ = 1.5, covariance of the population: the paper that defined SSIM.

Both take K1 = 0.01, K2 = 0.03, L = 255, the mean over windows inside the picture and then over the channels.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["Window", "psnr", "ssim"]

Window = Literal["uniform7", "gaussian11"]

_STRIP = 32
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

Pixels = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float64]


def _batches(real: Pixels, fake: Pixels, smallest: int) -> tuple[Pixels, Pixels]:
    """Both as (n, H, W, 3)."""
    real, fake = np.asarray(real), np.asarray(fake)
    for name, picture in (("first", real), ("second", fake)):
        if picture.ndim not in (3, 4) or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise UserError(
                f"the {name} pictures must be RGB of shape (H, W, 3) or (n, H, W, 3) and type uint8, "
                f"got {picture.shape} {picture.dtype}"
            )
    if real.shape != fake.shape:
        raise UserError(f"pictures to compare must agree in number and size, got {real.shape} and {fake.shape}")
    if min(real.shape[-3:-1]) < smallest:
        raise UserError(f"pictures must measure at least {smallest} pixels, got {real.shape[-2]}x{real.shape[-3]}")
    return (real[None], fake[None]) if real.ndim == 3 else (real, fake)


def ssim(real: Pixels, fake: Pixels, window: Window = "uniform7") -> Scores:
    """SSIM of pairs of pictures.

    Arguments:
        real, fake: (n, H, W, 3) or (H, W, 3) uint8 RGB.
        window: see the module.

    Returns:
        (n,) in [-1, 1].

    Raises:
        UserError: if shapes or types do not fit, or a picture is smaller than the window.
    """
    if window not in ("uniform7", "gaussian11"):
        raise UserError(f"SSIM window {window!r}: choose uniform7 or gaussian11")
    real, fake = _batches(real, fake, 7 if window == "uniform7" else 11)
    one = _uniform if window == "uniform7" else _gaussian
    return np.array([one(a, b) for a, b in zip(real, fake, strict=True)], np.float64)


def _uniform(a: Pixels, b: Pixels) -> float:
    """The sums over 49 pixels and n² times the covariances are exact in 32-bit integers: only the quotient rounds.

    In strips of rows that stay in the cache: three times as fast on 512 pixels.
    """
    c1, c2 = np.float32(49**2 * _C1), np.float32(49 * 48 * _C2)
    total = 0.0
    for top in range(0, len(a) - 6, _STRIP):
        rows = slice(top, top + _STRIP + 6)
        x, y = a[rows].astype(np.float32), b[rows].astype(np.float32)
        sx, sy, sxx, syy, sxy = map(_box, (x, y, x * x, y * y, x * y))
        cross, squares = sx * sy, sx * sx + sy * sy
        covariance, variances = 49 * sxy - cross, 49 * (sxx + syy) - squares
        similar = (np.float32(2) * cross + c1) * (np.float32(2) * covariance + c2)
        similar /= (squares + c1) * (variances + c2)
        total += float(similar.sum(dtype=np.float64))
    return total / float((a.shape[0] - 6) * (a.shape[1] - 6) * 3)


def _box(x: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Sums over 7x7 pixels inside the picture; below 2^24, so float32 holds them exactly."""
    return np.asarray(cv2.boxFilter(x, cv2.CV_32F, (7, 7), normalize=False)[3:-3, 3:-3].astype(np.int32))


def _gaussian(a: Pixels, b: Pixels) -> float:
    tap = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    tap /= tap.sum()
    x, y = a.astype(np.float64), b.astype(np.float64)
    ux, uy, uxx, uyy, uxy = (cv2.sepFilter2D(p, cv2.CV_64F, tap, tap)[5:-5, 5:-5] for p in (x, y, x * x, y * y, x * y))
    similar = (2 * ux * uy + _C1) * (2 * (uxy - ux * uy) + _C2)
    similar /= (ux * ux + uy * uy + _C1) * (uxx - ux * ux + uyy - uy * uy + _C2)
    return float(similar.mean())


def psnr(real: Pixels, fake: Pixels) -> Scores:
    """Peak signal-to-noise ratio 10 lg(255² / mse) of pairs of pictures in dB; infinite where they are equal.

    Arguments:
        real, fake: (n, H, W, 3) or (H, W, 3) uint8 RGB.

    Returns:
        (n,) dB.
    """
    real, fake = _batches(real, fake, 1)
    error = np.array([np.square(cv2.absdiff(a, b), dtype=np.int32).mean() for a, b in zip(real, fake, strict=True)])
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / error), np.float64)
