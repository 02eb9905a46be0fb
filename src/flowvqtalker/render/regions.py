"""Painters of the mouth and the eyes: what a warped picture cannot show, at the price of a few small crops.

The image generator of the paper sees the whole picture and spends as much on a cheek as on teeth. Mouth and eyes are a
twentieth of the pixels and most of what is missing in a warped picture: teeth behind lips that were shut, an iris
behind a lid. Two small U-Nets (ours) draw what is to be added to the warped picture there, told by the face mesh where
lips and lids open. They learn from crops alone, some ten times faster than the whole generator does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE
from flowvqtalker.render.layers import Attention2d, Downsample, ResBlock, Upsample, group_norm, silu
from flowvqtalker.render.mesh import OPENINGS

__all__ = ["REGIONS", "Region", "RegionPainter", "RegionUNet", "corners", "crops", "places"]

#: Crops begin at multiples of this: a cell of the mesh maps of 128x128.
_GRID = 4


class Region(NamedTuple):
    """A part of the face that is painted."""

    name: str
    painter: str
    """Which painter draws it."""
    height: int
    width: int
    """Of its crop, in pixels of the 512x512 picture."""
    vertices: tuple[int, ...]
    """Whose mean is its middle."""
    mirrored: bool
    """Whether the painter sees it mirrored: both eyes are painted by one painter, as right eyes."""


REGIONS = (
    Region("mouth", "mouth", 128, 128, LIPS, False),
    Region("right eye", "eye", 64, 96, RIGHT_EYE, False),
    Region("left eye", "eye", 64, 96, LEFT_EYE, True),
)


def places(vertices: Tensor) -> Tensor:
    """Middles (B, 3, 2) of the regions in crop pixels, of projected vertices (B, 478, 2 or 3)."""
    return torch.stack([vertices[:, list(region.vertices), :2].mean(1) for region in REGIONS], 1)


def corners(middles: Tensor, region: int, side: int = 512) -> list[tuple[int, int]]:
    """Left and top of a region's crop in each picture, from :func:`places`; inside the picture, on a grid."""
    size = torch.tensor([REGIONS[region].width, REGIONS[region].height])
    corner = ((middles[:, region].float().cpu() - size / 2) / _GRID).round().long() * _GRID
    return [(int(x), int(y)) for x, y in torch.minimum(corner.clamp(min=0), side - size).tolist()]


def crops(maps: Tensor, places: list[tuple[int, int]], region: int, side: int = 512) -> Tensor:
    """A region's crops of maps (B, C, s, s) of the whole picture of ``side`` pixels: (B, C, h s / side, w s / side)."""
    height, width = (value * maps.shape[-1] // side for value in REGIONS[region][2:4])
    cut = []
    for x, (left, top) in zip(maps, places, strict=True):
        i, j = top * maps.shape[-1] // side, left * maps.shape[-1] // side
        cut.append(x[:, i : i + height, j : j + width])
    found = torch.stack(cut)
    return found.flip(-1) if REGIONS[region].mirrored else found


class RegionUNet(nn.Module):
    """What is to be added to a crop of the warped picture.

    Works at half the resolution (pixel unshuffle), with three levels and attention on the coarsest. The last layer
    starts at zero, so an untrained painter adds nothing.

    Arguments of forward:
        image: (B, 3, h, w) in [-1, 1], sides divisible by 8.
        openings: (B, 6, h', w'), the target's :func:`flowvqtalker.render.mesh.openings` and the source's, moved; any
            size, enlarged to (h / 2, w / 2).

    Returns:
        (B, 3, h, w).
    """

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.stem = nn.Conv2d(12 + 2 * OPENINGS, a, 3, padding=1)
        self.down1, self.down2 = Downsample(a, b), Downsample(b, c)
        self.fine, self.middle = ResBlock(a), ResBlock(b)
        self.coarse = nn.Sequential(ResBlock(c), Attention2d(c), ResBlock(c))
        self.up2, self.up1 = Upsample(c, b, 1), Upsample(b, a, 1)
        self.join2, self.join1 = ResBlock(2 * b, b), ResBlock(2 * a, a)
        self.norm = group_norm(a)
        self.out = nn.Conv2d(a, 12, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, openings: Tensor) -> Tensor:
        half = F.pixel_unshuffle(image, 2)
        told = F.interpolate(openings.to(image.dtype), half.shape[-2:], mode="bilinear")
        fine = self.fine(self.stem(torch.cat([half, told], 1)))
        middle = self.middle(self.down1(fine))
        coarse = self.coarse(self.down2(middle))
        middle = self.join2(torch.cat([self.up2(coarse), middle], 1))
        fine = self.join1(torch.cat([self.up1(middle), fine], 1))
        change: Tensor = F.pixel_shuffle(self.out(silu(self.norm(fine))), 2)
        return change


class RegionPainter(nn.Module):
    """Paints all :data:`REGIONS` of a warped picture."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.mouth, self.eye = RegionUNet(width), RegionUNet(width * 3 // 5)
        for number, region in enumerate(REGIONS):
            self.register_buffer(f"rim{number}", _rim(region.height, region.width), persistent=False)

    def forward(self, image: Tensor, warped: Tensor, openings: Tensor, middles: Tensor) -> Tensor:
        """Lay the painted regions over a picture.

        Arguments:
            image: (B, 3, 512, 512), the generator's.
            warped: (B, 3, 512, 512), the warped picture I_w, on which the regions are painted.
            openings: (B, 6, s, s), see :class:`RegionUNet`.
            middles: (B, 3, 2), see :func:`places`.
        """
        image = image.clone()
        side = image.shape[-1]
        boxes = [corners(middles, number, side) for number in range(len(REGIONS))]
        for painter in ("mouth", "eye"):
            numbers = [n for n, region in enumerate(REGIONS) if region.painter == painter]
            below = torch.cat([crops(warped, boxes[n], n, side) for n in numbers])
            told = torch.cat([crops(openings, boxes[n], n, side) for n in numbers])
            painted = below + getattr(self, painter)(below, told)
            for n, patches in zip(numbers, painted.chunk(len(numbers)), strict=True):
                patches = patches.flip(-1) if REGIONS[n].mirrored else patches
                weight = getattr(self, f"rim{n}").to(image.dtype)
                for picture, patch, (x, y) in zip(image, patches, boxes[n], strict=True):
                    part = picture[:, y : y + patch.shape[1], x : x + patch.shape[2]]
                    part += weight * (patch.to(image.dtype) - part)
        return image


def _rim(height: int, width: int, soft: int = 16) -> Tensor:
    """(height, width) weights, 1 in the middle, 0 at the border."""

    def ramp(length: int) -> Tensor:
        place = torch.arange(length) + 0.5
        near = (torch.minimum(place, length - place) / soft).clamp(max=1)
        return near * near * (3 - 2 * near)

    return ramp(height)[:, None] * ramp(width)
