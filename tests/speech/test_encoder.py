"""Speech encoders: what a feature sees, and streams equal to the whole clip."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.speech.encoder import AudioConfig, AudioEncoder, AudioStream, SpeechEncoder, SpeechEncoderConfig

AUDIO = AudioConfig(mels=6, columns=8, width=8, layers=2, lookahead=1)


def test_audio_encoder_sees_its_neighbourhood_only():
    torch.manual_seed(0)
    encoder = AudioEncoder(AUDIO).eval()
    assert (AUDIO.lookback, AUDIO.lookahead) == (3, 1)
    windows = torch.randn(1, 12, 6, 8)
    before = encoder(windows)
    assert before.shape == (1, 8, 8)
    windows[:, 6] += 1
    changed = (encoder(windows) - before).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False, False, True, True, True, True, True, False]  # frame t reads windows t .. t + 4
    with pytest.raises(UserError, match="lookahead"):
        AudioConfig(layers=2, lookahead=5)


DEEP = SpeechEncoderConfig(dim=8, heads=2, back=3, ahead=1, reach=((1, 1), (2, 0)), width=5)


def test_speech_encoder_sees_its_reach_only():
    torch.manual_seed(0)
    encoder = SpeechEncoder(DEEP).eval()
    assert (DEEP.lookback, DEEP.lookahead) == (9, 3)
    windows = torch.randn(1, 9 + 16 + 3, 80, 7)
    before = encoder(windows)
    assert before.shape == (1, 16, 5)
    windows[:, 12] += 1  # of frame 3
    changed = (encoder(windows) - before).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero()[:, 0].tolist() == list(range(13))
    with pytest.raises(UserError, match="multiple of heads"):
        replace(DEEP, heads=3)


@pytest.mark.parametrize("config", [AUDIO, DEEP])
@pytest.mark.parametrize("frames", [1, 3, 30])
def test_streamed_encoder_equals_the_whole_clip(config, frames):
    torch.manual_seed(0)
    encoder = (SpeechEncoder if isinstance(config, SpeechEncoderConfig) else AudioEncoder)(config).eval()
    windows = torch.randn(frames, config.mels, config.columns)
    stream = AudioStream(encoder)
    with torch.no_grad():
        parts = [stream.push(window) for window in windows]
        assert [len(part) for part in parts] == [int(i >= config.lookahead) for i in range(frames)]
        found = [one for part in [*parts, stream.finish()] for one in part]
    assert torch.allclose(torch.cat(found), encoder.encode_clip(windows), atol=1e-5)
