"""Fréchet distance between the features of real and generated pictures (Heusel et al. 2017).

    d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)

The column is called ``FID`` on features of TensorFlow's Inception (see :mod:`flowvqtalker_eval.metrics.inception`; what
``pytorch-fid`` computes), and ``Frechet-MobileNet`` on those of torchvision's MobileNetV2, for machines that cannot
have the former; the two have nothing in common but the formula. Covariances are unbiased, as ``np.cov``. With fewer
than 2048 pictures the covariance is singular and the distance biased upwards: compare only equal numbers of pictures,
and print the ``note`` of the score.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Settings
from flowvqtalker_eval.metrics.inception import HASH, find_inception, load_inception

__all__ = [
    "ENOUGH",
    "FID",
    "FRECHET_MOBILENET",
    "FrechetScore",
    "Gaussian",
    "GaussianFit",
    "InceptionFeatures",
    "MobileNetFeatures",
    "fit_gaussian",
    "frechet",
    "frechet_distance",
]

logger = logging.getLogger(__name__)

FID = "FID"
FRECHET_MOBILENET = "Frechet-MobileNet"

#: As many pictures as features: below, a covariance of 2048 numbers is singular.
ENOUGH = 2048

Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Gaussian:
    """What is kept of a set of pictures.

    Attributes:
        mean: (D,).
        covariance: (D, D), unbiased.
        n_images: how many pictures.
    """

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    n_images: int


class GaussianFit:
    """Mean and covariance of features that come in batches; memory does not grow with their number."""

    def __init__(self) -> None:
        self.n_images = 0
        self._mean: npt.NDArray[np.float64] | None = None
        self._scatter: npt.NDArray[np.float64] | None = None

    def update(self, features: Floats) -> None:
        """Add features (n, D); rows with NaN (no face) are left out.

        Raises:
            UserError: if the shape does not fit.
        """
        if features.ndim != 2 or (self._mean is not None and features.shape[1] != len(self._mean)):
            wanted = "D" if self._mean is None else len(self._mean)
            raise UserError(f"features must have shape (n, {wanted}), got {features.shape}")
        values = np.asarray(features[np.isfinite(features).all(1)], np.float64)
        if not len(values):
            return
        mean = values.mean(0)
        scatter = (values - mean).T @ (values - mean)
        if self._mean is None or self._scatter is None:
            self.n_images, self._mean, self._scatter = len(values), mean, scatter
            return
        # Chan, Golub and LeVeque 1979.
        total = self.n_images + len(values)
        apart = mean - self._mean
        self._scatter += scatter + np.outer(apart, apart) * (self.n_images * len(values) / total)
        self._mean = self._mean + apart * (len(values) / total)
        self.n_images = total

    def result(self) -> Gaussian:
        """The Gaussian of all so far.

        Raises:
            UserError: if there were fewer than two pictures.
        """
        if self._mean is None or self._scatter is None or self.n_images < 2:
            raise UserError(
                f"a Fréchet distance needs at least 2 pictures with a face on each side, got {self.n_images}"
            )
        return Gaussian(self._mean.copy(), self._scatter / (self.n_images - 1), self.n_images)


def fit_gaussian(batches: Floats | Iterable[Floats]) -> Gaussian:
    """Mean and covariance of features: one array (n, D), or several one after the other."""
    fit = GaussianFit()
    for features in [batches] if isinstance(batches, np.ndarray) else batches:
        fit.update(features)
    return fit.result()


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance between two Gaussians.

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and positive: the
    same number as from a matrix square root, without its trouble with singular covariances, and several times as fast.

    Raises:
        UserError: if the sizes differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features must have one size, got {len(a.mean)} and {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.covariance)
    half = vectors * np.sqrt(np.maximum(values, 0))
    inner = half.T @ b.covariance @ half
    root = np.sqrt(np.maximum(np.linalg.eigvalsh((inner + inner.T) / 2), 0)).sum()
    apart = np.square(a.mean - b.mean).sum()
    distance = float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)
    return max(distance, 0.0)


@dataclass(frozen=True)
class FrechetScore:
    """A distance and what belongs beside it.

    Attributes:
        column: ``FID`` or ``Frechet-MobileNet``.
        distance: squared Fréchet distance.
        n_images: of the real and of the generated pictures.
    """

    column: str
    distance: float
    n_images: tuple[int, int]

    @property
    def note(self) -> str:
        """What a reader must know; empty if there are pictures enough."""
        if min(self.n_images) >= ENOUGH:
            return ""
        real, generated = self.n_images
        return f"{self.column} on {real} real and {generated} generated pictures, fewer than {ENOUGH}: biased upwards"


def frechet(real: Floats | Iterable[Floats], generated: Floats | Iterable[Floats], column: str) -> FrechetScore:
    """Distance between the features of real and generated pictures; few pictures are noted and logged.

    Arguments:
        real, generated: (n, D) features, or several arrays of them, clip by clip; rows of NaN do not count.
        column: :data:`FID` for features of :class:`InceptionFeatures`, :data:`FRECHET_MOBILENET` for those of
            :class:`MobileNetFeatures`.
    """
    if column not in (FID, FRECHET_MOBILENET):
        raise UserError(f"a Fréchet distance is called {FID} or {FRECHET_MOBILENET}, not {column}")
    a, b = fit_gaussian(real), fit_gaussian(generated)
    score = FrechetScore(column, frechet_distance(a, b), (a.n_images, b.n_images))
    if score.note:
        logger.warning("%s", score.note)
    return score


# ----------------------------------------------------------------------------------------------------------- features


def _rows(known: dict[str, Array]) -> tuple[Pixels, npt.NDArray[np.bool_]]:
    """The crops and which of them show a face."""
    aligned = known["aligned"]
    return aligned, np.asarray(aligned.any((1, 2, 3)))


def _tensor(pictures: Pixels) -> torch.Tensor:
    """(n, H, W, 3) uint8 to (n, 3, H, W) float32 in [0, 1], in the order that convolutions like."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255


