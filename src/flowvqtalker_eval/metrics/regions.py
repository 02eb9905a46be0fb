"""Crops of fixed size around the mouth and the eyes, and perceptual distances of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from flowvqtalker.constants import CROP
from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE, VERTICES
from flowvqtalker.io.image import ImageArray
from flowvqtalker.render.perceptual import PerceptualLoss

__all__ = ["SIZES", "Box", "as_tensor", "crop", "perceptual_distances", "regions"]

#: Width and height in pixels of the 512x512 crop. On 171 held-out faces the lips measure at most 147x89 pixels (median
#: 97x51), both eyes together 188x42.
SIZES = {"mouth": (128, 128), "eyes": (224, 64)}

#: Left, top, width and height in pixels.
Box = tuple[int, int, int, int]

_POINTS = {"mouth": list(LIPS), "eyes": [*RIGHT_EYE, *LEFT_EYE]}


def regions(points: npt.NDArray[np.floating[Any]], side: int = CROP) -> dict[str, Box]:
    """Boxes of :data:`SIZES` centred on the lips and on the eyes, moved to lie inside the image.

    Arguments:
        points: (478, 2 or 3) landmarks or projected vertices in pixels; a NaN means no face, and no box.
        side: of the image.

    Raises:
        UserError: if the landmarks have another shape.
    """
    points = np.asarray(points)
    if points.ndim != 2 or len(points) != VERTICES or points.shape[1] not in (2, 3):
        raise UserError(f"landmarks of a face have shape ({VERTICES}, 2 or 3), got {points.shape}")
    if not np.isfinite(points).all():
        return {}
    boxes = {}
    for name, (width, height) in SIZES.items():
        x, y = points[_POINTS[name], :2].mean(0)
        left = int(np.clip(round(float(x - width / 2)), 0, side - width))
        top = int(np.clip(round(float(y - height / 2)), 0, side - height))
        boxes[name] = (left, top, width, height)
    return boxes


def crop(image: ImageArray, box: Box) -> ImageArray:
    """The part of an image (H, W, 3) inside a box."""
    left, top, width, height = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def as_tensor(image: ImageArray, device: str | torch.device = "cpu") -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float().div(127.5).sub(1)


@torch.inference_mode()
def perceptual_distances(
    perceptual: PerceptualLoss,
    target: ImageArray,
    images: Mapping[str, ImageArray],
    box: Box | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """``perceptual(image, target)`` of each image, with the target's features computed once.

    Arguments:
        perceptual: the network.
        target: (H, W, 3) uint8 RGB.
        images: by name, of the target's size.
        box: compare this part alone, enlarged twice because teeth and irises are few pixels of the image.
        device: where the network is.
    """

    def features(image: ImageArray) -> list[Tensor]:
        if box is None:
            return perceptual.features(as_tensor(image, device))
        return perceptual.features(F.interpolate(as_tensor(crop(image, box), device), scale_factor=2))

    wanted = features(target)
    scales = [tap.float().square().mean() + 1e-6 for tap in wanted]
    distances = {}
    for name, image in images.items():
        taps = [
            (tap - want).float().square().mean() / scale
            for tap, want, scale in zip(features(image), wanted, scales, strict=True)
        ]
        distances[name] = float(torch.stack(taps).mean())
    return distances
