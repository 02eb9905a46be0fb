"""Image columns: SSIM, PSNR, Fréchet distances, landmark distances, sharpness, identity, detection."""

from __future__ import annotations

from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.image import read_image
from flowvqtalker.io.video import read_video
from flowvqtalker_eval.metrics.analysis import Extractor, Frames, Settings
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, Options, SetScore, landmark_extractors

__all__ = ["MEASURES", "aligned_extractors", "compare_frames"]

_BATCH = 8


def aligned_extractors(options: Options) -> list[Extractor]:
    """Extractors that give ``aligned`` and ``aligned68``: landmarks predicted on the crop, or moved from the mesh.

    Raises:
        MissingDependency: if dlib or its files are missing.
    """
    from flowvqtalker_eval.metrics.align import AlignedFaces

    return [*landmark_extractors(options), AlignedFaces("crop" if options.landmarks == "dlib" else "frame")]


def compare_frames(real: Path, generated: Path) -> dict[str, float]:
    """SSIM and PSNR of whole frames, means over frames; real frames are resized to the generated ones.

    Empty if the videos differ in length.
    """
    from flowvqtalker_eval.metrics.ssim import psnr, ssim

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
    """SSIM and PSNR of the aligned crops (``eat``) or of the frames (``native``)."""

    name = "ssim"
    by_frames = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.native = options.protocol == "native"
        where = "the frames, real ones resized to the generated" if self.native else "aligned 128x128 crops"
        self.columns = (
            Column("ssim", "SSIM", "higher", 3, f"of {where}; 7x7 uniform window, mean over all frames"),
            Column("psnr", "PSNR", "higher", 2, f"of {where}, dB, mean over all frames"),
        )
        self.compare = compare_frames if self.native else None

    def extractors(self) -> list[Extractor]:
        """The crops; whole frames need no extractor."""
        return [] if self.native else aligned_extractors(self.options)

    def settings(self) -> Settings:
        """The window."""
        return {"window": "uniform7", "K1": 0.01, "K2": 0.03, "images": "native" if self.native else "aligned 128"}

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Of the crops of frames in which both faces were found; ``compare`` measures whole frames."""
        if clips.same:
            return {"ssim": 1.0, "psnr": float("inf")}
        if self.native:
            return {}
        from flowvqtalker_eval.metrics.ssim import psnr, ssim

        seen = np.isfinite(np.concatenate(clips.paired("aligned68"), axis=2)).all((1, 2))
        if not seen.any():
            return {}
        real, generated = (images[seen] for images in clips.paired("aligned"))
        return {"ssim": float(ssim(real, generated).mean()), "psnr": float(psnr(real, generated).mean())}


class LandmarkDistance(Measure):
    """M-LMD and F-LMD of the aligned crops, in both protocols."""

    name = "lmd"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        whose = "dlib's 68" if options.landmarks == "dlib" else "the mesh's 68 (not comparable with dlib's)"
        self.columns = (
            Column("m_lmd", "M-LMD", "lower", 3, f"{whose} landmarks, 20 of the mouth less their mean, pixels of 128"),
            Column("f_lmd", "F-LMD", "lower", 3, "all 68 less their mean, pixels of 128"),
        )

    def extractors(self) -> list[Extractor]:
        """Landmarks on the crops."""
        return aligned_extractors(self.options)

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Means over the frames in which both faces were found."""
        from flowvqtalker_eval.metrics.lmd import landmark_distance

        mouth, face = landmark_distance(*clips.paired("aligned68"))
        return {"m_lmd": mouth, "f_lmd": face}


class _FrechetScore:
    """Fréchet distance between the features of all real and all generated images."""

    def __init__(self, key: str, array: str) -> None:
        from flowvqtalker_eval.metrics.frechet import GaussianFit

        self.key, self.array = key, array
        self.fits = GaussianFit(), GaussianFit()
        self.same = True

    def add(self, clips: ClipPair) -> None:
        """Add the features of a clip."""
        self.same &= clips.same
        for fit, features in zip(self.fits, clips.paired(self.array), strict=True):
            fit.update(features)

    def result(self) -> dict[str, float]:
        """The distance and the number of images per side."""
        from flowvqtalker_eval.metrics.frechet import frechet_distance

        count = min(fit.n_images for fit in self.fits)
        if count < 2:  # no faces
            return {}
        real, generated = (fit.result() for fit in self.fits)
        distance = 0.0 if self.same else frechet_distance(real, generated)
        return {self.key: distance, f"{self.key}_images": float(count)}


_FEW = "biased upwards below 2048 images, so compare equal numbers only"


class Fid(Measure):
    """FID of the aligned crops, if the weights of Inception are available."""

    name = "fid"
    columns = (
        Column("fid", "FID", "lower", 2, f"on the aligned crops, with the features of pytorch-fid; {_FEW}"),
        Column("fid_images", "FID images", None, 0, "images per side", extra=True),
    )

    def extractors(self) -> list[Extractor]:
        """Crops and Inception's features."""
        from flowvqtalker_eval.metrics.frechet import InceptionFeatures

        features = InceptionFeatures(self.options.inception, self.options.chosen_device())
        return [*aligned_extractors(self.options), features]

    def start(self) -> SetScore:
        """Of all clips."""
        return _FrechetScore("fid", "inception")


