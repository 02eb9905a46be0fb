"""What the crop of a portrait shows that will look wrong: a covered mouth, shut eyes, blur."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.topology import EYE_CORNERS
from flowvqtalker.io.image import ImageArray

__all__ = ["covered_mouth", "flaws", "sharpness", "shut_eyes"]

Floats = npt.NDArray[np.floating[Any]]

# Thresholds lie between 148 portraits of people outside of the training set and the same ones masked or blurred, and
# between open and shut eyes of 7,317 frames of clips (docs/portraits.md).
_SHARP, _SHARP_WIDTH = 0.44, 160.0
_SHUT, _SLIT = 0.45, 0.15
_REDDER, _DARKER, _SKIN, _COLOUR = 1.0, (-11.0, 3.0), 131.0, 4.0

_BLINKS = [arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]
# Lids (upper, lower) and corners of both eyes.
_LIDS, _CORNERS = ((159, 145), (386, 374)), ((33, 133), (362, 263))
# Vertices along the mouth, from its left to its right: outer and inner rim of the upper lip, and of the lower one.
_UPPER = (40, 39, 37, 0, 267, 269, 270), (80, 81, 82, 13, 312, 311, 310)
_LOWER = (91, 181, 84, 17, 314, 405, 321), (88, 178, 87, 14, 317, 402, 318)
_UPPER_FACE = (50, 280, 101, 330, 151, 108, 337)


def flaws(crop: ImageArray, landmarks: Floats, blendshapes: Floats, width: float) -> Iterator[str]:
    """Warnings about a portrait, each a sentence with "%s" for its name.

    Arguments:
        crop: (512, 512, 3) uint8.
        landmarks: (478, 3) in pixels of the crop.
        blendshapes: (52,) of the tracker.
        width: of the face in pixels of the image.
    """
    if covered_mouth(crop, landmarks):
        yield "something covers the mouth in %s; lips are painted onto it; give an image that shows the mouth"
    if shut_eyes(landmarks, blendshapes):
        yield "the eyes in %s are shut and will hardly open; give an image with open eyes"
    if width >= _SHARP_WIDTH and sharpness(crop, landmarks) < _SHARP:
        yield "the face in %s is blurred, and the video will be; give a sharper image"


def covered_mouth(crop: ImageArray, landmarks: Floats) -> bool:
    """Whether the place of the mouth has neither the colour of skin nor lips: a mask, not a hand.

    In a picture without colours nothing can be said.
    """
    lab = cv2.GaussianBlur(cv2.cvtColor(crop, cv2.COLOR_RGB2LAB).astype(np.float32), (0, 0), 2)

    def at(points: Floats) -> Floats:
        x, y = np.clip(np.rint(points[:, :2]).astype(int), 0, 511).T
        values: Floats = lab[y, x]
        return values

    outer, inner = (np.stack([landmarks[list(lip[k])] for lip in (_UPPER, _LOWER)]) for k in (0, 1))
    middle = inner.mean(0)
    lips = [at((o + i) / 2) for o, i in zip(outer, inner, strict=True)]
    around = np.concatenate([at(o + 0.7 * (o - middle)) for o in outer])
    redder = np.concatenate(lips)[:, 1].mean() - around[:, 1].mean()
    darker = min(lip[:, 0].mean() for lip in lips) - at(middle)[:, 0].mean()
    skin = np.median(at(landmarks[list(_UPPER_FACE)]), 0)[1:] - 128
    plain = abs(redder) < _REDDER and _DARKER[0] < darker < _DARKER[1]
    return bool(plain and np.concatenate(lips)[:, 1].mean() < _SKIN and np.hypot(*skin) > _COLOUR)


def shut_eyes(landmarks: Floats, blendshapes: Floats) -> bool:
    """Whether both eyes are shut, by the tracker and by the lids' distance."""

    def length(pair: tuple[int, int]) -> float:
        return float(np.linalg.norm(landmarks[pair[0], :2] - landmarks[pair[1], :2]))

    open_by = [length(lids) / max(length(corners), 1e-6) for lids, corners in zip(_LIDS, _CORNERS, strict=True)]
    return bool(blendshapes[_BLINKS].min() > _SHUT and max(open_by) < _SLIT)


def sharpness(crop: ImageArray, landmarks: Floats) -> float:
    """Detail of the face of the size of lashes against that of the size of eyelids; does not depend on contrast."""
    left, top = np.clip(landmarks[:, :2].min(0), 0, 510).astype(int)
    right, bottom = np.clip(landmarks[:, :2].max(0), 2, 512).astype(int)
    face = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)[top:bottom, left:right].astype(np.float32)
    unit = float(np.linalg.norm(landmarks[EYE_CORNERS[0], :2] - landmarks[EYE_CORNERS[1], :2])) / 180
    fine, middle, coarse = (cv2.GaussianBlur(face, (0, 0), max(0.5, size * unit)) for size in (2, 4, 8))
    return float(np.std(fine - middle) / max(np.std(middle - coarse), 1e-3))
