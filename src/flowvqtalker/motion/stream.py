"""Motion for live speech: samples in, frames out, bit-identical to motion for the whole recording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.auto import VoiceFollower
from flowvqtalker.motion.circumplex import place_emotion
from flowvqtalker.motion.emotion import AUTO
from flowvqtalker.motion.eyes import EyeLimiter
from flowvqtalker.motion.flow import ExpFlow, PoseFlow
from flowvqtalker.motion.habits import Habits
from flowvqtalker.motion.head_pose import PoseTrack
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.mouth import MouthCloser, MouthGate
from flowvqtalker.motion.options import LIMITS, MotionOptions
from flowvqtalker.motion.sampler import ARTICULATION, TEMPERATURE, MotionGenerator
from flowvqtalker.motion.smile import smile_correction
from flowvqtalker.speech import features
from flowvqtalker.speech.encoder import AudioEncoder
from flowvqtalker.speech.voice import VoiceEmotion

__all__ = ["MotionStream", "frontend_ms", "open_stream"]

_FRAME = SAMPLE_RATE // FPS


@lru_cache(maxsize=4)
def frontend_ms(frontend: str = "mel") -> float:
    """Milliseconds of speech after the start of a frame that its features need, measured from the frontend itself."""
    step, stream, needed, ready = 40, features.FeatureStream(frontend), 0, 0
    for samples in range(step, 16 * _FRAME, step):
        for _ in stream.push(np.zeros(step, np.float32)):
            needed, ready = max(needed, samples - ready * _FRAME), ready + 1
    return 1e3 * needed / SAMPLE_RATE


class MotionStream:
    """Motion for speech in blocks of any size, from a microphone or a file.

    ::

        stream = talker.stream(portrait, MotionOptions(emotion="happy"))
        for samples in microphone:  # (n,) float32 or int16 at 16 kHz, one channel
            motion = stream.push(samples)  # may hold no frame yet
        motion = stream.finish()

    Nothing is computed from a block as such, so the frames are bit-identical however the speech is cut. Memory does not
    grow with its length.

    Arguments:
        generator: a fresh one, for this speech alone.
        pose0: (6,) pose that the head moves around.
        pose_scale: factor on that movement.
        gate: shuts the mouth where there is no speech; None leaves it as sampled.
        eyes: holds lids and brows; None leaves them as sampled.
    """

    def __init__(
        self,
        generator: MotionGenerator | VoiceFollower,
        pose0: Tensor,
        pose_scale: float = 1.0,
        gate: MouthGate | None = None,
        eyes: EyeLimiter | None = None,
    ) -> None:
        self.generator, self.gate, self._eyes = generator, gate, eyes
        self._features = features.FeatureStream(generator.frontend)
        self._pose0, self._scale = pose0, pose_scale
        #: Frames returned so far; the next one is ``frames / 25`` seconds into the speech.
        self.frames = 0

    @property
    def latency_ms(self) -> float:
        """Milliseconds of speech after the start of a frame that must arrive before the frame is returned.

        Blocks longer than a frame and the time to compute come on top.
        """
        return frontend_ms(self.generator.frontend) + self.generator.lookahead * 1e3 * _FRAME / SAMPLE_RATE

    def push(self, samples: npt.NDArray[Any] | Tensor) -> Motion:
        """Take the next samples, (n,) float in [-1, 1] or int16 at 16 kHz; returns the frames they complete."""
        wave = _as_float(samples)
        if self.gate is not None:
            self.gate.push(wave)
        return self._finished(self.generator(self._features.push(wave)))

    def finish(self) -> Motion:
        """End the speech; returns the remaining frames."""
        return self._finished(self.generator(self._features.finish(), last=True))

    def run(self, blocks: Iterable[npt.NDArray[Any] | Tensor]) -> Iterator[Motion]:
        """Motion for all blocks as they arrive, without empty parts."""
        for samples in blocks:
            block = self.push(samples)
            if len(block):
                yield block
        block = self.finish()
        if len(block):
            yield block

    def _finished(self, block: Motion) -> Motion:
        self.frames += len(block)
        # Eyes first: what opens them moves the lips a little, and those shall be shut.
        expression = block.expression if self._eyes is None else self._eyes(block.expression)
        expression = expression if self.gate is None else self.gate(expression)
        if self._scale == 1:
            return Motion(expression, block.pose)
        return Motion(expression, self._pose0 + self._scale * (block.pose - self._pose0))


def _as_float(samples: npt.NDArray[Any] | Tensor) -> npt.NDArray[np.float32]:
    wave = samples.numpy(force=True) if isinstance(samples, torch.Tensor) else np.asarray(samples)
    if wave.ndim != 1:
        raise ValueError(f"samples must have one channel, (n,), got {wave.shape}")
    if wave.dtype == np.int16:
        return wave.astype(np.float32) / np.float32(32768)
    if not np.issubdtype(wave.dtype, np.floating):
        raise ValueError(f"samples must be float in [-1, 1] or int16, got {wave.dtype}")
    clean: npt.NDArray[np.float32] = np.nan_to_num(wave, nan=0.0, posinf=1.0, neginf=-1.0).astype(np.float32)
    return clean


def open_stream(
    expflow: ExpFlow,
    poseflow: PoseFlow,
    bank: LatentBank | None,
    options: MotionOptions,
    face: FaceModel,
    *,
    identity: Tensor,
    beta0: Tensor,
    pose0: Tensor,
    speech_encoder: AudioEncoder | None = None,
    voice: VoiceEmotion | None = None,
) -> MotionStream:
    """A stream of motion with a user's options.

    Arguments:
        expflow, poseflow, bank: the flows and the bank of latents.
        options: with files read and clips tracked (:meth:`flowvqtalker.pipeline.Talker.resolve`).
        face: the face model, to shut lips in pauses and to take off a portrait's smile.
        identity, beta0, pose0: identity (80,), expression (64,) and pose (6,) of the portrait.
        speech_encoder: see :class:`~flowvqtalker.motion.sampler.MotionGenerator`.
        voice: hears the emotion ``auto``.
    """
    emotion, intensity = options.emotion, options.intensity
    if options.valence is not None or options.arousal is not None:
        emotion, strength = place_emotion(options.valence or 0.0, options.arousal or 0.0)
        intensity = min(strength * intensity, LIMITS["intensity"])
    given = options.emotion_reference is not None or options.emotion_track is not None
    generator = MotionGenerator(
        expflow,
        poseflow,
        bank,
        beta0=beta0,
        pose0=pose0,
        emotion="neutral" if emotion == AUTO or (emotion is None and not given) else emotion,
        reference=options.emotion_reference,  # type: ignore[arg-type]  # resolved
        calm=options.reference_neutral,  # type: ignore[arg-type]
        track=options.emotion_track,  # type: ignore[arg-type]
        intensity=intensity,
        temperature=TEMPERATURE if options.temperature is None else options.temperature,
        articulation=ARTICULATION if options.articulation is None else options.articulation,
        blink_rate=options.blink_rate,
        seed=options.seed,
        poses=_pose_track(options),
        speech_encoder=speech_encoder,
        habits=Habits() if options.emotional_head else None,
        correction=smile_correction(face, beta0),
    )
    follower: MotionGenerator | VoiceFollower = generator
    if emotion == AUTO:
        if voice is None:
            raise UserError("emotion auto needs the weights voice_emotion; name one, or use the package's weights")
        follower = VoiceFollower(generator, voice, intensity)
    gate, eyes = MouthGate(MouthCloser(face, identity)), EyeLimiter(face, identity, generator.source[0].cpu())
    return MotionStream(follower, pose0, options.pose_scale, gate, eyes)


def _pose_track(options: MotionOptions) -> PoseTrack | None:
    if options.fixed_pose or options.pose_scale == 0:
        return PoseTrack.still()
    if options.pose_from is None:
        return None
    return PoseTrack(torch.from_numpy(options.pose_from.at(FPS).pose))  # type: ignore[union-attr]  # resolved
