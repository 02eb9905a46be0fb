"""Emotion auto: what is heard in a voice, and the face that follows it."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_voice
from flowvqtalker.motion.auto import VoiceFollower
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.speech.features import windows as windows_of
from flowvqtalker.speech.voice import VOICES, VoiceEmotion, VoiceState

from .conftest import make


class Script(VoiceEmotion):
    """Hears neutral, and from a loud frame on anger."""

    def __init__(self, turn):
        super().__init__()
        self.turn, self.calls = turn, 0

    def forward(self, statistics):
        self.calls += 1
        return 9.0 * torch.eye(len(VOICES))[VOICES.index("angry" if self.calls > self.turn else "neutral")]


@pytest.fixture(scope="module")
def heard(trained, sample_speech):
    return windows_of(decode.load(sample_speech)[: 16_000 * 5], trained[0].audio.config.frontend)


def follow(trained, heard, cuts, voice=None, **options):
    follower = VoiceFollower(make(trained, seed=1, blink_rate=0), voice or Script(20), **options)
    parts = [follower(part) for part in heard.split(cuts)]
    return Motion.join([*parts, follower(heard[:0], last=True)]).expression, follower


def test_the_face_follows_the_voice_and_any_cut_of_the_stream_does_the_same(trained, heard):
    whole, follower = follow(trained, heard, len(heard))
    assert follower.generator.emotion == "angry" and len(whole) == len(heard)
    assert torch.equal(follow(trained, heard, 7)[0], whole)
    neutral = make(trained, seed=1, blink_rate=0)(heard, last=True).expression
    changed = int((whole - neutral).norm(dim=1).gt(1e-4).int().argmax())
    assert 38 < changed < 110
    assert torch.equal(whole[:changed], neutral[:changed])
    steps = whole.diff(dim=0).norm(dim=1)
    assert steps[changed:].max() < 1.5 * neutral.diff(dim=0).norm(dim=1).max()  # no jump


def test_a_named_emotion_ends_the_following(trained, heard):
    follower = VoiceFollower(make(trained, blink_rate=0), Script(0))
    follower(heard[:20])
    follower.change_emotion("happy")
    follower(heard[20:], last=True)
    assert follower.generator.emotion == "happy"


def test_statistics_forget_silence_and_skip_pauses():
    state, generator = VoiceState(), torch.Generator().manual_seed(0)
    for _ in range(30):
        state.push(torch.full((2,), 50.0), torch.full((80,), -1.5))  # silence, the loudest so far
    loud = torch.randn(400, 2, generator=generator) + torch.tensor([1.0, -1.0])
    for feature in loud:
        assert state.push(feature, torch.full((80,), 0.5))
        assert not state.push(torch.full((2,), 50.0), torch.full((80,), -1.5))
    mean, spread = state.statistics().view(2, -1)[:, :2]
    torch.testing.assert_close(mean, torch.tensor([1.0, -1.0]), atol=0.4, rtol=0)
    torch.testing.assert_close(spread, torch.ones(2), atol=0.3, rtol=0)


def test_the_bundled_regression_hears_the_sample(talker, trained, sample_speech):
    voice = load_voice()
    assert voice is not None and voice.linear.out_features == len(VOICES)
    with pytest.raises(UserError, match="emotion auto needs"):
        talker.stream(options=MotionOptions(emotion="auto"))
    with pytest.raises(UserError, match="needs flows with the speech encoder"):
        VoiceFollower(talker.stream().generator, voice)
    with pytest.raises(UserError, match="with one emotion or with none"):
        MotionOptions(emotion="auto", emotion_reference="a.jpg")
