"""Regions of interest of stored images: what the lite codebook is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.data.gaps import EYES_SHUT, LIPS_OPEN, eye_gap, feature_centres, lip_gap
from flowvqtalker.data.images import Augmentation, augment, to_tensor
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError

__all__ = ["RegionDataset", "RegionViews"]

#: Images of a person beyond which more of them are drawn less often each, and how much less.
_FEW, _BALANCE = 6, 0.7
#: Crops from fewer input pixels than this are blurred, so they are drawn less often.
_SHARP, _BLURRED = 280, 0.6

Points = npt.NDArray[np.floating]


@dataclass(frozen=True)
class RegionViews:
    """Random changes of a training region."""

    rotation: float = 0.08
    """Largest rotation in radians."""
    scale: float = 0.08
    """Largest change of the logarithm of the scale."""
    shift: float = 14.0
    """Largest shift in pixels along each axis."""
    flip: bool = True
    """Mirror half of the regions."""
    colour: float = 0.1
    """Largest relative change of brightness, contrast and each colour channel."""


class RegionDataset(Dataset[dict[str, Tensor]]):
    """Regions of one split's images.

    Open mouths are drawn twice as often as others, shut eyes two and a half times; people with many images count less
    for each. In training, item ``i`` is a random view and depends on the seed and ``i`` alone; in validation it is the
    i-th image's own region.

    Items: ``image`` (3, height, width) in [-1, 1]; ``points`` (3, 2), the centres of mouth, right and left eye in
    pixels of the region.

    Arguments:
        shard: with images and landmarks.
        split: ``train`` or ``val``.
        roi: top, left, height and width of the region in pixels of the crop.
        views: random changes in training.
        min_native: leave out crops of fewer input pixels a side.
        seed: of the choice.
        limit: at most so many validation images, evenly spread; 0: all.

    Raises:
        UserError: if the split has no such image.
    """

    def __init__(
        self,
        shard: Shard,
        split: str,
        roi: tuple[int, int, int, int],
        views: RegionViews,
        *,
        min_native: float = 0.0,
        seed: int = 0,
        limit: int = 0,
    ) -> None:
        self.shard, self.split, self.roi, self.views, self.seed = shard, split, roi, views, seed
        clip = shard.image_clip
        numbers = np.flatnonzero((shard.split[clip] == split) & (shard.native[clip] >= min_native))
        landmarks = shard.landmarks(shard.image_row[numbers])
        tracked = np.isfinite(feature_centres(landmarks)).all(axis=(1, 2))
        numbers, landmarks = numbers[tracked], landmarks[tracked]
        if not len(numbers):
            raise UserError(f"shard {shard.path} has no tracked image of split {split}; prepare one with more people")
        if split != "train" and limit:
            keep = np.linspace(0, len(numbers) - 1, min(limit, len(numbers))).astype(int)
            numbers, landmarks = numbers[keep], landmarks[keep]
        self.numbers, self.centres = numbers, feature_centres(landmarks)
        self.cumulative = np.cumsum(self._weights(landmarks))

    def _weights(self, landmarks: Points) -> Points:
        """How often each image is drawn, up to a factor."""
        clips = self.shard.image_clip[self.numbers]
        _, person, count = np.unique(self.shard.identity[clips], return_inverse=True, return_counts=True)
        weight = 1 / np.maximum(1.0, (count[person] / _FEW) ** _BALANCE)
        weight = weight * np.where(lip_gap(landmarks) > LIPS_OPEN, 2.0, 1.0)
        weight = weight * np.where(eye_gap(landmarks) < EYES_SHUT, 2.5, 1.0)
        return np.asarray(weight * np.where(self.shard.native[clips] < _SHARP, _BLURRED, 1.0))

    def __len__(self) -> int:
        return 2**62 if self.split == "train" else len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        top, left, height, width = self.roi
        if self.split != "train":
            image = self.shard.image(int(self.numbers[index]))[top : top + height, left : left + width]
            return _item(image, self.centres[index] - (left, top))
        rng = np.random.default_rng((self.seed, index))
        chosen = int(np.searchsorted(self.cumulative, rng.uniform(0, self.cumulative[-1]), side="right"))
        image, points = self._view(self.shard.image(int(self.numbers[chosen])), self.centres[chosen], rng)
        return _item(augment(image, Augmentation(crop=0, flip=False, colour=self.views.colour), rng), points)

    def _view(
        self, image: npt.NDArray[np.uint8], centres: Points, rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.uint8], Points]:
        """A region that is moved, turned, scaled and mirrored at random, and where its features are in it."""
        top, left, height, width = self.roi
        angle, zoom = rng.uniform(-1, 1, 2) * (self.views.rotation, self.views.scale)
        mirror = -1.0 if self.views.flip and rng.random() < 0.5 else 1.0
        cos, sin = np.cos(angle) * np.exp(zoom), np.sin(angle) * np.exp(zoom)
        turn = np.array([[cos * mirror, -sin], [sin * mirror, cos]])  # region to crop
        middle = np.array([width, height]) / 2
        origin = np.array([left, top]) + middle + rng.uniform(-1, 1, 2) * self.views.shift
        offset = origin + turn @ (0.5 - middle) - 0.5  # pixel centres lie at halves
        view = cv2.warpAffine(
            image, np.column_stack([turn, offset]), (width, height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE,
        )  # fmt: skip
        return np.asarray(view, np.uint8), (centres - origin) @ np.linalg.inv(turn).T + middle


def _item(image: npt.NDArray[np.uint8], points: Points) -> dict[str, Tensor]:
    return {"image": to_tensor(image), "points": torch.from_numpy(points.astype(np.float32))}
