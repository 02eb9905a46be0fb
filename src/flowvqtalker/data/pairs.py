"""Source and target pictures of one person, with their coefficients: what the image generator is trained on."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.data.pictures import Augmentation, augment, to_tensor
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import INNER_LIPS

__all__ = ["PairDataset", "clamp_pose", "lip_gap", "window"]

_MASK = 64
#: Gaps between the lips (:func:`lip_gap`) up to which they are shut, and from which on they are open.
_SHUT, _OPEN = 0.04, 0.12


def window(frames: np.ndarray[Any, Any], centre: int, reach: int = 13) -> np.ndarray[Any, Any]:
    """(2 * reach + 1, k) rows around ``centre``, clamped to the ends of (T, k) ``frames`` (PIRender)."""
    return frames[np.clip(np.arange(centre - reach, centre + reach + 1), 0, len(frames) - 1)]


def lip_gap(landmarks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Height of the gap between the lips (N,) of landmarks (N, 478, 3), as a part of the mouth's width."""
    rim = landmarks[:, list(INNER_LIPS), :2]
    gap = np.linalg.norm(rim[:, 5] - rim[:, 15], axis=-1)  # middles of the upper and of the lower lip
    return np.asarray(gap / np.linalg.norm(rim[:, 0] - rim[:, 10], axis=-1).clip(1e-6))


