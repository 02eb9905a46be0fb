"""SSIM and PSNR: closed forms, plain computations, bad input."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.ssim import psnr, ssim


@pytest.fixture(scope="module")
def pairs(astronaut: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A real image beside blurred, noisy, shifted, darkened, flat and black ones: (6, 120, 140, 3) each."""
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


def test_ssim_equals_the_definition(pairs: tuple[np.ndarray, np.ndarray]) -> None:
    """7x7 windows, sample covariance, mean over windows inside the image and over channels."""
    windows = [
        np.lib.stride_tricks.sliding_window_view(x.astype(float), (7, 7), axis=(1, 2)).reshape(6, 114, 134, 3, 49)
        for x in pairs
    ]
    x, y = windows
    mx, my = x.mean(-1), y.mean(-1)
    vx, vy = x.var(-1, ddof=1), y.var(-1, ddof=1)
    cov = ((x - mx[..., None]) * (y - my[..., None])).sum(-1) / 48
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    wanted = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert np.allclose(ssim(*pairs), wanted.mean((1, 2, 3)), atol=1e-7, rtol=0)


def test_flat_images_have_a_closed_form() -> None:
    a, b = (np.full((16, 16, 3), value, np.uint8) for value in (100, 150))
    c1 = (0.01 * 255) ** 2
    wanted = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert ssim(a, b) == pytest.approx([wanted], abs=1e-6)
    assert ssim(a, a) == pytest.approx([1.0], abs=1e-7)


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
