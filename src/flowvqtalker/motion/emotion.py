"""Emotions: how users write them (a label, a mixture, a track over time) and how ExpFlow is conditioned on them."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.motion.cues import is_cue_sheet, read_cues
from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.reference import reference_bias, reference_latent

__all__ = [
    "AUTO",
    "BLEND",
    "EmotionCondition",
    "EmotionKey",
    "EmotionTrack",
    "encode_emotion",
    "heaviest",
    "parse_emotion",
    "smoothstep",
]

#: Instead of an emotion: the one that is heard in the voice (:mod:`flowvqtalker.motion.auto`).
AUTO = "auto"
#: Seconds of a change of emotion. A face takes 0.3 to 0.7 s from rest to the peak of an expression; a shorter change
#: looks like a cut.
BLEND = 0.4

_NEEDED = "a csv file with the columns time (seconds), emotion and optionally intensity, or a cue sheet"


def parse_emotion(spec: str) -> tuple[float, ...]:
    """Weights of the nine emotions from a label or a mixture.

    Arguments:
        spec: ``happy``, or ``happy:0.7,surprised:0.3``. Weights are divided by their sum; a missing one is 1; ``+`` may
            replace the comma (which needs quotes in a csv).

    Returns:
        nine weights in the order of :data:`flowvqtalker.EMOTIONS`, of sum one.

    Raises:
        UserError: for an unknown or repeated name, or a weight that is not positive.
    """
    weights = [0.0] * len(EMOTIONS)
    for part in spec.replace("+", ",").split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in EMOTIONS:
            raise UserError(f"unknown emotion {name!r}; choose one of {', '.join(EMOTIONS)}", code="unknown_emotion")
        if weights[EMOTIONS.index(name)]:
            raise UserError(
                f"emotion {spec!r} names {name} twice; give each once, for instance happy:0.7,surprised:0.3"
            )
        weight = _number(number) if colon else 1.0
        if weight is None or weight <= 0:
            raise UserError(
                f"emotion {spec!r}: the weight of {name} must be a number above 0, got {number!r}; "
                "write for instance happy:0.7,surprised:0.3"
            )
        weights[EMOTIONS.index(name)] = weight
    total = sum(weights)
    return tuple(weight / total for weight in weights)


def smoothstep(x: float) -> float:
    """3x² - 2x³ between 0 and 1, flat at both ends and outside."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


@dataclass(frozen=True)
class EmotionKey:
    """From ``time`` (seconds) on: an emotion (see :func:`parse_emotion`) and its intensity, 0 to 2; None is the default
    intensity."""

    time: float
    emotion: str
    intensity: float | None = None


