"""Options of the motion as keywords."""

from __future__ import annotations

from dataclasses import fields

import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.motion.options import MotionChoices, MotionOptions


def test_keywords_are_the_fields_of_the_options():
    assert list(MotionChoices.__annotations__) == [field.name for field in fields(MotionOptions)]


def test_keywords_replace_fields_and_none_does_not():
    assert MotionOptions(seed=3).updated({"emotion": "happy", "seed": None}) == MotionOptions(emotion="happy", seed=3)
    with pytest.raises(UserError, match="intensity must be between 0 and 2"):
        MotionOptions().updated({"intensity": 3.0})
    with pytest.raises(TypeError, match="volume"):
        MotionOptions().updated({"volume": 1})


def test_a_calm_face_needs_a_reference():
    with pytest.raises(UserError, match="reference_neutral needs emotion_reference"):
        MotionOptions(reference_neutral="calm.jpg")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"valence": 1.2}, "valence must be between -1 and 1, got 1.2"),
        ({"arousal": float("nan")}, "arousal must be between -1 and 1, got nan"),
        ({"valence": 0.5, "emotion": "happy"}, "emotion and valence exclude each other"),
        ({"arousal": 0.5, "emotion_track": "a.csv"}, "emotion_track and arousal exclude each other"),
        ({"emotion": "sad", "emotion_track": "a.csv"}, "emotion and emotion_track exclude each other"),
    ],
)
def test_wrong_choices_of_emotion_are_named(given, message):
    with pytest.raises(UserError, match=message):
        MotionOptions(**given)
