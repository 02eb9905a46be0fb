"""One tick of the clock: 40 ms of sound in, 40 ms of sound and at most one frame out. Knows no time and no threads."""

from __future__ import annotations

import enum
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.image import ImageArray
from flowvqtalker.live.behaviour import Behaviour
from flowvqtalker.live.sound import Floats, Resampler, SoundQueue
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.motion.stream import MotionStream
from flowvqtalker.provenance import DEFAULT_MARKS, Marks
from flowvqtalker.provenance.label import labelled
from flowvqtalker.provenance.watermark import Watermark, payload, to_luma

if TYPE_CHECKING:
    from flowvqtalker.pipeline import Talker
    from flowvqtalker.render.renderer import Renderer

__all__ = ["Draw", "LiveEngine", "LiveFrame", "State"]

#: Draws one image (512, 512, 3) uint8 RGB.
Draw = Callable[[], ImageArray]

_TICK = SAMPLE_RATE // FPS
#: Frames for which somebody who paused is still talking.
_HOLD = 10
#: Threads of torch from which on they all draw one image.
_ENOUGH = 4
#: Samples over which sound that is cut off fades out.
_FADE = 64


class State(enum.Enum):
    """What the portrait is doing."""

    IDLE = "idle"
    LISTENING = "listening"
    TALKING = "talking"


@dataclass
class LiveFrame:
    """40 ms of the stream.

    Attributes:
        image: (512, 512, 3) uint8 RGB; None where the last one stays: the rate is below 25, or the frame came too late.
        audio: (rate / 25,) float32 in [-1, 1], the sound of these 40 ms.
        pts: seconds from the start of the stream, of both.
        state: what the portrait is doing.
        motion: the coefficients of the frame.
        spoken: samples of the pushed speech that have sounded by the end of the frame.
    """

    image: ImageArray | None
    audio: Floats
    pts: float
    state: State
    motion: Motion
    spoken: int = 0


