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
from flowvqtalker.live.drawing import Drawer, Pace
from flowvqtalker.live.engine import LiveFrame, State

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
        # The clock may wait while the last images are being drawn.
        while ("nobody takes the frames" not in caplog.text or len(live._out) < 8) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        assert len(live._out) == 8  # memory does not grow
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


def simulate(pace, seconds, ticks, start=0):
    """Ticks with an image, if an image takes so many seconds and nobody draws but one after the other."""
    drawn, done = [], []
    for number in range(start, start + ticks):
        now = number / 25
        done = [time for time in done if time > now]
        if pace(number, 0.0, len(done), seconds):
            drawn.append(number)
            done.append(max([now, *done]) + seconds)
    return drawn


def test_a_machine_that_is_too_slow_lowers_the_rate_once_and_a_fast_one_keeps_it(caplog):
    fast = Pace(25.0)
    assert simulate(fast, 0.036, 500) == list(range(500))
    assert not caplog.text
    slow = Pace(25.0)
    simulate(slow, 0.094, 800)
    assert slow.fps == 10.0
    assert caplog.text.count("too slow") == 1
    assert slow.dropped > 0
    before = slow.dropped
    assert len(simulate(slow, 0.094, 250, 800)) == 100
    assert slow.dropped == before
    assert len(simulate(Pace(25.0), 3.0, 500)) >= 18  # one a second whatever it takes


def test_the_rate_rises_again_when_the_machine_is_free_and_waits_longer_each_time(caplog):
    pace = Pace(20.0)
    simulate(pace, 0.094, 800)
    assert pace.fps == 10.0
    at, waits = 800, []
    for _ in range(3):
        begun = at
        while pace.fps < 20.0:
            simulate(pace, 0.03, 1, at)
            at += 1
        waits.append(at - begun)
        simulate(pace, 0.094, 400, at)
        at += 400
    assert waits[0] < waits[1] < waits[2]
    simulate(pace, 0.03, 20_000, at)
    assert pace.fps == 20.0  # not above what was asked for
    assert caplog.text.count("too slow") == 1


def test_a_machine_that_is_slow_now_and_then_has_the_full_rate_most_of_the_time():
    pace, drawn = Pace(25.0), 0
    for minute in range(30):  # five seconds of each minute
        drawn += len(simulate(pace, 0.094, 125, 1500 * minute))
        drawn += len(simulate(pace, 0.03, 1375, 1500 * minute + 125))
    assert drawn / 1800 > 21


def test_frames_are_held_for_as_many_ticks_as_images_are_drawn_at_once():
    """With or without an image, and until it is drawn; at the end nothing is held."""
    passed, drawn = [], threading.Event()
    drawer = Drawer(2, 1, lambda frame: passed.append(frame.pts), pytest.fail)
    for number in range(4):
        drawer.begin(number)
        frame = LiveFrame(None, np.zeros(640, np.float32), number / 25, State.IDLE, None)  # type: ignore[arg-type]
        drawer.add(number, frame, (lambda: drawn.wait() and np.zeros(3)) if number == 2 else None)
    assert passed == [0, 1 / 25]
    drawer.begin(4)
    assert passed == [0, 1 / 25]  # the image of the third is not there
    drawn.set()
    drawer.close()
    assert passed == [0, 1 / 25, 2 / 25, 3 / 25]
    assert Drawer(1, 1, passed.append, pytest.fail).hold == 0


def test_the_clock_does_not_wait_for_an_image(live_talker, live_portrait):
    go_on = threading.Event()
    with make(live_talker, live_portrait) as live:
        live._engine._draw = lambda renderer, window: go_on.wait() and np.zeros((8, 8, 3), np.uint8)
        deadline = time.monotonic() + 60
        while live._engine.ticks < 10 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not live._out
        live.interrupt()  # what is under way loses its sound
        go_on.set()
        frames = live.frames()
        got = [next(frames) for _ in range(10)]
    assert [round(25 * frame.pts) for frame in got] == list(range(10))
    assert 1 <= sum(frame.image is not None for frame in got) <= 3
    assert live.dropped > 0


def test_an_interruption_silences_what_was_delivered_but_not_taken(live_talker, live_portrait):
    with make(live_talker, live_portrait) as live:
        live.push(babble(3.0), 16_000)
        frames = live.frames()
        while not next(frames).audio.any():
            pass
        live.interrupt()
        assert live.waiting == 0
        rest = np.concatenate([next(frames).audio for _ in range(8)])
    (loud,) = np.nonzero(rest)
    assert len(loud) <= 64  # it fades where the clock stood


def test_errors_reach_who_asks(live_talker, live_portrait):
    with pytest.raises(UserError, match=r"fps must be one of 25, 22\.5, 20"):
        make(live_talker, live_portrait, fps=24)
    with pytest.raises(UserError, match="audio_rate must be a multiple of 25"):
        LiveTalker(live_talker, live_portrait, audio_rate=11_111)
    live = make(live_talker, live_portrait)
    for values, message in ((("merry",), "unknown emotion"), (("sad", 3.0), "intensity"), (("sad", 1.0, -1), "fade")):
        with pytest.raises(UserError, match=message):
            live.set_emotion(*values)

    def fail(*arguments):
        raise RuntimeError("no more")

    live._engine.advance = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more"):
        list(live.frames())
    live = make(live_talker, live_portrait)
    live._engine._draw = fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more"):
        list(live.frames())
