"""Losses on the region of interest (ours): bands of detail, weights of mouth and eyes, a balanced adversarial gradient.

Points are the centres (B, 3, 2) of the mouth, the right eye and the left eye in pixels of the region, x first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE
from flowvqtalker.train.gan import PatchDiscriminator

__all__ = [
    "RegionDiscriminator", "backward_through", "balanced_gradient", "band_loss", "detail_loss", "distances", "eye_crop",
    "feature_points", "feature_weights", "mouth_crop",
]  # fmt: skip

#: Enlargement of the mouth's and the eyes' crops for the perceptual loss: teeth and lashes are few pixels.
_MOUTH_ZOOM, _EYE_ZOOM = 2.0, 1.4
#: Extra weight and spread (x, y in pixels) of the mouth and of both eyes.
_FEATURES = ((3.0, 48, 30), (2.0, 34, 20), (2.0, 34, 20))
#: Brings the fine band that a discriminator sees to the range of the image.
_FINE_GAIN = 8.0


def feature_points(vertices: Tensor, roi: tuple[int, int, int, int]) -> Tensor:
    """Points of vertices (B, 478, 2 or 3) in pixels of the crop."""
    centres = [vertices[:, list(group), :2].mean(1) for group in (LIPS, RIGHT_EYE, LEFT_EYE)]
    return torch.stack(centres, 1) - vertices.new_tensor([roi[1], roi[0]])


def feature_weights(points: Tensor, height: int, width: int) -> Tensor:
    """Weights (B, 1, height, width) of a region's pixels: 1, up to 4 at the mouth and up to 3 at the eyes."""
    y, x = (torch.arange(n, device=points.device) + 0.5 for n in (height, width))
    total = points.new_ones(len(points), 1, height, width)
    for k, (gain, spread_x, spread_y) in enumerate(_FEATURES):
        across = torch.exp(-0.5 * ((x - points[:, k, :1]) / spread_x) ** 2)
        down = torch.exp(-0.5 * ((y - points[:, k, 1:]) / spread_y) ** 2)
        total = total + gain * down[:, None, :, None] * across[:, None, None, :]
    return total


def _crop(image: Tensor, centre: Tensor, height: int, width: int, zoom: float) -> Tensor:
    """Crops (B, 3, height * zoom, width * zoom) around centres (B, 2), moved inside the image where it ends."""
    rows, columns = image.shape[-2:]
    y = (torch.arange(round(height * zoom), device=image.device) + 0.5) / zoom - height / 2
    x = (torch.arange(round(width * zoom), device=image.device) + 0.5) / zoom - width / 2
    centre = centre.round()
    across = centre[:, 0].clamp(min(width, columns) / 2, columns - min(width, columns) / 2)
    down = centre[:, 1].clamp(min(height, rows) / 2, rows - min(height, rows) / 2)
    grid_x = ((x[None] + across[:, None]) * 2 / columns - 1)[:, None, :].expand(-1, len(y), -1)
    grid_y = ((y[None] + down[:, None]) * 2 / rows - 1)[:, :, None].expand(-1, -1, len(x))
    grid = torch.stack([grid_x, grid_y], -1)
    crop = F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crop.contiguous(memory_format=torch.channels_last)


def mouth_crop(image: Tensor, points: Tensor, zoom: float = 1.0) -> Tensor:
    """96x144 pixels around the mouth, enlarged by ``zoom``."""
    return _crop(image, points[:, 0] + points.new_tensor([0.0, 6.0]), 96, 144, zoom)


def eye_crop(image: Tensor, points: Tensor, zoom: float = 1.0) -> Tensor:
    """96x240 pixels around both eyes and the brows, enlarged by ``zoom``."""
    return _crop(image, points[:, 1:].mean(1) - points.new_tensor([0.0, 8.0]), 96, 240, zoom)


