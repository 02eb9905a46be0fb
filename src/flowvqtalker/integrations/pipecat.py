"""A Pipecat service: speech of any TTS service in, speech and images out. Needs the extra ``pipecat``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    ServiceUpdateSettingsFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
    UserStartedSpeakingFrame,
    UserStoppedSpeakingFrame,
)
from pipecat.processors.frame_processor import FrameDirection
from pipecat.services.ai_service import AIService
from pipecat.services.settings import ServiceSettings
from pipecat.utils.types import NOT_GIVEN, NotGiven

from flowvqtalker.errors import UserError
from flowvqtalker.integrations.segments import Segments, to_pcm
from flowvqtalker.live import LiveFrame, LiveTalker

__all__ = ["FlowVQTalkerVideoService", "FlowVQTalkerVideoSettings"]


@dataclass
class FlowVQTalkerVideoSettings(ServiceSettings):  # type: ignore[misc]
    """What can change while the pipeline runs, by ``ServiceUpdateSettingsFrame(delta=...)``.

    Attributes:
        emotion: see :meth:`LiveTalker.set_emotion`; None leaves that of the engine.
        intensity: of the emotion.
        fade: seconds in which another emotion is reached.
    """

    emotion: str | NotGiven | None = field(default_factory=lambda: NOT_GIVEN)
    intensity: float | NotGiven = field(default_factory=lambda: NOT_GIVEN)
    fade: float | NotGiven = field(default_factory=lambda: NOT_GIVEN)


class FlowVQTalkerVideoService(AIService):  # type: ignore[misc]
    """Stands between the TTS service and the output transport.

    Each ``TTSAudioRawFrame`` waits for its time and comes out with an ``OutputImageRawFrame``, both with pts; images
    come in silence too. ``TTSStoppedFrame`` passes when its speech has sounded, and a change of settings holds for the
    speech behind it. ``InterruptionFrame`` silences the portrait; it listens while the user speaks. ``EndFrame`` waits
    for the speech.

    Arguments:
        live: the engine, which the service starts and closes.
        settings: emotion, intensity and fade at the start.
        kwargs: of ``AIService``.
    """

    Settings = FlowVQTalkerVideoSettings
    _settings: FlowVQTalkerVideoSettings

    def __init__(self, live: LiveTalker, *, settings: FlowVQTalkerVideoSettings | None = None, **kwargs: Any) -> None:
        chosen = self.Settings(model=None, emotion=None, intensity=1.0, fade=0.5)
        if settings is not None:
            chosen.apply_update(settings)
        super().__init__(settings=chosen, **kwargs)
        self._live, self._segments = live, Segments[Frame](live)
        self._task: asyncio.Task[None] | None = None
        self._silent = asyncio.Event()
        self._set_emotion()

    def _set_emotion(self) -> None:
        chosen: Any = self._settings
        if chosen.emotion is not None:
            self._live.set_emotion(chosen.emotion, chosen.intensity, chosen.fade)

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """See the class."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TTSAudioRawFrame):
            pcm = np.frombuffer(frame.audio, np.int16).reshape(-1, frame.num_channels)
            try:
                self._live.push(pcm, frame.sample_rate)
            except UserError as error:
                await self.push_error(error_msg=str(error), exception=error)
            return
        if isinstance(frame, TTSStoppedFrame):
            self._live.end_of_utterance()
            self._segments.mark(frame)
            return
        if isinstance(frame, ServiceUpdateSettingsFrame) and isinstance(frame.delta, self.Settings):
            self._segments.mark(frame)
            return
        if isinstance(frame, InterruptionFrame):
            self._segments.interrupt()
        elif isinstance(frame, UserStartedSpeakingFrame | UserStoppedSpeakingFrame):
            self._live.listen(isinstance(frame, UserStartedSpeakingFrame))
        await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame):  # whoever is downstream must have seen it before the first image
            self._task = self.create_task(self._stream())

    async def _update_settings(self, delta: ServiceSettings) -> dict[str, Any]:
        before = self._settings.copy()
        changed: dict[str, Any] = await super()._update_settings(delta)
        try:
            self._set_emotion()
        except UserError as error:
            self._settings = before
            await self.push_error(error_msg=str(error), exception=error)
        return changed

    async def _stream(self) -> None:
        try:
            async for frame in self._live:
                await self._push(frame)
                if not self._segments.pending:
                    self._silent.set()
        except Exception as error:
            await self.push_error(
                error_msg=f"the engine stopped: {error}", exception=error, force_treat_as_permanent=True
            )
        finally:
            self._silent.set()

    async def _push(self, frame: LiveFrame) -> None:
        speaks, reached = self._segments.follow(frame)
        pts = round(frame.pts * 1e9)
        if frame.image is not None:
            height, width = frame.image.shape[:2]
            image = OutputImageRawFrame(image=frame.image.tobytes(), size=(width, height), format="RGB")
            image.pts = pts
            await self.push_frame(image)
        if speaks:
            sound = TTSAudioRawFrame(audio=to_pcm(frame), sample_rate=self._live.audio_rate, num_channels=1)
            sound.pts = pts
            await self.push_frame(sound)
        for mark in reached:
            if isinstance(mark, ServiceUpdateSettingsFrame):
                await self._update_settings(mark.delta)
            else:
                await self.push_frame(mark)

    async def stop(self, frame: EndFrame) -> None:
        """Let the portrait finish its speech, then close the engine."""
        await super().stop(frame)
        self._live.end_of_utterance()
        if self._task is not None and not self._task.done():
            self._silent.clear()
            await self._silent.wait()
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        """Close the engine at once."""
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        """Close the engine, unless that was done."""
        await super().cleanup()
        await self._close()

    async def _close(self) -> None:
        if self._task is not None:
            await self.cancel_task(self._task)
            self._task = None
        await asyncio.to_thread(self._live.close)
