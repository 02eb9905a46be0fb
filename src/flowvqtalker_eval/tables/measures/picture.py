"""Columns about pictures: SSIM, PSNR, Fréchet distances, landmark distances, sharpness, identity, detection."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.media import read_image, read_video
from flowvqtalker_eval.metrics.analysis import Extractor, Settings
from flowvqtalker_eval.metrics.mesh import MeshExtractor
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.measures.base import Both, Measure, Options, Whole, landmark_extractors

__all__ = ["MEASURES", "aligned_extractors", "compare_frames", "seen_in_both"]

Pixels = npt.NDArray[np.uint8]

_BATCH = 8


def aligned_extractors(options: Options) -> list[Extractor]:
    """What gives ``aligned`` and ``aligned68``: the landmarks predicted anew on the crop, or those of the mesh moved.

    Raises:
        MissingDependency: if dlib or its files are missing.
    """
    from flowvqtalker_eval.metrics.align import AlignedFaces

    return [*landmark_extractors(options), AlignedFaces("crop" if options.landmarks == "dlib" else "frame")]


def seen_in_both(both: Both) -> npt.NDArray[np.bool_]:
    """(n,) whether both frames of a pair were aligned."""
    real, made = both.paired("aligned68")
    return np.asarray(np.isfinite(real).all((1, 2)) & np.isfinite(made).all((1, 2)))


def compare_frames(real: Path, made: Path) -> dict[str, float]:
    """SSIM and PSNR of the frames of two videos as they are, means over frames; the real ones are brought to the size
    of the generated ones. Empty where one video has more frames."""
    from flowvqtalker_eval.metrics.ssim import psnr, ssim

    totals = np.zeros(2)
    count = 0
    pairs = zip_longest(read_video(real), read_video(made))
    while batch := list(islice(pairs, _BATCH)):
        if any(a is None or b is None for a, b in batch):
            return {}
        theirs, ours = _same_size(batch)
        totals += ssim(theirs, ours).sum(), psnr(theirs, ours).sum()
        count += len(batch)
    return {"ssim": totals[0] / count, "psnr": totals[1] / count} if count else {}


def _same_size(pairs: list[tuple[Any, Any]]) -> tuple[Pixels, Pixels]:
    """Frames (real, generated) with the real ones resized to the generated ones."""
    height, width = pairs[0][1].shape[:2]

    def resized() -> Iterator[Pixels]:
        for frame, _ in pairs:
            if frame.shape[:2] == (height, width):
                yield frame
            else:
                how = cv2.INTER_AREA if frame.shape[0] > height else cv2.INTER_CUBIC
                yield np.asarray(cv2.resize(frame, (width, height), interpolation=how), np.uint8)

    return np.stack(list(resized())), np.stack([frame for _, frame in pairs])


class Similarity(Measure):
    """SSIM and PSNR: of the aligned crops (``eat``) or of the frames (``native``)."""

    name = "ssim"
    by_frames = True

    def __init__(self, options: Options) -> None:
        self.options = options
        self.native = options.protocol == "native"
        where = "the frames, real ones resized to the generated" if self.native else "aligned 128x128 crops"
        self.columns = (
            Column("ssim", "SSIM", "higher", 3, f"of {where}; 7x7 uniform window, mean over all frames"),
            Column("psnr", "PSNR", "higher", 2, f"of {where}, dB, mean over all frames"),
        )
        self.compare = compare_frames if self.native else None

    def extractors(self) -> list[Extractor]:
        """The crops; the frames themselves need none."""
        return [] if self.native else aligned_extractors(self.options)

    def settings(self) -> Settings:
        """The window."""
        return {"window": "uniform7", "K1": 0.01, "K2": 0.03, "pictures": "native" if self.native else "aligned 128"}

    def pair(self, both: Both) -> dict[str, float]:
        """Of the crops of the frames in which both faces were found."""
        if both.same:
            return {"ssim": 1.0, "psnr": float("inf")}
        if self.native:
            return {}  # made by ``compare``
        from flowvqtalker_eval.metrics.ssim import psnr, ssim

        seen = seen_in_both(both)
        if not seen.any():
            return {}
        real, made = (pictures[seen] for pictures in both.paired("aligned"))
        return {"ssim": float(ssim(real, made).mean()), "psnr": float(psnr(real, made).mean())}


class LandmarkDistance(Measure):
    """M-LMD and F-LMD, of the aligned crops in both protocols."""

    name = "lmd"

    def __init__(self, options: Options) -> None:
        self.options = options
        whose = "dlib's 68" if options.landmarks == "dlib" else "the mesh's 68 (not comparable with dlib's)"
        self.columns = (
            Column("m_lmd", "M-LMD", "lower", 3, f"{whose} landmarks, 20 of the mouth less their mean, pixels of 128"),
            Column("f_lmd", "F-LMD", "lower", 3, "all 68 less their mean, pixels of 128"),
        )

    def extractors(self) -> list[Extractor]:
        """Landmarks on the crops."""
        return aligned_extractors(self.options)

    def pair(self, both: Both) -> dict[str, float]:
        """Means over the frames in which both faces were found."""
        from flowvqtalker_eval.metrics.lmd import landmark_distance

        mouth, face = landmark_distance(*both.paired("aligned68"))
        return {"m_lmd": mouth, "f_lmd": face}


class _Frechet(Measure):
    """Fréchet distance between the features of all real and all generated pictures."""

    array = ""

    def __init__(self, options: Options) -> None:
        self.options = options

    def start(self) -> Whole:
        """Of all clips."""
        return _FrechetSet(self.columns[0].key, self.array)


class _FrechetSet:
    def __init__(self, key: str, array: str) -> None:
        from flowvqtalker_eval.metrics.frechet import GaussianFit

        self.key, self.array = key, array
        self.fits = GaussianFit(), GaussianFit()
        self.same = True

    def add(self, both: Both) -> None:
        self.same &= both.same
        for fit, features in zip(self.fits, both.paired(self.array), strict=True):
            fit.update(features)

    def result(self) -> dict[str, float]:
        from flowvqtalker_eval.metrics.frechet import frechet_distance

        count = min(fit.n_images for fit in self.fits)
        if count < 2:  # no faces
            return {}
        real, made = (fit.result() for fit in self.fits)
        return {self.key: 0.0 if self.same else frechet_distance(real, made), f"{self.key}_images": float(count)}


_FEW = "biased upwards below 2048 pictures, so compare equal numbers only"


class Fid(_Frechet):
    """FID of the aligned crops, where Inception's weights are."""

    name = "fid"
    array = "inception"
    columns = (
        Column("fid", "FID", "lower", 2, f"on the aligned crops, with the features of pytorch-fid; {_FEW}"),
        Column("fid_images", "FID images", None, 0, "pictures a side", extra=True),
    )

    def extractors(self) -> list[Extractor]:
        """Crops and Inception's features."""
        from flowvqtalker.loading import choose_device
        from flowvqtalker_eval.metrics.frechet import InceptionFeatures

        features = InceptionFeatures(self.options.inception, str(choose_device(self.options.device)))
        features.settings()  # the weights are looked for now
        return [*aligned_extractors(self.options), features]