class LiveEngine:
    """A portrait's endless motion, sound and frames; :class:`~flowvqtalker.live.talker.LiveTalker` runs it in time.

    Arguments:
        talker: with the components face, motion and render, and ``live`` for the short look-ahead.
        portrait: see :meth:`flowvqtalker.pipeline.Talker.portrait`.
        options: of the motion.
        audio_rate: samples per second of the sound that comes out.
        marks: the watermark and the visible label; a stream is not signed.
        behave: breathe, look around and nod.
    """

    def __init__(
        self,
        talker: Talker,
        portrait: Portrait,
        options: MotionOptions,
        *,
        audio_rate: int = 24_000,
        marks: Marks = DEFAULT_MARKS,
        behave: bool = True,
    ) -> None:
        self.sound = SoundQueue(audio_rate)
        self.listening = False
        self.ticks = 0
        self._talker, self._options = talker, options
        self._to_speech = Resampler(audio_rate, SAMPLE_RATE)
        self._watermark = Watermark(payload(marks.mark_id)) if marks.mark else None
        self._raw: ImageArray | None = None
        self._label = labelled(self._unlabelled()) if marks.label else None
        self._finishing = threading.Lock()
        #: Images drawn at the same time: where cores are few, two on one core each take less than one on both.
        self.workers = 2 if talker.device.type == "cpu" and 2 <= torch.get_num_threads() < _ENOUGH else 1
        self._behaviour = Behaviour(options.seed) if behave else None
        self._since_speech = _HOLD
        self._stream = self._open(portrait, options)
        #: Samples of the speech that the motion looks ahead, beyond the end of a frame.
        self._ahead = round(self._stream.latency_ms * SAMPLE_RATE / 1e3) - _TICK
        self._recent: Floats = np.zeros(self._ahead, np.float32)
        self._stream.push(self._recent)
        self._speech: Floats = np.zeros(0, np.float32)
        self._delayed: Floats = np.zeros(round(self._ahead * audio_rate / SAMPLE_RATE), np.float32)
        #: Samples taken by each tick since the last whose sound is out.
        self._taken = deque([0] * (self._ahead // _TICK + 2), self._ahead // _TICK + 2)

    @property
    def latency_ms(self) -> float:
        """Milliseconds from a sample to its frame without computing: its block of 40 ms and the look-ahead."""
        return 1e3 * (_TICK + self._ahead) / SAMPLE_RATE

    def _open(self, portrait: Portrait, options: MotionOptions) -> MotionStream:
        self._renderer = self._talker.renderer(portrait, batch_size=1, workers=self.workers)
        reach = self._renderer.generator.config.reach
        self._window = torch.zeros(0)
        self._reach = reach
        return self._talker.stream(portrait, options, live=True)

    @property
    def follows_track(self) -> bool:
        """Whether the emotion comes from a track."""
        return self._options.emotion_track is not None

    def set_portrait(self, portrait: Portrait, emotion: str | None, intensity: float) -> None:
        """Show another portrait from the next tick on, with an emotion; the speech goes on."""
        options = replace(
            self._options, emotion=emotion, intensity=intensity, emotion_reference=None, emotion_track=None
        )
        self._stream = self._open(portrait, options)
        self._stream.push(self._recent)

    def set_emotion(self, emotion: str, intensity: float, fade: float) -> None:
        """Cross-fade to another emotion; see :meth:`flowvqtalker.motion.sampler.MotionGenerator.change_emotion`."""
        self._stream.generator.change_emotion(emotion, intensity, fade)

    def interrupt(self) -> None:
        """Fall silent at once: drop what waits and shut the mouth."""
        self.sound.clear()
        fade = min(_FADE, len(self._delayed))
        self._delayed[:fade] *= np.linspace(1, 0, fade, dtype=np.float32)
        self._delayed[fade:] = 0
        assert self._stream.gate is not None
        self._stream.gate.shut()
        self._since_speech = _HOLD

    def tick(self, draw: bool = True) -> LiveFrame:
        """The next 40 ms; ``draw`` whether with an image."""
        frame, drawing = self.advance()
        if draw:
            frame.image = drawing()
        return frame

    def advance(self) -> tuple[LiveFrame, Draw]:
        """The next 40 ms without the image, and what draws it: later, in another thread, or never, but in order."""
        block = self.sound.take()
        self._delayed = np.concatenate([self._delayed, block])
        audio, self._delayed = self._delayed[: len(block)], self._delayed[len(block) :]
        motion = self._moved(self._speech_block(block))
        frame = LiveFrame(None, audio, self.ticks / FPS, self.state, motion, self._spoken())
        self.ticks += 1
        return frame, partial(self._draw, self._renderer, self._seen(motion))

    def _spoken(self) -> int:
        """The sound is late by the look-ahead, which ends within a block: its share of the samples is out."""
        self._taken.append(self.sound.taken)
        out, half = self._taken[0], self._taken[1]
        return out + round((half - out) * (1 - self._ahead % _TICK / _TICK))

    @property
    def state(self) -> State:
        """What the portrait is doing."""
        if self._since_speech < _HOLD:
            return State.TALKING
        return State.LISTENING if self.listening else State.IDLE

    def _speech_block(self, block: Floats) -> Floats:
        """(640,) at 16 kHz; what the resampler holds back at the start becomes silence before it."""
        self._speech = np.concatenate([self._speech, self._to_speech(block)])
        self._speech = np.pad(self._speech, (max(0, _TICK - len(self._speech)), 0))
        taken, self._speech = self._speech[:_TICK], self._speech[_TICK:]
        return taken

    def _moved(self, speech: Floats) -> Motion:
        self._recent = np.concatenate([self._recent, speech])[-self._ahead :] if self._ahead else self._recent
        motion = self._stream.push(speech)
        assert len(motion) == 1, "one tick is one frame"
        assert self._stream.gate is not None
        self._since_speech = 0 if self._stream.gate.speaking else min(self._since_speech + 1, _HOLD)
        if self._behaviour is None:
            return motion
        offset = self._behaviour(self.state is State.TALKING, self.listening)
        return Motion(motion.expression, motion.pose + offset)

    def _seen(self, motion: Motion) -> torch.Tensor:
        """The generator's window of motion around the frame."""
        frame = torch.cat([motion.expression, motion.pose], dim=1)
        if not len(self._window):
            self._window = frame.expand(self._reach + 1, -1)
        self._window = torch.cat([self._window[1:], frame])
        # The paper's generator looks half a window ahead, for which nobody can wait: the last frame is repeated.
        return torch.cat([self._window, frame.expand(self._reach, -1)])

    def _draw(self, renderer: Renderer, window: torch.Tensor) -> ImageArray:
        image = renderer.draw(window)
        with self._finishing:
            if self._label is not None:
                self._raw = image
                image = next(self._label)
            return image if self._watermark is None else _marked(image, self._watermark)

    def _unlabelled(self) -> Iterator[ImageArray]:
        while self._raw is not None:
            yield self._raw


def _marked(image: ImageArray, mark: Watermark) -> ImageArray:
    """An image (H, W, 3) with the watermark in its luma: what it adds there is added to each channel."""
    before = to_luma(image)
    after = before.copy()
    mark(after)
    change = cv2.subtract(after, before, dtype=cv2.CV_16S)
    marked: npt.NDArray[np.uint8] = cv2.add(image, cv2.merge([change] * 3), dtype=cv2.CV_8U)
    return marked
