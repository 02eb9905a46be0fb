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
from flowvqtalker.motion.context import history_of
from flowvqtalker.motion.flow import ExpFlow

__all__ = [
    "BLEND",
    "EmotionCondition",
    "EmotionKey",
    "EmotionTrack",
    "encode_emotion",
    "heaviest",
    "parse_emotion",
    "reference_latent",
    "smoothstep",
]

#: Seconds that a change of emotion takes. Shorter ones look like a cut: a face moves from rest to the height of an
#: expression in 0.3 to 0.7 s.
BLEND = 0.4

_NEEDED = "a file with the columns time (seconds), emotion and, if wanted, intensity"


def parse_emotion(spec: str) -> tuple[float, ...]:
    """Weights of the nine emotions from a label or a mixture.

    Arguments:
        spec: ``happy``, or ``happy:0.7,surprised:0.3``. Weights are divided by their sum; one that is left out is 1;
            ``+`` may take the place of the comma (in a csv a comma needs quotes).

    Returns:
        nine weights in the order of :data:`flowvqtalker.EMOTIONS`; they sum to one.

    Raises:
        UserError: if a name is none of the nine, is given twice, or a weight is no positive number.
    """
    weights = [0.0] * len(EMOTIONS)
    for part in spec.replace("+", ",").split(","):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in EMOTIONS:
            raise UserError(f"unknown emotion {name!r}; choose one of {', '.join(EMOTIONS)}")
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
    """From ``time`` on, in seconds: an emotion (see :func:`parse_emotion`) with an intensity, 0 to 2, or None for the
    one that is asked for elsewhere."""

    time: float
    emotion: str
    intensity: float | None = None


@dataclass(frozen=True)
class EmotionTrack:
    """Emotion over time: each key holds until the next; a change begins at the key's time and takes :attr:`blend`.

    A function of the time alone, so motion made from it does not depend on how a stream is cut.

    Attributes:
        keys: in the order of time. What the first one says holds from the beginning.
        blend: seconds of a change; less where the next key comes sooner.
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
                raise UserError(f"the times of an emotion track are seconds from 0, got {key.time:g}")
            if key.time <= before:
                raise UserError(f"the times of an emotion track must rise, got {key.time:g} after {before:g}")
            if key.intensity is not None and not 0 <= key.intensity <= 2:
                raise UserError(f"intensity must be between 0 and 2, got {key.intensity:g} at {key.time:g} s")
            before = key.time

    def at(self, time: float) -> tuple[int, int, float]:
        """What holds at a time: the number of the former key, that of the latest, and how far the change between them
        is, 0 to 1."""
        now = max(bisect_right(self.keys, time, key=lambda key: key.time) - 1, 0)
        if now == 0:
            return 0, 0, 1.0
        span = self._span(now)
        return now - 1, now, smoothstep((time - self.keys[now].time) / span) if span > 0 else 1.0

    def starts(self, key: int, ahead: float) -> float | None:
        """When a key can be prepared for: ``ahead`` seconds before it, but after the change before it is done; None
        where that leaves less than a change's own length, or there is no such key."""
        if not 1 <= key < len(self.keys):
            return None
        free = self.keys[key - 1].time + self._span(key - 1) if key > 1 else 0.0
        time = self.keys[key].time
        return max(time - ahead, free) if time - free >= BLEND else None

    def _span(self, key: int) -> float:
        """Seconds that the change to a key takes."""
        if key + 1 == len(self.keys):
            return self.blend
        return min(self.blend, self.keys[key + 1].time - self.keys[key].time)

    @classmethod
    def load(cls, path: str | Path, blend: float = BLEND) -> EmotionTrack:
        """Read a csv file: time in seconds, emotion and, if wanted, intensity, with or without a line of names.

        Raises:
            UserError: if it is missing or a line cannot be understood; the line is named.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"emotion track {path} does not exist; give {_NEEDED}")
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                lines = csv.reader(file, skipinitialspace=True)
                rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(map(str.strip, row))]
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
                raise UserError(f"{path}, line {line}: {error}") from error
        try:
            return cls(tuple(keys), blend)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def _key(row: dict[str, str], surplus: bool) -> EmotionKey:
    time, intensity = _number(row.get("time", "")), row.get("intensity", "")
    if time is None:
        raise UserError(f"{row.get('time', '')!r} is no time in seconds")
    if surplus:
        raise UserError("too many columns; put a mixture in quotes or join it with +, as in happy:0.7+surprised:0.3")
    strength = _number(intensity) if intensity else None
    if intensity and strength is None:
        raise UserError(f"{intensity!r} is no intensity; give a number from 0 to 2")
    parse_emotion(row.get("emotion", ""))
    return EmotionKey(time, row["emotion"], strength)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def heaviest(weights: Sequence[float]) -> int:
    """Number of the emotion with the largest weight, of equal ones the first."""
    return max(range(len(weights)), key=lambda number: weights[number])


_NEUTRAL = EMOTIONS.index("neutral")


@dataclass(frozen=True)
class EmotionCondition:
    """What an emotion is to the flow.

    Attributes:
        weights: (1, C) of the classes, which also set the multi-actnorms and the emotion token.
        centre: (1, D) of the latents.
        label: class that it mostly is; the draws are moved on to the training latents of this class.
        intensity: how much of its difference to neutral is shown; 1 is all of it.
        emotion_bias: (1, D) of :class:`~flowvqtalker.motion.flow.ExpFlow`, added to what is drawn.
    """

    weights: Tensor
    centre: Tensor
    label: int
    intensity: float
    emotion_bias: Tensor

    def towards(self, other: EmotionCondition, part: float) -> EmotionCondition:
        """A part of the way, 0 to 1, to another."""
        if part >= 1:
            return other
        weights = torch.lerp(self.weights, other.weights, part)
        centre = torch.lerp(self.centre, other.centre, part)
        intensity = (1 - part) * self.intensity + part * other.intensity
        bias = torch.lerp(self.emotion_bias, other.emotion_bias, part)
        return EmotionCondition(weights, centre, (self if part < 0.5 else other).label, intensity, bias)

    def faded(self) -> EmotionCondition:
        """The same, but neutral counts as an emotion of which nothing is shown; then intensities on the way from
        neutral to an emotion only rise."""
        return replace(self, intensity=0.0) if float(self.weights[0, _NEUTRAL]) == 1 else self


def encode_emotion(
    flow: ExpFlow, emotion: str | None, intensity: float, reference: Tensor | None = None
) -> EmotionCondition:
    """The condition of a label, a mixture or a reference.

    Arguments:
        flow: a trained ExpFlow.
        emotion: see :func:`flowvqtalker.motion.emotion.parse_emotion`; None: what the reference shows.
        intensity: 0 is neutral, 1 the emotion, up to 2.
        reference: (R, 64) expression of a clip or picture; it takes no mixture.
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
        label, latent = reference_latent(flow, reference.to(means.device, torch.float32), given)
        expressive, centre = torch.zeros_like(neutral), latent[None]
        expressive[0, label] = 1
        bias = torch.zeros_like(latent[None])  # a reference says itself how it looks
    return EmotionCondition(expressive, centre, label, intensity, bias)


