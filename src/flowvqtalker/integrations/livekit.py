"""A LiveKit avatar that runs in the agent's own process. Needs the extra ``livekit``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from livekit import rtc
from livekit.agents import AgentSession, UserStateChangedEvent
from livekit.agents.voice import avatar

from flowvqtalker.constants import CROP
from flowvqtalker.errors import UserError
from flowvqtalker.integrations.segments import Segments, to_pcm
from flowvqtalker.live import LiveTalker

__all__ = ["AvatarSession", "FlowVQTalkerGenerator"]


class FlowVQTalkerGenerator(avatar.VideoGenerator):  # type: ignore[misc]
    """The engine as LiveKit's ``AvatarRunner`` takes it: images at all times, sound while the portrait speaks.

    Arguments:
        live: the engine; whoever made it closes it.
    """

    def __init__(self, live: LiveTalker) -> None:
        self._live = live
        self._segments = Segments[avatar.AudioSegmentEnd | tuple[str, float, float]](live)

    def set_emotion(self, emotion: str, intensity: float = 1.0, fade: float = 0.5) -> None:
        """Emotion of the speech that is pushed from now on; what waits already keeps its own.

        Raises:
            UserError: see :meth:`LiveTalker.set_emotion`.
        """
        self._live.check_emotion(emotion, intensity, fade)
        self._segments.mark((emotion, intensity, fade))

    async def push_audio(self, frame: rtc.AudioFrame | avatar.AudioSegmentEnd) -> None:
        """Speech, or the end of a segment."""
        if isinstance(frame, avatar.AudioSegmentEnd):
            self._live.end_of_utterance()
            self._segments.mark(frame)
        else:
            self._live.push(np.frombuffer(frame.data, np.int16).reshape(-1, frame.num_channels), frame.sample_rate)

    def clear_buffer(self) -> None:
        """Stop speaking at once."""
        self._segments.interrupt()

    async def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | avatar.AudioSegmentEnd]:
        """Images, sound, and the end of each segment once it has sounded."""
        async for frame in self._live:
            speaks, reached = self._segments.follow(frame)
            if frame.image is not None:
                height, width = frame.image.shape[:2]
                yield rtc.VideoFrame(width, height, rtc.VideoBufferType.RGB24, frame.image.tobytes())
            if speaks:
                yield rtc.AudioFrame(to_pcm(frame), self._live.audio_rate, 1, len(frame.audio))
            for mark in reached:
                if isinstance(mark, tuple):
                    self._live.set_emotion(*mark)
                else:
                    yield mark


class AvatarSession(avatar.AvatarSession):  # type: ignore[misc]
    """Gives an ``AgentSession`` a face; start it before the session.

    The agent's own participant publishes sound and images; the portrait listens while the user speaks.

    Arguments:
        live: the engine, which the session starts and closes.
    """

    _room: rtc.Room | None

    def __init__(self, live: LiveTalker) -> None:
        super().__init__()
        self._live, self._generator = live, FlowVQTalkerGenerator(live)
        self._runner: avatar.AvatarRunner | None = None

    @property
    def avatar_identity(self) -> str:
        """The agent's own."""
        if self._room is None:
            raise UserError("the avatar has no room before start(); start it first")
        identity: str = self._room.local_participant.identity
        return identity

    @property
    def provider(self) -> str:
        """Name in metrics."""
        return "flowvqtalker"

    def set_emotion(self, emotion: str, intensity: float = 1.0, fade: float = 0.5) -> None:
        """See :meth:`FlowVQTalkerGenerator.set_emotion`."""
        self._generator.set_emotion(emotion, intensity, fade)

    async def start(self, agent_session: AgentSession[Any], room: rtc.Room) -> None:
        """Take over the session's sound and publish the portrait in the room."""
        await super().start(agent_session, room)
        sound = avatar.QueueAudioOutput(sample_rate=self._live.audio_rate, wait_playback_start=True)
        options = avatar.AvatarOptions(
            video_width=CROP,
            video_height=CROP,
            video_fps=self._live.fps,
            audio_sample_rate=self._live.audio_rate,
            audio_channels=1,
        )
        self._runner = avatar.AvatarRunner(room, audio_recv=sound, video_gen=self._generator, options=options)
        await self._runner.start()
        agent_session.output.replace_audio_tail(sound)
        agent_session.on("user_state_changed", self._listen)

    def _listen(self, event: UserStateChangedEvent) -> None:
        self._live.listen(event.new_state == "speaking")

    async def aclose(self) -> None:
        """Leave the session and close the engine."""
        if self._agent_session is not None:
            self._agent_session.off("user_state_changed", self._listen)
        if self._runner is not None:
            await self._runner.aclose()
            self._runner = None
        if self._room is not None:
            # The base class would remove the avatar's participant from the room, which here is the agent's.
            self._room.off("connection_state_changed", self._on_connection_state_changed)
            self._room = None
        await super().aclose()
        await asyncio.to_thread(self._live.close)
