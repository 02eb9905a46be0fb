"""Likelihood, lip prior, consistency and rollouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flowvqtalker.motion.flow import ExpFlow
from flowvqtalker.motion.likelihood import consistency, contexts, negative_log_likelihood, residual, rollout

from .flows import EXP, FLOWS, make, sequences


@pytest.mark.parametrize("config", FLOWS)
def test_flow_all_parameters_get_gradients(config):
    flow = make(config, torch.float32).train()
    batch = sequences(config)
    loss = negative_log_likelihood(flow, batch).mean()
    (loss + (flow.predict_lips(flow.audio(batch.windows)) - 1).square().mean()).backward()  # regression
    for name, p in flow.named_parameters():
        assert p.grad is not None, f"{name} got no gradient"
        assert float(p.grad.abs().sum()) > 0, f"the gradient of {name} is zero"


def test_consistency_reaches_every_parameter_but_the_latent():
    torch.manual_seed(0)
    flow = make(EXP, torch.float32).train()
    consistency(flow, sequences(EXP), 16).backward()
    for name, p in flow.named_parameters():
        if not name.startswith("lip_prior"):  # it learns by regression alone
            assert p.grad is not None, f"{name} got no gradient"


def test_lip_prior_is_a_shift_of_the_frames_given_the_speech():
    """log p of a frame is that of its residual under the same steps; without speech the lip prior is zero."""
    flow = make(EXP, torch.float32)
    batch = sequences(EXP)
    audio = flow.audio(batch.windows)
    lips = flow.predict_lips(audio, batch.speech[:, None].expand(-1, audio.shape[1]))
    assert lips[batch.speech].abs().sum() > 0 and lips[~batch.speech].abs().sum() == 0
    left = residual(flow, batch)
    size = EXP.history
    assert torch.allclose(left.frames[:, size:] + lips, batch.frames[:, size:], atol=1e-6)
    assert left.frames[:, :size].abs().sum() == 0
    expected = -flow.log_prob(left.frames[:, size:][left.mask], contexts(flow, left))
    assert torch.allclose(negative_log_likelihood(flow, batch), expected, atol=1e-4)


def test_consistency_is_zero_for_true_motion():
    """A flow whose draws are the true frames has no inconsistency; one that draws a constant has that of the truth."""
    flow = make(replace(EXP, has_lip_prior=False), torch.float32)
    batch = sequences(EXP)
    still = replace(batch, frames=torch.ones_like(batch.frames))
    flow.inverse = lambda z, context: torch.full_like(z, 3.0)  # type: ignore[method-assign]
    assert float(consistency(flow, still, 8)) == 0
    moving = replace(batch, frames=torch.arange(10.0)[None, :, None].expand(4, -1, 8) * 2)
    assert float(consistency(flow, moving, 8)) == pytest.approx(2 * 8)


def test_rollout_feeds_back_its_own_frames():
    flow = make(EXP, torch.float32)
    batch = sequences(EXP)
    draws = [
        rollout(flow, batch.windows, batch.emotion, torch.Generator().manual_seed(s), source=batch.source)
        for s in (0, 0, 1)
    ]
    assert draws[0].shape == (4, 6, 8)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    cold = rollout(flow, batch.windows, batch.emotion, torch.Generator(), source=batch.source, temperature=0)
    audio = flow.audio(batch.windows)
    left = cold - flow.predict_lips(audio)
    history = torch.cat([torch.zeros(4, 3, 8), left[:, :1]], dim=1)
    context = flow.encode(audio[:, 1], history, batch.emotion, source=batch.source)
    assert torch.allclose(flow.inverse(flow.latent.centre(batch.emotion), context), left[:, 1], atol=1e-5)


def test_flow_learns_a_conditional_density():
    """Frames that depend on emotion and past: the likelihood rises, and falls again for the wrong context."""
    torch.manual_seed(0)
    flow = ExpFlow(replace(EXP, steps=2, dropout=0.2)).train()
    generator = torch.Generator().manual_seed(0)
    frames = torch.zeros(32, 24, 8)
    emotion = torch.arange(32) % 3
    pull = torch.randn(3, 8, generator=generator)
    for t in range(1, 24):
        noise = 0.3 * torch.randn(32, 8, generator=generator)
        frames[:, t] = 0.8 * frames[:, t - 1] + pull[emotion] + noise
    batch = replace(sequences(EXP, 32, 20), frames=frames, emotion=emotion, mask=torch.ones(32, 20, dtype=torch.bool))
    first = float(negative_log_likelihood(flow, batch).mean().detach())
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    for _ in range(60):
        negative_log_likelihood(flow, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    flow.eval()
    with torch.no_grad():
        after = float(negative_log_likelihood(flow, batch).mean())
        wrong = float(negative_log_likelihood(flow, replace(batch, emotion=(emotion + 1) % 3)).mean())
        shuffled = torch.cat([frames[:, :20].roll(3, 0), frames[:, 20:]], dim=1)
        last = torch.zeros(32, 20, dtype=torch.bool)
        last[:, 16] = True  # frame 20: its past is another sequence's
        strange, true = (
            float(negative_log_likelihood(flow, replace(batch, frames=x, mask=last)).mean()) for x in (shuffled, frames)
        )
    assert after < first - 4
    assert wrong > after + 0.5
    assert strange > true + 0.5