@torch.inference_mode()
def reference_latent(flow: ExpFlow, reference: Tensor, emotion: int | None = None) -> tuple[int, Tensor]:
    """Class and mean latent z_ref = f⁻¹(β_ref) of a reference (section 3.2).

    The reference is encoded without sound and without a source, each frame given those before it. Its own latents also
    hold its speech and blinks, which are not wanted, so their mean over the frames is taken; noise is added in
    generation.

    Arguments:
        flow: a trained ExpFlow.
        reference: (R, 64) expression at 25 fps, R >= 1.
        emotion: class, or None for the one under which the reference is most likely.

    Returns:
        class number, and (64,) latent.
    """
    if reference.ndim != 2 or reference.shape[1] != flow.config.dim or len(reference) == 0:
        raise UserError(f"the reference must hold (R, {flow.config.dim}) coefficients, got {tuple(reference.shape)}")
    count, size = len(reference), flow.config.history
    padded = torch.cat([reference.new_zeros(size, reference.shape[1]), reference])
    history = history_of(padded[None], size)[0]
    silent = torch.zeros(count, dtype=torch.bool, device=reference.device)
    audio = reference.new_zeros(count, flow.audio.config.width)
    results = []
    for label in range(flow.config.classes) if emotion is None else [emotion]:
        labels = torch.full((count,), label, dtype=torch.long, device=reference.device)
        context = flow.encode(audio, history, labels, speech=silent, source=torch.zeros_like(reference))
        z, logdet = flow.forward_and_logdet(reference, context)
        likelihood = (flow.latent.log_prob(z, context.emotion) + logdet).mean()
        results.append((float(likelihood), label, z.mean(0)))
    _, label, centre = max(results, key=lambda result: result[0])
    return label, centre
