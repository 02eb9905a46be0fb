"""Stage ``motion-emotion``: the classifier of β sequences (:mod:`flowvqtalker_eval.evaluators.motion_emotion`).

Few clips are labelled, so the training data is varied in every way that leaves the emotion alone: the speech of other
clips moves the lips, the resting face of other people is put on, the face is mirrored, the emotion is made weaker or
stronger, and clips are cut and repeated.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.order import item_generator
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.loop import Stage, fit
from flowvqtalker_eval.evaluators.folds import (
    NEUTRAL,
    BalancedDraw,
    Labelled,
    by_person,
    cross_validate,
    draw,
    fit_temperature,
    held_out_logits,
    held_out_numbers,
    spread_out,
    write_report,
)
from flowvqtalker_eval.evaluators.motion_emotion import MIRRORED, MotionEmotion, MotionEmotionConfig

__all__ = ["Config", "MotionClips", "MotionEmotionStage", "VariedMotion", "load_clips", "run"]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_NATURAL = EMOTIONS.index("natural")


@dataclass(frozen=True)
class Variation:
    """How training sequences differ from the clips; each is drawn anew for every item."""

    frames: int = 48
    """T of an item; shorter clips are played forwards and backwards."""
    shortest: int = 10
    """Least number of different frames in an item."""
    speech: float = 0.5
    """Share of the items whose lips get another clip's speech."""
    identity: float = 0.8
    """Largest share of the difference between two other people's resting faces that is added."""
    strength: tuple[float, float] = (0.7, 1.4)
    """Range of factors on the distance from everyone's neutral face."""
    noise: float = 0.4
    """Standard deviation of an offset of each coefficient, in its standard deviations between clips."""
    mirror: bool = True
    """Mirror half of the items."""

    def __post_init__(self) -> None:
        check(
            (0 < self.shortest <= self.frames, f"shortest must be in 1 to frames ({self.frames}), got {self.shortest}"),
            (0 <= self.speech <= 1, f"speech must be in [0, 1], got {self.speech}"),
            (self.strength[0] <= self.strength[1], f"strength must be a range, got {self.strength}"),
        )


