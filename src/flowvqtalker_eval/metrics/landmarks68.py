"""The 68 iBUG landmarks of each frame: dlib's, or picked from the 478 points of the face mesh.

Landmark distances are defined on dlib's points. Those of the mesh lie elsewhere (2.1 pixels of the 128-pixel crop on
average, 3 to 5 at the jaw), so the two never share a column.

dlib's files come with the package ``face_recognition_models``, which is found but never imported (it needs
``pkg_resources``). The shape predictor was trained on iBUG 300-W, whose licence excludes commercial use.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.weights import sha256
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Frames, Settings

__all__ = ["DLIB_SHA256", "MESH68", "Dlib68", "DlibModel", "Mesh68", "dlib_module", "find_dlib_model", "mesh68"]

VARIABLE = "FLOWVQTALKER_DLIB"
_INSTALL = "run `pip install 'flowvqtalker[eval]'`"

DlibModel = Literal["shape_predictor_68_face_landmarks.dat", "dlib_face_recognition_resnet_model_v1.dat"]

#: Hashes of the model files.
DLIB_SHA256: dict[DlibModel, str] = {
    "shape_predictor_68_face_landmarks.dat": "fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
    "dlib_face_recognition_resnet_model_v1.dat": "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
}

#: Vertex of the face mesh for each of the 68 points: the nearest to dlib's point on average over 103 aligned portraits,
#: mirrored in the other half; of two as near, the one on the same contour.
MESH68 = np.array(
    [
        *(127, 234, 93, 215, 138, 136, 149, 148, 152, 377, 378, 365, 367, 435, 323, 454, 356),  # jaw
        *(70, 63, 105, 66, 107, 336, 296, 334, 293, 300),  # brows
        *(168, 197, 195, 4, 240, 97, 2, 326, 460),  # nose
        *(33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380),  # eyes
        *(61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181),  # outer lips
        *(78, 82, 13, 312, 308, 317, 14, 87),  # inner lips
    ],
    dtype=np.int64,
)

# Shorter sides of the reduced image that is searched, until one shows a face. dlib's detector needs 80 pixels of face,
# but misses more very large faces than the same ones reduced (39 of 50 frames of one clip of 512 pixels).
_SEARCHED = (256, 512, 1024)


def dlib_module() -> Any:
    """The module ``dlib``.

    Raises:
        MissingDependency: if it is not installed.
    """
    try:
        import dlib  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependency(f"dlib cannot be loaded ({error}); {_INSTALL}") from error
    return dlib


def find_dlib_model(name: DlibModel, folder: str | Path | None = None) -> Path:
    """A model file of dlib: in ``folder``, in the folder FLOWVQTALKER_DLIB, or in ``face_recognition_models``.

    Raises:
        MissingDependency: if it is nowhere, or has another sha256.
    """
    folders = [Path(given) for given in (folder, os.environ.get(VARIABLE)) if given]
    package = importlib.util.find_spec("face_recognition_models")
    if package is not None and package.submodule_search_locations:
        folders.append(Path(next(iter(package.submodule_search_locations))) / "models")
    hint = f"{_INSTALL}, or set {VARIABLE} to a folder with dlib.net/files/{name}.bz2, unpacked"
    file = next((place / name for place in folders if (place / name).is_file()), None)
    if file is None:
        raise MissingDependency(f"{name} not found; {hint}")
    if (found := sha256(file)) != DLIB_SHA256[name]:
        raise MissingDependency(f"{file} has sha256 {found}, expected {DLIB_SHA256[name]}; {hint}")
    return file


@functools.cache
def _load_models(folder: str | Path | None) -> tuple[Any, Any, Any]:
    """dlib, its face detector and its predictor (100 MB), shared within the process."""
    dlib = dlib_module()
    path = find_dlib_model("shape_predictor_68_face_landmarks.dat", folder)
    return dlib, dlib.get_frontal_face_detector(), dlib.shape_predictor(str(path))


class Dlib68(FrameExtractor):
    """dlib's 68 points of the largest face of each frame, found in each frame on its own.

    Following the last frame's box would save 4 ms a frame, but then a frame's points would depend on where a clip
    begins: moving the box by the detector's own spread moves the points by 0.4 to 0.6 pixels of the crop.

    Arrays: ``landmarks68`` (T, 68, 2) float32 in pixels of the frame; NaN where no face was found.

    Arguments:
        folder: where dlib's files are, see :func:`find_dlib_model`.
    """

    name = "dlib68"
    gives = ("landmarks68",)

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder

    def settings(self) -> Settings:
        digest = DLIB_SHA256["shape_predictor_68_face_landmarks.dat"][:16]
        return {"landmarks": "dlib 68", "sha256": digest, "detector": "dlib HOG, shorter side 256/512/1024"}

    def detect(self, grey: Frames) -> tuple[int, int, int, int] | None:
        """Left, top, right and bottom of the largest face in a grey image (H, W), or None."""
        _, detector, _ = _load_models(self._folder)
        short = min(grey.shape)
        for size in sorted({min(size, short) for size in _SEARCHED}):
            scale = short / size
            wide, high = round(grey.shape[1] / scale), round(grey.shape[0] / scale)
            small = grey if scale == 1 else cv2.resize(grey, (wide, high), interpolation=cv2.INTER_AREA)
            found, scores, _ = detector.run(np.ascontiguousarray(small), 0, 0.0)
            if len(found):
                # False detections may be as large as a face, but score far less.
                sure = [i for i, score in enumerate(scores) if score >= max(scores) / 2]
                box = found[max(sure, key=lambda i: (found[i].area(), scores[i]))]
                sides = (box.left(), box.top(), box.right(), box.bottom())
                left, top, right, bottom = (round(side * scale) for side in sides)
                return left, top, right, bottom
        return None

    def points(self, grey: Frames, box: tuple[int, int, int, int]) -> npt.NDArray[np.float32]:
        """The 68 points (68, 2) of the face in a box of a grey image (H, W)."""
        dlib, _, predictor = _load_models(self._folder)
        found = predictor(np.ascontiguousarray(grey), dlib.rectangle(*box))
        return np.array([(p.x, p.y) for p in found.parts()], np.float32)

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise UserError(f"RGB images (n, H, W, 3) of type uint8 are needed, got {frames.shape} {frames.dtype}")
        landmarks = np.full((len(frames), 68, 2), np.nan, np.float32)
        for i, frame in enumerate(frames):
            grey = np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), np.uint8)
            box = self.detect(grey)
            if box is not None:
                landmarks[i] = self.points(grey, box)
        return {"landmarks68": landmarks}


def mesh68(mesh: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """The 68 points (..., 68, 2) of a face mesh (..., 478, 2 or 3), see :data:`MESH68`."""
    if mesh.ndim < 2 or mesh.shape[-2] != 478 or mesh.shape[-1] not in (2, 3):
        raise UserError(f"a face mesh has shape (..., 478, 2 or 3), got {mesh.shape}")
    return np.ascontiguousarray(mesh[..., MESH68, :2], dtype=np.float32)


class Mesh68(FrameExtractor):
    """The 68 points picked from MediaPipe's face mesh, in place of dlib's.

    Arrays: ``landmarks68`` (T, 68, 2); NaN where no face was found.
    """

    name = "mesh68"
    needs = ("mesh",)
    gives = ("landmarks68",)

    def settings(self) -> Settings:
        return {"landmarks": "MediaPipe mesh, 68 of 478", "map": hashlib.sha256(MESH68.tobytes()).hexdigest()[:16]}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        return {"landmarks68": mesh68(known["mesh"])}
