"""From files to faces: load a portrait, track a clip."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import Crop, crop_box
from flowvqtalker.face.detect import MAX_RESIDUAL, Detection, detect_faces, face_turns, turn_back
from flowvqtalker.face.fit import fit
from flowvqtalker.face.model import CENTRE, EXPRESSION, FOCAL, IDENTITY, FaceModel
from flowvqtalker.face.quality import flaws
from flowvqtalker.face.topology import EYE_CORNERS, LIDS, LIPS
from flowvqtalker.face.tracker import Face, FaceTracker, largest_face
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.io.image import ImageArray, read_image
from flowvqtalker.io.video import probe, read_video

__all__ = [
    "MAX_FULL",
    "MAX_YAW",
    "MIN_FACE",
    "Portrait",
    "Progress",
    "front_pose",
    "load_portrait",
    "prepare_face",
    "track",
    "track_expression",
    "track_landmarks",
]

#: Depth at which the mean face is projected to measure the crop.
_FRONT_DEPTH = 13.0

logger = logging.getLogger(__name__)

#: Called with the frames done and the frames in total (0: unknown).
Progress = Callable[[int, int], None]

#: Smallest width of a face in pixels of the image.
MIN_FACE = 64
#: Largest yaw of the head in degrees.
MAX_YAW = 50.0
#: Longer side in pixels of whole-image video; larger images are reduced.
MAX_FULL = 3840

_MAX_FACES = 10
# Smaller faces are enlarged more than three times and look blurred.
_SMALL_FACE = 80
# Angles of the head in degrees up to which portraits come out well (docs/portraits.md).
_GOOD_YAW, _GOOD_PITCH = 30.0, 30.0
# Middles of the upper and lower inner lip; how far apart they may be, in distances between the outer eye corners.
_MOUTH, _WIDE_MOUTH = (13, 14), 0.33
# Fractions of landmarks outside of the image from which to warn, and from which to refuse.
_SOME_BEYOND, _MAX_BEYOND = 0.02, 0.35

# Frames of a clip that are searched in all orientations until one shows a face; a search in vain takes a second.
_SEARCHED_FRAMES = range(0, 100, 10)
_LONGEST_REFERENCE = 30 * FPS

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Portrait:
    """A portrait, ready to be animated.

    Attributes:
        picture: (H, W, 3) uint8, the whole image.
        image: (512, 512, 3) uint8, the crop.
        crop: the transform between them.
        landmarks: (478, 3) in pixels of the whole image.
        identity: (80,) α.
        expression: (64,) β0.
        pose: (6,) ρ0.
    """

    picture: ImageArray
    image: ImageArray
    crop: Crop
    landmarks: Floats
    identity: Tensor
    expression: Tensor
    pose: Tensor

    @property
    def view(self) -> tuple[ImageArray, Tensor, Tensor, Tensor]:
        """What is drawn from: the crop, α, β0 and ρ0."""
        return self.image, self.identity, self.expression, self.pose

    def reduced(self, side: int = MAX_FULL) -> Portrait:
        """The same portrait with the longer side of its image at most ``side`` pixels, for whole-image video."""
        height, width = self.picture.shape[:2]
        if max(height, width) <= side:
            return self
        factor = side / max(height, width)
        size = max(1, round(width * factor)), max(1, round(height * factor))
        logger.warning("the image of %dx%d pixels is reduced to %dx%d for video", width, height, *size)
        stretch = np.array([size[0] / width, size[1] / height])
        matrix = self.crop.matrix / [*stretch, 1]
        picture = np.asarray(cv2.resize(self.picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        landmarks = self.landmarks * np.array([*stretch, factor], np.float32)
        return replace(self, picture=picture, crop=Crop(matrix), landmarks=landmarks)


def load_portrait(model: FaceModel, source: str | Path | ImageArray, face: int | None = None) -> Portrait:
    """Detect the face of an image and fit the model to it.

    Arguments:
        model: the face model.
        source: file, or (H, W, 3) uint8 RGB.
        face: index of the face, largest first; None takes the largest and warns if there are several.

    Raises:
        UserError: if there is no image or no such face, or the face is too small or turned too far.
    """
    name = "the image" if isinstance(source, np.ndarray) else str(source)
    image = source if isinstance(source, np.ndarray) else read_image(source)
    with FaceTracker(max_faces=_MAX_FACES) as tracker:
        found = detect_faces(tracker, model, image)
    if not found:
        raise UserError(
            f"no face found in {name}; give an image in which a face of {MIN_FACE} pixels or more is clearly visible",
            code="no_face",
        )
    chosen = largest_face([one.face for one in found], face)
    if len(found) > 1 and face is None:
        others = (
            "--face 1 takes the other" if len(found) == 2 else f"--face 1 to --face {len(found) - 1} take the others"
        )
        across, down = chosen.landmarks[:, :2].mean(0)
        logger.warning(
            "%s shows %d faces; the largest is taken (at %.0f, %.0f), %s", name, len(found), across, down, others
        )
    return prepare_face(model, image, next(one for one in found if one.face is chosen), name)


def prepare_face(model: FaceModel, image: ImageArray, detection: Detection, name: str = "the image") -> Portrait:
    """Fit the model to a detected face.

    Arguments:
        model: the face model.
        image: (H, W, 3) uint8 RGB.
        detection: a face of it.
        name: of the image, for messages.

    Raises:
        UserError: if the face is too small, cut off or turned too far.
    """
    chosen = detection.face
    crop = crop_box(chosen.landmarks)
    fitted = fit(model, crop.points(chosen.landmarks))
    _check(name, image, chosen, fitted.pose[0], detection.residual)
    shown, (left, _, right, _) = crop.apply(image), chosen.box
    for text in flaws(shown, crop.points(chosen.landmarks), chosen.blendshapes, right - left):
        logger.warning(text, name)
    return Portrait(
        picture=image,
        image=shown,
        crop=crop,
        landmarks=chosen.landmarks,
        identity=torch.from_numpy(fitted.identity),
        expression=torch.from_numpy(fitted.expression[0]),
        pose=torch.from_numpy(fitted.pose[0]),
    )


def _check(name: str, image: ImageArray, face: Face, pose: Floats, residual: float) -> None:
    """Refuse a face that cannot be animated; warn of what will look wrong."""
    left, _, right, _ = face.box
    if right - left < MIN_FACE:
        raise UserError(
            f"the face in {name} is {right - left:.0f} pixels wide, {MIN_FACE} are needed; give a larger image",
            code="face_too_small",
        )
    size = np.array(image.shape[1::-1])
    points = face.landmarks[:, :2]
    beyond = np.asarray(((points < 0) | (points > size)).any(-1))
    if beyond[list(LIPS)].mean() > 0.5 or beyond[list(LIDS)].mean() > 0.5 or beyond.mean() > _MAX_BEYOND:
        raise UserError(
            f"the border of {name} cuts off {100 * beyond.mean():.0f} % of the face; "
            "give an image that shows both eyes, the mouth and the chin",
            code="face_cut_off",
        )
    gap, eyes = (float(np.linalg.norm(face.landmarks[a, :2] - face.landmarks[b, :2])) for a, b in (_MOUTH, EYE_CORNERS))
    if gap > _WIDE_MOUTH * eyes:
        logger.warning("the mouth in %s is wide open and will hardly close; give an image with it closed", name)
    pitch, yaw = (math.degrees(float(angle)) for angle in pose[:2])
    if abs(yaw) > MAX_YAW:
        raise UserError(
            f"the head in {name} is turned by {abs(yaw):.0f} degrees, at most {MAX_YAW:.0f} can be animated; "
            "give an image that shows both eyes",
            code="face_turned",
        )
    if right - left < _SMALL_FACE:
        logger.warning("the face in %s is %.0f pixels wide; from %d on it is sharp", name, right - left, _SMALL_FACE)
    if beyond.mean() > _SOME_BEYOND:
        logger.warning(
            "the border of %s cuts off %.0f %% of the face; what is missing is made up", name, 100 * beyond.mean()
        )
    if abs(yaw) > _GOOD_YAW:
        logger.warning(
            "the head in %s is turned by %.0f degrees; beyond %.0f the far cheek is made up", name, abs(yaw), _GOOD_YAW
        )
    elif abs(pitch) > _GOOD_PITCH:
        logger.warning(
            "the head in %s looks %s by %.0f degrees; beyond %.0f the face is often misread",
            *(name, "up" if pitch < 0 else "down", abs(pitch), _GOOD_PITCH),
        )
    elif residual > 2 * MAX_RESIDUAL:
        logger.warning("the face in %s is hard to make out; look at the result, or give a clearer image", name)


def track_landmarks(
    source: str | Path,
    limit: int | None = None,
    progress: Progress | None = None,
    model: FaceModel | None = None,
) -> tuple[Floats, Floats]:
    """Follow the largest face of an image or video.

    Arguments:
        source: image, or video (read at 25 fps).
        limit: number of frames to read at most.
        progress: called after each frame.
        model: with it, the face is found at any angle (:func:`flowvqtalker.face.detect.detect_faces`); a video keeps
            the orientation in which its face is first found.

    Returns:
        landmarks (T, 478, 3) in pixels and blendshapes (T, 52), float32; NaN where no face was found.

    Raises:
        UserError: if the file is neither, or shows no face in any frame.
    """
    info = probe(source)
    faces: list[Face | None] = []
    with FaceTracker() as tracker:
        if info.kind == "image":
            image = read_image(source)
            found = tracker.detect(image) if model is None else [d.face for d in detect_faces(tracker, model, image)]
            faces = [next(iter(found), None)]
        else:
            expected = round(info.seconds * FPS)
            expected = min(expected, limit) if limit is not None else expected
            for face in _follow(tracker, model, islice(read_video(source), limit)):
                faces.append(face)
                if progress is not None:
                    progress(len(faces), max(expected, len(faces)))
    if not any(faces):
        raise UserError(
            f"no face found in {source}; give an image or clip in which a face is clearly visible", code="no_face"
        )
    missing = sum(face is None for face in faces)
    if missing:
        logger.warning("%s: no face in %d of %d frames; their motion is interpolated", source, missing, len(faces))
    nothing = np.full((478, 3), np.nan, np.float32), np.full(52, np.nan, np.float32)
    pairs = [nothing if face is None else (face.landmarks, face.blendshapes) for face in faces]
    return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])


def _follow(tracker: FaceTracker, model: FaceModel | None, frames: Iterator[ImageArray]) -> Iterator[Face | None]:
    """One face through a clip, however the clip lies."""
    turns = 0 if model is None else None
    shape: tuple[int, ...] = ()

    def upright() -> Iterator[ImageArray]:
        nonlocal turns, shape
        for number, frame in enumerate(frames):
            if turns is None and model is not None and (number in _SEARCHED_FRAMES or tracker.detect(frame)):
                turns = face_turns(tracker, model, frame)
            shape = frame.shape
            yield np.ascontiguousarray(np.rot90(frame, turns)) if turns else frame

    for face in tracker.track(upright()):
        yield turn_back(face, turns, shape) if face is not None and turns else face


def track(
    model: FaceModel | None, source: str | Path, *, smooth: bool = True, progress: Progress | None = None
) -> Coefficients:
    """Landmarks and coefficients of an image or of every frame of a video (at 25 fps).

    Arguments:
        model: the face model; None leaves the coefficients at zero (landmarks only).
        source: image or video.
        smooth: smooth the coefficients of a clip over time, lips and lids excepted.
        progress: called after each frame.

    Raises:
        UserError: if the file is neither, or shows no face in any frame.
    """
    landmarks, blendshapes = track_landmarks(source, progress=progress, model=model)
    crop = crop_box(landmarks)
    count = len(landmarks)
    if model is None:
        expression, pose = np.zeros((count, 64), np.float32), np.zeros((count, 6), np.float32)
        identity = np.zeros(80, np.float32)
    else:
        fitted = fit(model, crop.points(landmarks), smooth=smooth)
        expression, pose, identity = fitted.expression, fitted.pose, fitted.identity
    matrix = crop.matrix.astype(np.float32)
    return Coefficients(expression, pose, identity, landmarks=landmarks, blendshapes=blendshapes, crop=matrix)


def front_pose(model: FaceModel) -> Tensor:
    """Pose (6,) of a frontal face at the size that every crop has."""
    zeros = model.mean.new_zeros(IDENTITY), model.mean.new_zeros(EXPRESSION)
    seen = model.project(*zeros, model.mean.new_tensor([0.0, 0.0, 0.0, 0.0, 0.0, _FRONT_DEPTH]))[:, :2].cpu().numpy()
    crop = crop_box(seen)
    depth = _FRONT_DEPTH / crop.scale  # an image s times as large is seen from 1 / s of the distance
    across, down = (crop.points(np.full(2, CENTRE, seen.dtype)) - CENTRE) * depth / FOCAL
    return torch.tensor([0.0, 0.0, 0.0, float(across), float(down), depth])


def track_expression(model: FaceModel, source: str | Path) -> Tensor:
    """Expression (T, 64) of an image or clip; of a clip the first 30 seconds."""
    landmarks, _ = track_landmarks(source, limit=_LONGEST_REFERENCE, model=model)
    return torch.from_numpy(fit(model, crop_box(landmarks).points(landmarks), smooth=True).expression)
