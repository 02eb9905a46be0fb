"""CPBD: equal to a slow program written straight from the definition, falls under blur, bad input."""

from __future__ import annotations

from itertools import pairwise
from math import atan2, exp, pi

import cv2
import numpy as np
import pytest
from scipy import ndimage
from skimage.feature import canny

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.cpbd import Sharpness, _with_edges, cpbd, cpbd_at, edge_widths


def slow_edges(image: np.ndarray) -> np.ndarray:
    """Edge pixels by the horizontal Sobel filter and the simple thinning."""
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    strength = ndimage.convolve(image, kernel) ** 2
    strength[strength <= 2 * np.sqrt(strength.mean())] = 0
    found = np.zeros(image.shape, bool)
    height, width = image.shape

    def at(y: int, x: int) -> float:
        return float(strength[y, x]) if 0 <= y < height and 0 <= x < width else 0.0

    for y in range(height):
        for x in range(width):
            here = at(y, x)
            row = here > at(y, x - 1) and here > at(y, x + 1)
            column = here > at(y - 1, x) and here > at(y + 1, x)
            found[y, x] = row or column
    return found


def slow_widths(image: np.ndarray) -> np.ndarray:
    """Widths of the edges, walking from each edge pixel step by step."""
    height, width = image.shape
    down, right = np.gradient(image)
    widths = np.zeros(image.shape, int)
    edges = slow_edges(image)
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            if not edges[y, x]:
                continue
            angle = atan2(down[y, x], right[y, x]) * 180 / pi if right[y, x] != 0 else 0.0
            quantised = 45 * round(angle / 45)
            if quantised not in (0, 180, -180):
                continue
            sign = 1 if quantised == 0 else -1  # grey levels rise or fall from left to right
            total = 0
            for direction in (-1, 1):
                margin = 0
                while margin < 100:
                    inner, outer = x + direction * (1 + margin), x + direction * (2 + margin)
                    if not 0 <= outer < width or sign * direction * (image[y, outer] - image[y, inner]) <= 0:
                        break
                    margin += 1
                total += margin + 1
            widths[y, x] = total
    return widths


def slow_cpbd(grey: np.ndarray) -> float:
    image = grey.astype(np.float64)
    edges, widths = canny(image), slow_widths(image)
    histogram = np.zeros(101)
    for top in range(0, grey.shape[0] - 63, 64):
        for left in range(0, grey.shape[1] - 63, 64):
            part = slice(top, top + 64), slice(left, left + 64)
            if edges[part].sum() <= 0.002 * 4096:
                continue
            noticeable = 5 if image[part].max() - image[part].min() <= 50 else 3
            for width in widths[part][widths[part] > 0]:
                histogram[round(100 * (1 - exp(-((width / noticeable) ** 3.6))))] += 1
    return float(histogram[:64].sum() / max(1, histogram.sum()))


def images(astronaut: np.ndarray) -> dict[str, np.ndarray]:
    """Grey images of many kinds, some with sides that are no multiple of 64."""
    grey = cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY)
    generator = np.random.default_rng(0)
    ramp = np.tile(np.arange(256, dtype=np.uint8)[::-1], (64, 1))
    flat = np.full((128, 192), 90, np.uint8)
    flat[20:40, 20:40] = 91
    flat[70:, 100:] = 200
    return {
        "face": grey[20:220, 130:300],
        "blurred": cv2.GaussianBlur(grey[20:148, 130:258], (0, 0), 2.5),
        "noise": generator.integers(0, 256, (70, 130), dtype=np.uint8),
        "few levels": generator.integers(0, 3, (64, 128), dtype=np.uint8),
        "soft": (grey[0:128, 0:128] // 8 + 100).astype(np.uint8),
        "ramp": ramp,
        "step and flat": flat,
        "one line": np.where(np.arange(128) == 64, 255, 0).astype(np.uint8)[None].repeat(64, 0),
        "flat": np.full((64, 64), 7, np.uint8),
    }


def test_equals_the_definition(astronaut: np.ndarray) -> None:
    for name, grey in images(astronaut).items():
        image = grey.astype(np.float64)
        assert np.array_equal(edge_widths(grey), slow_widths(image)), name
        rows, columns = (n // 64 for n in grey.shape)
        whole = canny(image)[: rows * 64, : columns * 64].reshape(rows, 64, columns, 64)
        assert np.array_equal(_with_edges(grey), whole.sum((1, 3)) > 8.192), name
        assert cpbd(grey) == pytest.approx(slow_cpbd(grey), abs=1e-12), name


def test_edge_of_known_width() -> None:
    """A ramp of n steps up is n + 1 pixels or so wide; it blurs from sharp to unsharp as it grows."""
    scores = []
    for steps in (1, 2, 3, 4, 8):
        row = np.clip((np.arange(128) - 64) * 200 // steps + 100, 20, 220).astype(np.uint8)
        image = np.tile(row, (64, 1))
        scores.append(cpbd(image))
    assert scores[0] == 1.0
    assert scores[-1] == 0.0
    assert sorted(scores, reverse=True) == scores


def test_falls_under_blur(astronaut: np.ndarray) -> None:
    blurred = [cv2.GaussianBlur(astronaut, (0, 0), sigma) for sigma in (0.6, 1.0, 1.5, 2.5, 4.0)]
    native = [cpbd(image) for image in [astronaut, *blurred]]
    common = [cpbd_at(image) for image in [astronaut, *blurred]]
    assert all(a > b for a, b in pairwise(native)), native
    # At 256 pixels a little blur before the reduction is none after it.
    assert all(a > b - 0.02 for a, b in pairwise(common)), common
    assert native[0] > 0.3 > 0.05 > native[-1]


def test_extractor_gives_both_sizes(astronaut: np.ndarray) -> None:
    found = Sharpness()(astronaut[None], {})
    assert found["cpbd"] == pytest.approx([cpbd(astronaut)])
    reduced = cv2.resize(cv2.cvtColor(astronaut, cv2.COLOR_RGB2GRAY), (256, 256), interpolation=cv2.INTER_AREA)
    assert found["cpbd256"] == pytest.approx([cpbd(reduced)])
    small = np.ascontiguousarray(astronaut[:256, :256])[None]
    found = Sharpness()(small, {})
    assert found["cpbd"] == pytest.approx(found["cpbd256"])
    assert 0 <= cpbd_at(astronaut[:70, :90]) <= 1


def test_bad_input_is_named(astronaut: np.ndarray) -> None:
    with pytest.raises(UserError, match="at least 64x64 pixels, got 512x63"):
        cpbd(astronaut[:63])
    with pytest.raises(UserError, match="float64"):
        cpbd(astronaut.astype(np.float64))
    with pytest.raises(UserError, match=r"\(512, 512, 4\)"):
        cpbd(np.zeros((512, 512, 4), np.uint8))
