"""The stage that distils the live speech encoder, on a tiny one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.train.speech_live import Config, SpeechLiveStage


def stage(**settings):
    torch.manual_seed(0)
    teacher = SpeechEncoder(SpeechEncoderConfig(dim=16, heads=2, width=8, back=3, reach=((1, 1), (2, 0))))
    random = np.random.default_rng(0)
    mels = {split: [random.normal(size=(400, 80)).astype(np.float16)] for split in ("train", "val")}
    return SpeechLiveStage(Config(frames=16, augment=0.0, **settings), teacher, torch.randn(64, 8), mels)


def test_the_short_encoder_learns_the_features_of_the_long_one():
    made = stage()
    assert (made.teacher.config.lookahead, made.student.config.lookahead) == (5, 1)
    optimiser = torch.optim.Adam(made.student.parameters(), 3e-3)
    batch = torch.stack([made.dataset("train")[i] for i in range(4)])
    assert batch.shape == (4, made.teacher.config.lookback + 16 + 5, 80, 7)
    losses = []
    for step in range(30):
        loss, logs = made.loss("speech_encoder", batch, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(logs["features"]))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in made.teacher.parameters())
    state, config = made.export()
    again = SpeechEncoder(SpeechEncoderConfig(**config))
    again.load_state_dict({key.removeprefix("audio."): value for key, value in state.items()})
    assert again.config.lookahead == 1


def test_a_look_ahead_that_is_not_shorter_is_refused():
    with pytest.raises(UserError, match="does not shorten"):
        stage(ahead=2)
