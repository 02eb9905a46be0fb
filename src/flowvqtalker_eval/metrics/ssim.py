"""SSIM (Wang et al. 2004) and PSNR of 8-bit RGB images.

SSIM is scikit-image's default, as in this field's tables: 7x7 uniform window, sample covariance, K1 = 0.01,
K2 = 0.03, mean over windows inside the image and over channels. A Gaussian window differs by several hundredths.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.analysis import Frames

__all__ = ["psnr", "ssim"]

_WINDOW = 7

Scores = npt.NDArray[np.float64]


def ssim(real: Frames, fake: Frames) -> Scores:
    """SSIM (n,) in [-1, 1] of pairs of images, (n, H, W, 3) or (H, W, 3) uint8 RGB.

    Raises:
        UserError: if shapes or types do not fit, or an image is smaller than the window.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise MissingDependency("SSIM needs scikit-image; run `pip install 'flowvqtalker[eval]'`") from error

    real, fake = _batches(real, fake)
    if min(real.shape[1:3]) < _WINDOW:
        raise UserError(f"images must measure at least {_WINDOW} pixels, got {real.shape[2]}x{real.shape[1]}")
    pairs = zip(real, fake, strict=True)
    return np.array([structural_similarity(a, b, win_size=_WINDOW, channel_axis=-1) for a, b in pairs])


def psnr(real: Frames, fake: Frames) -> Scores:
    """Peak signal-to-noise ratio (n,) = 10 lg(255² / mse) of pairs of images in dB; infinite where they are equal.

    Raises:
        UserError: if shapes or types do not fit.
    """
    real, fake = _batches(real, fake)
    error = np.square(real.astype(np.int32) - fake).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(255.0**2 / error), np.float64)


def _batches(real: Frames, fake: Frames) -> tuple[Frames, Frames]:
    """Both as (n, H, W, 3)."""
    for name, image in (("first", real), ("second", fake)):
        if image.ndim not in (3, 4) or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise UserError(
                f"the {name} images must be RGB of shape (H, W, 3) or (n, H, W, 3) and type uint8, "
                f"got {image.shape} {image.dtype}"
            )
    if real.shape != fake.shape:
        raise UserError(f"images to compare must agree in number and size, got {real.shape} and {fake.shape}")
    return (real[None], fake[None]) if real.ndim == 3 else (real, fake)