@dataclass(frozen=True)
class EmotionTrack:
    """Emotion over time: each key holds until the next; a change begins at the key's time and takes :attr:`blend`.

    Attributes:
        keys: in order of time; the first one holds from the beginning.
        blend: seconds of a change, less where the next key comes sooner.
    """

    keys: tuple[EmotionKey, ...]
    blend: float = BLEND

    def __post_init__(self) -> None:
        if not self.keys:
            raise UserError(f"the emotion track holds no row; give {_NEEDED}")
        if not 0 <= self.blend <= 60:
            raise UserError(f"blend must be between 0 and 60 seconds, got {self.blend:g}")
        before = -math.inf
        for key in self.keys:
            parse_emotion(key.emotion)
            if not 0 <= key.time < math.inf:
                raise UserError(f"the times of an emotion track must be seconds from 0, got {key.time:g}")
            if key.time <= before:
                raise UserError(f"the times of an emotion track must rise, got {key.time:g} after {before:g}")
            if key.intensity is not None and not 0 <= key.intensity <= 2:
                raise UserError(f"intensity must be between 0 and 2, got {key.intensity:g} at {key.time:g} s")
            before = key.time

    def at(self, time: float) -> tuple[int, int, float]:
        """The numbers of the former and the latest key at a time, and the progress of the change between them, 0 to
        1."""
        now = max(bisect_right(self.keys, time, key=lambda key: key.time) - 1, 0)
        if now == 0:
            return 0, 0, 1.0
        span = self._span(now)
        return now - 1, now, smoothstep((time - self.keys[now].time) / span) if span > 0 else 1.0

    def starts(self, key: int, ahead: float) -> float | None:
        """When to start preparing a key: ``ahead`` seconds before it, but not before the previous change is done; None
        if that leaves less than :data:`BLEND`, or there is no such key."""
        if not 1 <= key < len(self.keys):
            return None
        free = self.keys[key - 1].time + self._span(key - 1) if key > 1 else 0.0
        time = self.keys[key].time
        return max(time - ahead, free) if time - free >= BLEND else None

    def _span(self, key: int) -> float:
        """Seconds of the change to a key."""
        if key + 1 == len(self.keys):
            return self.blend
        return min(self.blend, self.keys[key + 1].time - self.keys[key].time)

    @classmethod
    def load(cls, path: str | Path, blend: float = BLEND) -> EmotionTrack:
        """Read a csv file of time in seconds, emotion and optionally intensity, with or without a header, or a cue
        sheet (:mod:`flowvqtalker.motion.cues`).

        Raises:
            UserError: naming the line, if the file is missing or cannot be understood.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"emotion track {path} does not exist; give {_NEEDED}")
        try:
            text = path.read_text(encoding="utf-8-sig")
            if is_cue_sheet(text):
                rows = [(line, [str(time), *cue]) for line, time, *cue in read_cues(text)]
            else:
                lines = csv.reader(text.splitlines(keepends=True), skipinitialspace=True)
                rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(map(str.strip, row))]
        except UserError as error:
            raise UserError(f"{path}, {error}") from error
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"emotion track {path} cannot be read ({error}); give {_NEEDED}") from error
        names = ["time", "emotion", "intensity"]
        if rows and _number(rows[0][1][0]) is None:
            names = [cell.lower() for cell in rows.pop(0)[1]]
            if not {"time", "emotion"} <= set(names):
                raise UserError(f"emotion track {path} has the columns {', '.join(names)}; give {_NEEDED}")
        keys = []
        for line, row in rows:
            try:
                keys.append(_key(dict(zip(names, row, strict=False)), len(row) > len(names)))
            except UserError as error:
                raise UserError(f"{path}, line {line}: {error}", code=error.code) from error
        try:
            return cls(tuple(keys), blend)
        except UserError as error:
            raise UserError(f"{path}: {error}", code=error.code) from error


def _key(row: dict[str, str], surplus: bool) -> EmotionKey:
    time, intensity = _number(row.get("time", "")), row.get("intensity", "")
    if time is None:
        raise UserError(f"{row.get('time', '')!r} is not a time in seconds")
    if surplus:
        raise UserError("too many columns; put a mixture in quotes or join it with +, as in happy:0.7+surprised:0.3")
    strength = _number(intensity) if intensity else None
    if intensity and strength is None:
        raise UserError(f"{intensity!r} is not an intensity; give a number from 0 to 2")
    parse_emotion(row.get("emotion", ""))
    return EmotionKey(time, row["emotion"], strength)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def heaviest(weights: Sequence[float]) -> int:
    """Number of the emotion with the largest weight; the first of equal ones."""
    return max(range(len(weights)), key=lambda number: weights[number])


_NEUTRAL, _HAPPY = EMOTIONS.index("neutral"), EMOTIONS.index("happy")


@dataclass(frozen=True)
class EmotionCondition:
    """An emotion as ExpFlow is conditioned on it.

    Attributes:
        weights: (1, C) class weights of the multi-actnorms and the emotion token.
        centre: (1, D) centre of the latents.
        label: heaviest class, whose training latents span the manifold.
        intensity: factor on the difference to neutral.
        emotion_bias: (1, D) added to each sample (:class:`~flowvqtalker.motion.flow.ExpFlow`).
    """

    weights: Tensor
    centre: Tensor
    label: int
    intensity: float
    emotion_bias: Tensor

    def towards(self, other: EmotionCondition, part: float) -> EmotionCondition:
        """Interpolate: part 0 is this condition, 1 the other."""
        if part >= 1:
            return other
        weights = torch.lerp(self.weights, other.weights, part)
        centre = torch.lerp(self.centre, other.centre, part)
        intensity = (1 - part) * self.intensity + part * other.intensity
        bias = torch.lerp(self.emotion_bias, other.emotion_bias, part)
        return EmotionCondition(weights, centre, (self if part < 0.5 else other).label, intensity, bias)

    def faded(self) -> EmotionCondition:
        """The same, with intensity 0 for neutral, so that intensity rises monotonically from neutral to an emotion."""
        return replace(self, intensity=0.0) if float(self.weights[0, _NEUTRAL]) == 1 else self


def encode_emotion(
    flow: ExpFlow,
    emotion: str | None,
    intensity: float,
    reference: Tensor | None = None,
    calm: Tensor | None = None,
    source: Tensor | None = None,
    correction: Tensor | None = None,
) -> EmotionCondition:
    """The condition for a label, a mixture or a reference.

    Arguments:
        flow: a trained ExpFlow.
        emotion: see :func:`parse_emotion`; None: that of the reference.
        intensity: 0 is neutral, 1 the emotion, at most 2.
        reference: (R, 64) expression of a clip or image; not with a mixture.
        calm: (N, 64) neutral expression of the reference's person; None: estimated.
        source: (1, 64) neutral face that will be animated; None: the mean face.
        correction: (64,) added to the samples of every emotion but happy, by its weight; None: nothing.
    """
    weights = None if emotion is None else parse_emotion(emotion)
    label = _NEUTRAL if weights is None else heaviest(weights)
    means = flow.latent.mean
    neutral = means.new_zeros(1, flow.config.classes)
    neutral[0, _NEUTRAL] = 1
    if reference is None:
        expressive = neutral.new_tensor([weights or parse_emotion(EMOTIONS[label])])
        centre = expressive @ means
        bias = expressive @ flow.emotion_bias
        intensity = 1.0 if torch.equal(expressive, neutral) else intensity
    else:
        if weights is not None and max(weights) < 1:
            raise UserError(f"a reference goes with one emotion or with none, not with the mixture {emotion!r}")
        given = None if emotion is None else label
        reference = reference.to(means.device, torch.float32)
        label, latent = reference_latent(flow, reference, given)
        expressive, centre = torch.zeros_like(neutral), latent[None]
        expressive[0, label] = 1
        bias = reference_bias(flow, reference, expressive, centre, neutral, calm, source)
    if correction is not None:
        bias = bias + (1 - expressive[:, _HAPPY, None]) * correction.to(bias)
    return EmotionCondition(expressive, centre, label, intensity, bias)
