"""Face mesh, expression and pose of each frame, for the metrics of motion."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, FrameExtractor, Frames, Settings, Wave

__all__ = ["FitExtractor", "MeshExtractor"]


class MeshExtractor(FrameExtractor):
    """MediaPipe's landmarks of the largest face of each frame, found in each frame on its own.

    Arrays: ``mesh`` (T, 478, 3) in pixels of the frame; NaN where no face was found.
    """

    name = "mesh"
    gives = ("mesh",)

    def settings(self) -> Settings:
        from flowvqtalker.face.tracker import LANDMARKER_SHA256

        return {"landmarks": "MediaPipe Face Landmarker", "sha256": LANDMARKER_SHA256[:16]}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        if self._model is None:
            from flowvqtalker.face.tracker import FaceTracker

            self._model = FaceTracker()
        mesh = np.full((len(frames), 478, 3), np.nan, np.float32)
        for i, frame in enumerate(frames):
            for face in self._model.detect(frame)[:1]:
                mesh[i] = face.landmarks
        return {"mesh": mesh}

    def close(self) -> None:
        """Free the native graph, which must not outlive the program; the next call makes a new one."""
        if self._model is not None:
            self._model.close()
            self._model = None


class FitExtractor(ClipExtractor):
    """Expression β and pose ρ of each frame: the face model fitted to the mesh, one identity per clip, no smoothing.

    The clip's own crop (:func:`flowvqtalker.face.crop.crop_box`) is the frame of reference, so that the translations of
    a whole frame and of a face cut out of it agree.

    Arrays: ``expression`` (T, 64), ``pose`` (T, 6), ``identity`` (80,); NaN where no face was found.

    Arguments:
        weights: folder of weights with the face model; None takes the package's.
    """

    name = "fit"
    needs = ("mesh",)
    gives = ("expression", "pose", "identity")

    def __init__(self, weights: str | Path | None = None) -> None:
        self._weights = weights

    def settings(self) -> Settings:
        from flowvqtalker import weights

        entry = weights.manifest(self._weights).get("face_model.safetensors")
        return {"face_model": entry.sha256[:16] if entry else "missing", "smoothing": "none"}

    def __call__(self, known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        from flowvqtalker.face.crop import crop_box
        from flowvqtalker.face.fit import fit
        from flowvqtalker.loading import load_face_model

        mesh = known["mesh"]
        seen = np.isfinite(mesh).all((1, 2))
        expression = np.full((len(mesh), 64), np.nan, np.float32)
        pose = np.full((len(mesh), 6), np.nan, np.float32)
        identity = np.full(80, np.nan, np.float32)
        if seen.any():
            if self._model is None:
                self._model = load_face_model(self._weights)
            found = fit(self._model, crop_box(mesh).points(mesh))
            expression[seen], pose[seen], identity = found.expression[seen], found.pose[seen], found.identity
        return {"expression": expression, "pose": pose, "identity": identity}
