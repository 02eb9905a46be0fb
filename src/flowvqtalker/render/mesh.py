"""Dense motion of the face mesh: the flow that the 3D morphable model itself implies between two poses and
expressions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS, IRISES, LEFT_EYE, RIGHT_EYE

__all__ = ["OPENINGS", "MeshFlow", "identity_grid", "openings", "warp"]

#: Channels of :func:`openings`: mouth, eyes, irises.
OPENINGS = 3

# How strongly the nearer of two surface points on the same cell wins: exp(-k * depth difference in eye distances).
_DEPTH_SHARPNESS = 25.0
# Width of the band around the face, in half face sizes, over which hair and neck follow the head.
_FALL_OFF = 0.55
# Pixels from an opening's rim at which its map reaches 1 or -1.
_RIM = 12.0


def identity_grid(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(1, H, W, 2) pixel centres in the coordinates of ``grid_sample(align_corners=False)``, float32."""
    y = (torch.arange(height, device=device, dtype=torch.float32) * 2 + 1) / height - 1
    x = (torch.arange(width, device=device, dtype=torch.float32) * 2 + 1) / width - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample ``image`` where ``flow`` points: out(p) = image(p + flow(p)).

    Always in float32: bfloat16 coordinates would be off by whole pixels.

    Arguments:
        image: (B, C, H, W).
        flow: (B, 2, h, w), x and y in units of half the image's side; resized to the image if smaller.
    """
    size = image.shape[-2:]
    flow = flow.float()
    if flow.shape[-2:] != size:
        flow = F.interpolate(flow, size, mode="bilinear", align_corners=False)
    grid = identity_grid(size[0], size[1], image.device) + flow.permute(0, 2, 3, 1)
    sampled = F.grid_sample(image.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(image.dtype)


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

    def __init__(
        self,
        model: FaceModel,
        size: int = 128,
        image_size: int = 512,
        samples: int = 12_000,
        *,
        openings: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.image_size, self.openings = size, image_size, openings
        index, weight = _sample_surface(model, samples)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Flow (B, 2, size, size) in units of half the crop's side; with ``openings`` (B, 8, size, size): the flow, the
        target's :func:`openings` and the source's, moved by the flow to where the target has them.

        Arguments:
            source, target: (B, 478, 3) projected vertices, u and v in crop pixels and the depth
                (:meth:`flowvqtalker.face.model.FaceModel.project`).
        """
        size = self.size
        batch = target.shape[0]
        source, target = source.float(), target.float()
        start = self._surface(source[..., :2].expand(batch, -1, -1))
        end = self._surface(target)
        displacement = (start - end[..., :2]) * (2.0 / self.image_size)
        nearness = torch.exp((end[..., 2].amin(1, keepdim=True) - end[..., 2]) * _DEPTH_SHARPNESS)
        sums = self._splat(
            end[..., :2], torch.cat([displacement, torch.ones_like(displacement[..., :1])], -1), nearness
        )
        filled = _fill(sums[:, :2], sums[:, 2:])

        low, high = target[..., :2].amin(1), target[..., :2].amax(1)
        centre, half = (low + high) / self.image_size - 1, (high - low) / self.image_size
        grid = identity_grid(size, size, target.device)
        radius = ((grid - centre[:, None, None]) / half[:, None, None]).norm(dim=-1)
        fade = torch.exp(-0.5 * ((radius - 1).clamp(min=0) / _FALL_OFF) ** 2)
        flow = filled * fade[:, None]
        if not self.openings:
            return flow
        # Distances bear being enlarged, and cost much at full size.
        theirs, ours = (
            F.interpolate(openings(v, size // 2, self.image_size), (size, size), mode="bilinear")
            for v in (target, source)
        )
        return torch.cat([flow, theirs, warp(ours.expand(batch, -1, -1, -1), flow)], dim=1)

    def _surface(self, vertices: Tensor) -> Tensor:
        """(B, 478, k) values at the vertices to (B, P, k) at the surface samples."""
        values: Tensor = (vertices[:, self.index] * self.weight[..., None]).sum(2)
        return values

    def _splat(self, position: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        """Add (B, P, k) values, weighted, bilinearly to the cells around (B, P, 2) positions: (B, k, size, size)."""
        batch, _, channels = values.shape
        size = self.size
        place = position * (size / self.image_size) - 0.5
        corner = place.floor()
        fraction = place - corner
        corner = corner.long()
        out = values.new_zeros(batch, size * size, channels)
        weighted = values * weight[..., None]
        for dx in (0, 1):
            for dy in (0, 1):
                x, y = corner[..., 0] + dx, corner[..., 1] + dy
                share = (fraction[..., 0] if dx else 1 - fraction[..., 0]) * (
                    fraction[..., 1] if dy else 1 - fraction[..., 1]
                )
                share = share * ((x >= 0) & (x < size) & (y >= 0) & (y < size))
                cell = (y.clamp(0, size - 1) * size + x.clamp(0, size - 1))[..., None].expand(-1, -1, channels)
                out.scatter_add_(1, cell, weighted * share[..., None])
        return out.movedim(1, 2).reshape(batch, channels, size, size)


def openings(vertices: Tensor, size: int, image_size: int = 512) -> Tensor:
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
    place = (torch.arange(size, device=points.device, dtype=torch.float32) + 0.5) * (image_size / size)
    x, y = (axis.reshape(1, 1, -1) for axis in torch.meshgrid(place, place, indexing="xy"))
    mouth = _inside(points[:, list(INNER_LIPS)], x, y)
    eyes = torch.maximum(*(_inside(points[:, list(rim)], x, y) for rim in (RIGHT_EYE, LEFT_EYE)))
    discs = []
    for centre, *rim in IRISES:
        middle = points[:, centre, :, None]
        radius = (points[:, rim] - points[:, centre, None]).norm(dim=-1).mean(1, keepdim=True)
        discs.append(radius - torch.hypot(x[0] - middle[:, 0], y[0] - middle[:, 1]))
    maps = torch.stack([mouth, eyes, torch.maximum(*discs)], 1).div_(_RIM).clamp_(-1, 1)
    return maps.view(len(points), OPENINGS, size, size)


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


def _fill(sums: Tensor, weights: Tensor) -> Tensor:
    """Normalise splatted sums and fill empty cells from ever coarser averages (push-pull)."""
    if sums.shape[-1] == 1:
        return sums / weights.clamp(min=1e-12)
    known = weights > 1e-10
    value = torch.where(known, sums / weights.clamp(min=1e-12), 0.0)
    presence = known.to(value)
    coarse = _fill(F.avg_pool2d(value * presence, 2), F.avg_pool2d(presence, 2))
    return torch.where(known, value, F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False))


def _sample_surface(model: FaceModel, samples: int) -> tuple[Tensor, Tensor]:
    """Vertex numbers (P, 3) and barycentric weights (P, 3) of points spread evenly over the mesh, mouth and eyes
    closed."""
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
    return torch.from_numpy(triangles.astype(np.int64)), torch.from_numpy(weights.astype(np.float32))
