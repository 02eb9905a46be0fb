"""Head and blinks under an emotion."""

from __future__ import annotations

import itertools
import math

import torch

from flowvqtalker.motion.emotion import EmotionKey, EmotionTrack
from flowvqtalker.motion.habits import Habits

from .conftest import make, windows


def poses(tiny, emotion, habits, **options):
    return make(tiny, emotion=emotion, habits=habits, blink_rate=0, **options)(windows(70), last=True).pose


def test_anger_lowers_the_head_and_happiness_moves_it_more(tiny):
    neutral = poses(tiny, "neutral", None)
    assert torch.equal(poses(tiny, "neutral", Habits()), neutral)
    lowered = (poses(tiny, "angry", Habits()) - neutral).rad2deg()
    assert lowered[0, 0].abs() < 0.3 and abs(float(lowered[-1, 0]) - 4.3) < 0.3  # starts at the source's pose
    half = poses(tiny, "angry", Habits(), intensity=0.5)
    assert abs(math.degrees(half[-1, 0] - neutral[-1, 0]) - 2.15) < 0.3
    torch.testing.assert_close(poses(tiny, "happy", Habits()), 1.45 * neutral)


def test_fear_blinks_less_and_a_change_takes_its_time(tiny):
    track = EmotionTrack((EmotionKey(0, "neutral"), EmotionKey(1, "fear")))
    generator = make(tiny, emotion=None, track=track, habits=Habits())
    factors = []
    for window in windows(110):
        generator(window[None])
        factors.append(generator._blinks.factor)
    assert factors[0] == 1 and 0.4 < factors[-1] < 0.5
    assert max(a - b for a, b in itertools.pairwise(factors)) < 0.06
