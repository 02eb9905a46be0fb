"""An invisible mark of 64 bits in the luma of every frame: informed spread spectrum in middle DCT bands.

A frame of any size is reduced to a square of 128x128 and whitened: high-passed, then divided by its local deviation.
Each code bit is the sign of the correlation between the DCT of that and a fixed pseudo-random carrier. The embedder
knows how the picture itself correlates and spends its fixed energy where the picture disagrees most, so that all bits
get the same margin (informed embedding: Cox, Miller, Bloom, "Digital Watermarking", 2002, chapter 5). The detector
divides each DCT coefficient by the size of those around it: what the picture or a codec put into a band weighs less.

Since the carriers belong to the reduced square, the mark survives a change of size; crops are searched for. Besides the
code word there are *pilot* carriers of known sign, which tell with the tag that there is a mark at all.
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
_SPREAD = 4.0  # of the coefficients that the detector compares one with
_GAIN = 0.8  # share of the mark that the whitening's high-pass leaves

_TAG_BITS = 16
_TAG = 0x4656
_WINDOW = 250  # frames that vote together
_TAG_CODE = 2 * _TAG_BITS  # code bits that the tag alone decides, which so are known as the pilots are
#: Least z-score of all known bits; about two unmarked windows in 10^6 are taken for marked.
_THRESHOLD = 4.75
#: The same for the best of many crops; about two unmarked files in 10^6 are taken for marked.
_CROP_THRESHOLD = 6.3
_CROP_SIDES = range(127, 106, -1)  # what a crop leaves of the square: 99 to 84 per cent of each side
_CROP_FRAMES = 50
_FINE = 2 * _SIDE  # side to which a crop is reduced, so that it can be put at parts of the square's pixels
_CROP_PLACES = 3  # best ones of whole pixels, which are then moved by these steps
_CROP_STEPS = (0.5, 0.25, 0.25)
_Box = tuple[float, ...]  # left, top, right, bottom of a crop in the square


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


def _whiten(luma: Luma, side: int = _SIDE) -> tuple[Floats, Floats]:
    """The frame reduced to a square, high-passed and divided by its local deviation; and that deviation."""
    small = cv2.resize(luma, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
    unit = side / _SIDE
    detail = small - cv2.GaussianBlur(small, (0, 0), unit)
    deviation = np.sqrt(cv2.GaussianBlur(detail * detail, (0, 0), 1.5 * unit)) + np.float32(0.3)
    return detail / deviation, deviation


def _correlate(spectrum: Floats) -> Floats:
    """Correlation of a DCT with each carrier, (172,)."""
    places, signs = _carriers()
    products: Floats = spectrum.ravel()[places] * signs
    return np.asarray(products.sum(1), np.float32)


def _levelled(white: Floats) -> Floats:
    """DCT of a square, each coefficient relative to those around it."""
    spectrum = cv2.dct(white)
    around = cv2.GaussianBlur(spectrum * spectrum, (0, 0), _SPREAD, borderType=cv2.BORDER_REFLECT)
    return np.asarray(spectrum / np.sqrt(around + np.float32(1e-12)), np.float32)


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
        agreement = _correlate(cv2.dct(white)) * self._signs
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
        score: z-score of the pilots and the tag; 4.75 is needed.
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
    """Look for a mark, also mirrored, in windows of 10 seconds; stops at the first one. Memory does not grow.

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
        found, mirrored = (_read(_correlate(_levelled(np.ascontiguousarray(m))), count) for m in (mean, mean[:, ::-1]))
        if found.found or mirrored.found:
            return found if found.found else mirrored
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
        self._mean = np.zeros((_FINE, _FINE), np.float32)
        self._count = 0

    def add(self, luma: Luma) -> Luma:
        """Take a frame into account and pass it on."""
        if self._count < _CROP_FRAMES:
            self._count += 1
            self._mean += (_whiten(luma, _FINE)[0] - self._mean) / np.float32(self._count)
        return luma

    def search(self) -> Detection:
        """The crop with the highest score: the best of whole pixels of the square, then moved by parts of them."""
        places, signs = _carriers()
        spectrum = np.zeros(_SIDE * _SIDE, np.float32)
        known = _known_signs()
        spectrum[places] = signs * known[:, None]
        known_mark = cv2.idct(spectrum.reshape(_SIDE, _SIDE))
        levelled = cv2.idct(_levelled(self._mean))
        self._mean = cv2.GaussianBlur(self._mean, (0, 0), 0.7)  # it is halved from here on
        found = []
        for side in _CROP_SIDES:
            small = cv2.resize(levelled, (side, side), interpolation=cv2.INTER_AREA)
            _, _, _, (left, top) = cv2.minMaxLoc(cv2.matchTemplate(known_mark, small, cv2.TM_CCORR))
            box = (float(left), float(top), float(left + side), float(top + side))
            found.append((_presence(self._at(box)), box))
        best = max(self._refined(*one) for one in sorted(found)[-_CROP_PLACES:])
        return _read(self._at(best[1]), self._count, _CROP_THRESHOLD)

    def _refined(self, presence: float, box: _Box) -> tuple[float, _Box]:
        """The best place near one, and the presence of a mark there."""
        for step, corner, sign in itertools.product(_CROP_STEPS, range(4), (-1, 1)):
            moved = (*box[:corner], box[corner] + sign * step, *box[corner + 1 :])
            presence, box = max((presence, box), (_presence(self._at(moved)), moved))
        return presence, box

    def _at(self, box: _Box) -> Floats:
        """Correlations if the crop is that box of the square."""
        corner = np.array(box[:2])
        scale = _FINE / (np.array(box[2:]) - corner)
        view = np.column_stack([np.diag(scale), scale * (0.5 - corner) - 0.5])  # from the square to the crop
        square = cv2.warpAffine(self._mean, view, (_SIDE, _SIDE), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
        return _correlate(_levelled(np.asarray(square, np.float32)))


def _presence(correlations: Floats) -> float:
    """How much there is of a mark whose code bits are not known."""
    known = _known_signs()
    return float(correlations @ known + np.abs(correlations[known == 0]).sum())


@functools.cache
def _known_signs() -> Floats:
    """Sign of the pilots and of the tag's code bits, 0 for the identifier's, (172,)."""
    word = np.concatenate([encode(payload()), np.ones(_PILOTS)])
    word[_TAG_CODE:CODE_BITS] = 0
    return np.asarray(word, np.float32)


def _read(correlations: Floats, frames: int, threshold: float = _THRESHOLD) -> Detection:
    known = _known_signs()
    spread = float(np.linalg.norm(known) * np.sqrt(np.mean(np.square(correlations))))
    score = float(correlations @ known) / spread if spread > 1e-6 else 0.0
    soft = correlations[:CODE_BITS]
    message = decode(soft + known[:CODE_BITS] * 10 * np.abs(soft).max())
    return Detection(score >= threshold, message, score, soft, frames)


def to_luma(frame: NDArray[np.uint8]) -> Luma:
    """BT.709 luma (H, W) of an RGB frame (H, W, 3), as the video's own plane up to a scale."""
    weights = np.array([[0.2126, 0.7152, 0.0722]], np.float32)
    return np.asarray(cv2.transform(frame, weights), np.uint8)
