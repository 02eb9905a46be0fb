"""The clock: pace, consumers of every kind, machines that are too slow."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.live import LiveTalker
from flowvqtalker.live import talker as live_module

from ..conftest import babble


def make(live_talker, live_portrait, **settings):
    return LiveTalker(live_talker, live_portrait, audio_rate=16_000, **settings)


def test_frames_and_sound_come_in_time(live_talker, live_portrait):
    async def main():
        frames, times = [], [time.monotonic()]
        async with make(live_talker, live_portrait, fps=12.5) as live:
            live.push(babble(0.4), 16_000)
            live.end_of_utterance()
            async for frame in live:
                frames.append(frame)
                times.append(time.monotonic())
                if len(frames) == 25:
                    break
        assert [frame.pts for frame in frames] == pytest.approx([n / 25 for n in range(25)])
        assert sum(frame.image is not None for frame in frames) <= 13
        assert np.concatenate([frame.audio for frame in frames]).any()
        assert times[-1] - times[0] > 0.9  # not faster than real time
        with pytest.raises(UserError, match="closed"):
            live.push(babble(0.1), 16_000)

    asyncio.run(main())


def test_a_consumer_that_is_slow_or_stops_loses_images_and_no_sound(live_talker, live_portrait, monkeypatch, caplog):
    monkeypatch.setattr(live_module, "_IMAGES", 3)
    monkeypatch.setattr(live_module, "_BACKLOG", 8)
    with make(live_talker, live_portrait) as live:
        frames = live.frames()
        got = [next(frames)]
        deadline = time.monotonic() + 20
        while "nobody takes the frames" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        assert len(live._out) == 8  # the clock waits, memory does not grow
        got += [next(frames) for _ in range(12)]
    assert [round(25 * frame.pts) for frame in got] == list(range(13))
    assert all(frame.image is None for frame in got[1:5])
    assert all(len(frame.audio) == 640 for frame in got)


def test_a_consumer_that_disappears_leaves_nothing_running(live_talker, live_portrait):
    async def main():
        live = make(live_talker, live_portrait)
        stream = live.__aiter__()
        await stream.__anext__()
        waiting = asyncio.create_task(stream.__anext__())
        await asyncio.sleep(0)
        waiting.cancel()
        live.close()

    asyncio.run(main())
    assert "flowvqtalker-live" not in {thread.name for thread in threading.enumerate()}


def test_a_machine_that_is_too_slow_lowers_the_rate_once_and_keeps_the_sound(live_talker, live_portrait, caplog):
    """A clock that each image moves on by 100 ms."""
    now = 0.0
    live = make(live_talker, live_portrait, clock=lambda: now)
    live._engine._draw = lambda motion, draw: draw or None  # type: ignore[method-assign]
    live._pause = lambda due: 0.0  # type: ignore[method-assign]
    kept = []

    def deliver(frame):
        nonlocal now
        now = max(now + (0.1 if frame.image else 0.005), (frame.pts or 0) + 0.04)
        kept.append(frame)
        if len(kept) == 800:
            live._closed = True

    live._deliver = deliver  # type: ignore[method-assign]
    live.start()
    live._thread.join(60)
    assert len(kept) == 800
    assert live.fps in (10.0, 5.0)
    assert caplog.text.count("too slow") == 1
    assert live.dropped > 0
    last = kept[-100:]
    assert sum(bool(frame.image) for frame in last) == pytest.approx(4 * live.fps, abs=3)


def test_an_interruption_silences_what_was_delivered_but_not_taken(live_talker, live_portrait):
    with make(live_talker, live_portrait) as live:
        live.push(babble(3.0), 16_000)
        frames = live.frames()
        while not next(frames).audio.any():
            pass
        live.interrupt()
        assert live.waiting == 0
        rest = np.concatenate([next(frames).audio for _ in range(5)])
        assert np.abs(rest[640 + 64 :]).max() == 0  # one tick of 40 ms may be under way


def test_errors_reach_who_asks(live_talker, live_portrait):
    with pytest.raises(UserError, match="fps must be one of 25, 20"):
        make(live_talker, live_portrait, fps=24)
    with pytest.raises(UserError, match="audio_rate must be a multiple of 25"):
        LiveTalker(live_talker, live_portrait, audio_rate=11_111)
    live = make(live_talker, live_portrait)
    for values, message in ((("merry",), "unknown emotion"), (("sad", 3.0), "intensity"), (("sad", 1.0, -1), "fade")):
        with pytest.raises(UserError, match=message):
            live.set_emotion(*values)

    def fail(draw=True):
        raise RuntimeError("no more")

    live._engine.tick = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more"):
        list(live.frames())
