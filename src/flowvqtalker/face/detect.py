"""Every face of a picture, however it lies: small ones, ones at the border, tilted by any angle."""

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

#: Residual of the face model's fit (in distances between the outer eye corners) above which landmarks are doubtful:
#: they are below it for 97 of 100 upright portraits, above it for all that were read upside down.
MAX_RESIDUAL = 0.0025
# A larger picture is searched at this length of its longer side; the landmarks are then refined at full resolution.
_SEARCHED = 1920
# Narrowest tile of a picture that is searched for small faces, in pixels.
_TILE = 128
# Faces whose middles are nearer than this, in widths of the larger, are one.
_SAME = 0.5
_ROUNDS = 2


@dataclass(frozen=True)
class Detection:
    """A face and how well it was seen.

    Attributes:
        face: landmarks in pixels of the picture.
        residual: of the fitted face model, in distances between the outer eye corners.
    """

    face: Face
    residual: float


def detect_faces(tracker: FaceTracker, model: FaceModel, picture: ImageArray) -> list[Detection]:
    """All faces of a picture, largest first.

    MediaPipe finds faces that are tilted by up to about 60 degrees and places their landmarks the less well the more
    they are; faces upside down it reads as upright ones. So each is looked at again in a crop that is upright after the
    first look, and where the result is no face by the measure of the face model, or there is none at all, the picture
    is searched again in its other three orientations. A picture that shows nothing large is searched in tiles.

    Arguments:
        tracker: with as many faces as are wanted.
        model: the face model.
        picture: (H, W, 3) uint8 RGB.
    """
    height, width = picture.shape[:2]
    factor = min(1.0, _SEARCHED / max(height, width))
    small = picture
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        small = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
    stretch = np.array([width / small.shape[1], height / small.shape[0], 1 / factor], np.float32)
    for parts in (0, 1, 2, 4):
        # Tiles are cut from the whole picture, where small faces are largest.
        seen = _moved(tracker.detect(small), stretch) if parts == 0 else _tiles(tracker, picture, parts)
        found = [_refined(tracker, model, picture, face) for face in seen]
        if parts == 0 and (not found or any(one.residual > MAX_RESIDUAL for one in found)):
            turned = _turned(tracker, model, picture, small, stretch)
            # A face that looks far up reads as one upside down, too, and not worse: what is doubtful is upright.
            sure = [one for one in turned if one.residual <= MAX_RESIDUAL]
            # Patterns look like faces, too: of doubtful ones only the best, and only where there is nothing else.
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
    tracker: FaceTracker, model: FaceModel, picture: ImageArray, small: ImageArray, stretch: npt.NDArray[np.float32]
) -> list[Detection]:
    """Faces seen in the other three orientations of a picture."""
    found = []
    for turns in (1, 2, 3):
        faces = tracker.detect(np.ascontiguousarray(np.rot90(small, turns)))
        back = _moved((turn_back(face, turns, small.shape) for face in faces), stretch)
        found += [_refined(tracker, model, picture, face) for face in back]
    return found


def _refined(tracker: FaceTracker, model: FaceModel, picture: ImageArray, face: Face) -> Detection:
    """The face as it is seen in its own upright crop; as it was, where it is not seen there."""
    best = Detection(face, _residual(model, face))
    for _ in range(_ROUNDS):
        try:
            crop = crop_box(face.landmarks)
        except UserError:  # landmarks that coincide
            break
        again = tracker.detect(crop.apply(picture))
        if not again:
            break
        # In the crop the face fills most of the picture; another person's may show beside it.
        middle = min(again, key=lambda one: float(np.linalg.norm(one.landmarks[:, :2].mean(0) - 256)))
        face = Face(crop.points_back(middle.landmarks).astype(np.float32), middle.blendshapes)
        best = Detection(face, _residual(model, face))
        # Nearly upright at first sight is upright enough.
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
    """Of faces in the same place the one that fits best."""
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


def _tiles(tracker: FaceTracker, picture: ImageArray, parts: int) -> list[Face]:
    """Faces in overlapping squares: the detector sees a whole picture at 128 pixels, and small faces are lost in it.

    Arguments:
        parts: the squares are the shorter side over this wide.
    """
    height, width = picture.shape[:2]
    side = min(height, width) // parts
    if side < _TILE or (parts == 1 and max(height, width) == side):
        return []
    faces = []
    for top in _starts(height, side):
        for left in _starts(width, side):
            shift = np.array([left, top, 0], np.float32)
            tile = np.ascontiguousarray(picture[top : top + side, left : left + side])
            faces += [Face(face.landmarks + shift, face.blendshapes) for face in tracker.detect(tile)]
    return faces


def _starts(length: int, side: int) -> list[int]:
    """Starts of overlapping pieces, a half of ``side`` apart, that cover ``length``."""
    count = max(1, -(-2 * (length - side) // side) + 1)
    return [round(k * (length - side) / max(1, count - 1)) for k in range(count)]