def clamp_pose(pose: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Keep a made-up pose within what the crop shows: angles in radians, shifts in eye distances, depth change 15 %."""
    limits = np.array([0.35, 0.5, 0.35, 0.35, 0.35], np.float32)
    out = pose.copy()
    out[..., :5] = np.clip(pose[..., :5], -limits, limits)
    return out


class PairDataset(Dataset[dict[str, Tensor]]):
    """Pairs of pictures.

    A pair from a clip is two of its stored frames. A pair from a still has the picture as *target*; its *source* is the
    same picture moved to another pose and expression by the face mesh (design: what is learnt from pictures alone),
    which the training stage does on its device: ``still`` is 1 and ``source_*`` hold the coefficients to move it to.
    The change is that between two frames of some clip, so it is one that faces make.

    Of ``hardest_of`` drawn pairs of frames that with the greatest change of expression is taken.

    In training, item ``i`` depends on the seed and ``i`` alone. Identities are drawn evenly, whatever the number of
    their clips. In validation, items pair the first stored frame of a held-out clip with each of its others.

    Items: ``source``, ``target`` (3, 512, 512) in [-1, 1]; ``identity`` (80,); ``source_expression`` (64,),
    ``source_pose`` (6,) and the same of the target; ``motion`` (27, 70); ``valid`` (64, 64); ``still`` scalar.
    """

    def __init__(
        self,
        shard: Shard,
        split: str,
        *,
        stills: float = 0.5,
        colour: float = 0.1,
        min_native: float = 0.0,
        hardest_of: int = 1,
        seed: int = 0,
        limit: int = 0,
    ) -> None:
        self.shard, self.split, self.stills, self.seed = shard, split, stills, seed
        self.hardest_of = hardest_of
        self.how = Augmentation(crop=0, flip=False, colour=colour)
        stored = np.flatnonzero(
            (shard.split[shard.image_clip] == split) & (shard.native[shard.image_clip] >= min_native)
        )
        still = shard.is_image[shard.image_clip[stored]]
        self.pictures = stored[still]
        clips: dict[int, list[int]] = {}
        for number in stored[~still]:
            clips.setdefault(int(shard.image_clip[number]), []).append(int(number))
        clips = {clip: numbers for clip, numbers in clips.items() if len(numbers) > 1}
        self.clips = list(clips.values())
        people: dict[str, list[int]] = {}
        for place, clip in enumerate(clips):
            people.setdefault(str(shard.identity[clip]), []).append(place)
        self.people = list(people.values())
        if split == "train" and (not self.people or (stills > 0 and not len(self.pictures))):
            raise UserError(
                f"shard {shard.path} has {len(self.people)} people with clips, {len(self.pictures)} stills: too few"
            )
        pairs = [(numbers[0], other) for numbers in self.clips for other in numbers[1:]]
        step = max(1, len(pairs) // limit) if limit else 1
        self.pairs = pairs[::step][: limit or None]

    def __len__(self) -> int:
        return 2**62 if self.split == "train" else len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.split != "train":
            return self._pair(*self.pairs[index], None)
        rng = np.random.default_rng((self.seed, index))
        first, second = self._two_frames(rng)
        if rng.random() < self.stills:
            return self._still(int(rng.choice(self.pictures)), first, second, rng)
        return self._pair(first, second, rng)

    def opening(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """A pair whose lips are shut in the source and open in the target, drawn from the whole split.

        A still's source expression is that of some clip's frame with shut lips.

        Raises:
            UserError: if the split has no clip with such pictures.
        """
        people, shuts, opens, stills = self._lips
        if not people:
            raise UserError(
                f"shard {self.shard.path} has no clip of split {self.split} with stored pictures of both shut and open "
                "lips; prepare one with more clips, or set data.opening to 0"
            )
        person = people[int(rng.integers(len(people)))]
        clip = person[int(rng.integers(len(person)))]
        shut, opened = int(rng.choice(shuts[clip])), int(rng.choice(opens[clip]))
        if rng.random() >= self.stills or not len(stills):
            return self._pair(shut, opened, rng)
        first, second = self._draw(rng)
        return self._still(int(rng.choice(stills)), first, second, rng, self._coefficients(shut)[0])

    @property
    def opens(self) -> bool:
        """Whether the split has pictures for :meth:`opening`."""
        return bool(self._lips[0])

    @cached_property
    def _lips(self) -> tuple[list[list[int]], dict[int, list[int]], dict[int, list[int]], np.ndarray[Any, Any]]:
        """Clips with shut and with open lips, by people; their pictures of both kinds; stills with open lips."""
        gap = lip_gap(self.shard.landmarks(self.shard.image_row))
        shuts = {k: found for k, numbers in enumerate(self.clips) if (found := [n for n in numbers if gap[n] < _SHUT])}
        opens = {k: found for k, numbers in enumerate(self.clips) if (found := [n for n in numbers if gap[n] > _OPEN])}
        people = [found for clips in self.people if (found := [k for k in clips if k in shuts and k in opens])]
        return people, shuts, opens, self.pictures[gap[self.pictures] > _OPEN]

    def _two_frames(self, rng: np.random.Generator) -> tuple[int, int]:
        """Two frames of a clip; of several such draws the two whose expressions differ most."""
        drawn = [self._draw(rng) for _ in range(self.hardest_of)]
        if len(drawn) == 1:
            return drawn[0]
        difference = [float(np.linalg.norm(self._coefficients(a)[0] - self._coefficients(b)[0])) for a, b in drawn]
        return drawn[int(np.argmax(difference))]

    def _draw(self, rng: np.random.Generator) -> tuple[int, int]:
        person = self.people[int(rng.integers(len(self.people)))]
        numbers = self.clips[person[int(rng.integers(len(person)))]]
        first, second = rng.choice(len(numbers), 2, replace=False)
        return numbers[first], numbers[second]

    def _coefficients(self, number: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        row = int(self.shard.image_row[number])
        return np.array(self.shard.expression[row]), np.array(self.shard.pose[row])

    def _pair(self, source: int, target: int, rng: np.random.Generator | None) -> dict[str, Tensor]:
        shard, clip = self.shard, int(self.shard.image_clip[target])
        rows = shard.rows(clip)
        motion = np.concatenate([shard.expression[rows], shard.pose[rows]], axis=1)
        images = np.concatenate([shard.image(source), shard.image(target)])
        if rng is not None:
            images = augment(images, self.how, rng)
        return self._item(images[:512], images[512:], clip, self._coefficients(source), self._coefficients(target),
                          window(motion, int(shard.image_row[target]) - rows.start), 0.0)  # fmt: skip

    def _still(
        self,
        number: int,
        first: int,
        second: int,
        rng: np.random.Generator,
        changed: np.ndarray[Any, Any] | None = None,
    ) -> dict[str, Tensor]:
        image = augment(self.shard.image(number), self.how, rng)
        expression, pose = self._coefficients(number)
        (beta1, rho1), (beta2, rho2) = self._coefficients(first), self._coefficients(second)
        moved = clamp_pose(pose + (rho2 - rho1))
        moved[5] = pose[5] * np.clip(rho2[5] / rho1[5], 0.87, 1.15)
        if changed is None:
            changed = np.clip(expression + (beta2 - beta1), -5, 5)
        motion = np.repeat(np.concatenate([expression, pose])[None], 27, axis=0)
        clip = int(self.shard.image_clip[number])
        return self._item(image, image, clip, (changed, moved), (expression, pose), motion, 1.0)

    def _item(
        self,
        source: np.ndarray[Any, Any],
        target: np.ndarray[Any, Any],
        clip: int,
        source_coefficients: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
        target_coefficients: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]],
        motion: np.ndarray[Any, Any],
        still: float,
    ) -> dict[str, Tensor]:
        arrays = {
            "identity": self.shard.identity_shape[clip],
            "source_expression": source_coefficients[0],
            "source_pose": source_coefficients[1],
            "target_expression": target_coefficients[0],
            "target_pose": target_coefficients[1],
            "motion": motion,
            "valid": self.shard.valid_mask(clip, _MASK),
        }
        item = {key: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for key, value in arrays.items()}
        return item | {"source": to_tensor(source), "target": to_tensor(target), "still": torch.tensor(still)}