class FrechetMobileNet(_Frechet):
    """The same distance on MobileNet's features, for want of Inception; never to be called FID."""

    name = "frechet-mobilenet"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.native = options.protocol == "native"
        self.array = "mobilenet512" if self.native else "mobilenet"
        where = "whole frames" if self.native else "the aligned crops"
        self.columns = (
            Column("frechet_mobilenet", "Fréchet-MobileNet", "lower", 1, f"on {where}; not FID's scale; {_FEW}"),
            Column("frechet_mobilenet_images", "Fréchet images", None, 0, "pictures a side", extra=True),
        )

    def extractors(self) -> list[Extractor]:
        """Features, of crops or frames."""
        from flowvqtalker.loading import choose_device
        from flowvqtalker_eval.metrics.frechet import MobileNetFeatures

        device = str(choose_device(self.options.device))
        features = MobileNetFeatures("frame" if self.native else "aligned", device=device)
        features.settings()  # the weights are looked for now
        return [features] if self.native else [*aligned_extractors(self.options), features]


class Sharpness(Measure):
    """CPBD at the size of the frames and at 256 pixels."""

    name = "cpbd"
    by_frames = True
    columns = (
        Column("cpbd", "CPBD", "higher", 3, "sharpness of the frames as they are; depends on their size"),
        Column("cpbd256", "CPBD256", "higher", 3, "the same with the shorter side at 256 pixels"),
    )

    def __init__(self, options: Options) -> None:
        del options

    def extractors(self) -> list[Extractor]:
        """CPBD of each frame."""
        from flowvqtalker_eval.metrics.cpbd import Sharpness as SharpnessExtractor

        return [SharpnessExtractor()]

    def pair(self, both: Both) -> dict[str, float]:
        """Of the generated frames."""
        return {key: float(both.made.arrays[key].mean()) for key in ("cpbd", "cpbd256")}


