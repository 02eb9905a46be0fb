"""Dense motion of the face mesh: the flow that the 3D morphable model itself implies between two poses and
expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS, IRISES, LEFT_EYE, RIGHT_EYE
from flowvqtalker.render.fill import double, fill

__all__ = [
    "APERTURES",
    "PRIOR",
    "MeshFlow",
    "MeshSource",
    "aperture_border",
    "aperture_maps",
    "identity_grid",
    "upsample_flow",
    "warp",
]

#: Channels of :func:`aperture_maps`: mouth, eyes, irises.
APERTURES = 3
#: Channels of a mesh flow with apertures: the flow, the aperture maps of target and source, the contact lines.
PRIOR = 2 + 2 * APERTURES + 5

Values = TypeVar("Values", Tensor, npt.NDArray[np.float32])

# How strongly the nearer of two surface points on the same cell wins: exp(-k * depth difference in eye distances).
_DEPTH_SHARPNESS = 25.0
# Width of the band around the face, in half face sizes, over which hair and neck follow the head.
_FALL_OFF = 0.55
# Pixels from an opening's rim at which its map reaches 1 or -1.
_RIM = 12.0
# Rims of the apertures that lips and lids close. The first half of each runs along its upper side.
_RIMS = (INNER_LIPS, RIGHT_EYE, LEFT_EYE)
# How far above and below an opening its two sides reach, in widths of it: the eyes' less than to the brows.
_REACH = 0.5


def identity_grid(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(1, H, W, 2) pixel centres in the coordinates of ``grid_sample(align_corners=False)``, float32."""
    y = (torch.arange(height, device=device, dtype=torch.float32) * 2 + 1) / height - 1
    x = (torch.arange(width, device=device, dtype=torch.float32) * 2 + 1) / width - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]


def warp(image: Tensor, flow: Tensor, prior: Tensor | None = None) -> Tensor:
    """Sample ``image`` where ``flow`` points: out(p) = image(p + flow(p)).

    Always in float32: bfloat16 coordinates would be off by whole pixels.

    Arguments:
        image: (B, C, H, W).
        flow: (B, 2, h, w), x and y in units of half the image's side; resized to the image if smaller.
        prior: that of :class:`MeshFlow`; if it has apertures, shut lips and lids touch (:func:`upsample_flow`).
    """
    size = image.shape[-2:]
    if prior is not None and prior.shape[1] == PRIOR:
        flow = upsample_flow(flow, prior, size[1])
    flow = flow.float().contiguous()  # two channels last are enlarged four times as slowly
    if flow.shape[-2:] != size:
        flow = F.interpolate(flow, size, mode="bilinear", align_corners=False)
    grid = identity_grid(size[0], size[1], image.device) + flow.permute(0, 2, 3, 1)
    sampled = F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(image.dtype)


class MeshSource(NamedTuple):
    """What a portrait's view gives to the flow to each of its frames."""

    surface: Tensor
    """(B, P, 2) surface samples in crop pixels."""
    apertures: Tensor | None
    """(B, 3, size, size) aperture maps, where the flow has them."""