def distances(
    perceptual: Callable[[Tensor, Tensor], Tensor], image: Tensor, target: Tensor, points: Tensor
) -> dict[str, Tensor]:
    """L_per on the region (``perceptual``), the enlarged ``mouth`` and the enlarged ``eyes``: (B, 3, H, W) each."""
    mouths = (mouth_crop(x, points, _MOUTH_ZOOM) for x in (image, target))
    eyes = (eye_crop(x, points, _EYE_ZOOM) for x in (image, target))
    return {"perceptual": perceptual(image, target), "mouth": perceptual(*mouths), "eyes": perceptual(*eyes)}


def band_loss(image: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L1, and the L1 of a coarse and a fine band: averages over 4x4 pixels, and what averages over 2x2 lose.

    Arguments:
        image, target: (B, 3, H, W).
        weight: (B, 1, H, W) of the pixels in the first.
    """
    difference = image.float() - target.float()
    size = difference.abs()
    l1 = size.mean() if weight is None else (size * weight).mean() / weight.mean()
    return l1, F.avg_pool2d(difference, 4).abs().mean() + _fine(difference).abs().mean()


def detail_loss(image: Tensor, target: Tensor) -> Tensor:
    """Difference of the local energies of the fine band, relative to the target's mean: is there as much detail?

    The other losses ask whether it is in the right place. Where that cannot be known, they prefer none at all.

    Arguments:
        image, target: (B, 3, H, W).
    """
    energies = [
        (F.avg_pool2d(_fine(x.float()).square().mean(1, keepdim=True), 8) + 1e-6).sqrt() for x in (image, target)
    ]
    return ((energies[0] - energies[1]).abs().mean((1, 2, 3)) / energies[1].mean((1, 2, 3))).mean()


def _fine(image: Tensor) -> Tensor:
    """What averages over 2x2 pixels lose."""
    return image - F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="nearest")


def balanced_gradient(
    image: Tensor, reconstruction: Tensor, adversarial: Tensor | None, ratio: float, most: float
) -> tuple[Tensor, Tensor]:
    """Gradient of both losses with regard to the image, and the weight that the adversarial one got.

    VQGAN's adaptive weight, measured on the image instead of the last layer: the adversarial gradient is scaled to
    ``ratio`` of the reconstruction's norm, by a factor of at most ``most``.
    """
    (gradient,) = torch.autograd.grad(reconstruction, image)
    if adversarial is None:
        return gradient, image.new_zeros(())
    (other,) = torch.autograd.grad(adversarial, image)
    weight = (ratio * gradient.float().norm() / (other.float().norm() + 1e-8)).clamp(max=most)
    return gradient + weight * other, weight


def backward_through(image: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A loss of a given value whose gradient with regard to the image is the given one."""
    linear = (image.float() * gradient).sum()
    return value.detach() + linear - linear.detach()


class RegionDiscriminator(nn.Module):
    """Three patch discriminators: of the region, of the mouth and of the eyes, given I_w.

    Each sees the image and beside it, enlarged, what averages over 3x3 pixels lose. What gives a drawn picture away is
    there and small: without it a discriminator of our size is no better than chance for hundreds of steps, and the
    generator blurs meanwhile. I_w shows how sharp the portrait is: among real pictures, soft and sharp ones, a drawing
    of a sharp portrait could hide as a soft one.

    Arguments:
        width: channels of their first layers.
        layers: strided layers.
    """

    def __init__(self, width: int = 40, layers: int = 3) -> None:
        super().__init__()
        self.region, self.mouth, self.eyes = (PatchDiscriminator(width, layers, 12) for _ in range(3))

    def forward(self, region: Tensor, warped: Tensor, points: Tensor) -> list[Tensor]:
        """Maps of logits of the region, the mouth and the eyes of regions (B, 3, H, W) and of I_w there."""
        images = torch.cat([region, warped], 1)
        near = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
        seen = torch.cat([images, _FINE_GAIN * (images - near)], 1)
        return [self.region(seen), self.mouth(mouth_crop(seen, points)), self.eyes(eye_crop(seen, points))]
