"""Colours that a file describes by numbers (ITU-T H.273, as video, PNG and AVIF do) -> 8-bit sRGB."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

__all__ = ["ADOBE_RGB", "is_srgb", "to_srgb"]

Floats = npt.NDArray[np.float32]

# H.273 numbers. Other primaries and transfers are shown as sRGB, as most players do (docs/inputs.md).
_LINEAR, _PQ, _HLG = 8, 16, 18
#: Chromaticities of red, green and blue by their number; the white is D65.
_PRIMARIES: dict[int, tuple[float, ...]] = {
    1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
#: Chromaticities of Adobe RGB (1998); its transfer is a power of 2.2.
ADOBE_RGB = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_D65 = (0.3127, 0.3290)
# Luminance of white in HDR (ITU-R BT.2408), and of the display that HLG is made for, in cd/m2.
_WHITE, _HLG_PEAK = 203.0, 1000.0
# Brightness from which highlights of HDR are compressed, 1 = white.
_KNEE = 0.8
_HDR = (_PQ, _HLG)


def is_srgb(primaries: int, transfer: int) -> bool:
    """Whether colours with these H.273 numbers are shown as they are."""
    return (primaries not in _PRIMARIES or primaries == 1) and transfer not in (_LINEAR, *_HDR)


def to_srgb(
    image: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
    primaries: int | Sequence[float] = 1,
    transfer: int | float = 13,
) -> npt.NDArray[np.uint8]:
    """Convert an image to sRGB.

    HDR (PQ and HLG) is shown with its reference white of 203 cd/m2 as white; brighter parts are compressed.

    Arguments:
        image: (H, W, 3) RGB.
        primaries: H.273 number, or the chromaticities (x, y) of red, green and blue.
        transfer: H.273 number; a float is an exponent, 1.0 linear.

    Returns:
        (H, W, 3) uint8.
    """
    deep = image.astype(np.uint16) * np.uint16(257) if image.dtype == np.uint8 else image
    light = _to_light(transfer)[deep]
    if transfer == _HLG:  # the display's own curve depends on the luminance (ITU-R BT.2100)
        luminance = np.maximum(light @ np.array([0.2627, 0.6780, 0.0593], np.float32), 1e-6)
        light *= (_HLG_PEAK / _WHITE) * luminance[..., None] ** np.float32(0.2)
    given = _PRIMARIES.get(primaries, _PRIMARIES[1]) if isinstance(primaries, int) else tuple(primaries)
    if given != _PRIMARIES[1]:
        matrix = np.linalg.solve(_xyz(_PRIMARIES[1]), _xyz(given)).astype(np.float32)
        light = cv2.transform(light, matrix)
    if transfer in _HDR:
        brightest = np.maximum(light.max(-1, keepdims=True), _KNEE)
        room = 1 - _KNEE
        light *= (_KNEE + room * (1 - np.exp((_KNEE - brightest) / room))) / brightest
    return _from_light()[(np.clip(light, 0, 1) * 65535 + 0.5).astype(np.uint16)]


@functools.cache
def _to_light(transfer: int | float) -> Floats:
    """Light of each of 65,536 values, 1 = white (for HLG, of the scene)."""
    x = np.arange(65536) / 65535
    if isinstance(transfer, float):
        light = x**transfer
    elif transfer == _LINEAR:
        light = x
    elif transfer == _PQ:  # SMPTE ST 2084
        power = x ** (1 / 78.84375)
        light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
        light *= 10_000 / _WHITE
    elif transfer == _HLG:  # ARIB STD-B67
        light = np.where(x <= 0.5, x * x / 3, (np.exp((x - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:  # SDR is seen through the curve of an sRGB display
        light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return np.asarray(light, np.float32)


@functools.cache
def _from_light() -> npt.NDArray[np.uint8]:
    """sRGB's 8-bit value of each of 65,536 amounts of light."""
    x = np.arange(65536) / 65535
    value = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(value * 255), np.uint8)


def _xyz(primaries: Sequence[float]) -> npt.NDArray[np.float64]:
    """Matrix (3, 3) from linear RGB to CIE XYZ, for D65 white."""
    x, y = np.array([*primaries, *_D65]).reshape(-1, 2).T
    columns = np.stack([x / y, np.ones(4), (1 - x - y) / y])
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
