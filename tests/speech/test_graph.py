"""The transformer as a graph returns what torch returns, frame by frame."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.speech.encoder import AudioStream, SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.graph import EncoderGraph
from flowvqtalker.speech.quantize import quantize


@pytest.mark.parametrize("frames", [1, 3, 30])
@pytest.mark.parametrize("ahead", [0, 2])
@torch.inference_mode()
def test_graph_streams_what_the_encoder_computes(ahead, frames):
    torch.manual_seed(0)
    encoder = SpeechEncoder(SpeechEncoderConfig(dim=64, heads=4, back=5, ahead=ahead)).eval()
    quantize(encoder, least=2**13)
    windows = torch.randn(frames, 80, 7)
    expected = encoder.encode_clip(windows)
    encoder.graph = EncoderGraph(encoder)
    stream = AudioStream(encoder)
    found = [feature for window in windows for feature in stream.push(window)]
    assert len(found) == max(0, frames - encoder.config.lookahead)
    result = torch.cat(found + stream.finish())
    assert result.shape == expected.shape
    # The graph may round rows to int8 in groups of 32.
    assert (result - expected).square().mean().sqrt() < 0.03 * expected.std()
