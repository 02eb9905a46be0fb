"""The avatar behind the runner of the real package, in a room without a server."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("livekit.agents")

from livekit import rtc
from livekit.agents import AgentSession
from livekit.agents.voice.avatar import AudioSegmentEnd, AvatarRunner

from flowvqtalker.errors import UserError
from flowvqtalker.integrations.livekit import AvatarSession, FlowVQTalkerGenerator

from ..conftest import babble


def speech(seconds, rate=24_000):
    pcm = (babble(seconds, rate=rate) * 20_000).astype(np.int16)
    return [rtc.AudioFrame(block.tobytes(), rate, 1, len(block)) for block in np.array_split(pcm, 10)]


def test_the_generator_gives_images_always_and_sound_while_it_speaks(live):
    said = []
    change, live.set_emotion = live.set_emotion, lambda *given: (said.append(given), change(*given))

    async def main():
        generator = FlowVQTalkerGenerator(live)
        for frame in speech(0.6):
            await generator.push_audio(frame)
        await generator.push_audio(AudioSegmentEnd())
        with pytest.raises(UserError, match="unknown emotion"):
            generator.set_emotion("merry")
        generator.set_emotion("sad", 0.5)
        found = []
        async for frame in generator:
            found.append(frame)
            if isinstance(frame, rtc.VideoFrame) and said:
                return found

    found = asyncio.run(main())
    sound = [frame for frame in found if isinstance(frame, rtc.AudioFrame)]
    assert sum(frame.duration for frame in sound) == pytest.approx(0.64, abs=0.05)
    at = found.index(next(frame for frame in found if isinstance(frame, AudioSegmentEnd)))
    assert found.index(sound[-1]) < at < len(found) - 1
    assert found[-1].width == found[-1].height == 512
    assert said == [("sad", 0.5, 0.5)]


class Room(rtc.EventEmitter):
    """A connected room whose tracks somebody subscribes to at once."""

    name = "room"

    def __init__(self):
        super().__init__()
        self.published = []
        self.remote_participants = {}
        self.local_participant = SimpleNamespace(
            identity="agent", publish_track=self.publish, track_publications={}, kind=0
        )

    def isconnected(self):
        return True

    async def publish(self, track, options):
        self.published.append(options.source)

        async def subscribed():
            return None

        return SimpleNamespace(wait_for_subscription=subscribed)


def test_the_session_speaks_is_interrupted_and_closes(live, monkeypatch):
    images = []
    capture = rtc.VideoSource.capture_frame
    monkeypatch.setattr(
        rtc.VideoSource, "capture_frame", lambda self, f, **k: (images.append(f), capture(self, f, **k))
    )

    async def main():
        session, room, events = AgentSession(), Room(), []
        avatar = AvatarSession(live)
        await avatar.start(session, room)
        assert avatar.avatar_identity == "agent" and isinstance(avatar._runner, AvatarRunner)
        output = session.output.audio
        output.on("playback_started", lambda event: events.append("started"))
        output.on("playback_finished", lambda event: events.append((event.interrupted, event.playback_position)))
        session.emit("user_state_changed", SimpleNamespace(new_state="speaking"))
        assert live._engine.listening

        for frame in speech(0.6):
            await output.capture_frame(frame)
        output.flush()
        await asyncio.wait_for(output.wait_for_playout(), 10)
        assert events[0] == "started" and events[1] == (False, pytest.approx(0.62, abs=0.05))

        for frame in speech(5.0):
            await output.capture_frame(frame)
        output.flush()
        await asyncio.sleep(0.7)
        start = time.monotonic()
        output.clear_buffer()
        await asyncio.wait_for(output.wait_for_playout(), 10)
        assert time.monotonic() - start < 1
        assert events[3][0] and 0.1 < events[3][1] < 1.0
        await avatar.aclose()
        return room

    room = asyncio.run(main())
    assert room.published == [rtc.TrackSource.SOURCE_MICROPHONE, rtc.TrackSource.SOURCE_CAMERA]
    assert len(images) >= 2
    with pytest.raises(UserError, match="closed"):
        live.push(babble(0.1), 16_000)
