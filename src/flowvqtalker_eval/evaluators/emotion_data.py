"""Training data of the stage ``emotion``: faces of a shard by person and class, and their augmentation.

Every item is a pure function of the seed and its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import SIZE
from flowvqtalker_eval.evaluators.emotion_faces import Faces
from flowvqtalker_eval.evaluators.folds import NEUTRAL, PER_PERSON, Labelled, limit_per_person
from flowvqtalker_eval.evaluators.motion_emotion import MIRRORED

__all__ = ["BalancedDraw", "ClipItems", "FaceClips", "FaceItems", "augment", "centre_crop", "load_faces"]

# Shares of still images among the unlabelled faces, and of natural speech among the neutral clips.
_IMAGES, _NATURAL = 0.4, 0.3

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


class FaceSource(Protocol):
    """The part of :class:`flowvqtalker_eval.evaluators.emotion_faces.Faces` that training reads."""

    def face(self, number: int) -> Pixels:
        """Face (S, S, 3) uint8 RGB, S of at least 112."""


@dataclass(frozen=True)
class FaceClips:
    """The faces of a shard, sorted.

    Attributes:
        faces: all of them.
        shapes: (M, 52) blendshapes of each face; NaN where the tracker gave none.
        numbers: faces of each labelled clip, in the order of time.
        data: labels and people of these clips.
        unlabelled: still images and frames of clips in the training split, of people without a labelled clip; one
            array of face numbers for each person.
        validation: faces of such people in the validation split.
    """

    faces: FaceSource
    shapes: Floats
    numbers: tuple[Ints, ...]
    data: Labelled
    unlabelled: tuple[list[Ints], list[Ints]]
    validation: Ints


def load_faces(folder: Path) -> FaceClips:
    """Read a shard's faces and labels.

    Raises:
        UserError: if the faces are missing or show fewer than two emotions.
    """
    shard, faces = Shard(folder), Faces(folder)
    clips = np.unique(faces.clip)
    clips = clips[(shard.emotion[clips] >= 0) & ~shard.is_image[clips]]
    natural = shard.emotion[clips] == EMOTIONS.index("natural")
    labels = np.where(natural, NEUTRAL, shard.emotion[clips]).astype(np.int64)
    if len(set(labels.tolist())) < 2:
        raise UserError(f"the faces of {folder} show fewer than two emotions; label the clips and prepare again")
    people = tuple(str(shard.identity[clip]) for clip in clips)
    measured = limit_per_person(labels, people, PER_PERSON) & ~natural
    labelled = {person for person, own in zip(people, natural, strict=True) if not own}
    who = [str(shard.identity[clip]) for clip in faces.clip]
    unknown = np.array([name not in labelled for name in who], bool)
    split = np.array([split_of(name) for name in who])
    image = shard.is_image[faces.clip]
    images, frames = (
        by_person(np.flatnonzero(unknown & (split == "train") & (image == kind)), who) for kind in (True, False)
    )
    return FaceClips(
        faces,
        np.asarray(shard.blendshapes[faces.row], np.float32),
        tuple(np.flatnonzero(faces.clip == clip) for clip in clips),
        Labelled(labels, people, natural, measured),
        (images, frames),
        np.flatnonzero(unknown & (split == "val")),
    )


def by_person(numbers: Ints, identities: Sequence[str]) -> list[Ints]:
    """Numbers of faces or clips, in one array for each person."""
    people: dict[str, list[int]] = {}
    for number in numbers:
        people.setdefault(identities[number], []).append(int(number))
    return [np.array(group, np.int64) for group in people.values()]


def _draw(people: Sequence[Ints], random: np.random.Generator) -> int:
    """A number of a person, people drawn uniformly."""
    group = people[int(random.integers(len(people)))]
    return int(group[int(random.integers(len(group)))])


class BalancedDraw:
    """Draws clips class by class and person by person, both uniformly.

    Arguments:
        data: all labelled clips.
        numbers: those to draw from.
    """

    def __init__(self, data: Labelled, numbers: Ints) -> None:
        labels, natural = data.labels[numbers], data.natural[numbers]
        self.groups = {
            int(label): by_person(numbers[(labels == label) & ~natural], data.identities)
            for label in np.unique(labels[~natural])
        }
        if not self.groups:
            raise UserError("no labelled clips to train on; check the split and the labels")
        self.natural = by_person(numbers[natural], data.identities)

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        """Number and label of a clip."""
        label = int(random.choice(list(self.groups)))
        natural = label == NEUTRAL and self.natural and random.random() < _NATURAL
        return _draw(self.natural if natural else self.groups[label], random), label


def augment(faces: Sequence[Pixels], random: np.random.Generator) -> tuple[Tensor, bool]:
    """Change light, lens, codec and crop of faces in the same way; the expression stays.

    Returns:
        faces (n, 3, 112, 112) in [0, 1], and whether left and right were swapped.
    """

    def chance(share: float) -> bool:
        return bool(random.random() < share)

    angle, scale, shift = random.uniform(-0.2, 0.2), random.uniform(0.88, 1.18), random.uniform(-7, 7, 2)
    mirror, grey = chance(0.5), chance(0.2)
    gain, offset = random.uniform(0.65, 1.35) * np.exp(random.normal(0, 0.1, 3)), random.uniform(-35, 35)
    small = int(random.integers(36, 100)) if chance(0.5) else 0
    quality = int(random.integers(25, 90)) if chance(0.4) else 0
    noise = random.uniform(1, 10) if chance(0.3) else 0.0
    box = random.integers(16, 44, 2) if chance(0.3) else np.zeros(2, int)
    top, left = (int(random.integers(SIZE - side)) for side in box)
    changed = []
    for face in faces:
        # Every frame also moves a little on its own.
        turn, zoom = angle + random.normal(0, 0.015), scale * np.exp(random.normal(0, 0.01))
        cosine, sine = zoom * np.cos(turn), zoom * np.sin(turn)
        linear = np.array([[cosine, -sine], [sine, cosine]]) @ np.diag([-1.0 if mirror else 1.0, 1.0])
        place = SIZE / 2 + shift + random.normal(0, 0.7, 2) - linear @ np.full(2, face.shape[0] / 2)
        matrix = np.concatenate([linear, (place + linear @ [0.5, 0.5] - 0.5)[:, None]], axis=1)
        x: Any = cv2.warpAffine(face, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if small:
            low = cv2.resize(x, (small, small), interpolation=cv2.INTER_AREA)
            x = cv2.resize(low, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        if quality:
            x = cv2.imdecode(cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
        if grey:
            x = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        levels = (x.astype(np.float64) - 128) * gain + 128 + offset + random.normal(0, noise, x.shape)
        levels[top : top + box[0], left : left + box[1]] = 128
        changed.append(_tensor(np.clip(levels, 0, 255).astype(np.uint8)))
    return torch.stack(changed), mirror


def _tensor(face: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(face)).permute(2, 0, 1).float() / 255


def centre_crop(face: Pixels) -> Tensor:
    """The middle (3, 112, 112) of a face in [0, 1], as inference sees it."""
    top, left = (face.shape[0] - SIZE) // 2, (face.shape[1] - SIZE) // 2
    return _tensor(face[top : top + SIZE, left : left + SIZE])


class _Items(Dataset[dict[str, Any]]):
    """Augmented faces with their blendshapes, which are mirrored with them."""

    def __init__(self, clips: FaceClips, seed: int) -> None:
        self.clips, self.seed = clips, seed

    def item(self, numbers: Sequence[int], random: np.random.Generator) -> dict[str, Any]:
        """Faces (n, 3, 112, 112) and blendshapes (n, 52)."""
        faces, mirror = augment([self.clips.faces.face(number) for number in numbers], random)
        shapes = self.clips.shapes[list(numbers)]
        return {"faces": faces, "shapes": torch.from_numpy(shapes[:, MIRRORED] if mirror else shapes)}


class FaceItems(_Items):
    """Single faces of people without a label, person by person."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, i])
        images, frames = self.clips.unlabelled
        people = images if images and (not frames or random.random() < _IMAGES) else frames
        return self.item([_draw(people, random)], random)


class ClipItems(_Items):
    """Three frames of a labelled clip, one of each third, and its label."""

    def __init__(self, clips: FaceClips, draws: BalancedDraw, seed: int) -> None:
        super().__init__(clips, seed)
        self.draws = draws

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, i])
        clip, label = self.draws.draw(random)
        whole = self.clips.numbers[clip]
        thirds = [int(random.choice(part if len(part) else whole)) for part in np.array_split(whole, 3)]
        return {**self.item(thirds, random), "label": label}
