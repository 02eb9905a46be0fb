"""Image columns: SSIM, PSNR, Fréchet distances, landmark distances, sharpness, identity, detection."""

from __future__ import annotations

from functools import cache
from itertools import islice, zip_longest
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.image import read_image
from flowvqtalker.io.video import read_video
from flowvqtalker_eval.metrics.align import AlignedFaces
from flowvqtalker_eval.metrics.analysis import Extractor, Frames, Settings
from flowvqtalker_eval.metrics.cpbd import Sharpness as SharpnessExtractor
from flowvqtalker_eval.metrics.frechet import GaussianFit, InceptionFeatures, MobileNetFeatures, frechet_distance
from flowvqtalker_eval.metrics.identity import COLUMN, FaceIdentity, csim, same_person
from flowvqtalker_eval.metrics.landmarks68 import dlib_module, find_dlib_model
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.metrics.motion import landmark_distance
from flowvqtalker_eval.metrics.ssim import psnr, ssim
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, Options, SetScore, landmark_extractors

__all__ = ["MEASURES", "aligned_extractors", "compare_frames"]

_BATCH = 8


def aligned_extractors(options: Options) -> list[Extractor]:
    """Extractors that give ``aligned`` and ``aligned68``: landmarks predicted on the crop, or moved from the mesh.

    Raises:
        MissingDependency: if dlib or its files are missing.
    """
    return [*landmark_extractors(options), AlignedFaces("crop" if options.landmarks == "dlib" else "frame")]


def compare_frames(real: Path, generated: Path) -> dict[str, float]:
    """SSIM and PSNR of whole frames, means over frames; real frames are resized to the generated ones.

    Empty if the videos differ in length.
    """
    totals = np.zeros(2)
    count = 0
    pairs = zip_longest(read_video(real), read_video(generated))
    while batch := list(islice(pairs, _BATCH)):
        if any(a is None or b is None for a, b in batch):
            return {}
        ours = np.stack([b for _, b in batch])
        theirs = np.stack([_resized(a, ours.shape[1], ours.shape[2]) for a, _ in batch])
        totals += ssim(theirs, ours).sum(), psnr(theirs, ours).sum()
        count += len(batch)
    return {"ssim": totals[0] / count, "psnr": totals[1] / count} if count else {}


def _resized(frame: Frames, height: int, width: int) -> Frames:
    if frame.shape[:2] == (height, width):
        return frame
    how = cv2.INTER_AREA if frame.shape[0] > height else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(frame, (width, height), interpolation=how), np.uint8)


class Similarity(Measure):
    """SSIM and PSNR of the aligned crops (``eat``) or of whole frames (``native``)."""

    name = "ssim"
    by_frames = True
    columns = (
        Column("ssim", "SSIM", "higher", 3, "7x7 uniform window, mean over all frames"),
        Column("psnr", "PSNR", "higher", 2, "dB, mean over all frames"),
    )

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.compare = compare_frames if options.protocol == "native" else None

    def extractors(self) -> list[Extractor]:
        return [] if self.compare else aligned_extractors(self.options)

    def settings(self) -> Settings:
        return {"window": "uniform7", "K1": 0.01, "K2": 0.03, "images": "native" if self.compare else "aligned 128"}

    def pair(self, clips: ClipPair) -> dict[str, float]:
        if clips.same:
            return {"ssim": 1.0, "psnr": float("inf")}
        if self.compare:
            return {}
        seen = np.isfinite(np.concatenate(clips.paired("aligned68"), axis=2)).all((1, 2))
        if not seen.any():
            return {}
        real, generated = (images[seen] for images in clips.paired("aligned"))
        return {"ssim": float(ssim(real, generated).mean()), "psnr": float(psnr(real, generated).mean())}


class LandmarkDistance(Measure):
    """M-LMD and F-LMD of the aligned crops, in both protocols."""

    name = "lmd"
    columns = (
        Column("m_lmd", "M-LMD", "lower", 3, "20 of the mouth's 68 landmarks less their mean, pixels of 128"),
        Column("f_lmd", "F-LMD", "lower", 3, "all 68 less their mean; dlib's are not comparable with MediaPipe's"),
    )

    def extractors(self) -> list[Extractor]:
        return aligned_extractors(self.options)

    def pair(self, clips: ClipPair) -> dict[str, float]:
        mouth, face = landmark_distance(*clips.paired("aligned68"))
        return {"m_lmd": mouth, "f_lmd": face}


def _frechet(key: str, array: str) -> SetScore:
    """Fréchet distance between an array's rows of all real and all generated clips, and the number of images."""
    fits = GaussianFit(), GaussianFit()

    def keep(clips: ClipPair) -> bool:
        for fit, features in zip(fits, clips.paired(array), strict=True):
            fit.update(features)
        return clips.same

    def reduce(same: list[bool]) -> dict[str, float]:
        count = min(fit.n_images for fit in fits)
        if count < 2:  # no faces
            return {}
        distance = 0.0 if all(same) else frechet_distance(*(fit.result() for fit in fits))
        return {key: distance, f"{key}_images": float(count)}

    return SetScore(keep, reduce)


