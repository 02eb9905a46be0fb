"""Facial landmarks of images and video frames (MediaPipe Face Landmarker, 478 points, 52 blendshapes)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker import weights
from flowvqtalker.errors import MissingDependency, UserError

__all__ = ["LANDMARKER_SHA256", "Face", "FaceTracker", "find_landmarker", "largest_face"]

LANDMARKER_SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
LANDMARKER_VARIABLE = "FLOWVQTALKER_FACE_LANDMARKER"

# The detector misses faces that fill the image to its edges; a border of this fraction of the longer side helps.
_BORDER = 0.35


@dataclass(frozen=True)
class Face:
    """One detected face.

    Attributes:
        landmarks: (478, 3) float32 in pixels of the input; z is MediaPipe's relative depth (smaller is nearer).
        blendshapes: (52,) float32 in [0, 1], see :data:`flowvqtalker.face.arkit.ARKIT_NAMES`.
    """

    landmarks: npt.NDArray[np.float32]
    blendshapes: npt.NDArray[np.float32]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the landmarks in pixels."""
        low = self.landmarks[:, :2].min(0)
        high = self.landmarks[:, :2].max(0)
        return float(low[0]), float(low[1]), float(high[0]), float(high[1])

    @property
    def area(self) -> float:
        """Area of the box in pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


def find_landmarker(path: str | Path | None = None) -> Path:
    """The Face Landmarker model file, its hash checked.

    Arguments:
        path: the file; None takes the one in the variable FLOWVQTALKER_FACE_LANDMARKER, or else the package's own.

    Raises:
        MissingDependency: if the file is missing, or its sha256 is not the expected one.
    """
    given = path or os.environ.get(LANDMARKER_VARIABLE)
    file = Path(given) if given else weights.folder() / weights.LANDMARKER
    remedy = "take another file" if given else "install the package again"
    if not file.is_file():
        raise MissingDependency(f"face landmarker model not found at {file}; {remedy}")
    digest = weights.sha256(file)
    if digest != LANDMARKER_SHA256:
        raise MissingDependency(
            f"face landmarker model {file} has sha256 {digest}, expected {LANDMARKER_SHA256}; {remedy}"
        )
    return file


class FaceTracker:
    """Landmarks of every face in an image, or of one face through a video. A context manager.

    Each frame is detected independently: MediaPipe's video mode smooths over time, which reduced lip motion by up to
    10 % on test clips. :mod:`flowvqtalker.face.fit` smooths everything but lips and lids.

    Arguments:
        model: the model file, see :func:`find_landmarker`.
        max_faces: maximum number of faces per image.
    """

    def __init__(self, model: str | Path | None = None, max_faces: int = 1) -> None:
        # The import takes seconds and links libEGL and libGLESv2.
        try:
            import mediapipe
            from mediapipe.tasks.python import BaseOptions, vision
        except (ImportError, OSError) as error:
            raise MissingDependency(
                f"mediapipe cannot be loaded ({str(error).splitlines()[0]}); run `pip install 'mediapipe>=1.2'`, "
                "on Debian also `apt-get install libegl1 libgles2 libgl1 libglib2.0-0`"
            ) from error
        self._image: Any = mediapipe.Image
        self._format: Any = mediapipe.ImageFormat.SRGB
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(find_landmarker(model))),
            running_mode=vision.RunningMode.IMAGE,
            num_faces=max_faces,
            output_face_blendshapes=True,
        )
        self._landmarker: Any = vision.FaceLandmarker.create_from_options(options)

    def detect(self, image: npt.NDArray[np.uint8]) -> list[Face]:
        """Faces of one image, largest first.

        Arguments:
            image: (H, W, 3) uint8 RGB.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"an image must have shape (H, W, 3) and type uint8, got {image.shape} {image.dtype}")
        faces = self._detect(image)
        if faces:
            return faces
        border = int(_BORDER * max(image.shape[:2]))
        padded = np.pad(image, ((border, border), (border, border), (0, 0)), mode="constant", constant_values=110)
        offset = np.array([border, border, 0], np.float32)
        return [Face(face.landmarks - offset, face.blendshapes) for face in self._detect(padded)]

    def _detect(self, image: npt.NDArray[np.uint8]) -> list[Face]:
        height, width = image.shape[:2]
        found = self._landmarker.detect(self._image(image_format=self._format, data=np.ascontiguousarray(image)))
        scale = np.array([width, height, width], np.float32)
        faces = [
            Face(
                np.array([(p.x, p.y, p.z) for p in points], dtype=np.float32) * scale,
                np.array([c.score for c in shapes], dtype=np.float32),
            )
            for points, shapes in zip(found.face_landmarks, found.face_blendshapes, strict=True)
        ]
        return sorted(faces, key=lambda face: -face.area)

    def track(self, frames: Iterable[npt.NDArray[np.uint8]]) -> Iterator[Face | None]:
        """Follow one face through frames in order: first the largest, then always the one nearest to the last.

        Yields:
            the face of each frame, or None where none was found.
        """
        last: npt.NDArray[np.float32] | None = None
        for frame in frames:
            faces = self.detect(frame)
            if not faces:
                yield None
                continue
            if last is None:
                face = faces[0]
            else:
                centre = last[:, :2].mean(0)
                face = min(faces, key=lambda f: float(np.linalg.norm(f.landmarks[:, :2].mean(0) - centre)))
            last = face.landmarks
            yield face

    def close(self) -> None:
        """Free the native graph; the tracker cannot be used afterwards."""
        if self._landmarker is not None:
            self._landmarker.close()
            self._landmarker = None

    def __enter__(self) -> FaceTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def largest_face(faces: list[Face], index: int | None = None) -> Face:
    """The face to animate: the largest, or the one with number ``index`` (0 is the largest).

    Raises:
        UserError: if there is no face, or fewer than ``index`` + 1.
    """
    if not faces:
        raise UserError("no face found; give an image in which one face is clearly visible, at least 64 pixels wide")
    if index is None:
        return faces[0]
    if not 0 <= index < len(faces):
        raise UserError(
            f"--face {index}: the image has {len(faces)} face(s), numbered 0 to {len(faces) - 1}, largest first",
            code="out_of_range",
        )
    return faces[index]
