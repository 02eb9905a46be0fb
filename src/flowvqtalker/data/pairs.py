"""Source and target images of one person, with their coefficients: what the image generator is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.data.gaps import EYES_OPEN, EYES_SHUT, LIPS_OPEN, eye_gap, lip_gap
from flowvqtalker.data.images import Augmentation, augment, to_tensor
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError

__all__ = ["PairDataset", "PairMix", "clamp_pose", "window"]

#: Side of the mask of valid pixels.
_MASK = 64
#: Share of pairs that are taken as drawn, although ``hard_candidates`` asks for the hardest of several.
_PLAIN = 0.3
#: Weights of rotation (radians), opening lips and lids (:mod:`flowvqtalker.data.gaps`) beside the change of β.
_ROTATION, _OPENING, _BLINK = 12.0, 40.0, 20.0

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class PairMix:
    """Which pairs are drawn. All but ``colour`` and ``min_native`` at their defaults are ours."""

    synthetic: float = 0.5
    """Share of pairs whose source is made from the target image, moved by the face mesh."""
    shut_lips: float = 0.0
    """Share of the synthetic pairs whose lips are open in the target and shut in the source."""
    shut_eyes: float = 0.0
    """Share of the synthetic pairs whose eyes are shut in the source alone."""
    hard_candidates: int = 1
    """Of so many drawn pairs the one that differs most is taken: most frames of a clip are much alike."""
    sessions: tuple[str, ...] = ()
    """Collections whose clips of one person are of one sitting, so that pairs may span them."""
    min_native: float = 0.0
    """Use only images whose crop had at least this many pixels a side in the original."""
    min_synthetic_native: float = 0.0
    """The same for synthetic pairs, whose target a second resampling must not blur."""
    colour: float = 0.1
    """Largest relative change of brightness, contrast and colour of a pair."""

    def __post_init__(self) -> None:
        for name in ("synthetic", "shut_lips", "shut_eyes"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.hard_candidates < 1:
            raise ValueError(f"hard_candidates must be at least 1, got {self.hard_candidates}")


def window(frames: npt.NDArray[Any], centre: int, reach: int = 13) -> npt.NDArray[Any]:
    """(2 * reach + 1, k) rows around ``centre``, clamped to the ends of (T, k) ``frames`` (PIRender)."""
    return frames[np.clip(np.arange(centre - reach, centre + reach + 1), 0, len(frames) - 1)]


def clamp_pose(pose: Floats) -> Floats:
    """Keep a made-up pose (..., 6) within what the crop shows: angles in radians, shifts in eye distances."""
    limits = np.array([0.35, 0.5, 0.35, 0.35, 0.35], np.float32)
    out = pose.copy()
    out[..., :5] = np.clip(pose[..., :5], -limits, limits)
    return out


class PairDataset(Dataset[dict[str, Tensor]]):
    """Pairs of images.

    A real pair is two stored frames of a clip, or of a sitting (``PairMix.sessions``). A synthetic pair has a stored
    image as *target*. Its *source* is the same image in another pose and expression, which the training stage makes on
    its device with the face mesh: ``synthetic`` is 1 and ``source_*`` hold the coefficients to move it to. The change
    is that between two frames of some clip, so it is one that faces make. Where ``shut_lips`` is 1, the stage shuts
    the source's lips as well.

    In training, item ``i`` depends on the seed and ``i`` alone. Identities are drawn evenly, whatever the number of
    their clips. In validation, items pair the first stored frame of a held-out clip with each of its others.

    Items: ``source``, ``target`` (3, 512, 512) in [-1, 1]; ``identity``, ``source_identity`` (80,);
    ``source_expression`` (64,), ``source_pose`` (6,) and the same of the target; ``motion`` (27, 70);
    ``valid`` (64, 64); ``synthetic``, ``shut_lips`` scalars.

    Arguments:
        shard: with images; landmarks too where lips, eyes or candidates matter.
        split: ``train`` or ``val``.
        mix: which pairs are drawn in training.
        seed: of the choice.
        limit: at most so many validation pairs, evenly spread; 0: all.

    Raises:
        UserError: if the split has too few images for the mix.
    """

    def __init__(self, shard: Shard, split: str, mix: PairMix | None = None, *, seed: int = 0, limit: int = 0) -> None:
        self.shard, self.split, self.seed = shard, split, seed
        self.mix = mix = mix or PairMix()
        self.views = Augmentation(crop=0, flip=False, colour=mix.colour)
        native = shard.native[shard.image_clip]
        self.numbers = np.flatnonzero((shard.split[shard.image_clip] == split) & (native >= mix.min_native))
        self.sharp = self.numbers[native[self.numbers] >= mix.min_synthetic_native]
        self.groups, self.people = self._grouped(mix.sessions if split == "train" else ())
        if split == "train" and (not self.people or (mix.synthetic > 0 and not len(self.sharp))):
            raise UserError(
                f"shard {shard.path} has {len(self.people)} people with clips and {len(self.sharp)} images for "
                "synthetic pairs: too few; prepare more, or lower min_native"
            )
        pairs = [(numbers[0], other) for numbers in self.groups for other in numbers[1:]]
        step = max(1, len(pairs) // limit) if limit else 1
        self.pairs = pairs[::step][: limit or None]

    def _grouped(self, sessions: Sequence[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Images that may be paired, by clip or sitting; and the places of each person's groups."""
        shard = self.shard
        found: dict[tuple[str, str, str], list[int]] = {}
        for number in self.numbers:
            clip = int(shard.image_clip[number])
            person, source = str(shard.identity[clip]), str(shard.source[clip])
            key = (person, source, "" if source in sessions else str(clip))
            found.setdefault(key, []).append(int(number))
        found = {key: numbers for key, numbers in found.items() if len(numbers) > 1}
        people: dict[str, list[int]] = {}
        for place, key in enumerate(found):
            people.setdefault(key[0], []).append(place)
        return list(found.values()), list(people.values())

    def __len__(self) -> int:
        return 2**62 if self.split == "train" else len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.split != "train":
            return self._real(*self.pairs[index], None)
        rng = np.random.default_rng((self.seed, index))
        if rng.random() < self.mix.synthetic:
            return self._synthetic(rng)
        candidates = 1 if rng.random() < _PLAIN else self.mix.hard_candidates
        drawn = [self._draw(rng) for _ in range(candidates)]
        return self._real(*(max(drawn, key=self._change) if candidates > 1 else drawn[0]), rng)

    def _draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Two frames of a clip or sitting of one person."""
        person = self.people[int(rng.integers(len(self.people)))]
        numbers = self.groups[person[int(rng.integers(len(person)))]]
        first, second = rng.choice(len(numbers), 2, replace=False)
        return numbers[first], numbers[second]

    @cached_property
    def _gaps(self) -> tuple[Floats, Floats]:
        """Gaps between lips and lids of every stored image; 0 where no face was tracked."""
        landmarks = self.shard.landmarks(self.shard.image_row)
        return np.nan_to_num(lip_gap(landmarks)), np.nan_to_num(eye_gap(landmarks))

    def _change(self, pair: tuple[int, int]) -> float:
        """How hard a pair is: change of expression and rotation, lips that open, lids that move."""
        (beta1, rho1), (beta2, rho2) = (self._coefficients(number) for number in pair)
        lips, eyes = (gap[pair[1]] - gap[pair[0]] for gap in self._gaps)
        change = float(np.linalg.norm(beta1 - beta2)) + _ROTATION * float(np.linalg.norm(rho1[:3] - rho2[:3]))
        return change + _OPENING * max(0.0, float(lips)) + _BLINK * abs(float(eyes))

    @cached_property
    def _targets(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Cumulative weights of the images for synthetic pairs (open mouths, shut eyes: more), and the open mouths."""
        lips, eyes = (gap[self.sharp] for gap in self._gaps)
        weight = np.where(lips > LIPS_OPEN, 2.0, 1.0) * np.where(eyes < EYES_SHUT, 2.5, 1.0)
        return np.cumsum(weight), self.sharp[lips > LIPS_OPEN]

    @cached_property
    def _blinks(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """Frames with open and with shut eyes of each group that has both."""
        eyes = self._gaps[1]
        both = [(np.array([n for n in g if eyes[n] > EYES_OPEN]), np.array([n for n in g if eyes[n] < EYES_SHUT]))
                for g in self.groups]  # fmt: skip
        return [(opened, shut) for opened, shut in both if len(opened) and len(shut)]

    def _coefficients(self, number: int) -> tuple[Floats, Floats]:
        row = int(self.shard.image_row[number])
        return np.array(self.shard.expression[row]), np.array(self.shard.pose[row])

    def _real(self, source: int, target: int, rng: np.random.Generator | None) -> dict[str, Tensor]:
        shard, clip = self.shard, int(self.shard.image_clip[target])
        rows = shard.rows(clip)
        motion = np.concatenate([shard.expression[rows], shard.pose[rows]], axis=1)
        images = np.concatenate([shard.image(source), shard.image(target)])
        if rng is not None:
            images = augment(images, self.views, rng)
        motion = window(motion, int(shard.image_row[target]) - rows.start)
        item = self._item(clip, self._coefficients(source), self._coefficients(target), motion)
        item["source_identity"] = torch.from_numpy(shard.identity_shape[int(shard.image_clip[source])].astype("f4"))
        return item | {"source": to_tensor(images[:512]), "target": to_tensor(images[512:])}

    def _synthetic(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """An image as target, to be moved by the change between two frames of some clip."""
        cumulative, opened = self._targets
        shut = len(opened) > 0 and rng.random() < self.mix.shut_lips
        place = np.searchsorted(cumulative, rng.uniform(0, cumulative[-1]), side="right")
        number = int(rng.choice(opened) if shut else self.sharp[place])
        first, second = self._draw(rng)
        if self.mix.shut_eyes and self._blinks and rng.random() < self.mix.shut_eyes:
            first, second = (int(rng.choice(g)) for g in self._blinks[int(rng.integers(len(self._blinks)))])
        image = to_tensor(augment(self.shard.image(number), self.views, rng))
        expression, pose = self._coefficients(number)
        (beta1, rho1), (beta2, rho2) = self._coefficients(first), self._coefficients(second)
        moved = clamp_pose(pose + (rho2 - rho1))
        moved[5] = pose[5] * np.clip(rho2[5] / rho1[5], 0.87, 1.15)
        changed = np.clip(expression + (beta2 - beta1), -5, 5)
        if shut:  # lips that shut leave little of the target's expression
            changed = (changed + expression) / 2
        motion = np.repeat(np.concatenate([expression, pose])[None], 27, axis=0)
        item = self._item(int(self.shard.image_clip[number]), (changed, moved), (expression, pose), motion)
        item |= {"synthetic": torch.tensor(1.0), "shut_lips": torch.tensor(float(shut))}
        return item | {"source": image, "target": image}

    def _item(
        self, clip: int, source: tuple[Floats, Floats], target: tuple[Floats, Floats], motion: Floats
    ) -> dict[str, Tensor]:
        identity = self.shard.identity_shape[clip]
        arrays = {
            "identity": identity,
            "source_identity": identity,
            "source_expression": source[0],
            "source_pose": source[1],
            "target_expression": target[0],
            "target_pose": target[1],
            "motion": motion,
            "valid": self.shard.valid_mask(clip, _MASK),
        }
        item = {key: torch.from_numpy(np.ascontiguousarray(value, dtype=np.float32)) for key, value in arrays.items()}
        return item | {"synthetic": torch.tensor(0.0), "shut_lips": torch.tensor(0.0)}
