"""Products with matrices of small integers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowvqtalker.speech.encoder import AudioStream, SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.quantize import QuantizedConvolution, QuantizedLinear, quantize


def integers(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix whose rows are integers up to 127 times a power of two, and those."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-127, 128, (rows, columns), generator=generator)
    steps[:, 0] = 127
    return steps * 2.0 ** torch.randint(-9, -3, (rows, 1), generator=generator), steps


def test_what_was_stored_as_integers_stays_as_it_is():
    weight, steps = integers(24, 40)
    layer = QuantizedLinear(weight, torch.zeros(24))
    assert torch.equal(layer.steps.long(), steps)
    assert torch.equal(layer.steps * layer.scale[:, None], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (1, 2, 64), (3, 5, 64)])
def test_product_is_that_of_the_rounded_matrix(dtype, shape):
    torch.manual_seed(1)
    plain = nn.Linear(64, 32).to(dtype)
    layer = QuantizedLinear(plain.weight.detach(), plain.bias)
    assert (
        layer.steps * layer.scale.float()[:, None] - plain.weight.float()
    ).abs().max() < plain.weight.abs().max() / 100
    x = torch.randn(shape).to(dtype)
    exact = x.double() @ (layer.steps.double() * layer.scale.double()[:, None]).T + plain.bias.double()
    found = layer(x)
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found - exact).abs().max() < (2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(found, layer(x.clone())), "the same in, the same out"


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_that_of_the_rounded_kernel(stride):
    torch.manual_seed(2)
    weight, _ = integers(16, 8 * 3)
    plain = nn.Conv1d(8, 16, 3, stride=stride)
    with torch.no_grad():
        plain.weight.copy_(weight.view(16, 8, 3))
    x = torch.randn(2, 8, 11)
    assert torch.allclose(QuantizedConvolution(plain)(x), plain(x), atol=1e-5)


def test_small_layers_and_padded_convolutions_are_left_alone():
    parts = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64), nn.Sequential(nn.Conv1d(64, 64, 3, padding=1)))
    quantize(parts, least=4096)
    assert isinstance(parts[0], nn.Linear) and isinstance(parts[1], QuantizedLinear)
    assert isinstance(parts[2][0], nn.Conv1d)


def test_a_speech_encoder_hears_the_same_with_integers():
    torch.manual_seed(3)
    speech_encoder = SpeechEncoder(SpeechEncoderConfig(dim=64, heads=4, attention=1, back=3, ahead=1, width=32)).eval()
    windows = torch.randn(20, 80, 7)
    with torch.inference_mode():
        before = speech_encoder.encode_clip(windows)
        quantize(speech_encoder, least=2**10)
        assert not any(isinstance(part, nn.Conv1d) for part in speech_encoder.modules())
        stream = AudioStream(speech_encoder)
        after = torch.cat([*(one for window in windows for one in stream.push(window)), *stream.finish()])
    assert after.shape == before.shape
    assert (after - before).norm() / before.norm() < 0.03
