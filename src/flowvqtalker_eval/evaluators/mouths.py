"""Command ``prepare-mouths``: grey 48x96 crops around the lips of every frame, which the stage ``sync`` is trained on.

A shard stores few images of each clip, and no neighbouring ones. This adds an optional column to it:

==============  =====================================================================================
``mouths.npy``  (M, 48, 96) uint8, the frames of all clips with speech, one clip after the other
``mouths.npz``  ``start`` (C,) int64: first row of each clip of the shard, -1 where a clip has none
==============  =====================================================================================

A crop is as wide as the distance between the outer eye corners and half as high, upright with the eyes. The distance
is taken in three dimensions, so that a turned head keeps its scale.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from flowvqtalker.constants import FPS
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.sources import Source
from flowvqtalker.errors import UserError
from flowvqtalker.face.geometry import fill_gaps
from flowvqtalker.face.topology import EYE_CORNERS, MOUTH_CORNERS, VERTICES

__all__ = ["HEIGHT", "WIDTH", "PrepareMouths", "cut_mouths", "mouth_matrices", "mouths_of"]

logger = logging.getLogger(__name__)

#: Pixels of a crop.
HEIGHT, WIDTH = 48, 96

# The middle of the crop lies a little below the corners of the mouth, because the jaw opens downwards.
_BELOW = 0.05
_FILE, _INDEX = "mouths.npy", "mouths.npz"

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


def mouth_matrices(landmarks: Floats) -> npt.NDArray[np.float64]:
    """Maps (T, 2, 3) from pixels of the frame to pixels of the crop; pixel centres are at 0.5 in both.

    Arguments:
        landmarks: (T, 478, 3) in pixels; a frame without a face is NaN, and so is its map.
    """
    points = np.asarray(landmarks, np.float64)
    if points.ndim != 3 or points.shape[1:] != (VERTICES, 3):
        raise UserError(f"mouth crops need landmarks of shape (T, {VERTICES}, 3), got {points.shape}")
    eyes = points[:, EYE_CORNERS[1]] - points[:, EYE_CORNERS[0]]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine, sine = eyes[:, :2].T / np.hypot(eyes[:, 0], eyes[:, 1])
        scale = WIDTH / np.linalg.norm(eyes, axis=1)
    linear = scale[:, None, None] * np.stack([cosine, sine, -sine, cosine], axis=1).reshape(-1, 2, 2)
    middle = points[:, MOUTH_CORNERS, :2].mean(1)
    shift = [WIDTH / 2, HEIGHT / 2 - _BELOW * WIDTH] - np.einsum("tij,tj->ti", linear, middle)
    return np.concatenate([linear, shift[:, :, None]], axis=2)


def cut_mouths(frames: Sequence[Pixels] | Pixels, landmarks: Floats) -> Pixels:
    """Mouth crops (T, 48, 96) uint8 grey of frames; zeros where there is no face.

    Arguments:
        frames: T frames (H, W, 3) RGB or (H, W) grey, uint8.
        landmarks: (T, 478, 3) in pixels of the frames, NaN where there is no face.
    """
    if len(frames) != len(landmarks):
        raise UserError(f"{len(frames)} frames but landmarks of {len(landmarks)}; both must have the same length")
    crops = np.zeros((len(frames), HEIGHT, WIDTH), np.uint8)
    for frame, matrix, crop in zip(frames, mouth_matrices(landmarks), crops, strict=True):
        if np.isfinite(matrix).all():
            crop[:] = _cut(frame, matrix)
    return crops


def _cut(frame: Pixels, matrix: npt.NDArray[np.float64]) -> Pixels:
    """One crop; a mouth much larger than the crop is averaged down first."""
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    corners = inverse[:2] @ np.array([[0, WIDTH, 0, WIDTH], [0, 0, HEIGHT, HEIGHT], [1, 1, 1, 1]], float)
    size = np.array(frame.shape[1::-1])
    low = np.clip(np.floor(corners.min(1)).astype(int) - 2, 0, size - 1)
    high = np.clip(np.ceil(corners.max(1)).astype(int) + 2, low + 1, size)
    part = frame[low[1] : high[1], low[0] : high[0]]
    if part.ndim == 3:
        part = cast(Pixels, cv2.cvtColor(part, cv2.COLOR_RGB2GRAY))
    linear, shift = matrix[:, :2], matrix[:, 2] + matrix[:, :2] @ low
    factor = int(1 / np.hypot(linear[0, 0], linear[1, 0]))
    if factor >= 2:
        # Whole blocks only, so that the averaged image is exactly `factor` times smaller.
        rows, columns = (max(1, n // factor) for n in part.shape)
        part = part[: rows * factor, : columns * factor]
        part = cast(Pixels, cv2.resize(part, (columns, rows), interpolation=cv2.INTER_AREA))
        linear = linear * factor
    shift = shift + linear @ [0.5, 0.5] - 0.5  # OpenCV counts from the centres of the pixels
    whole = np.concatenate([linear, shift[:, None]], axis=1)
    return cast(
        Pixels, cv2.warpAffine(part, whole, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    )


def mouths_of(shard: Shard) -> dict[int, Pixels]:
    """The mouths of a shard: number of the clip -> (T, 48, 96) uint8, views of one memory map.

    Raises:
        UserError: if the shard has none.
    """
    index = shard.path / _INDEX
    if not index.is_file() or not (shard.path / _FILE).is_file():
        raise UserError(
            f"shard {shard.path} has no {_FILE}; cut them with "
            f"`flowvqtalker prepare-mouths --data FOLDER --shard {shard.path}`"
        )
    rows = np.load(shard.path / _FILE, mmap_mode="r")
    with np.load(index) as stored:
        start = stored["start"]
    if len(start) != len(shard):
        raise UserError(f"{index} lists {len(start)} clips, the shard has {len(shard)}; cut the mouths again")
    return {int(clip): rows[start[clip] : start[clip] + shard.length[clip]] for clip in np.flatnonzero(start >= 0)}


@dataclass(frozen=True, kw_only=True)
class PrepareMouths:
    """Cut the mouths of every clip with speech, for training the sync expert, and add them to a shard."""

    data: Path
    """Folder that the shard was prepared from (clips.csv and clips/, or videos)."""
    shard: Path
    """The shard; its landmarks say where the mouths are."""

    def run(self) -> int:
        """Write the mouths; returns how many. Clips that cannot be read are left out and named.

        Raises:
            UserError: if there is no shard, or none of its clips with speech is in the folder.
        """
        from flowvqtalker.data.layouts import catalogue

        shard = Shard(self.shard)
        unpacked = self.shard.with_name(self.shard.name + ".parts") / "unpacked"
        sources = {s.name: s for s in catalogue(self.data, unpacked=unpacked).sources if not s.is_image}
        clips = [int(c) for c in shard.select(speech=True, is_image=False) if str(shard.name[c]) in sources]
        if not clips:
            raise UserError(f"no clip with speech of shard {self.shard} is in {self.data}; give the folder it is of")
        start = np.full(len(shard), -1, np.int64)
        beside = self.shard / (_FILE + ".tmp")
        rows = np.lib.format.open_memmap(beside, "w+", np.uint8, (int(shard.length[clips].sum()), HEIGHT, WIDTH))
        count = 0
        for clip, crops in _cut_clips(shard, clips, sources):
            rows[count : count + len(crops)] = crops
            start[clip] = count
            count += len(crops)
        rows.flush()
        del rows
        index = self.shard / (_INDEX + ".tmp.npz")
        np.savez(index, start=start)
        os.replace(beside, self.shard / _FILE)
        os.replace(index, self.shard / _INDEX)
        logger.info("%s: %d mouths", self.shard / _FILE, count)
        return count


def _cut_clips(shard: Shard, clips: Sequence[int], sources: dict[str, Source]) -> Iterator[tuple[int, Pixels]]:
    for clip in tqdm(clips, desc="cut mouths", dynamic_ncols=True):
        linear = np.linalg.inv(shard.crop[clip][:, :2])
        points = shard.landmarks(shard.rows(clip)).astype(np.float64)
        flat = (points[..., :2] - shard.crop[clip][:, 2]) @ linear.T
        depth = points[..., 2:] * np.hypot(linear[0, 0], linear[1, 0])
        try:
            yield clip, _clip_mouths(sources[str(shard.name[clip])], np.concatenate([flat, depth], axis=-1))
        except (UserError, OSError, ValueError) as error:
            logger.warning("%s: left out, %s", shard.name[clip], error)


def _clip_mouths(source: Source, landmarks: Floats) -> Pixels:
    """Crops (T, 48, 96) of a clip at 25 fps, each of the frame nearest to its tick, like the shard's landmarks."""
    ticks = len(landmarks)
    nearest = np.abs(source.timing().times[None] - np.arange(ticks)[:, None] / FPS).argmin(1)
    seen = np.asarray(np.isfinite(landmarks).all((1, 2)))
    matrices = mouth_matrices(fill_gaps(landmarks[seen], seen))
    crops = np.zeros((ticks, HEIGHT, WIDTH), np.uint8)
    done = 0
    for number, frame in source.frames(set(nearest.tolist())):
        for tick in np.flatnonzero(nearest == number):
            crops[tick] = _cut(frame, matrices[tick])
            done = max(done, int(tick) + 1)
    if done == 0:
        raise UserError(f"{source.path} has no frames that can be decoded")
    crops[done:] = crops[done - 1]  # a container may announce frames that it does not hold
    return crops