@dataclass(frozen=True)
class Config:
    """Configuration of the stage."""

    shards: tuple[Path, ...] = (Path("data/shard"),)
    """Folders of `flowvqtalker prepare`."""
    face_model: Path | None = None
    """Face model of the shards; None: the package's own."""
    model: MotionEmotionConfig = field(default_factory=MotionEmotionConfig)
    variation: Variation = field(default_factory=Variation)
    balance: float = 1.0
    """Classes are drawn by the number of their people to the power of one minus this; 1: all alike."""
    natural: float = 0.5
    """Share of the neutral items that come from natural speech (which counts as neutral in training only)."""
    l2: float = 0.05
    """Weight of the squared weights in the loss."""
    smoothing: float = 0.1
    """Label smoothing."""
    per_person: int = 2
    """At most so many clips of one person and class are measured."""
    folds: int = 0
    """Cross-validation before the final training, in so many folds by identity; 0: none."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, lr=2e-3, batch_size=64, decay="cosine", ema=0.99)
    )

    def __post_init__(self) -> None:
        check(
            (len(self.shards) > 0, "no shards were given"),
            (self.folds == 0 or self.folds >= 2, f"folds must be 0 or at least 2, got {self.folds}"),
            (0 <= self.balance <= 1, f"balance must be in [0, 1], got {self.balance}"),
            (0 <= self.natural <= 1, f"natural must be in [0, 1], got {self.natural}"),
            (self.l2 >= 0, f"l2 must not be negative, got {self.l2}"),
            (self.per_person > 0, f"per_person must be positive, got {self.per_person}"),
        )


@dataclass(frozen=True)
class MotionClips:
    """Clips in memory.

    Attributes:
        frames: β (T, 64) of each.
        data: their labels and people; natural speech has the label neutral and is not measured.
        natural, speech: (n,) bool; natural speech, and any sound that is the face's own speech.
    """

    frames: tuple[Floats, ...]
    data: Labelled
    natural: npt.NDArray[np.bool_]
    speech: npt.NDArray[np.bool_]


def load_clips(shards: tuple[Path, ...], per_person: int, shortest: int = 12) -> MotionClips:
    """Every clip with a label.

    Raises:
        UserError: if there is none of an emotion.
    """
    frames: list[Floats] = []
    labels: list[int] = []
    identities: list[str] = []
    speech: list[bool] = []
    natural: list[bool] = []
    for folder in shards:
        shard = Shard(folder)
        for number in shard.select(picture=False, min_length=shortest):
            emotion = int(shard.emotion[number])
            if emotion < 0:
                continue
            frames.append(np.array(shard.expression[shard.rows(int(number))], np.float32))
            labels.append(NEUTRAL if emotion == _NATURAL else emotion)
            identities.append(str(shard.identity[number]))
            speech.append(bool(shard.speech[number] and shard.sound[number]))
            natural.append(emotion == _NATURAL)
    classes = np.array(labels, np.int64)
    if len(set(labels)) < 2:
        raise UserError("the shards hold clips of fewer than two emotions; label them in clips.csv and prepare again")
    own = np.array(natural)
    measured = spread_out(classes, identities, per_person) & ~own
    return MotionClips(tuple(frames), Labelled(classes, tuple(identities), measured), own, np.array(speech))


class VariedMotion(Dataset[dict[str, Any]]):
    """Item ``i`` is a varied part of a clip, a pure function of the seed and ``i``.

    Arguments:
        clips: all clips.
        numbers: those to draw from.
        config: how.
        lips: (64, 64) projection on the directions in which lips move.
    """

    def __init__(self, clips: MotionClips, numbers: Ints, config: Config, lips: Floats) -> None:
        self.clips, self.config, self.lips = clips, config, lips
        self.draws = BalancedDraw(clips.data, numbers, clips.natural, config.balance, config.natural)
        speaking = numbers[clips.speech[numbers] & (clips.data.labels[numbers] == NEUTRAL)]
        self.speakers = by_person(speaking, clips.data.identities)
        calm = [*self.draws.groups.get(NEUTRAL, []), *self.draws.natural]
        means = [np.mean([clips.frames[n].mean(0) for n in group], axis=0) for group in calm]
        self.resting = np.stack(means) if means else np.zeros((1, clips.frames[0].shape[1]), np.float32)
        self.neutral = self.resting.mean(0)
        self.spread = np.stack([clips.frames[n].mean(0) for n in numbers]).std(0)

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = item_generator(self.config.loop.seed, i)
        number, label = self.draws.draw(random)
        x = self.vary(self.clips.frames[number], random)
        mirror = self.config.variation.mirror and random.random() < 0.5
        return {"expression": torch.from_numpy(x), "label": label, "mirror": bool(mirror)}

    def vary(self, clip: Floats, random: np.random.Generator) -> Floats:
        """A varied part (frames, 64) of a clip."""
        how = self.config.variation
        length = int(random.integers(min(how.shortest, len(clip)), min(how.frames, len(clip)) + 1))
        start = int(random.integers(len(clip) - length + 1))
        x = _there_and_back(clip[start : start + length], how.frames)
        if self.speakers and random.random() < how.speech:
            spoken = self.clips.frames[draw(self.speakers, random)]
            first = int(random.integers(max(1, len(spoken) - how.frames + 1)))
            part = _there_and_back(spoken[first : first + how.frames], how.frames)
            keep = random.uniform(0, 1)  # of the clip's own movement of the lips
            change = (part - part.mean(0)) - (1 - keep) * (x - x.mean(0))
            x = x + change @ self.lips
        a, b = random.integers(len(self.resting), size=2)
        x = x + random.uniform(0, how.identity) * (self.resting[a] - self.resting[b])
        x = self.neutral + random.uniform(*how.strength) * (x - self.neutral)
        x = x + how.noise * self.spread * random.normal(size=x.shape[1])
        return np.ascontiguousarray(x, dtype=np.float32)


def _there_and_back(frames: Floats, count: int) -> Floats:
    """``count`` frames: those given, then backwards, then forwards again."""
    if len(frames) == 1:
        return np.repeat(frames, count, axis=0)
    phase = np.arange(count) % (2 * len(frames) - 2)
    return frames[np.minimum(phase, 2 * len(frames) - 2 - phase)]


def lip_directions(face: FaceModel, share: float = 0.9) -> Floats:
    """Projection (64, 64) on the directions of β that move the lips: those that explain ``share`` of their motion."""
    from flowvqtalker.face.topology import LIPS

    moved = face.expression[:, list(LIPS)].flatten(1)
    left, size, _ = torch.linalg.svd(moved, full_matrices=False)
    energy = size.square().cumsum(0) / size.square().sum()
    kept = left[:, : int((energy < share).sum()) + 1]
    projection: Floats = (kept @ kept.mT).numpy()
    return projection


class MotionEmotionStage(Stage):
    """See the module.

    Arguments:
        clips: all clips.
        train, held: numbers of those to train on and to measure.
        face: gives the map from β to blendshapes.
        temperature: of the exported classifier; training and validation are without.
    """

    name = "motion-emotion"

    def __init__(
        self, config: Config, clips: MotionClips, train: Ints, held: Ints, face: FaceModel, temperature: float = 1.0
    ) -> None:
        torch.manual_seed(config.loop.seed)
        self.config, self.clips, self.held, self.temperature = config, clips, held, temperature
        self.model = MotionEmotion(config.model)
        self.module: nn.Module = self.model
        self.model.basis.copy_(face.arkit[:, :-1].mT)
        self.model.bias.copy_(face.arkit[:, -1])
        self.data = VariedMotion(clips, train, config, lip_directions(face))
        self.mirrored = torch.tensor(MIRRORED)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"classifier": list(self.model.parameters())}

    def dataset(self, split: str) -> VariedMotion:
        return self.data

    def on_start(self, batch: dict[str, Tensor]) -> None:
        """Standardise the statistics over a thousand varied sequences."""
        items = [self.data[2**40 + i]["expression"] for i in range(1024)]
        with torch.no_grad():
            shapes = self.model.shapes(torch.stack(items).to(self.model.basis))
            parts = torch.cat([self.model.statistics(part) for part in torch.split(shapes, 128)])
            self.model.centre.copy_(parts.mean(0))
            self.model.scale.copy_(parts.std(0).clamp_min(1e-3))

    def loss(self, group: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        shapes = self.model.shapes(batch["expression"])
        flipped = shapes[..., self.mirrored.to(shapes.device)]
        shapes = torch.where(batch["mirror"].bool()[:, None, None], flipped, shapes)
        logits = self.model.classify_shapes(shapes)
        loss = nn.functional.cross_entropy(logits, batch["label"], label_smoothing=self.config.smoothing)
        size = self.model.head.weight.square().sum()
        if self.config.model.width:
            size = size + self.model.motion.weight.square().sum()
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return loss + 0.5 * self.config.l2 * size, {"cross_entropy": loss.detach(), "accuracy": right}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`export` gave."""
        self.model.load_state_dict(state)

    def logits(self, numbers: Ints) -> Tensor:
        """Logits (k, 8) of whole clips."""
        device = self.model.basis.device
        return torch.cat([self.model(torch.from_numpy(self.clips.frames[n])[None].to(device)) for n in numbers])

    def validate(self, fabric: Fabric) -> dict[str, float]:
        if not len(self.held):
            return {}
        return held_out_numbers(self.clips.data, held_out_logits(self, self.held), self.held)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {**self.model.state_dict(), "temperature": torch.tensor(self.temperature)}, to_dict(self.config.model)


def run(config: Config, out: Path, resume: bool = False) -> dict[str, float]:
    """Cross-validate if asked to, then train on the training split; everything goes into ``out``."""
    from flowvqtalker.loading import load_face_model

    face = FaceModel.load(config.face_model) if config.face_model is not None else load_face_model()
    clips = load_clips(config.shards, config.per_person)
    results: dict[str, float] = {}
    temperature = 1.0
    if config.folds:

        def make(train: Ints, held: Ints, fold: int) -> MotionEmotionStage:
            return MotionEmotionStage(config, clips, train, held, face)

        accuracy, logits = cross_validate(make, clips.data, config.loop, out, config.folds, resume)
        temperature = fit_temperature(clips.data, logits)
        write_report(out, "Emotion from expression coefficients", accuracy, {"temperature": temperature})
        logger.info("%s", accuracy.text())
        results.update(pooled=accuracy.accuracy, pooled_balanced=accuracy.balanced)
    split = np.array([split_of(who) for who in clips.data.identities])
    train, held = (np.flatnonzero(split == name) for name in ("train", "val"))
    stage = MotionEmotionStage(config, clips, train, held, face, temperature)
    results.update(fit(stage, config.loop, out, resume))
    return results