class Identity(Measure):
    """CSIM by dlib's embedding."""

    name = "identity"

    def __init__(self, options: Options) -> None:
        from flowvqtalker_eval.metrics.identity import COLUMN

        self.options = options
        self.columns = (
            Column("csim", COLUMN, "higher", 3, "cosine of dlib's embeddings, generated and real, frame by frame"),
            Column("same_person", "Same %", "higher", 1, "frames that dlib takes for the same person", extra=True),
            Column(
                "csim_portrait", "CSIM portrait", "higher", 3, "cosine to the portrait, if pairs name it", extra=True
            ),
        )
        self._portraits: dict[Path, npt.NDArray[np.float32]] = {}
        self._embedder: Any = None

    def extractors(self) -> list[Extractor]:
        """Landmarks and embeddings."""
        from flowvqtalker_eval.metrics.identity import FaceIdentity
        from flowvqtalker_eval.metrics.landmarks68 import dlib_module, find_dlib_model

        dlib_module()
        find_dlib_model("dlib_face_recognition_resnet_model_v1.dat")
        return [*landmark_extractors(self.options), FaceIdentity()]

    def pair(self, both: Both) -> dict[str, float]:
        """Frame by frame."""
        from flowvqtalker_eval.metrics.identity import csim_to_clip, csim_to_portrait, same_person

        real, made = both.paired("identity_embedding")
        found = {"csim": csim_to_clip(real, made), "same_person": 100 * same_person(real, made)}
        if both.pair.source is not None:
            found["csim_portrait"] = csim_to_portrait(self._portrait(both.pair.source), made)
        return found

    def _portrait(self, path: Path) -> npt.NDArray[np.float32]:
        """Embedding (128,) of a portrait; NaN if dlib finds no face in it."""
        if path not in self._portraits:
            from flowvqtalker_eval.metrics.identity import FaceIdentity

            self._embedder = self._embedder or FaceIdentity()
            try:
                self._portraits[path] = self._embedder.portrait(read_image(path))
            except MissingDependency:
                raise
            except UserError:
                self._portraits[path] = np.full(128, np.nan, np.float32)
        return self._portraits[path]


class Detection(Measure):
    """Share of the generated frames in which a face was found: what the other columns leave out."""

    name = "detection"
    by_frames = True

    def __init__(self, options: Options) -> None:
        self.options = options
        self.columns = (
            Column(
                "detected", "Faces %", "higher", 1, "generated frames with a face (MediaPipe); others count nowhere"
            ),
            Column("detected68", "Faces68 %", "higher", 1, f"the same of the 68 landmarks ({options.landmarks})"),
        )

    def extractors(self) -> list[Extractor]:
        """Both detectors, if dlib is there."""
        try:
            return [MeshExtractor(), *(e for e in landmark_extractors(self.options) if e.name != "mesh")]
        except MissingDependency:
            return [MeshExtractor()]

    def pair(self, both: Both) -> dict[str, float]:
        """Of the generated clip."""
        arrays = both.made.arrays
        found = {"detected": "mesh", "detected68": "landmarks68"}
        return {
            key: 100.0 * float(np.isfinite(arrays[name]).all((1, 2)).mean())
            for key, name in found.items()
            if name in arrays
        }


MEASURES: tuple[type[Any], ...] = (
    Similarity,
    Fid,
    FrechetMobileNet,
    LandmarkDistance,
    Sharpness,
    Identity,
    Detection,
)
