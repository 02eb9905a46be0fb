"""Every face of an image: small, at the border, rotated by any angle."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import crop_box
from flowvqtalker.face.fit import fit
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.tracker import Face, FaceTracker
from flowvqtalker.io.image import ImageArray

__all__ = ["MAX_RESIDUAL", "Detection", "detect_faces", "face_turns", "turn_back"]

Floats = npt.NDArray[np.floating[Any]]

#: Residual of the face model's fit (in distances between the outer eye corners) above which landmarks are doubtful. It
#: is lower for 97 of 100 upright portraits, and higher for all that were read upside down.
MAX_RESIDUAL = 0.0025
# Longer side of the reduced image that is searched; landmarks are then refined at full resolution.
_SEARCHED = 1920
# Smallest tile that is searched for small faces, in pixels.
_TILE = 128
# Detections whose centres are closer than this, in widths of the larger, are one face.
_SAME = 0.5
_ROUNDS = 2


@dataclass(frozen=True)
class Detection:
    """A face and the confidence in its landmarks.

    Attributes:
        face: landmarks in pixels of the image.
        residual: of the fitted face model, in distances between the outer eye corners.
    """

    face: Face
    residual: float


def detect_faces(tracker: FaceTracker, model: FaceModel, image: ImageArray) -> list[Detection]:
    """All faces of an image, largest first.

    MediaPipe detects faces rotated by up to about 60 degrees, with landmarks that get worse with the angle, and reads
    faces upside down as upright. So each face is detected again in its own upright crop. Where there is none, or the
    face model does not fit, the image is searched in its other three orientations. If that fails too, it is searched in
    tiles, for small faces.

    Arguments:
        tracker: allows as many faces as are wanted.
        model: the face model.
        image: (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    factor = min(1.0, _SEARCHED / max(height, width))
    small = image
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    stretch = np.array([width / small.shape[1], height / small.shape[0], 1 / factor], np.float32)
    for parts in (0, 1, 2, 4):
        # Tiles have the full resolution.
        seen = _moved(tracker.detect(small), stretch) if parts == 0 else _tiles(tracker, image, parts)
        found = [_refined(tracker, model, image, face) for face in seen]
        if parts == 0 and (not found or any(one.residual > MAX_RESIDUAL for one in found)):
            turned = _turned(tracker, model, image, small, stretch)
            # A face that looks far up also fits as one upside down: doubtful faces count as upright.
            sure = [one for one in turned if one.residual <= MAX_RESIDUAL]
            # Patterns are detected as faces: keep only the best doubtful one, and only if there is nothing else.
            found += sure or ([] if found else sorted(turned, key=lambda one: one.residual)[:1])
        if found:
            return sorted(_unique(found), key=lambda one: -one.face.area)
    return []


def face_turns(tracker: FaceTracker, model: FaceModel, image: ImageArray) -> int | None:
    """Number of quarter turns by which ``np.rot90`` brings the largest face nearest to upright; None without a face."""
    found = detect_faces(tracker, model, image)
    if not found:
        return None
    matrix = crop_box(found[0].face.landmarks).matrix
    # The crop turns the image by this angle, clockwise where positive; rot90 turns it counter-clockwise.
    angle = np.arctan2(matrix[1, 0], matrix[0, 0])
    return int(-np.round(angle / (np.pi / 2))) % 4


def _turned(
    tracker: FaceTracker, model: FaceModel, image: ImageArray, small: ImageArray, stretch: npt.NDArray[np.float32]
) -> list[Detection]:
    """Faces detected in the other three orientations of an image."""
    found = []
    for turns in (1, 2, 3):
        faces = tracker.detect(np.ascontiguousarray(np.rot90(small, turns)))
        back = _moved((turn_back(face, turns, small.shape) for face in faces), stretch)
        found += [_refined(tracker, model, image, face) for face in back]
    return found


def _refined(tracker: FaceTracker, model: FaceModel, image: ImageArray, face: Face) -> Detection:
    """The face as detected in its own upright crop; unchanged if it is not detected there."""
    best = Detection(face, _residual(model, face))
    for _ in range(_ROUNDS):
        try:
            crop = crop_box(face.landmarks)
        except UserError:  # landmarks that coincide
            break
        again = tracker.detect(crop.apply(image))
        if not again:
            break
        # The face fills most of the crop, but another one may be visible beside it.
        middle = min(again, key=lambda one: float(np.linalg.norm(one.landmarks[:, :2].mean(0) - 256)))
        face = Face(crop.points_back(middle.landmarks).astype(np.float32), middle.blendshapes)
        best = Detection(face, _residual(model, face))
        # The first detection was nearly upright: a second round changes little.
        if abs(np.arctan2(crop.matrix[1, 0], crop.matrix[0, 0])) < np.radians(20):
            break
    return best


def _residual(model: FaceModel, face: Face) -> float:
    try:
        fitted = fit(model, crop_box(face.landmarks).points(face.landmarks))
    except (UserError, np.linalg.LinAlgError):
        return float("inf")
    value = float(fitted.residual[0])
    return value if np.isfinite(value) else float("inf")


def _unique(found: list[Detection]) -> list[Detection]:
    """Of detections in the same place, the one that fits best."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda one: one.residual):
        centre, reach = one.face.landmarks[:, :2].mean(0), _width(one.face)
        if all(
            np.linalg.norm(centre - other.face.landmarks[:, :2].mean(0)) > _SAME * max(reach, _width(other.face))
            for other in kept
        ):
            kept.append(one)
    return kept


def _width(face: Face) -> float:
    left, top, right, bottom = face.box
    return max(right - left, bottom - top)


def _moved(faces: Iterable[Face], stretch: npt.NDArray[np.float32]) -> list[Face]:
    return [Face(face.landmarks * stretch, face.blendshapes) for face in faces]


def turn_back(face: Face, turns: int, shape: tuple[int, ...]) -> Face:
    """Landmarks seen in an image that ``np.rot90`` turned, as those of the image of ``shape`` before it."""
    x, y, z = face.landmarks.T
    height, width = shape[:2]
    for turn in range(turns, 0, -1):
        # One turn to the left brings (x, y) to (y, w - x), w the width before it.
        x, y = (width if turn % 2 else height) - y, x
    return Face(np.stack([x, y, z], axis=1).astype(np.float32), face.blendshapes)


def _tiles(tracker: FaceTracker, image: ImageArray, parts: int) -> list[Face]:
    """Faces in overlapping square tiles: the detector scales its input to 128 pixels and misses small faces.

    Arguments:
        parts: number of tiles along the shorter side, without the overlap.
    """
    height, width = image.shape[:2]
    side = min(height, width) // parts
    if side < _TILE or (parts == 1 and max(height, width) == side):
        return []
    faces = []
    for top in _starts(height, side):
        for left in _starts(width, side):
            shift = np.array([left, top, 0], np.float32)
            tile = np.ascontiguousarray(image[top : top + side, left : left + side])
            faces += [Face(face.landmarks + shift, face.blendshapes) for face in tracker.detect(tile)]
    return faces


def _starts(length: int, side: int) -> list[int]:
    """Starts of pieces that cover ``length`` and overlap by half of ``side``."""
    count = max(1, -(-2 * (length - side) // side) + 1)
    return [round(k * (length - side) / max(1, count - 1)) for k in range(count)]
