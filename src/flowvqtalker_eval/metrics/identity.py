"""CSIM: how much a generated face is the same person, the cosine between embeddings of faces.

The embedding is dlib's (ResNet with 29 convolutions, 128 numbers; King 2017) of the face turned upright and scaled by
dlib's own rule, so the column is called ``CSIM (dlib)``; published values of CSIM use ArcFace and lie lower. dlib's
embeddings share a large mean: on 33 clips of 24 people, frames of one clip reach 0.98, two clips of one person 0.97,
two people still 0.84 (at most 0.94). dlib calls two faces one person when their embeddings lie closer than 0.6, and
:func:`same_person` gives that share as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Settings
from flowvqtalker_eval.metrics.landmarks68 import DLIB_SHA256, Dlib68, DlibModel, dlib_module, find_dlib_model

__all__ = ["COLUMN", "FaceIdentity", "cosine", "csim_to_clip", "csim_to_portrait", "same_person"]

COLUMN = "CSIM (dlib)"

_RESNET: DlibModel = "dlib_face_recognition_resnet_model_v1.dat"
_CHIP, _PADDING = 150, 0.25

Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]


def cosine(a: Floats, b: Floats) -> npt.NDArray[np.float64]:
    """Cosine between rows (..., D) of embeddings; NaN stays NaN."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim < 1 or b.ndim < 1 or a.shape[-1] != b.shape[-1]:
        raise UserError(f"embeddings must have one size, got {a.shape} and {b.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)))


def csim_to_portrait(portrait: Floats, generated: Floats) -> float:
    """Mean cosine between the portrait (D,) that was animated and the frames (T, D); NaN if no face was found."""
    if portrait.ndim != 1:
        raise UserError(f"the portrait's embedding has shape (D,), got {portrait.shape}")
    return _mean(cosine(portrait, generated))


def csim_to_clip(real: Floats, generated: Floats) -> float:
    """Mean cosine frame by frame between a real clip (T, D) and a generated one, where both faces were found."""
    if len(real) != len(generated):
        raise UserError(f"clips must be equally long, got {len(real)} and {len(generated)} frames; pair them first")
    return _mean(cosine(real, generated))


def same_person(reference: Floats, generated: Floats) -> float:
    """Share of the frames (T, D) within 0.6 of a reference, (D,) or (T, D), of those in which faces were found."""
    apart = np.linalg.norm(np.asarray(generated, np.float64) - np.asarray(reference, np.float64), axis=-1)
    return _mean(np.where(np.isfinite(apart), apart < 0.6, np.nan))


def _mean(values: Floats) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if found.size else float("nan")


class FaceIdentity(FrameExtractor):
    """dlib's embedding of the face in each frame.

    An embedding costs 60 ms, more than all else together, and a person does not change from frame to frame: the first
    face in each run of ``every`` frames is embedded and stands for the others.

    Arrays: ``identity_embedding`` (T, 128) float32; NaN where no face was found.

    Arguments:
        every: length of the runs; 1 embeds each frame. Runs begin anew with each batch.
        folder: where dlib's files are, see :func:`~flowvqtalker_eval.metrics.landmarks68.find_dlib_model`.
    """

    name = "identity"
    needs: tuple[str, ...] = ("landmarks68",)
    gives = ("identity_embedding",)

    def __init__(self, every: int = 8, folder: str | Path | None = None) -> None:
        if every < 1:
            raise UserError(f"identity is read every 1, 2, ... frames, got {every}")
        self.every = every
        self._folder = folder

    def settings(self) -> Settings:
        """Network and sampling."""
        return {"embedding": "dlib ResNet 128", "sha256": DLIB_SHA256[_RESNET][:16], "every": self.every}

    def embed(self, images: list[Pixels], landmarks: Floats) -> npt.NDArray[np.float32]:
        """Embeddings (n, 128) of faces.

        Arguments:
            images: (H, W, 3) uint8 RGB each.
            landmarks: (n, 68, 2) in their pixels.
        """
        dlib = dlib_module()
        if self._model is None:
            self._model = dlib.face_recognition_model_v1(str(find_dlib_model(_RESNET, self._folder)))
        chips = []
        for image, points in zip(images, np.round(landmarks).astype(int), strict=True):
            (left, top), (right, bottom) = points.min(0), points.max(0)
            box = dlib.rectangle(int(left), int(top), int(right), int(bottom))
            shape = dlib.full_object_detection(box, [dlib.point(int(x), int(y)) for x, y in points])
            chips.append(dlib.get_face_chip(np.ascontiguousarray(image), shape, _CHIP, _PADDING))
        if not chips:
            return np.empty((0, 128), np.float32)
        return np.array(self._model.compute_face_descriptor(chips), np.float32)

    def portrait(self, image: Pixels) -> npt.NDArray[np.float32]:
        """Embedding (128,) of the largest face in a picture (H, W, 3).

        Raises:
            UserError: if there is none.
        """
        landmarks = Dlib68(self._folder)(image[None], {})["landmarks68"]
        if not np.isfinite(landmarks).all():
            raise UserError("no face found in the portrait; give a picture in which one face is seen from the front")
        return np.asarray(self.embed([image], landmarks)[0], np.float32)

    def __call__(self, frames: Pixels, known: dict[str, Array]) -> dict[str, Array]:
        """Frames (n, H, W, 3) and ``landmarks68`` to ``identity_embedding``."""
        landmarks = known["landmarks68"]
        found = np.asarray(np.isfinite(landmarks).all((1, 2)))
        embedding = np.full((len(frames), 128), np.nan, np.float32)
        runs = [range(start, min(start + self.every, len(frames))) for start in range(0, len(frames), self.every)]
        chosen = [(run, next((i for i in run if found[i]), None)) for run in runs]
        used = [(run, i) for run, i in chosen if i is not None]
        made = self.embed([frames[i] for _, i in used], landmarks[[i for _, i in used]])
        for (run, _), values in zip(used, made, strict=True):
            embedding[[i for i in run if found[i]]] = values
        return {"identity_embedding": embedding}
