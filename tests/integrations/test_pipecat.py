"""The service in a pipeline of the real package."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

pytest.importorskip("pipecat")

from pipecat.frames.frames import (
    ErrorFrame,
    InterruptionFrame,
    OutputImageRawFrame,
    ServiceUpdateSettingsFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
    UserStartedSpeakingFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.tests.utils import SleepFrame, run_test
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams

from flowvqtalker.errors import UserError
from flowvqtalker.integrations.pipecat import FlowVQTalkerVideoService

from ..conftest import babble


def tts(seconds, rate=22_050):
    pcm = (babble(seconds, rate=rate) * 20_000).astype(np.int16)
    blocks = np.array_split(pcm, max(1, round(seconds / 0.1)))
    return [TTSAudioRawFrame(audio=block.tobytes(), sample_rate=rate, num_channels=1) for block in blocks]


def of(kind, frames):
    return [frame for frame in frames if isinstance(frame, kind)]


def test_speech_comes_out_in_time_with_images_and_the_emotion_of_its_segment(live):
    said = []
    change, live.set_emotion = live.set_emotion, lambda *given: (said.append((given, time.monotonic())), change(*given))
    service = FlowVQTalkerVideoService(live, settings=FlowVQTalkerVideoService.Settings(emotion="happy"))
    sad = ServiceUpdateSettingsFrame(delta=service.Settings(emotion="sad", intensity=0.5))
    wrong = ServiceUpdateSettingsFrame(delta=service.Settings(emotion="merry"))
    frames = [TTSStartedFrame(), *tts(0.8), sad, *tts(0.4), wrong, TTSStoppedFrame()]
    down, up = asyncio.run(run_test(service, frames_to_send=frames))

    images, sound = of(OutputImageRawFrame, down), of(TTSAudioRawFrame, down)
    assert all(image.size == (512, 512) and len(image.image) == 3 * 512**2 for image in images)
    assert len(sound) in (30, 31, 32) and all(block.sample_rate == 16_000 for block in sound)
    pts = [block.pts for block in sound]
    assert np.diff(pts).tolist() == [40_000_000] * (len(pts) - 1)
    assert {image.pts for image in images} & set(pts)
    samples = np.concatenate([np.frombuffer(block.audio, np.int16) for block in sound])
    assert np.count_nonzero(np.abs(samples) > 500) > 5000
    kinds = [type(frame) for frame in down]
    assert kinds.index(TTSStoppedFrame) > max(n for n, kind in enumerate(kinds) if kind is TTSAudioRawFrame)
    assert [given for given, _ in said] == [("happy", 1.0, 0.5), ("sad", 0.5, 0.5), ("merry", 0.5, 0.5)]
    assert said[1][1] - said[0][1] > 0.7  # not when it was sent, but when the speech before it had sounded
    assert "unknown emotion 'merry'" in of(ErrorFrame, up)[0].error
    assert service.settings.emotion == "sad"
    with pytest.raises(UserError, match="closed"):
        live.push(babble(0.1), 16_000)


def test_an_interruption_silences_the_portrait_which_listens(live):
    service = FlowVQTalkerVideoService(live)
    frames = [*tts(5.0), TTSStoppedFrame(), SleepFrame(0.6), UserStartedSpeakingFrame(), InterruptionFrame()]
    start = time.monotonic()
    down, _ = asyncio.run(run_test(service, frames_to_send=[*frames, SleepFrame(0.5)]))
    assert time.monotonic() - start < 4
    at = [type(frame) for frame in down].index(InterruptionFrame)
    assert of(TTSAudioRawFrame, down[:at]) and len(of(TTSAudioRawFrame, down[at:])) <= 1
    assert of(OutputImageRawFrame, down[at:]) and not of(TTSStoppedFrame, down)
    assert live._engine.listening


class Output(BaseOutputTransport):
    """A transport that notes what it shows and plays."""

    def __init__(self):
        super().__init__(
            TransportParams(
                audio_out_enabled=True,
                video_out_enabled=True,
                video_out_is_live=True,
                video_out_width=512,
                video_out_height=512,
                video_out_framerate=25,
            )
        )
        self.shown, self.played = [], []

    async def start(self, frame):
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_video_frame(self, frame):
        self.shown.append(time.monotonic())
        return True

    async def write_audio_frame(self, frame):
        if np.abs(np.frombuffer(frame.audio, np.int16)).max(initial=0) > 500:
            self.played.append(time.monotonic())
        await asyncio.sleep(len(frame.audio) / 2 / frame.sample_rate)
        return True


def test_a_transport_shows_images_while_it_plays(live):
    output = Output()
    asyncio.run(
        run_test(Pipeline([FlowVQTalkerVideoService(live), output]), frames_to_send=[*tts(1.0), TTSStoppedFrame()])
    )
    assert len(output.played) > 15
    assert sum(output.played[0] < when < output.played[-1] for when in output.shown) >= 2