class MeshFlow(nn.Module):
    """Backward flow from a target view of the face mesh to a source view (design: warp prior ``mesh``).

    The surface is sampled once, densely and evenly on the mean face. For a pair of views the samples' displacements
    are splatted at their target positions, nearer samples outweighing farther ones, holes and the surroundings are
    filled coarse to fine, and away from the face the motion fades to none. All of it is batched and runs on any
    device.

    Arguments:
        model: gives the mean face and the triangles.
        size: side of the flow.
        image_size: side of the crop in pixels.
        samples: surface points.
    """

    index: Tensor
    weight: Tensor
    upper: Tensor
    lower: Tensor

    def __init__(
        self,
        model: FaceModel,
        size: int = 128,
        image_size: int = 512,
        samples: int = 12_000,
        *,
        apertures: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.image_size, self.apertures = size, image_size, apertures
        index, weight, hole = _sample_surface(model, samples)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("weight", weight, persistent=False)
        if apertures:
            upper, lower = _sides(self._surface(model.mean[None])[0], model.mean, hole)
            self.register_buffer("upper", upper, persistent=False)
            self.register_buffer("lower", lower, persistent=False)

    def forward(self, source: Tensor | MeshSource, target: Tensor) -> Tensor:
        """Flow (B, 2, size, size) in units of half the crop's side; with ``apertures`` (B, 13, size, size).

        Those are the flow; the target's :func:`aperture_maps` and the source's, moved by the flow to where the target
        has them; and what :func:`upsample_flow` needs to shut lips and lids: the motion of the upper sides and of the
        lower ones, as differences from the flow, and how many rims (12 pixels) each place is above the contact line.

        Arguments:
            source: (B, 478, 3) projected vertices, u and v in crop pixels and the depth
                (:meth:`flowvqtalker.face.model.FaceModel.project`), or what :meth:`prepare` made of them.
            target: (B, 478, 3) likewise.
        """
        size = self.size
        batch = target.shape[0]
        start, ours = source if isinstance(source, MeshSource) else self.prepare(source)
        target = target.float()
        end = self._surface(target)
        displacement = (start - end[..., :2]) * (2.0 / self.image_size)
        nearness = torch.exp((end[..., 2].amin(1, keepdim=True) - end[..., 2]) * _DEPTH_SHARPNESS)
        values = (torch.cat([displacement, torch.ones_like(displacement[..., :1])], -1) * nearness[..., None]).mT
        cell, share = self._cells(end[..., :2])
        sums = [self._splat(cell, share, values)]
        for side in (self.upper, self.lower) if ours is not None else ():
            sums.append(self._splat(cell[..., side], share[..., side], values[..., side]))
        whole = torch.cat(sums)
        filled = fill(whole[:, :2], whole[:, 2:]).view(len(sums), batch, 2, size, size)

        low, high = target[..., :2].amin(1), target[..., :2].amax(1)
        centre, half = (low + high) / self.image_size - 1, (high - low) / self.image_size
        grid = identity_grid(size, size, target.device)
        radius = ((grid - centre[:, None, None]) / half[:, None, None]).norm(dim=-1)
        fade = torch.exp(-0.5 * ((radius - 1).clamp(min=0) / _FALL_OFF) ** 2)
        flow: Tensor = filled[0] * fade[:, None]
        if ours is None:
            return flow
        theirs = self._maps(target)
        above, near = _contact_lines(target, size, self.image_size)
        apart = [(side * fade[:, None] - flow) * near for side in filled[1:]]
        return torch.cat([flow, theirs, warp(ours.expand(batch, -1, -1, -1), flow), *apart, above], dim=1)

    def prepare(self, source: Tensor) -> MeshSource:
        """What a source view (B, 478, 3) gives to :meth:`forward`; of a portrait it is needed once for all frames."""
        source = source.float()
        return MeshSource(self._surface(source[..., :2]), self._maps(source) if self.apertures else None)

    def _maps(self, vertices: Tensor) -> Tensor:
        """Aperture maps (B, 3, size, size). Distances bear being enlarged, and cost much at full size."""
        return double(aperture_maps(vertices, self.size // 2, self.image_size))

    def _surface(self, vertices: Tensor) -> Tensor:
        """(B, 478, k) values at the vertices to (B, P, k) at the surface samples."""
        rows = vertices.movedim(0, 1).flatten(1).contiguous()
        values = F.embedding_bag(self.index, rows, mode="sum", per_sample_weights=self.weight)
        return values.view(-1, *vertices.shape[::2]).movedim(1, 0)

    def _cells(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers (B, 4, P) of the cells around positions (B, P, 2), and the bilinear shares of each; 0 outside."""
        size = self.size
        place = (position * (size / self.image_size) - 0.5).mT
        corner = place.floor()
        after = place - corner
        corner = torch.stack([corner, corner + 1], 2)  # (B, 2, 2, P): x and y of the cells before and after
        shares = torch.stack([1 - after, after], 2) * ((corner >= 0) & (corner < size))
        x, y = corner.clamp(0, size - 1).long().unbind(1)
        return (y[:, :, None] * size + x[:, None]).flatten(1, 2), (shares[:, 1, :, None] * shares[:, 0, None]).flatten(
            1, 2
        )

    def _splat(self, cell: Tensor, share: Tensor, values: Tensor) -> Tensor:
        """Add (B, k, P) values bilinearly to the cells around their positions: (B, k, size, size)."""
        batch, channels, _ = values.shape
        parts = (values[:, :, None] * share[:, None]).flatten(2)
        out = values.new_zeros(batch, channels, self.size**2)
        out.scatter_add_(2, cell.flatten(1)[:, None].expand_as(parts), parts)
        return out.view(batch, channels, self.size, self.size)


def aperture_maps(vertices: Tensor, size: int, image_size: int = 512) -> Tensor:
    """Where the face is open: signed distances to the rims of the mouth, the eyes and the irises.

    Arguments:
        vertices: (B, 478, 2 or 3) projected vertices in crop pixels.
        size: side of the maps.
        image_size: side of the crop in pixels.

    Returns:
        (B, 3, size, size): 1 from 12 pixels inside a rim on, 0 on it, -1 from 12 pixels outside on. A distance can be
        enlarged without stairs, a mask of this size could not.
    """
    points = vertices[..., :2].float()
    maps = points.new_full((len(points), APERTURES, size, size), -1.0)

    def draw(channel: int, rim: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        (columns, x), (rows, y) = (_near(rim[..., axis], size, image_size) for axis in (0, 1))
        x, y = (axis.reshape(1, 1, -1) for axis in torch.meshgrid(x, y, indexing="xy"))
        part = maps[:, channel, rows, columns]
        torch.maximum(part, (distance(x, y) / _RIM).clamp(max=1).view_as(part), out=part)

    for channel, around in ((0, INNER_LIPS), (1, RIGHT_EYE), (1, LEFT_EYE)):
        rim = points[:, list(around)]
        draw(channel, rim, partial(_inside, rim))
    for middle, *ring in IRISES:
        centre = points[:, middle, :, None]
        radius = (points[:, ring] - points[:, middle, None]).norm(dim=-1).mean(1, keepdim=True)
        disc = torch.stack([centre[..., 0] - radius, centre[..., 0] + radius], 1)
        draw(2, disc, lambda x, y, c=centre, r=radius: r - torch.hypot(x[0] - c[:, 0], y[0] - c[:, 1]))  # type: ignore[misc]
    return maps


def _near(values: Tensor, size: int, image_size: int) -> tuple[slice, Tensor]:
    """Cells along an axis that lie within a rim's width of any of the coordinates, and the places of their centres."""
    step = image_size / size
    first, last = 0, size
    if not values.is_meta:  # shapes without values
        low, high = ((end / step) for end in torch.stack([values.amin() - _RIM, values.amax() + _RIM]).tolist())
        first = min(max(math.floor(low), 0), size)
        last = min(max(math.ceil(high), first), size)
    return slice(first, last), (torch.arange(first, last, device=values.device, dtype=torch.float32) + 0.5) * step


def upsample_flow(flow: Tensor, prior: Tensor, side: int) -> Tensor:
    """A flow (B, 2, h, w) at the size of the picture (B, 2, side, side), in which shut lips and lids touch.

    A flow of a few cells must pass, between the motions of two lids that meet, through all motions between them, and
    so shows a slit of the open eye. Here every pixel outside of the apertures moves with its own side of the contact
    line.

    Arguments:
        flow: in units of half the picture's side.
        prior: (B, 13, h, w), that of :class:`MeshFlow` with apertures.
        side: of the picture, a multiple of the flow's.
    """
    theirs, lines = prior[:, 2 : 2 + APERTURES], prior[:, 2 + 2 * APERTURES :]
    whole = F.interpolate(flow.float().contiguous(), (side, side), mode="bilinear", align_corners=False)
    box = _box(lines[:, :4])
    if box is None:
        return whole
    maps = torch.cat([lines, theirs[:, :2].amax(1, keepdim=True)], 1)[..., box[0], box[1]].float().contiguous()
    scale = side // flow.shape[-1]
    maps = F.interpolate(maps, scale_factor=scale, mode="bilinear", align_corners=False)
    shut = aperture_border(maps[:, 5:])
    apart = torch.where(maps[:, 4:5] > 0, maps[:, :2], maps[:, 2:4])
    rows, columns = (slice(part.start * scale, part.stop * scale) for part in box)
    whole[..., rows, columns] += shut * apart
    return whole


def aperture_border(apertures: Values) -> Values:
    """From 0, a pixel inside of an opening, to 1, a pixel outside, of aperture maps."""
    return (0.5 - apertures * (_RIM / 2)).clip(0, 1)


def _box(maps: Tensor) -> tuple[slice, slice] | None:
    """Rows and columns outside of which all maps (B, C, h, w) are nothing, and None if they are nothing anywhere."""
    if maps.is_meta:  # shapes without values
        return slice(0, maps.shape[2]), slice(0, maps.shape[3])
    size = maps.abs().amax((0, 1)) > 1e-5
    rows, columns = (torch.nonzero(size.any(axis))[:, 0].tolist() for axis in (1, 0))
    return (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if rows else None


def _contact_lines(vertices: Tensor, size: int, image_size: int) -> tuple[Tensor, Tensor]:
    """How many rims each place is above the nearest contact line, where lips or lids meet, and whether it is above or
    below one at all: two maps (B, 1, size, size), the second from 0 to 1."""
    points = vertices[..., :2].float()
    place = (torch.arange(size, device=points.device, dtype=torch.float32) + 0.5) * (image_size / size)
    heights, weights = [], []
    for rim in _RIMS:
        middle = _middle(points[:, list(rim)])
        later = torch.ones(middle.shape[1], middle.shape[1], dtype=torch.bool, device=points.device).triu(1)
        # Rising, whichever way the head is turned. (OpenVINO knows no cummax.)
        x = middle[:, None, :, 0].masked_fill(later, -torch.inf).amax(-1)
        line = _interpolate(x, middle[..., 1], place.expand(len(x), -1))
        above = line[:, None] - place[:, None]
        reach = _REACH * (x[:, -1:] - x[:, :1]).clamp(min=1e-3)[..., None]
        inside = torch.minimum(place - x[:, :1], x[:, -1:] - place)[:, None]
        heights.append(above / _RIM)
        weights.append((inside / 4 + 0.5).clamp(0, 1) * ((1 - above.abs() / reach) / 0.3).clamp(0, 1))
    height, weight = torch.stack(heights, 1), torch.stack(weights, 1)
    near, which = weight.max(1, keepdim=True)
    return height.gather(1, which), near


def _sides(points: Tensor, mean: Tensor, hole: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the samples around the apertures without those of holes and of the skin just below an opening; and the
    same without the skin just above one.

    Arguments:
        points: (P, 3) samples on the mean face, y downwards.
        mean: (478, 3) the mean face.
        hole: (P,) whether the sample lies in an opening.
    """
    around, under, over = (torch.zeros_like(hole) for _ in range(3))
    for rim in _RIMS:
        x, y = _middle(mean[None, list(rim), :2])[0].T
        width = x[-1] - x[0]
        above = _interpolate(x[None], y[None], points[None, :, 0])[0] - points[:, 1]
        beside = (points[:, 0] > x[0]) & (points[:, 0] < x[-1]) & (above.abs() < _REACH * width)
        under |= beside & (above < 0)
        over |= beside & (above > 0)
        around |= ((points[:, 0] - x.mean()).abs() < width) & (above.abs() < 1.5 * _REACH * width)
    upper, lower = (torch.nonzero(around & ~hole & ~side)[:, 0] for side in (under, over))
    return upper, lower


def _middle(ring: Tensor) -> Tensor:
    """(B, n / 2 + 1, 2) the line halfway between the upper and the lower side of rims (B, n, 2)."""
    half = ring.shape[1] // 2
    between = (ring[:, 1:half] + ring[:, half + 1 :].flip(1)) / 2
    return torch.cat([ring[:, :1], between, ring[:, half : half + 1]], 1)


def _interpolate(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Values (B, P) at places (B, P) of lines through (B, n) points with rising x; constant beyond their ends."""
    after = torch.searchsorted(x.contiguous(), at.contiguous()).clamp(1, x.shape[1] - 1)
    x0, x1, y0, y1 = (values.gather(1, index) for values in (x, y) for index in (after - 1, after))
    return y0 + (y1 - y0) * ((at - x0) / (x1 - x0).clamp(min=1e-6)).clamp(0, 1)


def _inside(rim: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (B, P) of points, x and y (1, 1, P), to polygons (B, n, 2); positive inside."""
    x0, y0 = rim.unsqueeze(-1).unbind(2)  # (B, n, 1)
    dx, dy = x0.roll(-1, 1) - x0, y0.roll(-1, 1) - y0
    right, down = x - x0, y - y0
    along = ((right * dx + down * dy) / (dx * dx + dy * dy).clamp(min=1e-6)).clamp_(0, 1)
    squared = (right - along * dx).square_() + (down - along * dy).square_()
    # Even-odd rule: how many edges does a ray to the right cross?
    slope = dx / torch.where(dy == 0, 1.0, dy)
    crosses = ((down < 0) != (down < dy)) & (right < down * slope)
    distance = squared.amin(1).sqrt_()
    return torch.where(crosses.sum(1) % 2 == 1, distance, -distance)


def _sample_surface(model: FaceModel, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vertex numbers (P, 3) and barycentric weights (P, 3) of points spread evenly over the mesh, mouth and eyes
    closed; and which (P,) are not of the skin."""
    skin = model.triangles.cpu().numpy()
    holes = torch.cat([model.mouth_triangles, model.eye_triangles]).cpu().numpy()
    mean = model.mean.cpu().numpy()
    edges = mean[skin][:, 1:] - mean[skin][:, :1]
    area = 0.5 * np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    # Mouth and eyes are nearly shut on the mean face but may open wide, so they get a fixed number a triangle.
    counts = np.concatenate([np.maximum(3, np.round(samples * area / area.sum())), np.full(len(holes), 24)]).astype(int)
    triangles = np.repeat(np.concatenate([skin, holes]), counts, axis=0)
    rank = np.concatenate([np.arange(c) for c in counts])
    # The R2 sequence (Roberts 2018) covers each triangle evenly and without chance.
    u, v = (rank * 0.7548776662466927 + 0.5) % 1, (rank * 0.5698402909980532 + 0.5) % 1
    fold = u + v > 1
    u, v = np.where(fold, 1 - u, u), np.where(fold, 1 - v, v)
    weights = np.stack([1 - u - v, u, v], axis=-1)
    hole = np.repeat(np.arange(len(counts)) >= len(skin), counts)
    return (
        torch.from_numpy(triangles.astype(np.int64)),
        torch.from_numpy(weights.astype(np.float32)),
        torch.from_numpy(hole),
    )
