"""From speech windows to motion, frame by frame with a carried state."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.blink import Blinks
from flowvqtalker.motion.emotion import EmotionCondition, EmotionTrack, encode_emotion
from flowvqtalker.motion.flow import ExpFlow, PoseFlow
from flowvqtalker.motion.fused import FusedInverse
from flowvqtalker.motion.head_pose import PoseTrack
from flowvqtalker.motion.manifold import LatentBank, project
from flowvqtalker.motion.options import check_limits
from flowvqtalker.speech.encoder import AudioStream

__all__ = ["ARTICULATION", "TEMPERATURE", "MotionGenerator"]

#: Default temperatures of expression and pose: below one, a draw keeps to what the model is sure of.
TEMPERATURE, POSE_TEMPERATURE = 0.9, 1.0
#: Share of the drawn lips' opening, around its mean over half a second, that is taken off (ours): what the speech does
#: not foretell of it is noise to a viewer, who sees lips that open in silence. Smiles, brows and the mouth's slow
#: posture stay as drawn.
LIP_DAMPING, _SLOW = 0.9, 12.5
#: Gain on what the speech foretells: a regression halves a movement that it is not sure of, and such lips mumble.
ARTICULATION = 1.4
#: Share of the training clips' blinks that are laid over the motion by default: the flow draws the others itself.
BLINKS = 0.7
#: How far a drawn latent is moved on to the manifold of the training latents.
MANIFOLD = 0.15
#: Seconds in which the head leaves the source's pose for its own motion around it (time constant).
SETTLE = 0.6
#: Seconds before a change of emotion in which the next one is drawn out of sight. From rest the flow needs about half a
#: second to reach an expression.
PREPARE = 1.0
#: Seconds (time constant) over which the difference between an emotion and neutral is averaged, to exaggerate it: the
#: movements themselves stay as they are, so that twice the emotion is not twice the fidgeting.
EXCESS = 1.0
_FPS = 25


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: for products this small a second one costs more than it gives (ten times as much when its
    core is busy), and sums do not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Rollout:
    """One course of drawn expressions: each frame is drawn given those before it.

    Attributes:
        condition: what it expresses.
        history: (1, τ, D) of its own frames.
        level: (1,) slow course of the lips' opening.
        excess: (1, D) slow course of its difference to neutral.
    """

    def __init__(self, condition: EmotionCondition, history: Tensor) -> None:
        self.condition, self.history = condition, history
        self.level: Tensor | None = None
        self.excess = torch.zeros_like(history[:, -1])


class MotionGenerator:
    """Draw expression and head pose for speech (section 3.2, inference), in blocks of any size.

    Every frame is drawn from its own noise by the same operations on the same shapes, so consecutive blocks give, bit
    for bit, what one call gives. A frame needs the windows of :attr:`lookahead` frames after it and is returned that
    much later; ``last=True`` says that no window follows, and returns the rest.

    * Emotion label: z_t = μ_e + temperature · noise, then moved on to the manifold of training latents of that emotion.
      What the drawn frames of an emotion lack of its mean difference to neutral is added (``ExpFlow.emotion_bias``).
    * Mixture: latent centre, multi-actnorm and emotion token are the weighted means of those of its emotions; the
      manifold is that of the heaviest.
    * Emotion over time: the flow holds on to what it has drawn, for seconds at times, so the next emotion is drawn on
      its own, out of sight, for a second before its time, from the same noise; then one fades into the other. Where
      changes come too thick for that, as in a slow rise of intensity, all that an emotion sets moves along a smooth
      step from one to the next.
    * Reference: the class is the one under which the reference is most likely (or the given label), and its latents'
      mean takes the place of μ_e (see :func:`flowvqtalker.motion.emotion.reference_latent`).
    * Intensity s: neutral is drawn beside the emotion from the same noise, and what is shown is (1 - s) · neutral + s ·
      emotion; above 1, the emotion and (s - 1) times the slow course of the difference. (Half-way between two latent
      centres no training latent lies, and half a smile by latents came out as none.) Costs ExpFlow twice, unless s = 1.
    * Pose: PoseFlow draws motion around a clip's mean pose; here around the source's pose. It starts exactly there and
      settles within about a second. Motion from elsewhere takes the place of what PoseFlow draws.

    Arguments:
        expflow, poseflow: trained flows.
        bank: latents of the training data for the manifold projection; None: no projection.
        beta0: (64,) expression of the source.
        pose0: (6,) pose of the source.
        emotion: one of :data:`flowvqtalker.EMOTIONS` or, without a reference, a mixture (see
            :func:`flowvqtalker.motion.emotion.parse_emotion`); may be None with a reference.
        reference: (R, 64) expression of a clip (25 fps) or picture to take the emotion from.
        track: emotion over time, instead of both.
        intensity: 0 to 2; of a track, where it says nothing itself.
        temperature: of the expression, 0 (always the most likely) to 1 (as the data varies).
        seed: of the noise.
        pose_temperature: of the pose.
        articulation: factor on what the speech foretells of the lips (ours), 0 to 3.
        blink_rate: blinks a minute laid over the expression, 0 to 60; None is most of the training clips' rate.
        manifold: 0 (no projection) to 1.
        neighbours: 𝒦 of the projection.
        poses: head motion instead of PoseFlow's.
        device: where to compute. The noise is drawn on the CPU, so it is the same everywhere.

    Raises:
        UserError: for an unknown emotion or numbers out of range.
    """

    def __init__(
        self,
        expflow: ExpFlow,
        poseflow: PoseFlow,
        bank: LatentBank | None = None,
        *,
        beta0: Tensor,
        pose0: Tensor,
        emotion: str | None = "neutral",
        reference: Tensor | None = None,
        track: EmotionTrack | None = None,
        intensity: float = 1.0,
        temperature: float = TEMPERATURE,
        articulation: float = ARTICULATION,
        blink_rate: float | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
        pose_temperature: float = POSE_TEMPERATURE,
        manifold: float = MANIFOLD,
        neighbours: int = 10,
        poses: PoseTrack | None = None,
    ) -> None:
        if emotion is None and reference is None and track is None:
            raise UserError("neither an emotion nor a reference was given; give one")
        check_limits(
            intensity=intensity,
            temperature=temperature,
            articulation=articulation,
            blink_rate=blink_rate,
            pose_temperature=pose_temperature,
            manifold=manifold,
        )
        self.device = torch.device(device)
        self.expflow, self.poseflow = expflow.to(self.device).eval(), poseflow.to(self.device).eval()
        self.temperature, self.pose_temperature = temperature, pose_temperature
        self.articulation = articulation
        self.blink_rate = BLINKS * float(expflow.blink_rate) if blink_rate is None else blink_rate
        self.manifold, self.neighbours, self.seed = manifold, neighbours, seed
        with torch.no_grad():
            self.source = self.expflow.neutral_face(beta0.to(self.device, torch.float32).reshape(1, -1))
        self.pose0 = pose0.to(self.device, torch.float32).reshape(1, -1)
        self.poses, self._track = poses, track
        self._bank = bank if manifold > 0 else None
        self._banks: dict[int, Tensor] = {}
        with torch.inference_mode(), _one_thread():
            if track is None:
                self._conditions = [encode_emotion(self.expflow, emotion, intensity, reference)]
            else:
                pairs = [(key.emotion, intensity if key.intensity is None else key.intensity) for key in track.keys]
                known = {pair: encode_emotion(self.expflow, *pair) for pair in dict.fromkeys(pairs)}
                self._conditions = [known[pair] for pair in pairs]
            neutral = encode_emotion(self.expflow, "neutral", 1.0)
            if track is None and intensity == 0:
                self._conditions = [neutral]
            self._neutral = neutral if any(condition.intensity != 1 for condition in self._conditions) else None
            if self._neutral is not None:
                self._conditions = [condition.faded() for condition in self._conditions]
            self._inverse = FusedInverse(self.expflow, self._conditions[0].weights)
            self._set_to = self._conditions[0].weights
            single = torch.ones(1, self.poseflow.config.classes, device=self.device)
            self._pose_weights = single / self.poseflow.config.classes
            self._pose_inverse = FusedInverse(self.poseflow, self._pose_weights)
        self._reset()

    @property
    def frontend(self) -> str:
        """The front end whose windows it takes (:data:`flowvqtalker.speech.features.FRONTENDS`)."""
        return self.expflow.audio.config.frontend

    @property
    def lookahead(self) -> int:
        """Frames by which the output comes later than the windows."""
        return max(stream.encoder.config.lookahead for stream in self._audio)

    @property
    def emotion(self) -> str:
        """The emotion at present; of a mixture the heaviest."""
        return EMOTIONS[self._rollout.condition.label]

    def _reset(self) -> None:
        self._finished, self._frame = False, 0
        flows = [self.expflow] if self.poses is not None else [self.expflow, self.poseflow]
        encoders = list(dict.fromkeys(flow.audio for flow in flows))  # flows that share a speech encoder listen once
        if len({encoder.config.frontend for encoder in encoders}) > 1:
            raise ValueError(
                "the flows hear with different front ends: train both with the speech encoder or both without"
            )
        self._audio = [AudioStream(encoder) for encoder in encoders]
        self._waiting: list[deque[Tensor]] = [deque() for _ in encoders]
        self._generators = tuple(torch.Generator().manual_seed(2 * self.seed + which) for which in (0, 1))
        self._blinks = Blinks(self.expflow.blink, self.blink_rate, 2 * self.seed + 1)
        self._rollout: _Rollout
        self._next: _Rollout | None
        exp, pose = self.expflow.config, self.poseflow.config
        self._start = torch.zeros(1, exp.history, exp.dim, device=self.device)
        self._rollout, self._next = _Rollout(self._conditions[0], self._start), None
        self._neutral_rollout = None if self._neutral is None else _Rollout(self._neutral, self._start)
        self._pose_history = torch.zeros(1, pose.history, pose.dim, device=self.device)
        self._pose_start: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, windows: Tensor, last: bool = False) -> Motion:
        """Motion for the next windows.

        Arguments:
            windows: (T, 80, 16 or 7) log-mel windows of consecutive frames by the front end :attr:`frontend`, T >= 0.
            last: whether they are the last ones.

        Returns:
            t frames, on the CPU. Without ``last``, t lags behind by
            :attr:`lookahead` frames over all calls; with it, all frames that are left come.
        """
        if self._finished:
            raise RuntimeError("the last windows were given already; make a new MotionGenerator")
        expected = (self.expflow.audio.config.mels, self.expflow.audio.config.columns)
        if windows.ndim != 3 or tuple(windows.shape[1:]) != expected:
            raise ValueError(f"windows must be (T, {expected[0]}, {expected[1]}), got {tuple(windows.shape)}")
        with _one_thread():
            return self._run(windows, last)

    def _run(self, windows: Tensor, last: bool) -> Motion:
        frames: list[tuple[Tensor, Tensor]] = []
        for window in windows.to(self.device, torch.float32):
            window = window.clone()  # the same memory alignment for every cut of the stream
            for stream, waiting in zip(self._audio, self._waiting, strict=True):
                waiting.extend(stream.push(window))
            frames += self._drain()
        if last:
            self._finished = True
            for stream, waiting in zip(self._audio, self._waiting, strict=True):
                waiting.extend(stream.finish())
            frames += self._drain()
        if not frames:
            return Motion(torch.zeros(0, self.expflow.config.dim), torch.zeros(0, self.poseflow.config.dim))
        beta, pose = (torch.cat(parts).cpu() for parts in zip(*frames, strict=True))
        return Motion(beta.clone(), pose.clone())

    def _drain(self) -> list[tuple[Tensor, Tensor]]:
        """Draw every frame whose audio features of both flows are there."""
        frames = []
        while all(self._waiting):
            audio = [waiting.popleft() for waiting in self._waiting]
            frames.append((self._expression(audio[0]), self._pose(audio[-1])))
            self._frame += 1
        return frames

    def _expression(self, audio: Tensor) -> Tensor:
        part = 0.0 if self._track is None else self._follow(self._track)
        noise = self.temperature * self.expflow.latent.noise(1, self._generators[0]).to(self.device)
        neutral = None if self._neutral_rollout is None else self._draw(self._neutral_rollout, audio, noise)
        drawn = self._show(self._rollout, self._draw(self._rollout, audio, noise), neutral)
        if self._next is not None:
            coming = self._show(self._next, self._draw(self._next, audio, noise), neutral)
            drawn = torch.lerp(drawn, coming, part)
        return drawn + self.articulation * self.expflow.predict_lips(audio) + self._blinks.next()

    def _follow(self, track: EmotionTrack) -> float:
        """Make the chains those of the next frame; returns how much of it is the coming rollout's."""
        time = self._frame / _FPS
        former, latest, part = track.at(time)
        if part == 1:
            if self._next is not None and self._next.condition is self._conditions[latest]:
                self._rollout, self._next = self._next, None
            self._rollout.condition = self._conditions[latest]
            ahead = track.starts(latest + 1, PREPARE)
            if ahead is not None and time >= ahead and self._next is None:
                self._next = _Rollout(self._conditions[latest + 1], self._start)
            return 0.0
        if self._next is None:
            self._rollout.condition = self._conditions[former].towards(self._conditions[latest], part)
        return part

    def _draw(self, rollout: _Rollout, audio: Tensor, noise: Tensor) -> Tensor:
        """The next frame (1, D) of a rollout, with its lips quietened, and with what its emotion lacks."""
        condition = rollout.condition
        if condition.weights is not self._set_to:
            self._inverse.set_emotion(condition.weights)
            self._set_to = condition.weights
        context = self.expflow.encode(audio, rollout.history, condition.weights, source=self.source)
        if self._bank is not None:
            if condition.label not in self._banks:
                offsets = self._bank.offsets(condition.label, self.expflow.latent.mean.cpu())  # around any centre
                self._banks[condition.label] = offsets.to(self.device)
            noise = project(noise, self._banks[condition.label], self.neighbours, self.manifold)
        drawn = self.expflow.soft_clamp(self._inverse(condition.centre + noise, context))
        rollout.history = torch.cat([rollout.history[:, 1:], drawn[None]], dim=1)
        return self._damp_lips(rollout, drawn) + condition.emotion_bias

    def _show(self, rollout: _Rollout, drawn: Tensor, neutral: Tensor | None) -> Tensor:
        """As much of an emotion (1, D) beside neutral as its intensity says."""
        if neutral is None:
            return drawn
        rollout.excess = torch.lerp(rollout.excess, drawn - neutral, 1 / (EXCESS * _FPS))
        if rollout.condition.intensity <= 1:
            return torch.lerp(neutral, drawn, rollout.condition.intensity)
        return self.expflow.soft_clamp(drawn + (rollout.condition.intensity - 1) * rollout.excess)

    def _damp_lips(self, rollout: _Rollout, drawn: Tensor) -> Tensor:
        """Damp the drawn opening of the lips (1, D) around its slow course."""
        size = self.expflow.opening.square().sum()
        if size == 0:
            return drawn
        level = drawn @ self.expflow.opening / size
        rollout.level = level if rollout.level is None else rollout.level + (level - rollout.level) / _SLOW
        return drawn - LIP_DAMPING * (level - rollout.level)[:, None] * self.expflow.opening

    def _pose(self, audio: Tensor) -> Tensor:
        motion = self._draw_pose(audio) if self.poses is None else self.poses.at(self._frame).to(self.device)
        if self._pose_start is None:
            self._pose_start = motion
        return self.pose0 + motion - math.exp(-self._frame / (SETTLE * _FPS)) * self._pose_start

    def _draw_pose(self, audio: Tensor) -> Tensor:
        context = self.poseflow.encode(audio, self._pose_history, self._pose_weights)
        noise = self.poseflow.latent.noise(1, self._generators[1]).to(self.device)
        z = self.poseflow.latent.place(noise, self._pose_weights, self.pose_temperature)
        motion = self.poseflow.soft_clamp(self._pose_inverse(z, context))
        self._pose_history = torch.cat([self._pose_history[:, 1:], motion[None]], dim=1)
        return motion