class InceptionFeatures(FrameExtractor):
    """Features of the aligned crops by TensorFlow's Inception, for the FID.

    About 200 ms a picture on one core. Arrays: ``inception`` (T, 2048) float32; NaN where no face was found.

    Arguments:
        weights: the file of weights, see :func:`flowvqtalker_eval.metrics.inception.find_inception`.
        device: where the network runs.
        digest: how the file's sha256 must begin; None takes any.
    """

    name = "inception"
    needs: tuple[str, ...] = ("aligned",)
    gives = ("inception",)

    def __init__(self, weights: str | Path | None = None, device: str = "cpu", digest: str | None = HASH) -> None:
        self._weights, self._device, self._digest = weights, device, digest
        self._found: tuple[Path, str] | None = None

    def _find(self) -> tuple[Path, str]:
        if self._found is None:
            self._found = find_inception(self._weights, self._digest)
        return self._found

    def settings(self) -> Settings:
        """Weights and resizing."""
        return {"features": "FID Inception pool3", "sha256": self._find()[1][:16], "input": "eat 128, bilinear to 299"}

    def __call__(self, frames: Pixels, known: dict[str, Array]) -> dict[str, Array]:
        """``aligned`` (n, 128, 128, 3) to ``inception``."""
        if self._model is None:
            self._model = load_inception(self._find()[0]).to(self._device)
        aligned, seen = _rows(known)
        features = np.full((len(aligned), 2048), np.nan, np.float32)
        if seen.any():
            with torch.inference_mode():
                features[seen] = self._model(_tensor(aligned[seen]).to(self._device)).cpu().numpy()
        return {"inception": features}


class MobileNetFeatures(FrameExtractor):
    """Features of pictures by torchvision's MobileNetV2 (the 1280 numbers before its classifier).

    Arrays: ``mobilenet`` (T, 1280) float32 of the aligned crops at their 128 pixels, NaN where no face was found; or,
    with ``source="frame"``, ``mobilenet512`` (T, 1280) of whole frames reduced to 224 pixels (area-averaged).

    Arguments:
        source: ``aligned`` or ``frame``.
        weights: file of weights, see :func:`flowvqtalker.render.perceptual.find_weights`.
        device: where the network runs.
    """

    def __init__(
        self, source: Literal["aligned", "frame"] = "aligned", weights: str | Path | None = None, device: str = "cpu"
    ) -> None:
        self.name = "mobilenet" if source == "aligned" else "mobilenet512"
        self.needs: tuple[str, ...] = ("aligned",) if source == "aligned" else ()
        self.gives = (self.name,)
        self._weights, self._device = weights, device

    def settings(self) -> Settings:
        """Weights and size."""
        from flowvqtalker.render.perceptual import find_weights

        found = find_weights("mobilenet", self._weights).name.rsplit(".", 1)[0]
        return {"features": found, "input": "eat 128" if self.needs else "frame, area-averaged to 224x224"}

    def __call__(self, frames: Pixels, known: dict[str, Array]) -> dict[str, Array]:
        """Frames (n, H, W, 3) or ``aligned`` to the features."""
        if self.needs:
            pictures, seen = _rows(known)
        else:
            resized = [cv2.resize(frame, (224, 224), interpolation=cv2.INTER_AREA) for frame in frames]
            pictures, seen = np.stack(resized).astype(np.uint8), np.ones(len(frames), bool)
        features = np.full((len(pictures), 1280), np.nan, np.float32)
        if seen.any():
            features[seen] = self._features(_tensor(pictures[seen]))
        return {self.name: features}

    def _features(self, pictures: torch.Tensor) -> npt.NDArray[np.float32]:
        if self._model is None:
            self._model = _mobilenet(self._weights).to(self._device)
        with torch.inference_mode():
            return np.asarray(self._model(pictures.to(self._device)).cpu().numpy(), np.float32)


class _MobileNet(torch.nn.Module):
    """The perceptual loss's network and the layer that follows its last tap."""

    def __init__(self, weights: str | Path | None) -> None:
        super().__init__()
        from flowvqtalker.render.perceptual import PerceptualLoss, find_weights

        self.body = PerceptualLoss("mobilenet", weights)
        state = torch.load(find_weights("mobilenet", weights), map_location="cpu", weights_only=True)
        conv, norm = torch.nn.Conv2d(320, 1280, 1, bias=False), torch.nn.BatchNorm2d(1280)
        head = torch.nn.Sequential(conv, norm)
        head.load_state_dict({k[len("features.18.") :]: v for k, v in state.items() if k.startswith("features.18.")})
        self.head = torch.nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval())

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 1280)."""
        last = self.body.features(2 * pictures - 1)[-1]
        return torch.clamp(self.head(last), 0, 6).mean((2, 3))


def _mobilenet(weights: str | Path | None) -> _MobileNet:
    return _MobileNet(weights).eval().requires_grad_(False)
