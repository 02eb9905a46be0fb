"""Options of the motion: together, in conflict, and the names of samples."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import sample_paths
from flowvqtalker.motion.options import MotionOptions

from .conftest import joined


def test_options_by_name_and_as_one(talker, speech):
    options = MotionOptions(emotion="sad", seed=4)
    named = joined(talker.motion(speech, emotion="sad", seed=4))
    assert torch.equal(named[0], joined(talker.motion(speech, options=options))[0])
    mixed = joined(talker.motion(speech, options=options, emotion="happy"))
    assert torch.equal(mixed[0], joined(talker.motion(speech, emotion="happy", seed=4))[0])
    with pytest.raises(TypeError, match="emotoin"):
        talker.motion(speech, emotoin="sad")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"emotion": "happy", "emotion_track": "a.csv"}, "emotion and emotion_track exclude each other"),
        ({"emotion_reference": "a.png", "emotion_track": "a.csv"}, "emotion_reference and emotion_track exclude"),
        ({"emotion": "happy,sad", "emotion_reference": "a.png"}, "leave the mixture out"),
        ({"fixed_pose": True, "pose_from": "a.npz"}, "fixed_pose and pose_from exclude each other"),
        ({"blink_rate": 61}, "blink_rate must be between 0 and 60, got 61"),
        ({"emotion_track": "none.csv"}, "none.csv does not exist"),
        ({"pose_from": "none.npz"}, "none.npz does not exist"),
    ],
)
def test_choices_that_do_not_go_together(talker, speech, choices, message):
    with pytest.raises(UserError, match=message):
        talker.motion(speech, **choices)


def test_names_of_samples(tmp_path):
    assert sample_paths("a.mp4", 1)[0].name == "a.mp4"
    assert [path.name for path in sample_paths(tmp_path / "a.b.mp4", 3)] == ["a.b_1.mp4", "a.b_2.mp4", "a.b_3.mp4"]
    for count in (0, -1, 1001):
        with pytest.raises(UserError, match="num_samples must be from 1 to 1000"):
            sample_paths("a.mp4", count)
