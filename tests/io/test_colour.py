"""Colours by numbers: known values of the standards, and the same colour through every container."""

from __future__ import annotations

import numpy as np
import pytest

from flowvqtalker.io.colour import ADOBE_RGB, is_srgb, to_srgb


def one(value: tuple[int, int, int] | int, primaries=1, transfer: int | float = 13, kind=np.uint8) -> np.ndarray:
    pixel = np.zeros((1, 1, 3), kind)
    pixel[:] = value
    return to_srgb(pixel, primaries, transfer)[0, 0].astype(int)


def test_srgb_stays():
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    assert np.array_equal(to_srgb(every), every)
    assert is_srgb(1, 1) and is_srgb(2, 2) and is_srgb(6, 6)
    assert not is_srgb(9, 1) and not is_srgb(1, 16) and not is_srgb(12, 13)


#: Published matrices to linear sRGB: SMPTE EG 432-1 / CSS Color 4 (P3), ITU-R BT.2087 (BT.2020), Adobe RGB (1998).
MATRICES = {
    12: [[1.2249, -0.2249, 0.0], [-0.0420, 1.0420, 0.0], [-0.0196, -0.0786, 1.0983]],
    9: [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]],
    ADOBE_RGB: [[1.3984, -0.3984, 0.0], [0.0, 1.0, 0.0], [0.0, -0.0429, 1.0429]],
}


@pytest.mark.parametrize("primaries", MATRICES)
def test_wide_colours_become_more_saturated_numbers(primaries):
    given = np.array([200, 120, 100])
    light = np.array(MATRICES[primaries]) @ (((given / 255 + 0.055) / 1.055) ** 2.4)
    expected = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    assert expected[0] - expected[2] > 112  # and not the 100 of the numbers as they are
    assert one(tuple(given), primaries) == pytest.approx(expected, abs=1)
    assert one((128, 128, 128), primaries) == pytest.approx((128, 128, 128), abs=1)


@pytest.mark.parametrize(("transfer", "white"), [(16, 0.5807), (18, 0.75)])
def test_hdr_white_is_nearly_white_and_highlights_do_not_clip(transfer, white):
    """Reference white (203 cd/m2) lies at 58 % of PQ and 75 % of HLG (ITU-R BT.2408)."""
    levels = [one(round(value * 65535), 9, transfer, np.uint16)[0] for value in (0, white / 2, white, 1)]
    assert levels[0] == 0
    assert 240 <= levels[2] <= 250
    assert 40 < levels[1] < 150
    assert levels[3] == 255


def test_linear_light_and_powers():
    assert one(55, transfer=8) == pytest.approx((128, 128, 128), abs=1)  # 21.6 % of the light is the middle of sRGB
    assert one(128, transfer=2.2) == pytest.approx((128, 128, 128), abs=1)
