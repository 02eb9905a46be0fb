"""A painter of the inside of the mouth: what lies behind shut lips can be painted, but not warped.

The image generator of the paper spends as much on a cheek as on teeth. This small U-Net (ours) sees a crop of the
warped picture around the mouth and, from the face mesh, where the lips open; it draws what is to be added there, and
nowhere else. Crops are cheap, so it learns from ten times more of them than the whole generator can of pictures.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.render.layers import Attention2d, Downsample, ResBlock, Upsample, group_norm, silu

__all__ = ["HEIGHT", "WIDTH", "MouthPainter", "corners", "crops", "inside"]

#: Size of the crop in pixels of the picture of 512x512.
HEIGHT, WIDTH = 128, 160
#: Side of the picture.
_SIDE = 512
#: Crops begin at multiples of this: a cell of the mesh's maps of 128x128.
_GRID = 4


def corners(openings: Tensor) -> list[tuple[int, int]]:
    """Left and top of each picture's crop: around the middle of the mouth, inside the picture, on a grid.

    Arguments:
        openings: (B, s, s), the mouth's map of :func:`flowvqtalker.render.mesh_flow.openings`.
    """
    side = openings.shape[-1]
    # A map of signed distances is highest along the slit of shut lips, and inside of open ones.
    weight = torch.softmax(openings.float().flatten(1) * 20, 1).view(-1, side, side)
    place = (torch.arange(side, device=openings.device) + 0.5) * (_SIDE / side)
    middle = torch.stack([weight.sum(1) @ place, weight.sum(2) @ place], 1).cpu()
    size = torch.tensor([WIDTH, HEIGHT])
    corner = ((middle - size / 2) / _GRID).round().long() * _GRID
    return [(int(x), int(y)) for x, y in torch.minimum(corner.clamp(min=0), _SIDE - size).tolist()]


def crops(maps: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The crops of maps (B, C, s, s) of whole pictures: (B, C, 128 s / 512, 160 s / 512)."""
    side = maps.shape[-1]
    height, width = HEIGHT * side // _SIDE, WIDTH * side // _SIDE
    found = []
    for x, (left, top) in zip(maps, places, strict=True):
        i, j = top * side // _SIDE, left * side // _SIDE
        found.append(x[:, i : i + height, j : j + width])
    return torch.stack(found)


def inside(told: Tensor) -> Tensor:
    """(B, 1, 128, 160) how much may be painted: 1 in the open mouth and up to 3 pixels from its rim, 0 from 9 pixels
    on and at the crop's border.

    Arguments:
        told: (B, 2, h, w) crops of the mouth's openings, the target's first.
    """
    far = F.interpolate(told[:, :1].float(), (HEIGHT, WIDTH), mode="bilinear")
    weight = _smooth((far + 0.75) * 2)
    ramps = [torch.arange(n, device=told.device) + 0.5 for n in (HEIGHT, WIDTH)]
    rows, columns = (_smooth(torch.minimum(r, len(r) - r) / 8) for r in ramps)
    return weight * rows[:, None] * columns


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


class MouthPainter(nn.Module):
    """Paints the inside of the mouth into a picture.

    Works at half the resolution (pixel unshuffle), with three levels and attention on the coarsest. The last layer
    starts at zero, so an untrained painter adds nothing.

    Arguments:
        width: channels of the finest level.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        a, b, c = width, 2 * width, 4 * width
        self.stem = nn.Conv2d(12 + 2, a, 3, padding=1)
        self.down1, self.down2 = Downsample(a, b), Downsample(b, c)
        self.fine, self.middle = ResBlock(a), ResBlock(b)
        self.coarse = nn.Sequential(ResBlock(c), Attention2d(c), ResBlock(c))
        self.up2, self.up1 = Upsample(c, b, 1), Upsample(b, a, 1)
        self.join2, self.join1 = ResBlock(2 * b, b), ResBlock(2 * a, a)
        self.norm = group_norm(a)
        self.out = nn.Conv2d(a, 12, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def paint(self, crop: Tensor, told: Tensor) -> Tensor:
        """What is to be added to a crop of the warped picture, before :func:`inside` weighs it.

        Arguments:
            crop: (B, 3, 128, 160) in [-1, 1].
            told: (B, 2, h, w), the mouth's opening in the target and that in the source, moved.
        """
        half = F.pixel_unshuffle(crop, 2)
        fine = self.stem(torch.cat([half, F.interpolate(told.to(crop.dtype), half.shape[-2:], mode="bilinear")], 1))
        fine = self.fine(fine)
        middle = self.middle(self.down1(fine))
        coarse = self.coarse(self.down2(middle))
        middle = self.join2(torch.cat([self.up2(coarse), middle], 1))
        fine = self.join1(torch.cat([self.up1(middle), fine], 1))
        change: Tensor = F.pixel_shuffle(self.out(silu(self.norm(fine))), 2)
        return change

    def forward(self, image: Tensor, warped: Tensor, openings: Tensor) -> Tensor:
        """Add the painted mouth to a picture.

        Arguments:
            image: (B, 3, 512, 512), the generator's.
            warped: (B, 3, 512, 512), the warped picture I_w, which the painter sees.
            openings: (B, 6, s, s), the target's :func:`flowvqtalker.render.mesh_flow.openings` and the source's, moved.
        """
        told = rearrange(openings, "b (view part) h w -> b view part h w", view=2)[:, :, 0]
        places = corners(told[:, 0])
        told = crops(told, places)
        change = (self.paint(crops(warped, places), told) * inside(told)).to(image.dtype)
        image = image.clone()
        for k, (left, top) in enumerate(places):
            image[k, :, top : top + HEIGHT, left : left + WIDTH] += change[k]
        return image