_FEW = "biased upwards below 2048 images, so compare equal numbers only"


class Fid(Measure):
    """FID of the aligned crops, if the weights of Inception are available."""

    name = "fid"
    columns = (
        Column("fid", "FID", "lower", 2, f"on the aligned crops, with the features of pytorch-fid; {_FEW}"),
        Column("fid_images", "FID images", None, 0, "images per side", extra=True),
    )

    def extractors(self) -> list[Extractor]:
        features = InceptionFeatures(self.options.inception, self.options.chosen_device())
        return [*aligned_extractors(self.options), features]

    def start(self) -> SetScore:
        return _frechet("fid", "inception")


class FrechetMobileNet(Measure):
    """The same distance on MobileNet's features, whose weights are at hand; never to be called FID."""

    name = "frechet-mobilenet"
    columns = (
        Column("frechet_mobilenet", "Fréchet-MobileNet", "lower", 1, f"on MobileNetV2; not FID's scale; {_FEW}"),
        Column("frechet_mobilenet_images", "Fréchet images", None, 0, "images per side", extra=True),
    )  # fmt: skip

    def extractors(self) -> list[Extractor]:
        if self.options.protocol == "native":
            return [MobileNetFeatures("frame", device=self.options.chosen_device())]
        features = MobileNetFeatures("aligned", device=self.options.chosen_device())
        return [*aligned_extractors(self.options), features]

    def start(self) -> SetScore:
        return _frechet("frechet_mobilenet", "mobilenet512" if self.options.protocol == "native" else "mobilenet")


class Sharpness(Measure):
    """CPBD at the size of the frames and at 256 pixels."""

    name = "cpbd"
    by_frames = True
    columns = (
        Column("cpbd", "CPBD", "higher", 3, "sharpness of the frames as they are; depends on their size"),
        Column("cpbd256", "CPBD256", "higher", 3, "the same with the shorter side at 256 pixels"),
    )

    def extractors(self) -> list[Extractor]:
        return [SharpnessExtractor()]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        return {key: float(clips.generated.arrays[key].mean()) for key in ("cpbd", "cpbd256")}


class Identity(Measure):
    """CSIM by dlib's embedding."""

    name = "identity"
    columns = (
        Column("csim", COLUMN, "higher", 3, "cosine of dlib's embeddings, generated and real, frame by frame"),
        Column("same_person", "Same %", "higher", 1, "frames that dlib takes for the same person", extra=True),
        Column("csim_portrait", "CSIM portrait", "higher", 3, "cosine to the portrait, if pairs name it", extra=True),
    )

    def extractors(self) -> list[Extractor]:
        dlib_module()
        find_dlib_model("dlib_face_recognition_resnet_model_v1.dat")
        return [*landmark_extractors(self.options), FaceIdentity()]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        real, generated = clips.paired("identity_embedding")
        found = {"csim": csim(real, generated), "same_person": 100 * same_person(real, generated)}
        if clips.pair.source is not None:
            found["csim_portrait"] = csim(_portrait(clips.pair.source), generated)
        return found


_embedder = cache(FaceIdentity)


@cache
def _portrait(path: Path) -> npt.NDArray[np.float32]:
    """Embedding (128,) of a portrait; NaN if dlib finds no face in it."""
    try:
        return _embedder().portrait(read_image(path))
    except MissingDependency:
        raise
    except UserError:
        return np.full(128, np.nan, np.float32)


class Detection(Measure):
    """Share of the generated frames in which a face was found; the other columns leave the rest out."""

    name = "detection"
    by_frames = True
    columns = (
        Column("detected", "Faces %", "higher", 1, "generated frames with a face (MediaPipe); others count nowhere"),
        Column("detected68", "Faces68 %", "higher", 1, "the same of the detector of the 68 landmarks"),
    )

    def extractors(self) -> list[Extractor]:
        try:
            return [MeshExtractor(), *(e for e in landmark_extractors(self.options) if e.name != "mesh")]
        except MissingDependency:  # without dlib
            return [MeshExtractor()]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        arrays = clips.generated.arrays
        found = {"detected": "mesh", "detected68": "landmarks68"}
        seen = {key: np.isfinite(arrays[name]).all((1, 2)) for key, name in found.items() if name in arrays}
        return {key: 100.0 * float(values.mean()) for key, values in seen.items()}


_IMAGES = (Similarity, Fid, FrechetMobileNet, LandmarkDistance, Sharpness, Identity, Detection)
MEASURES: tuple[type[Measure], ...] = _IMAGES
