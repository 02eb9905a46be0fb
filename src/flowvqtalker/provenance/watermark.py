"""An invisible mark of 64 bits in the luma of every frame: informed spread spectrum in middle DCT bands.

A frame of any size is reduced to a square of 128x128 and whitened: high-passed, then divided by its local deviation.
Each code bit is the sign of the correlation between the DCT of that and a fixed pseudo-random carrier. The embedder
knows how the picture itself correlates and spends its fixed energy where the picture disagrees most, so that all bits
get the same margin (informed embedding: Cox, Miller, Bloom, "Digital Watermarking", 2002, chapter 5).

Since the carriers belong to the reduced square, the mark survives a change of size; crops are searched for. Besides the
code word there are *pilot* carriers of known sign, which tell that there is a mark at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from flowvqtalker.provenance.code import CODE_BITS, MESSAGE_BITS, decode, encode

__all__ = ["Detection", "Watermark", "detect", "payload", "to_luma"]

Luma = NDArray[np.uint8]
Floats = NDArray[np.float32]

_SIDE = 128
_BAND = (24, 90)  # radius in the 128x128 DCT: periods of 43 to 11 pixels in a frame of 512
_PILOTS = 32
_CARRIERS = CODE_BITS + _PILOTS
_STRENGTH = 1.35  # root mean square of the mark in grey levels: PSNR 45.4 dB
_FLAT = -0.3  # exponent of the local deviation in the mark's local strength
_PACE = 0.15  # weight of a new frame in the running correlation; the mark must not flicker
_GAIN = 0.8  # share of the mark that the whitening's high-pass leaves

_TAG_BITS = 16
_TAG = 0x4656
_WINDOW = 250  # frames that vote together
#: Least z-score of the pilots. With the 16 bits of the tag, about two unmarked windows in 10^8 are taken for marked.
_THRESHOLD = 3.0
#: The same for the best of many crops; still fewer than one unmarked file in 10^6 is taken for marked.
_CROP_THRESHOLD = 4.2
_CROP_SIDES = range(127, 106, -1)  # what a crop leaves of the square: 99 to 84 per cent of each side
_CROP_FRAMES = 50


def payload(identifier: int = 0) -> int:
    """The 64 bits of a mark: our tag and an identifier of 48 bits.

    Raises:
        ValueError: if the identifier needs more bits.
    """
    if not 0 <= identifier < 2 ** (MESSAGE_BITS - _TAG_BITS):
        raise ValueError(f"an identifier has {MESSAGE_BITS - _TAG_BITS} bits, got {identifier}")
    return _TAG << (MESSAGE_BITS - _TAG_BITS) | identifier


@functools.cache
def _carriers() -> tuple[NDArray[np.intp], Floats]:
    """DCT coefficients of each carrier (172, n) and their signs, of unit norm. Changing them loses every old mark."""
    radius = np.hypot(*np.mgrid[:_SIDE, :_SIDE])
    places = np.flatnonzero((radius >= _BAND[0]) & (radius < _BAND[1]))
    # RandomState's streams are frozen by NumPy's compatibility policy; those of Generator are not.
    random = np.random.RandomState(2024)
    random.shuffle(places)
    each = len(places) // _CARRIERS
    signs = random.randint(0, 2, (_CARRIERS, each)) * 2 - 1
    return places[: _CARRIERS * each].reshape(_CARRIERS, each), (signs / np.sqrt(each)).astype(np.float32)


def _whiten(luma: Luma, width: int = _SIDE, height: int = _SIDE) -> tuple[Floats, Floats]:
    """The reduced frame, high-passed and divided by its local deviation; and that deviation."""
    small = cv2.resize(luma, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    detail = small - cv2.GaussianBlur(small, (0, 0), 1.0)
    deviation = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), 1.5)) + np.float32(0.3)
    return detail / deviation, deviation


def _correlate(white: Floats) -> Floats:
    """Correlation with each carrier, (172,)."""
    places, signs = _carriers()
    products: Floats = cv2.dct(white).ravel()[places] * signs
    return np.asarray(products.sum(1), np.float32)


class Watermark:
    """Puts the same 64 bits into every frame of a video; one object for each video. About a millisecond at 512x512.

    Arguments:
        message: 64 bits, see :func:`payload`.
    """

    def __init__(self, message: int) -> None:
        self._signs = np.concatenate([encode(message), np.ones(_PILOTS, np.float32)])
        self._agreement: Floats | None = None

    def __call__(self, luma: Luma) -> None:
        """Mark a luma plane (H, W) uint8 in place."""
        white, deviation = _whiten(luma)
        agreement = _correlate(white) * self._signs
        if self._agreement is not None:
            agreement = self._agreement + np.float32(_PACE) * (agreement - self._agreement)
        self._agreement = agreement
        local = np.clip(deviation / 2, 0.6, 3.0) ** np.float32(_FLAT)
        local /= np.sqrt(np.mean(local * local))
        gain = _GAIN * float(np.mean(local / deviation))
        energy = (_STRENGTH * _SIDE) ** 2
        amplitudes = np.maximum(_margin(agreement, energy * gain**2) - agreement, 0) / gain * self._signs
        places, signs = _carriers()
        spectrum = np.zeros(_SIDE * _SIDE, np.float32)
        spectrum[places] = amplitudes[:, None] * signs
        mark = cv2.idct(spectrum.reshape(_SIDE, _SIDE)) * local
        height, width = luma.shape
        mark = cv2.resize(mark, (width, height), interpolation=cv2.INTER_CUBIC)
        luma[:] = cv2.add(luma, mark, dtype=cv2.CV_8U)  # rounds and saturates


def _margin(agreement: Floats, energy: float) -> float:
    """Level m with sum(max(m - agreement, 0)^2) = energy, by bisection."""
    low = float(agreement.min())
    high = low + float(np.sqrt(energy)) + 1e-6
    for _ in range(16):
        middle = (low + high) / 2
        if np.square(np.maximum(middle - agreement, 0)).sum() > energy:
            high = middle
        else:
            low = middle
    return (low + high) / 2


@dataclass(frozen=True)
class Detection:
    """What the detector found.

    Attributes:
        found: whether there is a mark of ours.
        message: the 64 bits read; noise if there is no mark.
        score: z-score of the pilots; 3 is needed.
        soft: (140,) correlations of the code bits; the sign says which bit.
        frames: number of frames that voted.
    """

    found: bool
    message: int
    score: float
    soft: Floats
    frames: int

    @property
    def identifier(self) -> int:
        """The 48 bits beside the tag."""
        return self.message & ((1 << (MESSAGE_BITS - _TAG_BITS)) - 1)


def detect(frames: Iterable[Luma]) -> Detection:
    """Look for a mark, in windows of 10 seconds; stops at the first that is found. Memory does not grow.

    If no window has one, the first two seconds are searched for the mark of a larger frame of which they were cropped.

    Arguments:
        frames: luma planes (H, W) uint8, at least one.

    Returns:
        the window or crop with a mark, else the window with the highest score.

    Raises:
        ValueError: if there is no frame.
    """
    best: Detection | None = None
    crops = _Crops()
    for mean, count in _windows(map(crops.add, frames)):
        found = _read(_correlate(mean), count)
        if found.found:
            return found
        best = found if best is None or found.score > best.score else best
    if best is None:
        raise ValueError("there is no frame to look at")
    found = crops.search()
    return found if found.found else best


def _windows(frames: Iterable[Luma]) -> Iterator[tuple[Floats, int]]:
    """Mean of the whitened frames of each window, and their number: a vote in which each frame weighs the same."""
    total, count = np.zeros((_SIDE, _SIDE), np.float32), 0
    for luma in frames:
        total += _whiten(luma)[0]
        count += 1
        if count == _WINDOW:
            yield total / np.float32(count), count
            total, count = np.zeros_like(total), 0
    if count:
        yield total / np.float32(count), count


class _Crops:
    """Search for the mark in what was cropped by the same share of both sides: the pilots tell scale and place."""

    def __init__(self) -> None:
        self._means = {side: np.zeros((side, side), np.float32) for side in _CROP_SIDES}
        self._count = 0

    def add(self, luma: Luma) -> Luma:
        """Take a frame into account and pass it on."""
        if self._count < _CROP_FRAMES:
            self._count += 1
            for side, mean in self._means.items():
                mean += (_whiten(luma, side, side)[0] - mean) / np.float32(self._count)
        return luma

    def search(self) -> Detection:
        """The crop with the highest score."""
        places, signs = _carriers()
        spectrum = np.zeros(_SIDE * _SIDE, np.float32)
        spectrum[places[CODE_BITS:]] = signs[CODE_BITS:]
        pilots = cv2.idct(spectrum.reshape(_SIDE, _SIDE))
        candidates = []
        for mean in self._means.values():
            _, _, _, (left, top) = cv2.minMaxLoc(cv2.matchTemplate(pilots, mean, cv2.TM_CCORR))
            # A crop seldom begins at a whole pixel of the square.
            for down, right in itertools.product((-0.5, 0, 0.5), repeat=2):
                shift = np.array([[1, 0, left + right], [0, 1, top + down]], np.float32)
                candidates.append(_correlate(cv2.warpAffine(mean, shift, (_SIDE, _SIDE), flags=cv2.INTER_CUBIC)))
        return _read(max(candidates, key=_score), self._count, _CROP_THRESHOLD)


def _score(correlations: Floats) -> float:
    """z-score of the pilots."""
    spread = float(np.sqrt(np.mean(np.square(correlations)) * _PILOTS))
    return float(correlations[CODE_BITS:].sum()) / spread if spread > 1e-6 else 0.0


def _read(correlations: Floats, frames: int, threshold: float = _THRESHOLD) -> Detection:
    soft, score = correlations[:CODE_BITS], _score(correlations)
    message = decode(soft)
    found = score >= threshold and message >> (MESSAGE_BITS - _TAG_BITS) == _TAG
    return Detection(found, message, score, soft, frames)


def to_luma(frame: NDArray[np.uint8]) -> Luma:
    """BT.709 luma (H, W) of an RGB frame (H, W, 3), as the video's own plane up to a scale."""
    weights = np.array([[0.2126, 0.7152, 0.0722]], np.float32)
    return np.asarray(cv2.transform(frame, weights), np.uint8)
