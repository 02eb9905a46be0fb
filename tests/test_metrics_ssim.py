"""SSIM and PSNR: equal to scikit-image, closed forms, bad input."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.ssim import psnr, ssim


@pytest.fixture(scope="module")
def pairs(astronaut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A real picture beside blurred, noisy, shifted, darkened, flat and black ones: (6, 120, 140, 3) each."""
    real = np.ascontiguousarray(astronaut[40:160, 150:290])
    noise = np.random.default_rng(0).normal(0, 25, real.shape)
    fakes = [
        cv2.GaussianBlur(real, (0, 0), 2),
        np.clip(real + noise, 0, 255).astype(np.uint8),
        np.roll(real, 3, 1),
        (real * 0.6).astype(np.uint8),
        np.full_like(real, 255),
        np.zeros_like(real),
    ]
    return np.stack([real] * len(fakes)), np.stack(fakes)


def test_uniform_window_equals_skimage(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    wanted = [structural_similarity(a, b, channel_axis=-1) for a, b in zip(*pairs, strict=True)]
    assert np.allclose(ssim(*pairs), wanted, atol=1e-7, rtol=0)


def test_gaussian_window_equals_skimage(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    wanted = [structural_similarity(a, b, channel_axis=-1, **options) for a, b in zip(*pairs, strict=True)]
    found = ssim(*pairs, window="gaussian11")
    assert np.allclose(found, wanted, atol=1e-9, rtol=0)
    assert np.abs(found - ssim(*pairs)).max() > 0.01  # the windows are not interchangeable


def test_flat_pictures_have_a_closed_form() -> None:
    a, b = (np.full((16, 16, 3), value, np.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    wanted = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    for window in ("uniform7", "gaussian11"):
        assert ssim(a, b, window=window) == pytest.approx([wanted], abs=1e-6)
        assert ssim(a, a, window=window) == pytest.approx([1.0], abs=1e-7)


def test_psnr(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    wanted = [peak_signal_noise_ratio(a, b) for a, b in zip(*pairs, strict=True)]
    assert np.allclose(psnr(*pairs), wanted, atol=1e-9)
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a + np.uint8(10)) == pytest.approx([20 * np.log10(25.5)] * 2)
    assert np.isinf(psnr(a, a)).all()


def test_bad_input_is_named() -> None:
    a = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=r"\(1, 16, 16, 3\)"):
        ssim(a, a[:1])
    with pytest.raises(UserError, match="float32"):
        ssim(a, a.astype(np.float32))
    with pytest.raises(UserError, match="first"):
        psnr(a[..., 0], a)
    with pytest.raises(UserError, match="at least 7 pixels, got 16x6"):
        ssim(a[:, :6], a[:, :6])
    with pytest.raises(UserError, match="uniform7 or gaussian11"):
        ssim(a, a, window="box")  # type: ignore[arg-type]
