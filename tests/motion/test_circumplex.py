"""Valence and arousal."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.motion.circumplex import PLACES, place_emotion
from flowvqtalker.motion.emotion import parse_emotion


def effect(valence, arousal):
    """Weights of the emotions times intensity: what the face shows of each."""
    mixture, intensity = place_emotion(valence, arousal)
    return intensity * np.array(parse_emotion(mixture))


@pytest.mark.parametrize("name", PLACES)
def test_an_emotion_is_met_at_its_place_and_grows_from_neutral(name):
    place = np.array(PLACES[name])
    for share in (0.25, 0.5, 1.0):
        shown = effect(*(share * place))
        assert shown[EMOTIONS.index(name)] == pytest.approx(share, abs=0.02)
        assert shown.sum() == pytest.approx(share, abs=0.02)
    assert effect(0, 0).sum() == 0


def test_the_whole_plane_is_continuous_and_in_range():
    for radius in (0.05, 0.5, 1.0):
        way = [effect(radius * math.cos(a), radius * math.sin(a)) for a in np.linspace(-math.pi, math.pi, 4000)]
        assert np.abs(np.diff(way, axis=0)).max() < 0.1 * radius
        assert min(map(np.sum, way)) >= 0 and max(map(np.sum, way)) <= 1.5 + 1e-6
    assert effect(1, 1)[EMOTIONS.index("happy")] > 0.3 < effect(1, 1)[EMOTIONS.index("surprised")]
    assert effect(0.5, -0.5).sum() < 0.3  # calm is nearly neutral
