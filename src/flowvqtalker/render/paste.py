"""The whole picture: rendered faces put back into the picture they were cut from, which bends with the head."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.constants import CROP
from flowvqtalker.face.crop import Crop
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.render.mesh_flow import MeshFlow

__all__ = ["POSE_LIMITS", "Paster", "limit_pose", "paste_frames"]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.floating[Any]]
Picture = npt.NDArray[np.uint8]

#: How far the head may leave the portrait's pose in a whole picture: pitch, yaw and roll in radians, the shifts to the
#: side and down in the model's unit (the width between the outer eye corners), the distance as a share of itself.
POSE_LIMITS = (math.radians(15), math.radians(20), math.radians(12), 0.2, 0.2, 0.15)
# Share of a limit up to which a movement is left as it is; beyond it bends smoothly towards the limit.
_FREE = 0.7

# The field of motion reaches this far beyond the crop, in pixels of the crop: neck and shoulders of a picture go on
# where its crop ends. Its cells are those of the generator's flow, since the hair around the face moves with them.
_BEYOND, _CELL = 128, 4
_SIDE = CROP + 2 * _BEYOND
_GRID = _SIDE // _CELL
_SAMPLES = 4000
# Distance from the middle of the face, in half face sizes, where its motion begins to fade and where nothing moves.
_FADE, _STILL = 1.3, 2.4
# Pixels of the crop over which motion fades to the border of the picture and to that of the field.
_MARGIN = 96.0
# The mask is the hull of the mesh, grown by this much and blurred by this much, in pixels of the crop.
_GROW, _SOFT = 20.0, 9.0
# Largest correction of a rendered face's colour, in levels of 255: a drift of the generator, not a change of light.
_COLOUR = 16.0
_COLOUR_GRID, _COLOUR_REACH = 64, 5.0
_ROUNDS = 3


def limit_pose(motion: Iterable[Motion], pose0: Tensor) -> Iterator[Motion]:
    """Motion whose poses stay within :data:`POSE_LIMITS` of the portrait's; says so once where that changes much.

    Up to seven tenths of a limit nothing changes; what is beyond bends smoothly towards the limit and never passes it.

    Arguments:
        motion: blocks of any length.
        pose0: (6,) of the portrait.
    """
    limits = torch.tensor(POSE_LIMITS)
    limits[5] *= pose0[5].cpu()
    names = ("pitch", "yaw", "roll")
    said = False
    for block in motion:
        away = block.pose.float().cpu() - pose0.float().cpu()
        # A turn of 350 degrees is one of -10.
        away[:, :3] = torch.remainder(away[:, :3] + math.pi, 2 * math.pi) - math.pi
        size = away.abs() / limits
        bent = torch.where(size > _FREE, _FREE + (1 - _FREE) * torch.tanh((size - _FREE) / (1 - _FREE)), size)
        over = size.amax(0)
        if not said and bool((over > 1).any()):
            said = True
            worst = int(over.argmax())
            bound = f"{math.degrees(POSE_LIMITS[worst]):.0f} degrees"
            what = (
                f"the {names[worst]} of the head leaves the portrait's by more than {bound}"
                if worst < 3
                else "the head moves farther than a fifth of the distance between its eyes' corners"
                if worst < 5
                else "the head comes nearer or farther by more than a seventh"
            )
            logger.warning("%s; in a whole picture it is held within that (the crop alone has no limit)", what)
        yield Motion(block.expression, pose0.float().cpu() + away.sign() * bent * limits, block.fps)


class Paster:
    """Puts frame after frame of one portrait into its picture.

    The mask is the mesh of each frame's face, with a soft rim. Around it the picture itself moves: the same field of
    motion that the generator's warp starts from bends hair, ears and neck, fades out towards the shoulders, and is zero
    beyond a fixed border, where the picture stays as it is bit for bit. So the two layers show the same things in the
    same places where they meet, and only a drift of colour is left to be corrected there.

    Arguments:
        face_model: the morphable model of the coefficients.
        crop: where the crop lies in the picture.
        picture: (H, W, 3) uint8.
        image: (512, 512, 3) uint8, the crop.
        alpha, beta0, rho0: (80,), (64,), (6,) coefficients of the portrait.
    """

    def __init__(
        self,
        face_model: FaceModel,
        crop: Crop,
        picture: Picture,
        image: Picture,
        alpha: Tensor,
        beta0: Tensor,
        rho0: Tensor,
    ) -> None:
        self._face, device = face_model, face_model.mean.device
        self._mesh = MeshFlow(face_model, CROP // _CELL, CROP, _SAMPLES).to(device)
        self._alpha = alpha.to(device, torch.float32)
        self._picture = picture
        start = self._project(beta0, rho0)
        self._start = self._mesh.prepare(start)
        self._window, reach = _window(start[0, :, :2].cpu().numpy(), crop, picture.shape[:2])
        # What a grid of cells of the field, with its corner at -_BEYOND of the crop, becomes in the picture.
        to_picture = crop.inverse
        height, width = picture.shape[:2]
        self._linear = to_picture[:, :2]
        used = np.argwhere(reach > 0)
        self.area = (slice(0, 0), slice(0, 0))
        if not len(used):
            return
        low, high = (used.min(0)[::-1] - 1) * _CELL - _BEYOND, (used.max(0)[::-1] + 2) * _CELL - _BEYOND
        corners = crop.points_back(np.array([[x, y] for x in (low[0], high[0]) for y in (low[1], high[1])], float))
        left, top = np.clip(np.floor(corners.min(0)).astype(int), 0, [width, height])
        right, bottom = np.clip(np.ceil(corners.max(0)).astype(int), 0, [width, height])
        self.area = (slice(int(top), int(bottom)), slice(int(left), int(right)))
        self._size = int(right - left), int(bottom - top)
        if min(self._size) <= 0:
            return
        self._under = np.ascontiguousarray(picture[self.area])
        self._crop_to_area = to_picture.copy()
        self._crop_to_area[:, 2] -= (left, top)
        x, y = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in self._size))
        self._still = np.stack([x, y], axis=-1)
        self._map = np.empty_like(self._still)
        # Where the area's pixels lie in the crop, but for a shift.
        inverse = np.linalg.inv(self._linear)
        self._places = (self._still + np.float32(0.5)) @ inverse.T.astype(np.float32)
        self._places_shift = -inverse @ self._crop_to_area[:, 2]
        # Nothing of a face is shown where the field is still for good.
        self._reach = _grid_to_area(reach, _CELL, self._crop_to_area, self._size)
        #: (h, w) bool of :attr:`area`: pixels that may ever change; all others stay as they are bit for bit.
        self.touched = self._reach > 0
        small = cv2.resize(image, (_COLOUR_GRID, _COLOUR_GRID), interpolation=cv2.INTER_AREA)
        self._small = small.astype(np.float32)
        y, x = np.mgrid[:_COLOUR_GRID, :_COLOUR_GRID].astype(np.float32)
        self._small_still = np.stack([x, y], axis=-1)
        seen = np.full((_COLOUR_GRID, _COLOUR_GRID), 0.0, np.float32)
        step = CROP / _COLOUR_GRID
        where = crop.points_back(((np.stack([x, y], axis=-1) + 0.5) * step).astype(np.float64))
        seen[((where >= 0) & (where <= [width, height])).all(-1)] = 1
        self._seen = seen

    @torch.inference_mode()
    def _project(self, beta: Tensor, rho: Tensor) -> Tensor:
        """Vertices (1, 478, 3) in pixels of the crop."""
        device = self._face.mean.device
        return self._face.project(self._alpha[None], beta.to(device).float()[None], rho.to(device).float()[None])

    def field(
        self, beta: Tensor, rho: Tensor
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Motion around the crop, in cells of four pixels of the crop from 128 pixels beyond it on.

        Returns:
            Where the generator's warp looks in the portrait, from each place on, (192, 192, 2) in pixels of the crop;
            where the bent picture does; and how much of the face is seen, (192, 192) in [0, 1].
        """
        end = self._project(beta, rho)
        with torch.inference_mode():
            flow = self._mesh(self._start, end)[0].permute(1, 2, 0).cpu().numpy() * np.float32(CROP / 2)
        # Beyond the crop its border goes on, and the window makes it fade.
        more = _BEYOND // _CELL
        flow = np.asarray(cv2.copyMakeBorder(flow, more, more, more, more, cv2.BORDER_REPLICATE), np.float32)
        return flow, flow * self._window[..., None], _hull_mask(end[0, :, :2].cpu().numpy())

    def layers(
        self, frame: Picture, beta: Tensor, rho: Tensor, out: Picture | None = None
    ) -> tuple[Picture, Picture, npt.NDArray[np.float32], tuple[slice, slice]]:
        """What a whole picture is made of.

        Arguments:
            frame, beta, rho: see :meth:`__call__`.
            out: where the bent picture goes, of the area's size.

        Returns:
            The bent picture (h, w, 3) uint8 of :attr:`area`; of the part of it where the face is seen, the rendered
            face (m, n, 3) uint8, how much of it is seen (m, n) in [0, 1], and where the part lies in the area.
        """
        flow, bend, mask = self.field(beta, rho)
        back = _moved_back(flow, bend)
        moved = _grid_to_area(bend @ self._linear.T.astype(np.float32), _CELL, self._crop_to_area, self._size)
        # Memory that is used again: fresh pages for maps of this size would take as long as the sampling.
        cv2.add(self._still, moved, dst=self._map)
        under = np.empty_like(self._under) if out is None else out
        cv2.remap(self._under, self._map, None, cv2.INTER_LINEAR, dst=under, borderMode=cv2.BORDER_REPLICATE)
        part = self._part(mask)
        size = part[1].stop - part[1].start, part[0].stop - part[0].start
        if min(size) <= 0:
            return under, np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.float32), part
        to_part = self._crop_to_area.copy()
        to_part[:, 2] -= (part[1].start, part[0].start)
        seen = _grid_to_area(mask, _CELL, to_part, size) * self._reach[part]
        over = self._over(self._matched(frame, mask, bend, back), mask, back, part, to_part)
        return under, over, seen, part

    def _part(self, mask: Floats) -> tuple[slice, slice]:
        """The part of the area that holds all of a mask."""
        used = [np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))]
        if not len(used[0]):
            return slice(0, 0), slice(0, 0)
        rows, columns = ((k[[0, -1]] + [-1, 2]) * _CELL - _BEYOND for k in used)
        corners = np.array([[x, y, 1] for x in columns for y in rows]) @ self._crop_to_area.T
        left, top = np.clip(np.floor(corners.min(0)).astype(int), 0, self._size)
        right, bottom = np.clip(np.ceil(corners.max(0)).astype(int), 0, self._size)
        return slice(int(top), int(bottom)), slice(int(left), int(right))

    def _over(
        self, frame: Picture, mask: Floats, back: Floats, part: tuple[slice, slice], to_part: npt.NDArray[np.float64]
    ) -> Picture:
        """The rendered face in a part of the area, moved back by as much as the picture moves less than it."""
        used = [np.flatnonzero(mask.any(k))[[0, -1]] * _CELL - _BEYOND for k in (1, 0)]
        (top, bottom), (left, right) = (np.clip((k[0] - 3 * _CELL, k[1] + 4 * _CELL), 0, CROP) for k in used)
        frame = frame[top:bottom, left:right]
        if not frame.size:
            return np.zeros((part[0].stop - part[0].start, part[1].stop - part[1].start, 3), np.uint8)
        # Brought to the picture's resolution first: nothing aliases, and bilinear samples of it are sharp.
        scale = float(np.hypot(*self._linear[:, 0]))
        size = tuple(max(1, round(n * scale)) for n in frame.shape[1::-1])
        kernel = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        frame = np.asarray(cv2.resize(frame, size, interpolation=kernel), np.uint8)
        stretch = np.array([size[0] / (right - left), size[1] / (bottom - top)])
        offset = (self._places_shift - (left, top)) * stretch - 0.5
        shift = (back * stretch + offset).astype(np.float32)
        places = cv2.multiply(self._places[part], (*stretch.tolist(), 0.0, 0.0))
        places = cv2.add(places, _grid_to_area(shift, _CELL, to_part, places.shape[1::-1]))
        return np.asarray(cv2.remap(frame, places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.uint8)

    def _matched(self, frame: Picture, mask: Floats, bend: Floats, back: Floats) -> Picture:
        """The rendered crop with its colour drawn to the picture's at the rim of the mask, smoothly inwards."""
        size, step = (_COLOUR_GRID, _COLOUR_GRID), CROP / _COLOUR_GRID
        inner = slice(_BEYOND // _CELL, (_BEYOND + CROP) // _CELL)
        rim = cv2.resize(np.asarray(mask[inner, inner], np.float32), size, interpolation=cv2.INTER_AREA)
        rim = rim * (1 - rim) * self._seen
        if rim.sum() < 1:
            return frame
        # Cells of the field -> cells of this grid.
        places = np.array([[_CELL / step, 0, -_BEYOND / step], [0, _CELL / step, -_BEYOND / step]])
        moved = _affine(bend.astype(np.float32) / np.float32(step), places, size)
        back = _affine(back.astype(np.float32) / np.float32(step), places, size)
        under = cv2.remap(
            self._small, self._small_still + moved, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        over = cv2.remap(small, self._small_still + back, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        sums = cv2.GaussianBlur(np.concatenate([(under - over) * rim[..., None], rim[..., None]], -1), (0, 0),
                                _COLOUR_REACH, borderType=cv2.BORDER_CONSTANT)  # fmt: skip
        # Far from the rim, in the middle of the face, the mean difference along it takes over.
        mean = ((under - over) * rim[..., None]).sum((0, 1)) / rim.sum()
        weak = np.float32(1e-3)
        drift = (sums[..., :3] + weak * mean.astype(np.float32)) / (sums[..., 3:] + weak)
        drift = cv2.resize(np.clip(drift, -_COLOUR, _COLOUR), (CROP, CROP), interpolation=cv2.INTER_LINEAR)
        return np.asarray(cv2.add(frame, np.rint(drift).astype(np.int16), dtype=cv2.CV_8U), np.uint8)

    def __call__(self, frame: Picture, beta: Tensor, rho: Tensor) -> Picture:
        """The picture (H, W, 3) with one rendered face.

        Arguments:
            frame: (512, 512, 3) uint8.
            beta, rho: (64,), (6,) that it was rendered with.
        """
        if frame.shape != (CROP, CROP, 3) or frame.dtype != np.uint8:
            raise ValueError(
                f"a face must have shape ({CROP}, {CROP}, 3) and type uint8, got {frame.shape} {frame.dtype}"
            )
        result = self._picture.copy()
        if self.area[0].start < self.area[0].stop and self.area[1].start < self.area[1].stop:
            under, over, mask, part = self.layers(frame, beta, rho, result[self.area])
            if mask.size:
                under[part] = cv2.blendLinear(over, np.ascontiguousarray(under[part]), mask, 1 - mask)
        return result


def paste_frames(
    paster: Paster, render: Callable[[Iterable[Motion]], Iterator[Picture]], motion: Iterable[Motion]
) -> Iterator[Picture]:
    """Whole pictures for motion, one for each frame.

    Arguments:
        paster: of the portrait.
        render: blocks of motion to crops, for instance :meth:`flowvqtalker.render.renderer.Renderer.render`; it may
            hold frames back.
        motion: blocks of any length.
    """
    waiting: deque[tuple[Tensor, Tensor]] = deque()

    def noted() -> Iterator[Motion]:
        for block in motion:
            waiting.extend(zip(block.expression, block.pose, strict=True))
            yield block

    for frame in render(noted()):
        yield paster(frame, *waiting.popleft())


def _window(
    points: Floats, crop: Crop, size: tuple[int, ...]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """How much of the motion the picture takes part in, and where a face may be shown at all: (192, 192) each.

    Both are zero in the outermost cells.

    Arguments:
        points: (478, 2) vertices of the portrait in the crop.
        crop: places the picture's border.
        size: height and width of the picture.
    """
    place = (np.mgrid[:_GRID, :_GRID][::-1].transpose(1, 2, 0) + 0.5) * _CELL - _BEYOND
    low, high = points.min(0), points.max(0)
    radius = np.linalg.norm((place - (low + high) / 2) / ((high - low) / 2), axis=-1)
    around = 1 - _smooth((radius - _FADE) / (_STILL - _FADE))
    edge = np.minimum(place + _BEYOND, CROP + _BEYOND - place).min(-1)
    around *= _smooth((edge - _CELL) / _MARGIN)
    inside = crop.points_back(place)
    border = np.minimum(inside, np.array(size[1::-1]) - inside).min(-1) * crop.scale
    reach = np.minimum(around * 4, 1)
    return (around * _smooth(border / _MARGIN)).astype(np.float32), reach.astype(np.float32)


def _moved_back(flow: Floats, bend: Floats) -> Floats:
    """Where the rendered crop shows what the bent picture shows at a place: a displacement (192, 192, 2).

    A place p of the crop shows the portrait at p + flow(p), one of the bent picture that at p + bend(p). The s with
    s + flow(p + s) = bend(p) is found by iteration; it is zero where the picture takes part in all of the motion.
    """
    y, x = np.mgrid[:_GRID, :_GRID].astype(np.float32)
    still = np.stack([x, y], axis=-1)
    found = np.asarray(bend - flow, np.float32)
    for _ in range(_ROUNDS):
        there = cv2.remap(
            flow, still + found / np.float32(_CELL), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        found = np.asarray(bend - there, np.float32)
    return found


def _smooth(x: Floats) -> Floats:
    x = np.clip(x, 0, 1)
    return np.asarray(x * x * (3 - 2 * x))


def _hull_mask(points: Floats) -> npt.NDArray[np.float32]:
    """The convex hull of points (478, 2) of the crop, grown and softened, as (192, 192) in [0, 1] over the field."""
    hull = cv2.convexHull(points.astype(np.float32))[:, 0]
    away = hull - hull.mean(0)
    hull = hull + away / np.linalg.norm(away, axis=1, keepdims=True) * _GROW
    side = _SIDE // _CELL
    drawn = np.zeros((side, side), np.uint8)
    places = np.rint(((hull + _BEYOND) / _CELL - 0.5) * 16).astype(np.int32)
    cv2.fillConvexPoly(drawn, places, 255, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(drawn.astype(np.float32) / 255, (0, 0), _SOFT / _CELL)
    # The tails are cut, so that inside and outside are exact.
    return np.asarray(np.clip((soft - 0.02) / 0.96, 0, 1), np.float32)


def _grid_to_area(
    values: Floats, cell: int, crop_to_area: npt.NDArray[np.float64], size: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """A grid of cells over the field, sampled at every pixel of a part of the picture; zero outside of the field."""
    matrix = crop_to_area.copy()
    matrix[:, 2] -= matrix[:, :2] @ [_BEYOND, _BEYOND]
    matrix[:, :2] *= cell
    # Cells that are many pixels wide are enlarged in two steps, most of the way without turning, which is faster.
    coarse = max(1, int(np.hypot(*matrix[:, 0]) / 2.5))
    if coarse == 1:
        return _affine(np.asarray(values, np.float32), matrix, size)
    small = -(-size[0] // coarse) + 1, -(-size[1] // coarse) + 1
    matrix /= coarse
    large = cv2.resize(_affine(np.asarray(values, np.float32), matrix, small), (small[0] * coarse, small[1] * coarse))
    return np.asarray(large[: size[1], : size[0]], np.float32)


def _affine(values: Floats, matrix: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Bilinear samples under a continuous map from cells of the input to pixels of the output."""
    matrix = matrix.copy()
    matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5  # OpenCV counts from the centres
    return np.asarray(cv2.warpAffine(values, matrix, size, flags=cv2.INTER_LINEAR), np.float32)
