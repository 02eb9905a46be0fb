"""Emotion by reference: its latents (section 3.2), and what it differs by from its own calm face (ours)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.motion.context import history_of
from flowvqtalker.motion.flow import ExpFlow

__all__ = ["reference_bias", "reference_latent"]

#: Frames of a reference at which its mean latent counts as much as that of its class.
_PRIOR = 25.0
#: Share of the bias that is applied where the calm face is estimated: this estimate and what the class shows for z_ref
#: err in different ways, so their mean is nearer to the truth than either.
_TRUST = 0.5
#: Rollouts by which the effect of z_ref is measured, their frames, and the first one that counts.
_ROLLOUTS, _FRAMES, _FROM = 16, 36, 12


@torch.inference_mode()
def reference_latent(flow: ExpFlow, reference: Tensor, emotion: int | None = None) -> tuple[int, Tensor]:
    """Class and mean latent z_ref = f⁻¹(β_ref) of a reference (section 3.2).

    The reference is encoded without sound and source, each frame given those before it. The mean over the frames
    removes its speech and blinks; noise is added in generation. A mean of few frames is mostly noise of its own, with
    which the samples would be unlike any face, so it is drawn towards the class's mean.

    Arguments:
        flow: a trained ExpFlow.
        reference: (R, 64) expression at 25 fps, R >= 1.
        emotion: class; None takes the one under which the reference is most likely.

    Returns:
        class number and (64,) latent.
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
    _, label, latent = max(results, key=lambda result: result[0])
    return label, torch.lerp(flow.latent.mean[label], latent, count / (count + _PRIOR))


@torch.inference_mode()
def reference_bias(
    flow: ExpFlow,
    reference: Tensor,
    weights: Tensor,
    centre: Tensor,
    neutral: Tensor,
    calm: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """What samples around z_ref lack of the reference's difference from its own calm face (ours).

    z_ref tells the flow little about whose brow or corner moved, so on another face an expression arrives weakly or as
    another one. The difference is taken in β, without what parts the lips: these belong to the speech. The effect of
    z_ref itself is the mean difference of silent rollouts to neutral ones from the same noise.

    Arguments:
        flow: a trained ExpFlow.
        reference: (R, 64) expression at 25 fps.
        weights, centre: (1, C) and (1, D), as the flow will be conditioned for the reference.
        neutral: (1, C) weights of the neutral class.
        calm: (N, 64) expression of the same person, neutral; None: estimated (:meth:`ExpFlow.neutral_face`).
        source: (1, 64) neutral face that will be animated; None: the mean face.

    Returns:
        (1, 64), to add to each sample.
    """
    face = flow.neutral_face(reference) if calm is None else calm.to(reference)
    target = (reference.mean(0) - face.mean(0))[None]
    if flow.opening.any():
        opening = flow.opening / flow.opening.norm()
        target = target - (target @ opening)[:, None] * opening
    pair = torch.cat([neutral, weights]).repeat_interleave(_ROLLOUTS, 0)
    centres = torch.cat([flow.latent.centre(neutral), centre]).repeat_interleave(_ROLLOUTS, 0)
    count, generator = len(pair), torch.Generator().manual_seed(0)
    audio = target.new_zeros(count, flow.audio.config.width)
    silent = torch.zeros(count, dtype=torch.bool, device=target.device)
    faces = torch.zeros_like(centres) if source is None else source.expand(count, -1)
    history = target.new_zeros(count, flow.config.history, flow.config.dim)
    total = torch.zeros_like(centres)
    for frame in range(_FRAMES):
        noise = flow.latent.noise(_ROLLOUTS, generator).to(centres).repeat(2, 1)
        context = flow.encode(audio, history, pair, speech=silent, source=faces)
        sampled = flow.soft_clamp(flow.inverse(centres + noise, context))
        history = torch.cat([history[:, 1:], sampled[:, None]], dim=1)
        total = total + sampled if frame >= _FROM else total
    calmly, shown = total.view(2, _ROLLOUTS, -1).mean(1) / (_FRAMES - _FROM)
    bias: Tensor = target - (shown - calmly)
    return bias if calm is not None else _TRUST * bias
