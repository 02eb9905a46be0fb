"""Images as training data: a folder of face crops, split by identity, with augmentation (numpy and OpenCV only)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError

__all__ = ["Augmentation", "ImageDataset", "find_images", "read_rgb", "to_tensor"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image."""

    crop: int = 256
    """Side in pixels of the square that is cut out; 0 keeps the whole image."""
    min_scale: float = 0.5
    """The square covers between ``crop / side`` (no scaling) and ``crop / side / min_scale`` of the image's side."""
    flip: bool = True
    """Mirror half of the images."""
    colour: float = 0.1
    """Largest relative change of brightness, contrast and each colour channel."""
    blur_jpeg: float = 0.0
    """Share of images re-encoded as JPEG of quality 60-95."""


def find_images(folder: str | Path, table: str | Path | None = None) -> list[tuple[Path, str]]:
    """Images of a folder (recursively) with their identity.

    Arguments:
        folder: holds .jpg, .png or .webp files.
        table: csv with the columns ``file`` and ``identity``; without it every file is a person of its own.

    Raises:
        UserError: if there is no image.
    """
    folder = Path(folder)
    identities: dict[str, str] = {}
    if table is not None:
        with open(table, newline="", encoding="utf-8") as stream:
            identities = {row["file"]: row["identity"] for row in csv.DictReader(stream)}
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not found:
        raise UserError(f"no images (.jpg, .png, .webp) in {folder}; give a folder of face crops")
    return [(p, identities.get(str(p.relative_to(folder)), p.stem)) for p in found]


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise UserError(f"{path} cannot be read as an image; remove it or convert it to PNG, JPEG or WebP")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def to_tensor(image: npt.NDArray[np.uint8]) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def augment(image: npt.NDArray[np.uint8], how: Augmentation, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """One random view of an image."""
    side = min(image.shape[:2])
    if how.crop:
        span = int(min(side, round(how.crop / rng.uniform(how.min_scale, 1.0))))
        top = int(rng.integers(image.shape[0] - span + 1))
        left = int(rng.integers(image.shape[1] - span + 1))
        image = image[top : top + span, left : left + span]
        if span != how.crop:
            image = cv2.resize(image, (how.crop, how.crop), interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    if how.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    if how.blur_jpeg and rng.random() < how.blur_jpeg:
        ok, code = cv2.imencode(
            ".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 96))]
        )
        image = cv2.imdecode(code, cv2.IMREAD_COLOR) if ok else image  # type: ignore[assignment]
    if how.colour:
        gain = 1 + rng.uniform(-how.colour, how.colour, 3) * 0.5 + rng.uniform(-how.colour, how.colour)
        lift = rng.uniform(-how.colour, how.colour) * 64
        table = np.clip(np.arange(256)[:, None] * gain + lift, 0, 255).astype(np.uint8)
        image = cv2.LUT(np.ascontiguousarray(image), table[None])  # type: ignore[assignment]
    return image


class ImageDataset(Dataset[Tensor]):
    """Images of one split as (3, H, W) tensors in [-1, 1].

    In training, item ``i`` is a random view of a random image and depends on the seed and ``i`` alone; in validation
    it is the i-th image, unchanged.
    """

    def __init__(
        self, images: list[tuple[Path, str]], split: str, augmentation: Augmentation, seed: int = 0, size: int = 512
    ) -> None:
        self.paths = [path for path, identity in images if split_of(identity) == split]
        if not self.paths:
            raise UserError(f"none of {len(images)} images belongs to the split {split!r}; give more identities")
        self.split, self.augmentation, self.seed, self.size = split, augmentation, seed, size

    def __len__(self) -> int:
        return 2**62 if self.split == "train" else len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.split != "train":
            return to_tensor(self._sized(read_rgb(self.paths[index])))
        rng = np.random.default_rng((self.seed, index))
        image = self._sized(read_rgb(self.paths[int(rng.integers(len(self.paths)))]))
        return to_tensor(augment(image, self.augmentation, rng))

    def _sized(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        if image.shape[:2] == (self.size, self.size):
            return image
        shrink = image.shape[0] > self.size
        resized = cv2.resize(image, (self.size, self.size), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC)
        return np.asarray(resized, dtype=np.uint8)
