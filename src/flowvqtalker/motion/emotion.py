"""What an emotion is to ExpFlow: where its latents lie and what the flow is conditioned on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.motion.context import history_of
from flowvqtalker.motion.emotion_track import heaviest, parse_emotion
from flowvqtalker.motion.flow import ExpFlow

__all__ = ["Mood", "make_mood", "reference_latent"]

_NEUTRAL = EMOTIONS.index("neutral")


@dataclass(frozen=True)
class Mood:
    """What an emotion is to the flow.

    Attributes:
        weights: (1, C) of the classes, which also set the multi-actnorms and the emotion token.
        centre: (1, D) of the latents.
        label: class that it mostly is; the draws are moved on to the training latents of this class.
        intensity: how much of its difference to neutral is shown; 1 is all of it.
        shift: (1, D) of :class:`~flowvqtalker.motion.flow.ExpFlow`, added to what is drawn.
    """

    weights: Tensor
    centre: Tensor
    label: int
    intensity: float
    shift: Tensor

    def towards(self, other: Mood, part: float) -> Mood:
        """A part of the way, 0 to 1, to another."""
        if part >= 1:
            return other
        weights = torch.lerp(self.weights, other.weights, part)
        centre = torch.lerp(self.centre, other.centre, part)
        intensity = (1 - part) * self.intensity + part * other.intensity
        shift = torch.lerp(self.shift, other.shift, part)
        return Mood(weights, centre, (self if part < 0.5 else other).label, intensity, shift)

    def faded(self) -> Mood:
        """The same, but neutral counts as an emotion of which nothing is shown; then intensities on the way from
        neutral to an emotion only rise."""
        return replace(self, intensity=0.0) if float(self.weights[0, _NEUTRAL]) == 1 else self


def make_mood(flow: ExpFlow, emotion: str | None, intensity: float, reference: Tensor | None = None) -> Mood:
    """The mood of a label, a mixture or a reference.

    Arguments:
        flow: a trained ExpFlow.
        emotion: see :func:`flowvqtalker.motion.emotion_track.parse_emotion`; None: what the reference shows.
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
        shift = expressive @ flow.shift
        intensity = 1.0 if torch.equal(expressive, neutral) else intensity
    else:
        if weights is not None and max(weights) < 1:
            raise UserError(f"a reference goes with one emotion or with none, not with the mixture {emotion!r}")
        given = None if emotion is None else label
        label, latent = reference_latent(flow, reference.to(means.device, torch.float32), given)
        expressive, centre = torch.zeros_like(neutral), latent[None]
        expressive[0, label] = 1
        shift = torch.zeros_like(latent[None])  # a reference says itself how it looks
    return Mood(expressive, centre, label, intensity, shift)


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
