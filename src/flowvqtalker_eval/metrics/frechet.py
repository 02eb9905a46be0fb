"""Fréchet distance between the features of real and generated images (Heusel et al. 2017).

    d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)

The column is called ``FID`` on TensorFlow's Inception features (what ``pytorch-fid`` computes), and
``Frechet-MobileNet`` on torchvision's MobileNetV2, for machines that cannot have the former; the two share nothing but
the formula. With fewer images than features the covariance is singular and the distance biased upwards: compare equal
numbers of images only, and print :func:`note`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Frames, Settings
from flowvqtalker_eval.metrics.inception import WEIGHTS, load_inception

__all__ = [
    "FRECHET_MOBILENET",
    "Gaussian",
    "GaussianFit",
    "InceptionFeatures",
    "MobileNetFeatures",
    "frechet_distance",
    "note",
]

FRECHET_MOBILENET = "Frechet-MobileNet"

#: The number of Inception's features: with fewer images the covariance is singular.
ENOUGH = 2048

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D) of the features of a number of images."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    n_images: int


class GaussianFit:
    """Mean and covariance of features that come in batches; memory does not grow with their number."""

    def __init__(self) -> None:
        self.n_images = 0
        self._sum: npt.NDArray[np.float64] | None = None

    def update(self, features: Floats) -> None:
        """Add features (n, D); rows with NaN (no face) are left out.

        Raises:
            UserError: if the shape does not fit.
        """
        if features.ndim != 2 or (self._sum is not None and features.shape[1] != len(self._sum)):
            wanted = "D" if self._sum is None else len(self._sum)
            raise UserError(f"features must have shape (n, {wanted}), got {features.shape}")
        values = np.asarray(features[np.isfinite(features).all(1)], np.float64)
        if not len(values):
            return
        if self._sum is None:
            # Sums of squares around a point near the mean lose no digits.
            self._origin = values.mean(0)
            self._sum, self._squares = np.zeros(values.shape[1]), np.zeros((values.shape[1],) * 2)
        values = values - self._origin
        self._sum += values.sum(0)
        self._squares += values.T @ values
        self.n_images += len(values)

    def result(self) -> Gaussian:
        """The Gaussian of everything so far.

        Raises:
            UserError: if there were fewer than two images.
        """
        if self._sum is None or self.n_images < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images with a face on each side, got {self.n_images}")
        mean = self._sum / self.n_images
        covariance = (self._squares - self.n_images * np.outer(mean, mean)) / (self.n_images - 1)
        return Gaussian(self._origin + mean, covariance, self.n_images)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance of two Gaussians.

    tr (Σ₁ Σ₂)^½ is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric and positive. That is
    several times as fast as ``scipy.linalg.sqrtm``, and exact for singular covariances.

    Raises:
        UserError: if the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"features must have one size, got {len(a.mean)} and {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.covariance)
    half = vectors * np.sqrt(np.maximum(values, 0))
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(half.T @ b.covariance @ half), 0)).sum()
    distance = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root
    return max(float(distance), 0.0)


def note(column: str, real: int, generated: int) -> tuple[str, ...]:
    """What to print beside a distance of so many images: nothing if there are enough."""
    if min(real, generated) >= ENOUGH:
        return ()
    return (f"{column} on {real} real and {generated} generated images, fewer than {ENOUGH}: biased upwards",)


def _features(network: torch.nn.Module, images: Frames, size: int, device: str) -> npt.NDArray[np.float32]:
    """(n, size) of images (n, H, W, 3); NaN for black ones, which stand for frames without a face."""
    features = np.full((len(images), size), np.nan, np.float32)
    seen = images.any((1, 2, 3))
    if seen.any():
        batch = torch.from_numpy(images[seen]).to(device).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            features[seen] = network(batch).cpu().numpy()
    return features


class InceptionFeatures(FrameExtractor):
    """Inception features of the aligned crops, for the FID; about 200 ms an image on one core.

    Arrays: ``inception`` (T, 2048) float32; NaN where no face was found.

    Arguments:
        weights: the published file; None looks in its usual places.
        device: where the network runs.

    Raises:
        MissingDependency: if the weights are nowhere.
    """

    name = "inception"
    needs = ("aligned",)
    gives = ("inception",)

    def __init__(self, weights: str | Path | None = None, device: str = "cpu") -> None:
        (self._path, self._sha256), self._device = WEIGHTS.find(weights), device

    def settings(self) -> Settings:
        return {"features": "FID Inception pool3", "sha256": self._sha256[:16], "input": "eat 128, bilinear to 299"}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        if self._model is None:
            self._model = load_inception(self._path).to(self._device)
        return {"inception": _features(self._model, known["aligned"], 2048, self._device)}


class MobileNetFeatures(FrameExtractor):
    """Features of torchvision's MobileNetV2: the 1280 numbers before its classifier.

    Arrays: ``mobilenet`` (T, 1280) float32 of the aligned crops at 128 pixels, NaN where no face was found; with
    ``source="frame"``, ``mobilenet512`` (T, 1280) of whole frames reduced to 224 pixels.

    Arguments:
        source: ``aligned`` or ``frame``.
        weights: see :func:`flowvqtalker.render.perceptual.find_weights`.
        device: where the network runs.

    Raises:
        MissingDependency: if the weights are nowhere.
    """

    def __init__(
        self, source: Literal["aligned", "frame"] = "aligned", weights: str | Path | None = None, device: str = "cpu"
    ) -> None:
        from flowvqtalker.render.perceptual import find_weights

        self.name = "mobilenet" if source == "aligned" else "mobilenet512"
        self.needs: tuple[str, ...] = ("aligned",) if source == "aligned" else ()
        self.gives = (self.name,)
        self._path, self._device = find_weights("mobilenet", weights), device

    def settings(self) -> Settings:
        size = "eat 128" if self.needs else "frame, area-averaged to 224x224"
        return {"features": self._path.name.rsplit(".", 1)[0], "input": size}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        if self._model is None:
            self._model = _MobileNet(self._path).eval().requires_grad_(False).to(self._device)
        if self.needs:
            images = known["aligned"]
        else:
            images = np.stack([cv2.resize(frame, (224, 224), interpolation=cv2.INTER_AREA) for frame in frames])
        return {self.name: _features(self._model, images, 1280, self._device)}


class _MobileNet(torch.nn.Module):
    """The perceptual loss's network and the layer that follows its last tap."""

    def __init__(self, weights: Path) -> None:
        super().__init__()
        from flowvqtalker.render.perceptual import PerceptualLoss

        self.body = PerceptualLoss("mobilenet", weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.head = torch.nn.Sequential(torch.nn.Conv2d(320, 1280, 1, bias=False), torch.nn.BatchNorm2d(1280))
        self.head.load_state_dict({k[12:]: v for k, v in state.items() if k.startswith("features.18.")})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 1280)."""
        last = self.body.features(2 * images - 1)[-1]
        return torch.clamp(self.head(last), 0, 6).mean((2, 3))
