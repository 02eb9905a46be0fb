"""Varied faces for the stage ``emotion``; every item is a pure function of the seed and its number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.data.order import item_generator
from flowvqtalker.face.alignment import SIZE
from flowvqtalker_eval.evaluators.folds import BalancedDraw, draw
from flowvqtalker_eval.evaluators.motion_emotion import MIRRORED

__all__ = ["ClipItems", "FaceItems", "Look", "draw_augmentation", "plain"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

_MIRRORED = np.array(MIRRORED)


class FaceSource(Protocol):
    """What is needed of :class:`flowvqtalker_eval.evaluators.emotion_faces.Faces`."""

    def face(self, number: int) -> Pixels:
        """Face (S, S, 3) uint8 RGB, S of at least 112."""


def _tensor(face: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(face)).permute(2, 0, 1).float() / 255


def plain(face: Pixels) -> Tensor:
    """The middle of a face as (3, 112, 112) in [0, 1], as inference sees it."""
    top, left = (face.shape[0] - SIZE) // 2, (face.shape[1] - SIZE) // 2
    return _tensor(face[top : top + SIZE, left : left + SIZE])


@dataclass(frozen=True)
class Look:
    """One way of seeing a face, the same for all frames of an item.

    Attributes:
        angle: radians.
        scale: factor.
        shift: pixels.
        mirror: left for right.
        gain, lift: of each colour channel, in levels.
        grey: without colour.
        small: side in pixels to which the face is brought down before it is brought up again; 0: not.
        quality: of a JPEG; 0: none.
        noise: standard deviation in levels.
        box: left, top, width and height of a grey box, pixels; of no width: none.
    """

    angle: float
    scale: float
    shift: tuple[float, float]
    mirror: bool
    gain: tuple[float, float, float]
    lift: float
    grey: bool
    small: int
    quality: int
    noise: float
    box: tuple[int, int, int, int]

    def apply(self, face: Pixels, random: np.random.Generator) -> Pixels:
        """The face (112, 112, 3) so seen; every frame moves a little on its own."""
        middle = face.shape[0] / 2
        angle = self.angle + random.normal(0, 0.015)
        scale = self.scale * float(np.exp(random.normal(0, 0.01)))
        cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
        linear = np.array([[cosine, -sine], [sine, cosine]])
        if self.mirror:
            linear = linear @ np.diag([-1.0, 1.0])
        place = np.array([SIZE / 2, SIZE / 2]) + self.shift + random.normal(0, 0.7, 2)
        shift = place - linear @ [middle, middle] + linear @ [0.5, 0.5] - 0.5
        matrix = np.concatenate([linear, shift[:, None]], axis=1)
        x = cv2.warpAffine(face, matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if self.small:
            low = cv2.resize(x, (self.small, self.small), interpolation=cv2.INTER_AREA)
            x = cv2.resize(low, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        if self.quality:
            _, code = cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, self.quality])
            x = cast(Any, cv2.imdecode(code, cv2.IMREAD_COLOR))
        if self.grey:
            x = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        table = np.clip((np.arange(256)[:, None] - 128) * self.gain + 128 + self.lift, 0, 255).astype(np.uint8)
        x = cv2.LUT(np.ascontiguousarray(x), table[None])
        if self.noise:
            x = np.clip(x + random.normal(0, self.noise, x.shape), 0, 255).astype(np.uint8)
        left, top, width, height = self.box
        x[top : top + height, left : left + width] = 128
        return cast(Pixels, np.asarray(x, np.uint8))


def draw_augmentation(random: np.random.Generator) -> Look:
    """A random way of seeing a face: light, lens, codec and crop vary, the expression stays."""

    def sometimes(share: float) -> bool:
        return bool(random.random() < share)

    bright = random.uniform(0.65, 1.35)
    gain = bright * np.exp(random.normal(0, 0.1, 3))
    side = random.integers(16, 44, 2) if sometimes(0.3) else np.zeros(2, int)
    corner = [int(random.integers(SIZE - s)) for s in side]
    return Look(
        angle=random.uniform(-0.2, 0.2),
        scale=random.uniform(0.88, 1.18),
        shift=(random.uniform(-7, 7), random.uniform(-7, 7)),
        mirror=sometimes(0.5),
        gain=(float(gain[0]), float(gain[1]), float(gain[2])),
        lift=random.uniform(-35, 35),
        grey=sometimes(0.2),
        small=int(random.integers(36, 100)) if sometimes(0.5) else 0,
        quality=int(random.integers(25, 90)) if sometimes(0.4) else 0,
        noise=random.uniform(1, 10) if sometimes(0.3) else 0.0,
        box=(corner[0], corner[1], int(side[0]), int(side[1])),
    )


class FaceItems(Dataset[dict[str, Any]]):
    """Single faces with their blendshapes, person by person.

    Arguments:
        faces, shapes: all faces and their blendshapes (M, 52).
        free: numbers of stills and of frames of clips, by person each.
        pictures: share of stills.
        seed: of the draws.
    """

    def __init__(
        self, faces: FaceSource, shapes: Floats, free: tuple[Sequence[Ints], Sequence[Ints]], pictures: float, seed: int
    ) -> None:
        self.faces, self.shapes, self.free, self.pictures, self.seed = faces, shapes, free, pictures, seed

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = item_generator(self.seed, i)
        stills, frames = self.free
        people = stills if stills and (not frames or random.random() < self.pictures) else frames
        number = draw(people, random)
        look = draw_augmentation(random)
        shapes = self.shapes[number]
        return {
            "face": _tensor(look.apply(self.faces.face(number), random)),
            "shapes": torch.from_numpy(shapes[_MIRRORED] if look.mirror else shapes.copy()),
        }


class ClipItems(Dataset[dict[str, Any]]):
    """Three frames of a labelled clip, one of each third, with their blendshapes.

    Arguments:
        faces, shapes: all faces and their blendshapes (M, 52).
        numbers: faces of each clip, in the order of time.
        draws: which clips.
        seed: of the draws.
    """

    def __init__(
        self, faces: FaceSource, shapes: Floats, numbers: Sequence[Ints], draws: BalancedDraw, seed: int
    ) -> None:
        self.faces, self.shapes, self.numbers, self.draws, self.seed = faces, shapes, numbers, draws, seed

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = item_generator(self.seed, i)
        clip, label = self.draws.draw(random)
        thirds = np.array_split(self.numbers[clip], 3)
        whole = self.numbers[clip]
        chosen = [int(random.choice(part if len(part) else whole)) for part in thirds]
        look = draw_augmentation(random)
        shapes = self.shapes[chosen]
        return {
            "faces": torch.stack([_tensor(look.apply(self.faces.face(number), random)) for number in chosen]),
            "shapes": torch.from_numpy(shapes[:, _MIRRORED] if look.mirror else shapes.copy()),
            "label": label,
        }
