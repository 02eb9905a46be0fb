"""The parts of a face that are judged on their own: crops of fixed size around the mouth and around the eyes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE, VERTICES
from flowvqtalker.io.media import Picture
from flowvqtalker.render.perceptual import PerceptualLoss

__all__ = ["EYES", "MOUTH", "SIZES", "Box", "as_tensor", "cut", "distances", "regions"]

#: Width and height in pixels of the 512x512 crop: on 171 held-out faces the lips reach at most 147 and 89 pixels (the
#: median 97 and 51), both eyes together 188 and 42.
MOUTH = (128, 128)
EYES = (224, 64)
SIZES = {"mouth": MOUTH, "eyes": EYES}

#: Left, top, width and height, pixels.
Box = tuple[int, int, int, int]

_POINTS = {"mouth": list(LIPS), "eyes": [*RIGHT_EYE, *LEFT_EYE]}


def regions(points: npt.NDArray[np.floating[Any]], side: int = 512) -> dict[str, Box]:
    """Boxes of :data:`SIZES` around the middle of the lips and of the eyes' rims, moved into the picture.

    Arguments:
        points: (478, 2 or 3) landmarks or projected vertices in pixels of the picture; with a NaN there is no face,
            and no box.
        side: of the picture.

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
        left, top = (
            int(np.clip(round(float(middle - extent / 2)), 0, side - extent))
            for middle, extent in ((x, width), (y, height))
        )
        boxes[name] = (left, top, width, height)
    return boxes


def cut(image: Picture, box: Box) -> Picture:
    """The part of a picture (H, W, 3) in a box."""
    left, top, width, height = box
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def as_tensor(images: Sequence[Picture], device: str | torch.device = "cpu") -> Tensor:
    """n pictures (H, W, 3) uint8 of one size to (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.inference_mode()
def distances(
    perceptual: PerceptualLoss,
    target: Picture,
    images: Mapping[str, Picture],
    *,
    box: Box | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Perceptual distance of each picture to one target: what ``perceptual(image, target)`` gives for each alone, with
    the target's features computed once.

    Arguments:
        perceptual: the network.
        target: (H, W, 3) uint8 RGB.
        images: by name, of the target's size.
        box: compare that part alone, enlarged twice (teeth and irises are few pixels of the picture).
        device: where the network is.
    """

    def features(image: Picture) -> list[Tensor]:
        found = as_tensor([image if box is None else cut(image, box)], device)
        return perceptual.features(found if box is None else F.interpolate(found, scale_factor=2))

    wanted = features(target)
    scales = [tap.float().square().mean() + 1e-6 for tap in wanted]
    out = {}
    for name, image in images.items():
        taps = [
            (tap - want).float().square().mean() / scale
            for tap, want, scale in zip(features(image), wanted, scales, strict=True)
        ]
        out[name] = float(torch.stack(taps).mean())
    return out
