"""CSIM: how much a generated face is the same person, as the cosine between face embeddings.

The embedding is dlib's (a ResNet with 29 convolutions, 128 numbers; King 2017) of the face aligned by dlib's own rule,
so the column is called ``CSIM (dlib)``; published values of CSIM use ArcFace and are lower. dlib's embeddings share a
large mean: on 33 clips of 24 people, frames of one clip reach 0.98, two clips of one person 0.97, two people still 0.84
(at most 0.94). dlib takes two faces for one person if their embeddings lie closer than 0.6; :func:`same_person` gives
the share of such frames.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Frames, Settings
from flowvqtalker_eval.metrics.landmarks68 import DLIB_SHA256, Dlib68, DlibModel, dlib_module, find_dlib_model
from flowvqtalker_eval.metrics.motion import finite_mean

__all__ = ["COLUMN", "FaceIdentity", "cosine", "csim", "same_person"]

COLUMN = "CSIM (dlib)"

_RESNET: DlibModel = "dlib_face_recognition_resnet_model_v1.dat"
_CHIP, _PADDING = 150, 0.25


def cosine(a: Array, b: Array) -> npt.NDArray[np.float64]:
    """Cosine between rows (..., D) of embeddings; NaN stays NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1]:
        raise UserError(f"embeddings must have one size, got {a.shape} and {b.shape}")
    return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def csim(reference: Array, generated: Array) -> float:
    """Mean cosine of frames (T, D) and a portrait (D,) or, frame by frame, a real clip (T, D), where both faces were
    found; NaN if none was."""
    if reference.ndim > 1 and len(reference) != len(generated):
        raise UserError(
            f"clips must be equally long, got {len(reference)} and {len(generated)} frames; pair them first"
        )
    return finite_mean(cosine(reference, generated))


def same_person(reference: Array, generated: Array) -> float:
    """Share of the frames (T, D) with a face that lie within 0.6 of a reference, (D,) or (T, D)."""
    apart = np.linalg.norm(np.asarray(generated, np.float64) - np.asarray(reference, np.float64), axis=-1)
    return finite_mean(np.where(np.isfinite(apart), apart < 0.6, np.nan))


class FaceIdentity(FrameExtractor):
    """dlib's embedding of the face in each frame.

    An embedding costs 60 ms, more than all else together, and a person does not change from frame to frame: the first
    face of each run of ``every`` frames is embedded and stands for the others.

    Arrays: ``identity_embedding`` (T, 128) float32; NaN where no face was found.

    Arguments:
        every: length of the runs; 1 embeds each frame. Runs begin anew with each batch.
        folder: where dlib's files are, see :func:`~flowvqtalker_eval.metrics.landmarks68.find_dlib_model`.
    """

    name = "identity"
    needs = ("landmarks68",)
    gives = ("identity_embedding",)

    def __init__(self, every: int = 8, folder: str | Path | None = None) -> None:
        if every < 1:
            raise UserError(f"identity is read every 1, 2, ... frames, got {every}")
        self.every, self._folder = every, folder

    def settings(self) -> Settings:
        return {"embedding": "dlib ResNet 128", "sha256": DLIB_SHA256[_RESNET][:16], "every": self.every}

    def _embed(self, frames: Frames, landmarks: Array) -> npt.NDArray[np.float32]:
        """Embeddings (n, 128) of the faces with landmarks (n, 68, 2) in frames (n, H, W, 3)."""
        dlib = dlib_module()
        if self._model is None:
            self._model = dlib.face_recognition_model_v1(str(find_dlib_model(_RESNET, self._folder)))
        chips = []
        for frame, points in zip(frames, np.round(landmarks).astype(int).tolist(), strict=True):
            box = dlib.rectangle(*map(min, zip(*points, strict=True)), *map(max, zip(*points, strict=True)))
            shape = dlib.full_object_detection(box, [dlib.point(x, y) for x, y in points])
            chips.append(dlib.get_face_chip(np.ascontiguousarray(frame), shape, _CHIP, _PADDING))
        return np.array(self._model.compute_face_descriptor(chips) if chips else [], np.float32).reshape(-1, 128)

    def portrait(self, image: Frames) -> npt.NDArray[np.float32]:
        """Embedding (128,) of the largest face in an image (H, W, 3).

        Raises:
            UserError: if there is none.
        """
        landmarks = Dlib68(self._folder)(image[None], {})["landmarks68"]
        if not np.isfinite(landmarks).all():
            raise UserError("no face found in the portrait; give an image in which one face is seen from the front")
        return np.asarray(self._embed(image[None], landmarks)[0], np.float32)

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        landmarks = known["landmarks68"]
        found = np.flatnonzero(np.isfinite(landmarks).all((1, 2)))
        _, first, run = np.unique(found // self.every, return_index=True, return_inverse=True)
        chosen = found[first]
        embedding = np.full((len(frames), 128), np.nan, np.float32)
        embedding[found] = self._embed(frames[chosen], landmarks[chosen])[run]
        return {"identity_embedding": embedding}
