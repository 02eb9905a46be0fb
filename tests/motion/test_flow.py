"""Flows: invertibility, log-determinants, the fused inverse, the soft clamp, loading."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig
from flowvqtalker.motion.fused import FusedFlow
from flowvqtalker.motion.likelihood import rollout

from .flows import EXP, FLOWS, context_of, make, shake


@pytest.mark.parametrize("config", FLOWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)])
def test_flow_invertibility(config, dtype, tolerance):
    flow = make(config, dtype)
    context = context_of(flow)
    x = torch.randn(7, config.dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    z, _ = flow.forward_and_logdet(x, context)
    assert (z - x).abs().max() > 0.1
    assert (flow.inverse(z, context) - x).abs().max() < tolerance
    assert (flow.forward_and_logdet(flow.inverse(x, context), context)[0] - x).abs().max() < tolerance


def test_default_flow_is_invertible_in_float32():
    torch.manual_seed(0)
    flow = ExpFlow().eval()
    shake(flow, 0.01)
    context = context_of(flow)
    x = torch.randn(7, 64)
    assert (flow.inverse(flow.forward_and_logdet(x, context)[0], context) - x).abs().max() < 1e-4


@pytest.mark.parametrize("config", FLOWS)
def test_flow_logdet_matches_autograd(config):
    flow = make(config)
    flow.data_std.copy_(torch.linspace(0.5, 2, config.dim))
    context = context_of(flow, 2)
    x = torch.randn(2, config.dim, dtype=torch.float64)
    _, logdet = flow.forward_and_logdet(x, context)
    for row in range(2):
        part = context[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, part=part: flow.forward_and_logdet(v[None], part)[0][0], x[row]
        )
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(logdet[row].detach()), abs=1e-8)


@pytest.mark.parametrize("config", [*FLOWS, replace(EXP, layers=2, soft_clamp=0.5)])
@pytest.mark.parametrize("frames", [0, 1, 4])
def test_fused_flow_equals_the_flow(config, frames):
    """With an empty history, one that begins and a full one, and after a change of the emotion."""
    flow = make(config, torch.float64)
    flow.data_std.copy_(torch.linspace(0.5, 2, config.dim))
    source = torch.randn(1, config.dim).double() if config.source else None
    audio, z = torch.randn(1, config.audio.width).double(), torch.randn(1, config.dim).double()
    history = torch.randn(1, config.history, config.dim).double()
    history[:, : config.history - frames] = 0
    first, second = torch.full((2, 1, config.classes), 1 / config.classes).double()
    if config.classes > 1:
        second = torch.tensor([[1.5, -0.5, 0.0]]).double()
    fused = FusedFlow(flow, first, source)
    for emotion in (first, second):
        fused.set_emotion(emotion)
        expected = flow.soft_clamp(flow.inverse(z, flow.encode(audio, history, emotion, source=source)))
        assert torch.allclose(fused(z, audio, history), expected, atol=1e-10)


def test_fused_flow_needs_its_source():
    with pytest.raises(ValueError, match="give source"):
        FusedFlow(make(EXP), torch.ones(1, 3))


def test_soft_clamp_is_the_identity_inside():
    flow = make(EXP, torch.float32)
    flow.data_std.fill_(0.5)
    x = torch.linspace(-100, 100, 2001)[:, None].expand(-1, 8)
    bent = flow.soft_clamp(x)
    inside = x.abs() <= 0.6 * EXP.soft_clamp * 0.5
    assert torch.equal(bent[inside], x[inside])
    assert float(bent.abs().max()) <= EXP.soft_clamp * 0.5 + 1e-5
    assert (bent[1:] >= bent[:-1]).all(), "order is kept"


def test_soft_clamp_holds_a_diverging_flow():
    """A prior that doubles the last frame leaves any bound without the soft clamp."""
    flow = make(replace(EXP, soft_clamp=3.0), torch.float32)
    with torch.no_grad():
        flow.encoder.ar_prior.gain.fill_(2.0)
    windows = torch.randn(2, 60 + 4, 6, 8)
    drawn = rollout(flow, windows, torch.tensor([0, 1]), torch.Generator(), source=torch.zeros(2, 8))
    left = drawn - flow.predict_lips(flow.audio(windows)).detach()
    assert torch.isfinite(drawn).all()
    assert 2 < float(left.abs().max()) < 3.001


def test_save_load_gives_equal_flow_and_names_what_is_wrong():
    flow = make(EXP, torch.float32)
    values = {"dim": 8, "soft_clamp": 50.0, "classes": 3, "steps": 3, "width": 8, "heads": 2, "history": 4}
    values["audio"] = {"mels": 6, "columns": 8, "width": 8, "layers": 2, "lookahead": 1}
    state = {**flow.state_dict(), "bank.latents": torch.zeros(1, 8)}
    again = ExpFlow.load(state, values)
    assert again.config == EXP
    x, context = torch.randn(7, 8), context_of(flow)
    assert torch.equal(again.log_prob(x, context), flow.log_prob(x, context))
    assert not again.training
    assert "ExpFlow" in repr(again)
    with pytest.raises(UserError, match="do not fit"):
        ExpFlow.load(state, {**values, "steps": 2})
    with pytest.raises(UserError, match="unknown settings of a flow: stepz"):
        ExpFlow.load(state, {**values, "stepz": 2})
    with pytest.raises(UserError, match=r"dropout must be in.*nu must be positive"):
        ExpFlowConfig(dropout=1.0, nu=0)
