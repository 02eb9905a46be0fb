"""Training terms of the flows on sequences of frames: likelihood (eq. 10, 12), consistency (eq. 11), and rollouts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from flowvqtalker.motion.bijections import Context, class_weights
from flowvqtalker.motion.context import history_of
from flowvqtalker.motion.flow import Flow

__all__ = ["Sequences", "consistency", "contexts", "negative_log_likelihood", "residual", "rollout"]


@dataclass(frozen=True)
class Sequences:
    """B sequences of T consecutive frames, each frame with its true past (teacher forcing).

    Attributes:
        frames: (B, τ + T, D); zeros before the start of a clip.
        windows: (B, lookback + T + lookahead, mels, columns), in which the outermost windows of a clip are repeated; or
            audio features (B, T, width) of a frozen encoder.
        emotion: (B,) class numbers or (B, C) weights.
        speech: (B,) bool; false: no sound, or hidden.
        mask: (B, T) bool; false: after the end of a clip.
        source: (B, D), or None.
    """

    frames: Tensor
    windows: Tensor
    emotion: Tensor
    speech: Tensor
    mask: Tensor
    source: Tensor | None = None


def residual(flow: Flow, batch: Sequences, audio: Tensor | None = None) -> Sequences:
    """The batch less its lip prior. The flow's densities are those of residuals.

    The τ frames before the first have no audio features and become zeros, as before a clip. The likelihood does not
    train the prior, which would learn to leave small residuals instead of typical ones.
    """
    if flow.lip_prior is None:
        return batch
    audio = flow.encode_speech(batch.windows) if audio is None else audio
    size = flow.config.history
    lips = flow.predict_lips(audio, batch.speech[:, None].expand(-1, audio.shape[1])).detach()
    frames = torch.cat([torch.zeros_like(batch.frames[:, :size]), batch.frames[:, size:] - lips], dim=1)
    return dataclasses.replace(batch, frames=frames)


def contexts(flow: Flow, batch: Sequences, audio: Tensor | None = None) -> Context:
    """Contexts of the frames of ``batch`` that its mask keeps, in order: N = mask.sum()."""
    audio = flow.encode_speech(batch.windows) if audio is None else audio
    keep = batch.mask
    length = keep.shape[1]
    emotion = class_weights(batch.emotion, flow.config.classes).to(batch.frames)
    return flow.encode(
        audio[keep],
        history_of(batch.frames, flow.config.history)[keep],
        emotion[:, None].expand(-1, length, -1)[keep],
        speech=batch.speech[:, None].expand(-1, length)[keep],
        source=None if batch.source is None else batch.source[:, None].expand(-1, length, -1)[keep],
    )


def negative_log_likelihood(flow: Flow, batch: Sequences, audio: Tensor | None = None) -> Tensor:
    """-log p of each frame that the mask keeps, (N,) nats: the terms of L_exp (eq. 10) and L_pose (eq. 12)."""
    audio = flow.encode_speech(batch.windows) if audio is None else audio
    batch = residual(flow, batch, audio)
    targets = batch.frames[:, flow.config.history :][batch.mask]
    return -flow.log_prob(targets, contexts(flow, batch, audio))


def consistency(flow: Flow, batch: Sequences, pairs: int, audio: Tensor | None = None) -> Tensor:
    """L_con (eq. 11): ‖(x_t - x_{t-1}) - (x̂_t - x̂_{t-1})‖₁, mean over ``pairs`` random pairs of frames.

    The first frame of a pair is sampled given its true past, the second given that past and the first sample, as in
    generation. Uses torch's global generator.
    """
    size, device = flow.config.history, batch.frames.device
    audio = flow.encode_speech(batch.windows) if audio is None else audio
    batch = residual(flow, batch, audio)  # the same prior for true and sampled frames
    rows, columns = torch.nonzero(batch.mask[:, 1:], as_tuple=True)  # column c: frames c and c + 1 of a pair
    chosen = torch.randperm(len(rows), device=device)[:pairs]
    rows, columns = rows[chosen], columns[chosen]
    span = columns[:, None] + torch.arange(size + 2, device=device)
    frames = batch.frames[rows[:, None], span]  # N, τ + 2: τ of history, the pair
    emotion = class_weights(batch.emotion[rows], flow.config.classes).to(frames)
    source = None if batch.source is None else batch.source[rows]
    sampled: list[Tensor] = []
    for second in (0, 1):
        history = torch.cat([frames[:, second : size + second - len(sampled)], *(x[:, None] for x in sampled)], dim=1)
        speech = batch.speech[rows]
        context = flow.encode(audio[rows, columns + second], history, emotion, speech=speech, source=source)
        sampled.append(flow.inverse(flow.latent.sample(emotion), context))
    true = (frames[:, size + 1] - frames[:, size]) / flow.data_std
    return (true - (sampled[1] - sampled[0]) / flow.data_std).abs().sum(-1).mean()


@torch.no_grad()
def rollout(
    flow: Flow,
    windows: Tensor,
    emotion: Tensor,
    generator: torch.Generator,
    *,
    speech: Tensor | None = None,
    source: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Sample B sequences in parallel, each frame given the sampled ones before it (for evaluation; for streams see
    :class:`~flowvqtalker.motion.sampler.MotionGenerator`).

    Arguments:
        windows: see :class:`Sequences`.
        emotion: (B,) class numbers or (B, C) weights.
        generator: of the noise.
        speech: (B,) bool.
        source: (B, D).
        temperature: of the latent.

    Returns:
        (B, T, D).
    """
    audio = flow.encode_speech(windows)
    history = audio.new_zeros(len(audio), flow.config.history, flow.config.dim)
    frames = []
    for t in range(audio.shape[1]):
        context = flow.encode(audio[:, t], history, emotion, speech=speech, source=source)
        sampled = flow.sample(context, generator, temperature)
        frames.append(sampled + flow.predict_lips(audio[:, t], speech))
        history = torch.cat([history[:, 1:], sampled[:, None]], dim=1)
    return torch.stack(frames, dim=1)
