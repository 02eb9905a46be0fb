"""The stage of the voice's emotion on made-up voices."""

from __future__ import annotations

import json

import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.loading import load_voice
from flowvqtalker.speech.voice import VOICES
from flowvqtalker.train.release import add_weights
from flowvqtalker.train.voice_emotion import Config, Voice, fit_voice, listen, store


def voices(spread):
    """Eight speakers, each with a place of their own, saying each of three emotions twice."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for speaker in range(8):
        own = 0.5 * torch.randn(4, generator=generator)
        for label in (0, 3, 5):
            for _ in range(2):
                features = own + 6 * torch.eye(4)[label % 4] + spread * torch.randn(60, 4, generator=generator)
                samples = listen(features, torch.zeros(60, 80))
                made.append(Voice("toy", f"s{speaker}", label, samples))
    return made


def test_unheard_speakers_are_recognised_and_the_weights_are_stored(tmp_path):
    made = voices(0.5)
    assert {len(voice.samples) for voice in made} == {3}  # after 1 s and 2 s, and at the end
    (tmp_path / "run").mkdir()
    scores = store(made, 4, Config(), tmp_path / "run")
    assert scores["toy"] > 0.8 > 2 * scores["toy, chance"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["scores"] == scores
    add_weights(tmp_path / "run", "voice_emotion", path=tmp_path / "weights")
    loaded, fitted = load_voice(tmp_path / "weights"), fit_voice(made, 4, Config().l2)
    x = torch.cat([voice.samples for voice in made])
    torch.testing.assert_close(loaded(x), fitted(x), atol=0.02, rtol=0.02)
    assert {VOICES[i] for i in loaded(x).argmax(-1).tolist()} <= {"angry", "happy", "sad", "neutral"}


def test_one_emotion_is_refused(tmp_path):
    with pytest.raises(UserError, match="no speech of two emotions"):
        store([voice for voice in voices(0.5) if voice.label == 0], 4, Config(), tmp_path)
