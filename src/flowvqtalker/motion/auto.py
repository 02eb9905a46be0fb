"""Emotion ``auto``: the face takes the emotion that is heard in the voice (ours)."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.emotion import BLEND
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.speech.voice import VOICES, VoiceEmotion, VoiceState, spectrum

__all__ = ["VoiceFollower"]

#: Loud frames that are heard before the first decision, and frames between two changes of emotion.
_FIRST, _PAUSE = 38, FPS
#: Time constant (frames) of the probabilities; the least one that shows an emotion other than neutral, and how much
#: likelier than the present emotion another must be. All three keep the face from flickering between two guesses.
_SMOOTH, _SURE, _MARGIN = 12.5, 0.4, 0.1
#: Seconds of a change.
_FADE = 0.8


class VoiceFollower:
    """A generator of motion that changes its emotion with the voice.

    A decision for a frame is made from the speech up to that frame and the encoder's look-ahead, so a stream shows what
    the file shows. It begins neutral. The last frames, which :attr:`MotionGenerator.lookahead` holds back, keep theirs.

    Arguments:
        generator: a fresh one, neutral.
        voice: what hears.
        intensity: of the emotions that it shows.

    Raises:
        UserError: if the flows hear with encoders of their own, whose features ``voice`` does not know.
    """

    def __init__(self, generator: MotionGenerator, voice: VoiceEmotion, intensity: float = 1.0) -> None:
        if generator.frontend != "whisper" or generator.expflow.audio.config.width != voice.width:
            raise UserError("emotion auto needs flows with the speech encoder; name an emotion, or use other weights")
        self.generator, self.intensity = generator, intensity
        self._voice, self._state = voice, VoiceState()
        self._mels: deque[Tensor] = deque()
        self._likely: Tensor | None = None
        self._shown, self._since, self._follows = "neutral", 0, True

    @property
    def frontend(self) -> str:
        """As the generator's."""
        return self.generator.frontend

    @property
    def lookahead(self) -> int:
        """As the generator's."""
        return self.generator.lookahead

    def __call__(self, windows: Tensor, last: bool = False) -> Motion:
        """Motion for the next windows; see :meth:`MotionGenerator.__call__`."""
        blocks = []
        for window in windows:
            self._mels.append(spectrum(window))
            blocks.append(self.generator(window[None]))
            if len(blocks[-1]) and self._follows and self.generator.heard is not None:
                self._follow(self.generator.heard[0].cpu(), self._mels.popleft())
        return Motion.join([*blocks, self.generator(windows[:0], last=last)])

    def change_emotion(self, emotion: str, intensity: float = 1.0, fade: float = BLEND) -> None:
        """Show this emotion instead of the voice's from now on; see :meth:`MotionGenerator.change_emotion`."""
        self.generator.change_emotion(emotion, intensity, fade)
        self._follows = False

    @torch.inference_mode()
    def _follow(self, feature: Tensor, mel: Tensor) -> None:
        """Hear a frame, and change the emotion if the voice's has changed."""
        self._since += 1
        if not self._state.push(feature, mel) or self._state.heard < _FIRST:
            return
        now = self._voice(self._state.statistics()).softmax(-1)
        self._likely = now if self._likely is None else torch.lerp(self._likely, now, 1 / _SMOOTH)
        best = int(self._likely.argmax())
        name = VOICES[best] if float(self._likely[best]) >= _SURE else "neutral"
        ahead = float(self._likely[best] - self._likely[VOICES.index(self._shown)])
        if name != self._shown and self._since >= _PAUSE and (name == "neutral" or ahead >= _MARGIN):
            self.generator.change_emotion(name, self.intensity, _FADE)
            self._shown, self._since = name, 0
