"""What several benchmarks share: held-out people in turn, and portraits driven by given coefficients."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowvqtalker.constants import CROP
from flowvqtalker.data.shards import Shard
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.image import ImageArray
from flowvqtalker.render.region import RegionVQIG
from flowvqtalker.render.region_vqvae import STRIDE
from flowvqtalker.render.renderer import ImageGenerator, Renderer


def in_turn(people: Sequence[str], limit: int) -> list[int]:
    """Ascending numbers of at most ``limit`` items, one of each person, then a second of each ...; 0 takes all."""
    seen: dict[str, int] = {}
    rank = []
    for person in people:
        rank.append(seen.setdefault(person, 0))
        seen[person] += 1
    order = sorted(range(len(people)), key=lambda i: rank[i])
    return sorted(order[: limit or None])


@dataclass(frozen=True)
class Portrait:
    """A stored image of a shard and its coefficients.

    Attributes:
        name, identity: of its clip.
        image: (512, 512, 3).
        alpha: (80,) identity shape.
        start: (70,) expression and pose.
    """

    name: str
    identity: str
    image: ImageArray
    alpha: np.ndarray
    start: np.ndarray

    @staticmethod
    def stored(shard: Shard, number: int) -> Portrait:
        """Image ``number`` of a shard."""
        row, clip = int(shard.image_row[number]), int(shard.image_clip[number])
        start = np.concatenate([shard.expression[row], shard.pose[row]]).astype(np.float32)
        alpha = np.array(shard.identity_shape[clip], np.float32)
        return Portrait(str(shard.name[clip]), str(shard.identity[clip]), shard.image(number), alpha, start)


@dataclass(frozen=True)
class Driven:
    """A generated frame (512, 512, 3), the warped portrait I_w, and the codes if there are any (:func:`on_crop`)."""

    image: ImageArray
    warped: ImageArray
    codes: np.ndarray | None


def on_crop(generator: ImageGenerator, codes: np.ndarray) -> np.ndarray:
    """Codes on a square grid over the whole crop; -1 around the region that the codes cover."""
    if not isinstance(generator, RegionVQIG):
        return codes
    top, left, height, width = (value // STRIDE for value in generator.config.codebook.roi)
    whole = np.full((CROP // STRIDE, CROP // STRIDE), -1)
    whole[top : top + height, left : left + width] = codes
    return whole


def drive(
    generator: ImageGenerator,
    face: FaceModel,
    portrait: Portrait,
    motion: np.ndarray,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Driven]:
    """A portrait driven by coefficients (T, 70), frame by frame, through the renderer that users get.

    Call ``torch.set_num_threads(1)`` before, so that the renderer keeps its batches in order.
    """
    start, alpha = torch.from_numpy(portrait.start), torch.from_numpy(portrait.alpha)
    renderer = Renderer(generator, face, portrait.image, alpha, start[:64], start[64:], device=device, dtype=dtype)
    seen: deque[tuple[ImageArray, np.ndarray | None]] = deque()

    def keep(module: object, arguments: object, found: Any) -> None:
        warped = found.warped.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
        for i, image in enumerate(warped.permute(0, 2, 3, 1).contiguous().cpu().numpy()):
            codes = None
            if found.logits is not None:
                codes = on_crop(generator, found.logits[i].argmax(-1).view(found.latent.shape[-2:]).cpu().numpy())
            seen.append((image, codes))

    hook = renderer.generator.register_forward_hook(keep)
    values = torch.from_numpy(motion)
    try:
        for image in renderer.render([Motion(values[:, :64], values[:, 64:])]):
            warped, codes = seen.popleft()
            yield Driven(image, warped, codes)
    finally:
        hook.remove()
