"""Marks come back when the speech before them has sounded."""

from __future__ import annotations

import numpy as np

from flowvqtalker.integrations.segments import Segments
from flowvqtalker.live.engine import LiveEngine
from flowvqtalker.motion.options import MotionOptions

from ..conftest import babble


class Ticking:
    """The engine without its clock."""

    def __init__(self, talker, portrait):
        self.engine = LiveEngine(talker, portrait, MotionOptions(), audio_rate=24_000)
        self.interrupt = self.engine.interrupt

    @property
    def pushed(self):
        return self.engine.sound.pushed

    def push(self, wave):
        self.engine.sound.push(wave, 16_000)
        self.engine.sound.end()


def test_marks_and_speech_are_those_of_the_sound(live_talker, live_portrait):
    live = Ticking(live_talker, live_portrait)
    segments = Segments(live)
    segments.mark("start")
    tone = np.full(4000, 0.25, np.float32)  # 250 ms
    live.push(tone)
    segments.mark("first")
    live.push(babble(0.3))
    segments.mark("second")
    sound, spoken, found = [], [], {}
    for tick in range(40):
        frame = live.engine.tick(draw=False)
        speaks, reached = segments.follow(frame)
        sound.append(frame.audio)
        spoken.append(speaks)
        found |= dict.fromkeys(reached, tick)
    assert not segments.pending
    loud = [bool(np.abs(block).max() > 1e-3) for block in sound]
    assert spoken == loud and sum(loud) < 20
    last = max(tick for tick in range(40) if loud[tick])
    assert found["start"] == 0 and found["second"] == last
    ahead = len(live.engine._delayed) / 24_000
    assert found["first"] == int((0.25 + ahead) * 25)


def test_an_interruption_drops_marks_and_what_waits(live_talker, live_portrait):
    live = Ticking(live_talker, live_portrait)
    segments = Segments(live)
    live.push(babble(2.0))
    segments.mark("dropped")
    for _ in range(10):
        segments.follow(live.engine.tick(draw=False))
    segments.interrupt()
    assert not segments.pending
    assert [segments.follow(live.engine.tick(draw=False)) for _ in range(10)] == [(False, [])] * 10
    live.push(babble(0.2))
    segments.mark("next")
    found = [segments.follow(live.engine.tick(draw=False)) for _ in range(20)]
    assert sum(speaks for speaks, _ in found) in (5, 6) and [marks for _, marks in found if marks] == [["next"]]
