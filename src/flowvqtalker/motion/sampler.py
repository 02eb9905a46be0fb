"""From speech windows to motion, frame by frame with carried state."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from flowvqtalker.constants import EMOTIONS, FPS
from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.blink import Blinks
from flowvqtalker.motion.emotion import BLEND, EmotionCondition, EmotionTrack, encode_emotion, smoothstep
from flowvqtalker.motion.flow import ExpFlow, PoseFlow
from flowvqtalker.motion.fused import FusedFlow
from flowvqtalker.motion.habits import Habits
from flowvqtalker.motion.head_pose import PoseTrack
from flowvqtalker.motion.manifold import LatentBank, project
from flowvqtalker.motion.options import check_limits
from flowvqtalker.motion.rollout import Rollout
from flowvqtalker.speech.encoder import AudioEncoder, AudioStream

__all__ = ["ARTICULATION", "TEMPERATURE", "MotionGenerator"]

#: Default temperatures of expression and pose; below one, samples stay close to the mode.
TEMPERATURE, POSE_TEMPERATURE = 1.0, 1.0
#: Fraction of the flow's fast lip motion to remove, around its mean over ``_SLOW`` frames (ours). Audio cannot explain
#: it, so viewers see it as noise: lips that open in silence. Smiles, brows and the mouth's slow posture stay.
LIP_DAMPING, _SLOW = 0.9, 12.5
#: Gain on the lip prior. Regression halves a movement that it is unsure of, and the lips mumble.
ARTICULATION = 1.4
#: Default blink rate as a fraction of the training clips'; the flow samples the other blinks itself.
BLINKS = 0.7
#: Default blend of the manifold projection.
MANIFOLD = 0.15
#: Frames sampled before the first one, unseen, to fill the history.
WARM_UP = 25
#: Seconds (time constant) in which the head leaves the source's pose for its own motion around it.
SETTLE = 0.6
#: Seconds by which the next emotion is sampled ahead, unseen. The flow takes half a second to build up an expression.
PREPARE = 1.0
#: Seconds (time constant) over which the difference between an emotion and neutral is averaged before it is
#: exaggerated. Fast movements keep their size: twice the emotion is not twice the fidgeting.
EXCESS = 1.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: products this small gain nothing from more, and sums must not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class MotionGenerator:
    """Sample expression and head pose for speech (section 3.2, inference), in blocks of any size.

    Every frame is computed from its own noise by the same operations on the same shapes, so consecutive blocks return
    bit for bit what one call returns. A frame needs the windows of :attr:`lookahead` frames after it and is returned
    that much later; ``last=True`` says that no window follows and returns the rest.

    * Emotion label: z_t = μ_e + temperature · noise, moved towards the manifold of the emotion's training latents. The
      class's correction (``ExpFlow.emotion_bias``) is added to the sample.
    * Mixture: latent centre, multi-actnorm and emotion token are weighted means; the manifold is that of the heaviest.
    * Emotion over time: the flow clings to its history, at times for seconds. So the next emotion is sampled as a
      rollout of its own from the same noise, starting a second early and unseen, and the two are cross-faded. Where
      keys follow too closely for that, as in a slow rise of intensity, one rollout moves along the interpolated
      condition.
    * Reference: the class under which the reference is most likely (or the given label); the mean of its latents
      replaces μ_e, and what the samples then lack of its difference from its own calm face is added
      (:mod:`flowvqtalker.motion.reference`).
    * Intensity s: neutral is sampled beside the emotion from the same noise, and the result is (1 - s) · neutral + s ·
      emotion; above 1, the emotion plus (s - 1) times the averaged difference. (Interpolating latent centres fails: no
      training latent lies between two of them.) Runs ExpFlow twice, unless s = 1.
    * Pose: PoseFlow's motion around a clip's mean pose becomes motion around the source's pose. It starts exactly there
      and settles within about a second. A :class:`PoseTrack` may replace PoseFlow.

    Arguments:
        expflow, poseflow: trained flows.
        bank: latents of the training data for the manifold projection; None: no projection.
        beta0: (64,) expression of the source.
        pose0: (6,) pose of the source.
        emotion: one of :data:`flowvqtalker.EMOTIONS` or, without a reference, a mixture (see
            :func:`flowvqtalker.motion.emotion.parse_emotion`); may be None with a reference.
        reference: (R, 64) expression of a clip (25 fps) or image to take the emotion from.
        calm: (N, 64) neutral expression of the reference's person; None: estimated.
        track: emotion over time, instead of both.
        intensity: 0 to 2; for a track, of keys without their own.
        temperature: of the expression, 0 (the mode) to 1 (the variance of the data).
        articulation: gain on the lip prior (ours), 0 to 3.
        blink_rate: blinks per minute added to the expression, 0 to 60; None is most of the training clips' rate.
        seed: of the noise.
        pose_temperature: of the pose.
        manifold: 0 (no projection) to 1.
        neighbours: 𝒦 of the projection.
        poses: head motion instead of PoseFlow's.
        speech_encoder: takes the place of the flows' own; trained to give the same features with another look-ahead.
        warm_up: frames sampled before the first one, unseen, to fill the history.
        habits: how the emotion changes head and blinks; None: not at all.
        correction: what the portrait's smile needs (:func:`flowvqtalker.motion.smile.smile_correction`); None: nothing.

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
        calm: Tensor | None = None,
        track: EmotionTrack | None = None,
        intensity: float = 1.0,
        temperature: float = TEMPERATURE,
        articulation: float = ARTICULATION,
        blink_rate: float | None = None,
        seed: int = 0,
        pose_temperature: float = POSE_TEMPERATURE,
        manifold: float = MANIFOLD,
        neighbours: int = 10,
        poses: PoseTrack | None = None,
        warm_up: int = WARM_UP,
        speech_encoder: AudioEncoder | None = None,
        habits: Habits | None = None,
        correction: Tensor | None = None,
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
        # On the CPU: small matrices, for which a GPU would not be faster, and one seed is the same everywhere.
        self.expflow, self.poseflow = expflow.cpu().eval(), poseflow.cpu().eval()
        self.temperature, self.pose_temperature, self.articulation = temperature, pose_temperature, articulation
        with torch.no_grad():
            self.source = self.expflow.neutral_face(beta0.cpu().float().reshape(1, -1))
        self.pose0 = pose0.cpu().float().reshape(1, -1)
        self.poses, self._track, self._warm_up_frames = poses, track, warm_up
        self._encoder, self._habits, self.manifold, self.neighbours = speech_encoder, habits, manifold, neighbours
        self._encode = partial(encode_emotion, self.expflow, correction=correction)
        self._bank = bank if manifold > 0 else None
        self._banks: dict[int, Tensor] = {}
        with torch.inference_mode(), _one_thread():
            self._conditions, self._neutral = self._encode_emotions(emotion, intensity, reference, calm)
            self._fused_for = self._conditions[0].weights
            self._fused = FusedFlow(self.expflow, self._fused_for, self.source)
            self._pose_weights = torch.full((1, self.poseflow.config.classes), 1 / self.poseflow.config.classes)
            self._fused_pose = FusedFlow(self.poseflow, self._pose_weights)
        self._start(seed, BLINKS * float(expflow.blink_rate) if blink_rate is None else blink_rate)

    @property
    def frontend(self) -> str:
        """The frontend of its windows (:data:`flowvqtalker.speech.features.FRONTENDS`)."""
        return self._audio[0].encoder.config.frontend

    @property
    def lookahead(self) -> int:
        """Frames by which the output lags behind the windows."""
        return max(stream.encoder.config.lookahead for stream in self._audio)

    @property
    def emotion(self) -> str:
        """The present emotion; of a mixture, the heaviest."""
        return EMOTIONS[self._rollout.condition.label]

    def _encode_emotions(
        self, emotion: str | None, intensity: float, reference: Tensor | None, calm: Tensor | None
    ) -> tuple[list[EmotionCondition], EmotionCondition | None]:
        """The conditions of the keys (one without a track), and neutral if an intensity needs it."""
        neutral = self._encode("neutral", 1.0)
        if self._track is not None:
            pairs = [(key.emotion, intensity if key.intensity is None else key.intensity) for key in self._track.keys]
            known = {pair: self._encode(*pair) for pair in dict.fromkeys(pairs)}
            conditions = [known[pair] for pair in pairs]
        else:
            condition = self._encode(emotion, intensity, reference, calm, self.source)  # refuses what cannot be used
            conditions = [condition if intensity > 0 else neutral]
        if all(condition.intensity == 1 for condition in conditions):
            return conditions, None
        return [condition.faded() for condition in conditions], neutral

    def _start(self, seed: int, blink_rate: float) -> None:
        self._finished, self._frame, self._fade_start, self._fade_frames = False, 0, 0, 1
        flows = [self.expflow] if self.poses is not None else [self.expflow, self.poseflow]
        # A shared speech encoder runs once.
        encoders = list(dict.fromkeys(flow.audio if self._encoder is None else self._encoder for flow in flows))
        if len({encoder.config.frontend for encoder in encoders}) > 1:
            raise ValueError("the flows use different frontends: train both with the speech encoder or both without")
        self._audio = [AudioStream(encoder) for encoder in encoders]
        self._waiting: list[deque[Tensor]] = [deque() for _ in encoders]
        self._generators = tuple(torch.Generator().manual_seed(2 * seed + which) for which in (0, 1))
        self._blinks = Blinks(self.expflow.blink, blink_rate, 2 * seed + 1)
        exp, pose = self.expflow.config, self.poseflow.config
        self._no_history = torch.zeros(1, exp.history, exp.dim)
        self._rollout = Rollout(self._conditions[0], self._no_history)
        self._next: Rollout | None = None
        self._neutral_rollout = None if self._neutral is None else Rollout(self._neutral, self._no_history)
        self._pose_history = torch.zeros(1, pose.history, pose.dim)
        self._first_pose: Tensor | None = None
        self.heard: Tensor | None = None
        self._wanted: tuple[EmotionCondition, int] | None = None

    @torch.inference_mode()
    def change_emotion(self, emotion: str, intensity: float = 1.0, fade: float = BLEND) -> None:
        """Cross-fade to another emotion from the next frame on; while a change is under way, after it.

        Arguments:
            emotion: label or mixture.
            intensity: 0 to 2.
            fade: seconds.

        Raises:
            UserError: for an unknown emotion or a number out of range, or if an emotion track is being followed.
        """
        check_limits(intensity=intensity)
        if not 0 <= fade <= 60:
            raise UserError(f"fade must be between 0 and 60 seconds, got {fade:g}")
        if self._track is not None:
            raise UserError("the emotion follows a track; leave the track out to change it")
        self._wanted = self._encode(emotion, intensity), max(1, round(fade * FPS))

    def _change(self) -> float:
        """Begin a change that is wanted, end one that is complete; returns the weight of the coming emotion."""
        part = smoothstep((self._frame - self._fade_start) / self._fade_frames)
        if self._next is not None and part < 1:
            return part
        if self._next is not None:
            self._rollout, self._next = self._next, None
        if self._wanted is None or self.heard is None:
            return 0.0
        (condition, self._fade_frames), self._wanted = self._wanted, None
        self._fade_start, self._next = self._frame, Rollout(condition, self._no_history)
        coming = [self._next]
        if condition.intensity != 1 and self._neutral_rollout is None:
            self._neutral_rollout = Rollout(self._encode("neutral", 1.0), self._no_history)
            coming.append(self._neutral_rollout)
        most_likely = torch.zeros_like(self._no_history[:, 0])
        for _ in range(self._warm_up_frames):
            for rollout in coming:
                self._advance(rollout, self.heard, most_likely)
        return 0.0

    @torch.inference_mode()
    def __call__(self, windows: Tensor, last: bool = False) -> Motion:
        """Motion for the next windows.

        Arguments:
            windows: (T, 80, 16 or 7) log-mel windows of consecutive frames by the :attr:`frontend`, T >= 0.
            last: whether they are the last ones.

        Returns:
            the frames that are ready, on the CPU. Without ``last``, their total lags behind by :attr:`lookahead`
            frames.
        """
        if self._finished:
            raise RuntimeError("the last windows were given already; make a new MotionGenerator")
        config = self._audio[0].encoder.config
        if windows.ndim != 3 or windows.shape[1:] != (config.mels, config.columns):
            raise ValueError(f"windows must be (T, {config.mels}, {config.columns}), got {tuple(windows.shape)}")
        with _one_thread():
            frames = []
            for window in windows.cpu().float():
                window = window.clone()  # the same memory alignment, and so the same sums, however the stream is cut
                frames += self._sample([stream.push(window) for stream in self._audio])
            if last:
                self._finished = True
                frames += self._sample([stream.finish() for stream in self._audio])
        if not frames:
            return Motion(torch.zeros(0, self.expflow.config.dim), torch.zeros(0, self.poseflow.config.dim))
        expression, pose = (torch.cat(parts) for parts in zip(*frames, strict=True))
        return Motion(expression.clone(), pose.clone())

    def _sample(self, features: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Sample every frame whose audio features of both flows are there, given each encoder's new features."""
        for waiting, new in zip(self._waiting, features, strict=True):
            waiting.extend(new)
        frames = []
        while all(self._waiting):
            audio = [waiting.popleft() for waiting in self._waiting]
            if self._frame == 0:
                self._warm_up(audio[0], audio[-1])
            frames.append((self._expression(audio[0]), self._pose(audio[-1])))
            self._frame += 1
        return frames

    def _warm_up(self, audio: Tensor, pose_audio: Tensor) -> None:
        """Fill the histories with unseen frames for the first audio features, the most likely ones (temperature 0).

        An empty history is no face: without this the eyes open from half shut during the first frames.
        """
        rollouts = [self._rollout] if self._neutral_rollout is None else [self._neutral_rollout, self._rollout]
        most_likely = torch.zeros_like(self._no_history[:, 0])
        for _ in range(self._warm_up_frames):
            for rollout in rollouts:
                self._advance(rollout, audio, most_likely)
            if self.poses is None:
                self._sample_pose(pose_audio, torch.zeros_like(self._pose_history[:, 0]))

    def _expression(self, audio: Tensor) -> Tensor:
        part = self._change() if self._track is None else self._follow(self._track)
        self.heard = audio
        if self._habits is not None:
            self._blinks.factor = self._habits.follow(self._rollout.condition)
        noise = self.temperature * self.expflow.latent.noise(1, self._generators[0])
        neutral = None if self._neutral_rollout is None else self._advance(self._neutral_rollout, audio, noise)
        frame = self._intensify(self._rollout, self._advance(self._rollout, audio, noise), neutral)
        if self._next is not None:
            coming = self._intensify(self._next, self._advance(self._next, audio, noise), neutral)
            frame = torch.lerp(frame, coming, part)
        return frame + self.articulation * self.expflow.predict_lips(audio) + self._blinks.next()

    def _follow(self, track: EmotionTrack) -> float:
        """Set the rollouts for the next frame; returns the weight of the coming one in the cross-fade."""
        time = self._frame / FPS
        former, latest, part = track.at(time)
        if part == 1:
            if self._next is not None and self._next.condition is self._conditions[latest]:
                self._rollout, self._next = self._next, None
            self._rollout.condition = self._conditions[latest]
            ahead = track.starts(latest + 1, PREPARE)
            if ahead is not None and time >= ahead and self._next is None:
                self._next = Rollout(self._conditions[latest + 1], self._no_history)
            return 0.0
        if self._next is None:
            self._rollout.condition = self._conditions[former].towards(self._conditions[latest], part)
        return part

    def _advance(self, rollout: Rollout, audio: Tensor, noise: Tensor) -> Tensor:
        """The next frame (1, D) of a rollout, with damped lips and its emotion's bias."""
        condition = rollout.condition
        if condition.weights is not self._fused_for:
            self._fused.set_emotion(condition.weights)
            self._fused_for = condition.weights
        if self._bank is not None:
            if condition.label not in self._banks:
                offsets = self._bank.offsets(condition.label, self.expflow.latent.mean)  # around any centre
                self._banks[condition.label] = offsets
            noise = project(noise, self._banks[condition.label], self.neighbours, self.manifold)
        frame = self._fused(condition.centre + noise, audio, rollout.history)
        rollout.history = torch.cat([rollout.history[:, 1:], frame[None]], dim=1)
        return self._damp_lips(rollout, frame) + condition.emotion_bias

    def _intensify(self, rollout: Rollout, frame: Tensor, neutral: Tensor | None) -> Tensor:
        """Scale the difference of a frame (1, D) to neutral by the intensity."""
        if neutral is None:
            return frame
        rollout.excess = torch.lerp(rollout.excess, frame - neutral, 1 / (EXCESS * FPS))
        if rollout.condition.intensity <= 1:
            return torch.lerp(neutral, frame, rollout.condition.intensity)
        return self.expflow.soft_clamp(frame + (rollout.condition.intensity - 1) * rollout.excess)

    def _damp_lips(self, rollout: Rollout, frame: Tensor) -> Tensor:
        """Damp the lip opening of a frame (1, D) around its slow average."""
        opening = self.expflow.opening
        size = opening.square().sum()
        if size == 0:
            return frame
        level = frame @ opening / size
        rollout.level = level if rollout.level is None else rollout.level + (level - rollout.level) / _SLOW
        return frame - LIP_DAMPING * (level - rollout.level)[:, None] * opening

    def _pose(self, audio: Tensor) -> Tensor:
        motion = (
            self._sample_pose(audio, self.poseflow.latent.noise(1, self._generators[1]))
            if self.poses is None
            else self.poses.at(self._frame)
        )
        motion = self._habits.turn(motion) if self._habits is not None and self.poses is None else motion
        if self._first_pose is None:
            self._first_pose = motion
        return self.pose0 + motion - math.exp(-self._frame / (SETTLE * FPS)) * self._first_pose

    def _sample_pose(self, audio: Tensor, noise: Tensor) -> Tensor:
        z = self.poseflow.latent.place(noise, self._pose_weights, self.pose_temperature)
        motion = self._fused_pose(z, audio, self._pose_history)
        self._pose_history = torch.cat([self._pose_history[:, 1:], motion[None]], dim=1)
        return motion
