"""Ticks: sound and motion for blocks of any size, changes on the way, and what goes in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode
from flowvqtalker.live.behaviour import Behaviour
from flowvqtalker.live.engine import LiveEngine, State
from flowvqtalker.live.sound import MAX_SECONDS, SoundQueue
from flowvqtalker.motion.mouth import CLOSED
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.provenance import Marks
from flowvqtalker.provenance.watermark import detect, to_luma

from ..conftest import babble


@pytest.fixture(scope="module")
def real_speech(sample_speech):
    return decode.load(sample_speech)[:24_000]


def engine(talker, portrait, rate=16_000, **settings):
    return LiveEngine(talker, portrait, MotionOptions(seed=3), audio_rate=rate, **settings)


def run(made, ticks):
    frames = [made.tick(draw=False) for _ in range(ticks)]
    expression = torch.cat([frame.motion.expression for frame in frames])
    return frames, expression, np.concatenate([frame.audio for frame in frames])


@pytest.mark.parametrize("seed", range(2))
def test_blocks_of_any_size_give_the_motion_of_the_file(live_talker, live_portrait, real_speech, seed):
    made = engine(live_talker, live_portrait, behave=False)
    random, at = np.random.default_rng(seed), 0
    while at < len(real_speech):
        size = int(random.integers(1, 4000))
        made.sound.push(real_speech[at : at + size], 16_000)
        at += size
    made.sound.end()
    _, expression, sound = run(made, 45)

    stream = live_talker.stream(live_portrait, MotionOptions(seed=3))
    ahead = len(made._recent)
    whole = stream.push(np.concatenate([np.zeros(ahead), real_speech, np.zeros(640 * 60)]).astype(np.float32))
    assert torch.equal(expression, whole.expression[:45])
    assert np.array_equal(sound[ahead : ahead + len(real_speech)], real_speech)
    assert not sound[:ahead].any() and not sound[ahead + len(real_speech) :].any()


def test_sound_keeps_its_rate_and_its_length(live_talker, live_portrait):
    made = engine(live_talker, live_portrait, rate=24_000)
    wave = babble(0.5, rate=44_100)
    for block in np.array_split(wave, 50):
        made.sound.push((block * 20_000).astype(np.int16), 44_100)
    made.sound.end()
    frames, _, sound = run(made, 25)
    assert {len(frame.audio) for frame in frames} == {960}
    heard = np.flatnonzero(np.abs(sound) > 1e-4)
    assert (heard[-1] - heard[0]) / 24_000 == pytest.approx(0.5, abs=0.005)
    assert frames[3].pts == pytest.approx(0.12)


def test_the_mouth_is_shut_without_speech_and_after_an_interruption(live_talker, live_portrait, real_speech):
    made = engine(live_talker, live_portrait)
    closer = made._stream.gate.closer
    _, idle, _ = run(made, 20)
    assert made.state is State.IDLE
    assert closer.gap(idle[5:]).max() <= CLOSED
    made.sound.push(real_speech, 16_000)
    _, spoken, _ = run(made, 20)
    assert made.state is State.TALKING
    assert closer.gap(spoken).max() > CLOSED
    made.interrupt()
    _, after, sound = run(made, 20)
    assert not sound[64:].any()  # a fade of 4 ms
    assert closer.gap(after[5:]).max() <= CLOSED  # 200 ms
    assert made.state is State.IDLE


def test_an_emotion_is_reached_without_a_jump(live_talker, live_portrait):
    plain, changed = engine(live_talker, live_portrait), engine(live_talker, live_portrait)
    _, before, _ = run(plain, 40)
    run(changed, 10)
    changed.set_emotion("angry", 1.5, 0.4)
    _, after, _ = run(changed, 30)
    difference = (after - before[10:]).norm(dim=1)
    assert difference[0] == 0
    assert difference[12:].min() > 0
    # Cross-faded: no step of the difference is larger than two frames' share of it.
    assert (difference[1:11] - difference[:10]).max() < 0.5 * difference[9:14].max()


def test_another_portrait_takes_over(live_talker, live_portrait, astronaut):
    made = engine(live_talker, live_portrait, behave=False)
    run(made, 5)
    made.set_portrait(live_talker.portrait(astronaut[:, ::-1].copy()), "sad", 1.0)
    frames, _, _ = run(made, 3)
    assert [frame.pts for frame in frames] == pytest.approx([0.2, 0.24, 0.28])
    assert not torch.allclose(frames[0].motion.pose[0], live_portrait.pose, atol=1e-3)


def test_frames_are_marked_unless_told_otherwise(live_talker, live_portrait):
    made = engine(live_talker, live_portrait, marks=Marks(mark_id=7, label=True))
    images = [made.tick().image for _ in range(12)]
    found = detect(to_luma(image) for image in images)
    assert found.found and found.identifier == 7
    plain = engine(live_talker, live_portrait, marks=Marks(mark=False))
    first = plain.tick().image.astype(int)
    assert np.abs(first[:400] - images[0][:400]).mean() < 3  # invisible
    assert np.abs(first[490:, :120] - images[0][490:, :120]).mean() > 20  # the label


def test_two_engines_do_not_disturb_each_other(live_talker, live_portrait, real_speech):
    def fresh():
        made = engine(live_talker, live_portrait)
        made.sound.push(real_speech, 16_000)
        return made

    alone = run(fresh(), 20)[1]
    first, second = fresh(), fresh()
    pairs = [(first.tick(draw=False), second.tick(draw=False)) for _ in range(20)]
    for side in zip(*pairs, strict=True):
        assert torch.equal(torch.cat([frame.motion.expression for frame in side]), alone)


def test_a_listener_nods_and_an_idle_face_moves_a_little():
    degrees = {}
    for listening in (False, True):
        behaviour = Behaviour(0)
        pitch = np.degrees([float(behaviour(False, listening)[0]) for _ in range(1500)])
        degrees[listening] = pitch.max()
        assert np.abs(np.diff(pitch)).max() < 1.0  # no jump
    assert degrees[True] > 3 > degrees[False] > 0.2
    talking = Behaviour(0)
    assert all(float(talking(True, False).abs().max()) < 1e-3 for _ in range(200))


@pytest.mark.parametrize(
    "samples, rate, message",
    [
        (np.array([0.0, np.nan, np.inf], np.float32), 16_000, "2 of 3 samples are NaN"),
        (np.full(10, 3000.0), 16_000, r"reach 3000.*divide int16"),
        (np.zeros(10, np.int32), 16_000, "int16, or floating point"),
        (np.zeros((2, 3, 4)), 16_000, r"\(n, channels\)"),
        (np.zeros(10), 4_000, "from 8000 to 192000, got 4000"),
        (np.zeros(10), 16_000.5, "whole number"),
        (np.zeros(int(MAX_SECONDS) * 8000 + 8000), 8_000, "would wait"),
    ],
)
def test_sound_that_cannot_be_is_refused_by_name(samples, rate, message):
    queue = SoundQueue(24_000)
    with pytest.raises(UserError, match=message):
        queue.push(samples, rate)
    queue.push(np.full(10, 1.5), 16_000)  # clipped; and the queue goes on


def test_sound_at_an_uneven_pace_stays_whole():
    random = np.random.default_rng(0)
    queue, wave = SoundQueue(16_000), np.random.default_rng(1).uniform(0.1, 1, 16_000).astype(np.float32)
    sent, out = 0, []
    for tick in range(200):
        due = min(len(wave), tick * 640)
        if random.random() < 0.7:  # a late block now and then
            queue.push(wave[sent:due], 16_000)
            sent = due
        if sent == len(wave):
            queue.end()
        out.append(queue.take())
    heard = np.concatenate(out)
    assert np.array_equal(heard[heard > 0], wave)
    gaps = np.diff(np.flatnonzero(heard > 0)) > 1
    assert gaps.sum() <= 8  # the reserve grows, so the speech soon flows


def test_a_stop_of_the_clock_is_made_up_for_in_pauses():
    queue, speech = SoundQueue(16_000), np.full(6_400, 0.5, np.float32)
    queue.push(np.concatenate([speech, np.zeros(16_000), speech]), 16_000)
    queue.skip_pauses(0.6)
    queue.end()
    heard = np.concatenate([queue.take() for _ in range(60)])
    assert (heard > 0).sum() == 12_800  # no speech is lost
    assert np.flatnonzero(heard)[-1] + 1 == 28_800 - 9_600