class FrechetMobileNet(Measure):
    """The same distance on MobileNet's features, whose weights are at hand; never to be called FID."""

    name = "frechet-mobilenet"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.native = options.protocol == "native"
        where = "whole frames" if self.native else "the aligned crops"
        self.columns = (
            Column("frechet_mobilenet", "Fréchet-MobileNet", "lower", 1, f"on {where}; not FID's scale; {_FEW}"),
            Column("frechet_mobilenet_images", "Fréchet images", None, 0, "images per side", extra=True),
        )

    def extractors(self) -> list[Extractor]:
        """Features of crops or frames."""
        from flowvqtalker_eval.metrics.frechet import MobileNetFeatures

        features = MobileNetFeatures("frame" if self.native else "aligned", device=self.options.chosen_device())
        return [features] if self.native else [*aligned_extractors(self.options), features]

    def start(self) -> SetScore:
        """Of all clips."""
        return _FrechetScore("frechet_mobilenet", "mobilenet512" if self.native else "mobilenet")


class Sharpness(Measure):
    """CPBD at the size of the frames and at 256 pixels."""

    name = "cpbd"
    by_frames = True
    columns = (
        Column("cpbd", "CPBD", "higher", 3, "sharpness of the frames as they are; depends on their size"),
        Column("cpbd256", "CPBD256", "higher", 3, "the same with the shorter side at 256 pixels"),
    )

    def extractors(self) -> list[Extractor]:
        """CPBD of each frame."""
        from flowvqtalker_eval.metrics.cpbd import Sharpness as SharpnessExtractor

        return [SharpnessExtractor()]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Of the generated frames."""
        return {key: float(clips.generated.arrays[key].mean()) for key in ("cpbd", "cpbd256")}


class Identity(Measure):
    """CSIM by dlib's embedding."""

    name = "identity"

    def __init__(self, options: Options) -> None:
        from flowvqtalker_eval.metrics.identity import COLUMN

        super().__init__(options)
        self.columns = (
            Column("csim", COLUMN, "higher", 3, "cosine of dlib's embeddings, generated and real, frame by frame"),
            Column("same_person", "Same %", "higher", 1, "frames that dlib takes for the same person", extra=True),
            Column(
                "csim_portrait", "CSIM portrait", "higher", 3, "cosine to the portrait, if pairs name it", extra=True
            ),
        )
        self._portraits: dict[Path, npt.NDArray[np.float32]] = {}

    @cached_property
    def _embedder(self) -> Any:
        from flowvqtalker_eval.metrics.identity import FaceIdentity

        return FaceIdentity()

    def extractors(self) -> list[Extractor]:
        """Landmarks and embeddings."""
        from flowvqtalker_eval.metrics.identity import FaceIdentity
        from flowvqtalker_eval.metrics.landmarks68 import dlib_module, find_dlib_model

        dlib_module()
        find_dlib_model("dlib_face_recognition_resnet_model_v1.dat")
        return [*landmark_extractors(self.options), FaceIdentity()]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Frame by frame."""
        from flowvqtalker_eval.metrics.identity import csim_to_clip, csim_to_portrait, same_person

        real, generated = clips.paired("identity_embedding")
        found = {"csim": csim_to_clip(real, generated), "same_person": 100 * same_person(real, generated)}
        if clips.pair.source is not None:
            found["csim_portrait"] = csim_to_portrait(self._portrait(clips.pair.source), generated)
        return found

    def _portrait(self, path: Path) -> npt.NDArray[np.float32]:
        """Embedding (128,) of a portrait; NaN if dlib finds no face in it."""
        if path not in self._portraits:
            try:
                self._portraits[path] = self._embedder.portrait(read_image(path))
            except MissingDependency:
                raise
            except UserError:
                self._portraits[path] = np.full(128, np.nan, np.float32)
        return self._portraits[path]


class Detection(Measure):
    """Share of the generated frames in which a face was found; the other columns leave the rest out."""

    name = "detection"
    by_frames = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        about = "generated frames with a face (MediaPipe); others count nowhere"
        self.columns = (
            Column("detected", "Faces %", "higher", 1, about),
            Column("detected68", "Faces68 %", "higher", 1, f"the same of the 68 landmarks ({options.landmarks})"),
        )

    def extractors(self) -> list[Extractor]:
        """Both detectors, if dlib is available."""
        try:
            return [MeshExtractor(), *(e for e in landmark_extractors(self.options) if e.name != "mesh")]
        except MissingDependency:
            return [MeshExtractor()]

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Of the generated clip."""
        arrays = clips.generated.arrays
        found = {"detected": "mesh", "detected68": "landmarks68"}
        return {
            key: 100.0 * float(np.isfinite(arrays[name]).all((1, 2)).mean())
            for key, name in found.items()
            if name in arrays
        }


MEASURES: tuple[type[Measure], ...] = (
    Similarity,
    Fid,
    FrechetMobileNet,
    LandmarkDistance,
    Sharpness,
    Identity,
    Detection,
)
