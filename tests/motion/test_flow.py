"""Bijections and flows: invertibility, log-determinants, gradients, actnorm, contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.motion.bijections import (
    AffineCoupling,
    Bijection,
    Context,
    InvertibleLinear,
    MultiActNorm,
    class_weights,
)
from flowvqtalker.motion.context import ContextEncoder, history_of
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, Flow, PoseFlow, PoseFlowConfig
from flowvqtalker.motion.fused import FusedInverse
from flowvqtalker.motion.likelihood import Sequences, consistency, contexts, negative_log_likelihood, residual, rollout
from flowvqtalker.speech.encoder import AudioConfig

AUDIO = AudioConfig(mels=6, columns=8, width=8, layers=2, lookahead=1)
EXP = ExpFlowConfig(dim=8, classes=3, steps=3, width=8, heads=2, history=4, soft_clamp=50.0, audio=AUDIO)
POSE = PoseFlowConfig(dim=5, steps=3, width=8, heads=2, history=4, audio=AUDIO)
FLOWS = [
    EXP,
    replace(EXP, linear="full", layers=2, learn_means=True),
    replace(EXP, latent="gaussian-mixture", ar_prior=False),
    POSE,
]


def shake(module: torch.nn.Module, amount: float = 0.15) -> None:
    """Away from the start, where the last layers are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += amount * torch.randn(p.shape, generator=generator).to(p)


def make(config: ExpFlowConfig | PoseFlowConfig, dtype: torch.dtype = torch.float64) -> Flow:
    torch.manual_seed(0)
    flow = (PoseFlow if isinstance(config, PoseFlowConfig) else ExpFlow)(config).to(dtype)
    shake(flow)
    return flow.eval()


def context_of(flow: Flow, count: int = 7) -> Context:
    config = flow.config
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(flow.data_std)

    return flow.encode(
        draw(count, config.audio.width),
        draw(count, config.history, config.dim),
        torch.arange(count) % config.classes,
        speech=torch.arange(count) % 3 > 0,
        source=draw(count, config.dim) if config.source else None,
    )


def sequences(config: ExpFlowConfig | PoseFlowConfig, count: int = 4, length: int = 6) -> Sequences:
    generator = torch.Generator().manual_seed(3)
    reach = config.audio.lookback + config.audio.lookahead
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[0, 4:] = False
    return Sequences(
        frames=torch.randn(count, config.history + length, config.dim, generator=generator),
        windows=torch.randn(count, length + reach, config.audio.mels, config.audio.columns, generator=generator),
        emotion=torch.arange(count) % config.classes,
        speech=torch.arange(count) % 2 == 0,
        mask=mask,
        source=torch.randn(count, config.dim, generator=generator) if config.source else None,
    )


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


@pytest.mark.parametrize(
    "bijection", [InvertibleLinear(5), InvertibleLinear(5, "full"), MultiActNorm(5, 2), AffineCoupling(5, 8, 2)]
)
def test_each_bijection_is_invertible_with_its_logdet(bijection: Bijection):
    bijection = bijection.double().eval()
    shake(bijection, 0.3)
    context = Context(torch.randn(3, 4, 8, dtype=torch.float64), class_weights(torch.tensor([0, 1, 1]), 2).double())
    x = torch.randn(3, 5, dtype=torch.float64)
    z, logdet = bijection.forward_and_logdet(x, context)
    assert logdet.shape == (3,)
    assert torch.allclose(bijection.inverse(z, context), x, atol=1e-10)
    jacobian = torch.autograd.functional.jacobian(lambda v: bijection.forward_and_logdet(v, context)[0].sum(0), x)
    for row in range(3):
        assert float(torch.linalg.slogdet(jacobian[:, row])[1]) == pytest.approx(float(logdet[row].detach()), abs=1e-10)


@pytest.mark.parametrize("config", FLOWS)
def test_flow_all_parameters_get_gradients(config):
    flow = make(config, torch.float32).train()
    batch = sequences(config)
    loss = negative_log_likelihood(flow, batch).mean()
    (loss + (flow.predict_lips(flow.audio(batch.windows)) - 1).square().mean()).backward()  # voice learns by regression
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
    foretold = flow.predict_lips(audio, batch.speech[:, None].expand(-1, audio.shape[1]))
    assert foretold[batch.speech].abs().sum() > 0 and foretold[~batch.speech].abs().sum() == 0
    left = residual(flow, batch)
    size = EXP.history
    assert torch.allclose(left.frames[:, size:] + foretold, batch.frames[:, size:], atol=1e-6)
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


def test_full_and_lu_maps_start_as_the_same_rotation():
    lu, full = (InvertibleLinear(6, kind, torch.Generator().manual_seed(4)) for kind in ("lu", "full"))
    assert torch.allclose(lu.matrix(), full.matrix(), atol=1e-6)
    assert torch.allclose(lu.matrix() @ lu.matrix().mT, torch.eye(6), atol=1e-5)
    assert torch.allclose(lu.inverse_matrix() @ lu.matrix(), torch.eye(6), atol=1e-5)
    with pytest.raises(ValueError, match="'lu' or 'full'"):
        InvertibleLinear(6, "qr")


def test_coupling_follows_equation_5():
    coupling = AffineCoupling(6, 8, 2)
    x, context = torch.randn(2, 6), Context(torch.randn(2, 3, 8), torch.ones(2, 1))
    scale = torch.sigmoid(torch.tensor(2.0)) + 1e-6
    assert torch.allclose(coupling.forward_and_logdet(x, context)[0], torch.cat([x[:, :3], x[:, 3:] * scale], 1))
    shake(coupling)
    shift, scale = coupling.shift_and_scale(x[:, :3], context)
    assert torch.allclose(coupling.forward_and_logdet(x, context)[0][:, 3:], (x[:, 3:] + shift) * scale)


def test_actnorm_initialises_once_and_survives_checkpoint():
    norm = MultiActNorm(4, 3).train()
    context = Context(torch.zeros(50, 1, 1), class_weights(torch.arange(50) % 3, 3))
    x = 5 + 3 * torch.randn(50, 4)
    z, _ = norm.forward_and_logdet(x, context)
    assert z.mean(0).abs().max() < 1e-5
    assert (z.std(0, unbiased=False) - 1).abs().max() < 1e-5
    again, _ = norm.forward_and_logdet(10 * x, context)
    assert again.std() > 5, "the second batch must not initialise again"
    other = MultiActNorm(4, 3).train()
    other.load_state_dict(norm.state_dict())
    assert torch.equal(other.forward_and_logdet(10 * x, context)[0], again)


def test_actnorm_does_not_initialise_in_eval():
    norm = MultiActNorm(4).eval()
    norm.forward_and_logdet(torch.randn(9, 4) + 7, Context(torch.zeros(9, 1, 1), torch.ones(9, 1)))
    assert not norm.initialised
    assert float(norm.mean.detach().abs().max()) == 0


def test_multi_actnorm_classes_start_equal_and_diverge():
    norm = MultiActNorm(4, 2).train()
    emotion = torch.arange(64) % 2
    context = Context(torch.zeros(64, 1, 1), class_weights(emotion, 2))
    x = torch.randn(64, 4) + 3.0 * emotion[:, None]
    optimizer = torch.optim.Adam(norm.parameters(), lr=0.05)
    norm.forward_and_logdet(x, context)
    assert torch.equal(norm.mean[0], norm.mean[1])
    assert torch.equal(norm.log_scale[0], norm.log_scale[1])
    for _ in range(60):
        z, logdet = norm.forward_and_logdet(x, context)
        (0.5 * z.square().sum(1) - logdet).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (norm.mean[1] - norm.mean[0]).min() > 1.5


def test_class_weights_interpolate_means_and_keep_scales_convex():
    norm = MultiActNorm(2, 2)
    with torch.no_grad():
        norm.mean.copy_(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
        norm.log_scale.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    mean, log_scale = norm.statistics(Context(torch.zeros(1, 1, 1), torch.tensor([[-1.0, 2.0]])))
    assert torch.equal(mean, torch.tensor([[2.0, 4.0]]))
    assert torch.equal(log_scale, torch.tensor([[1.0, 1.0]]))
    for bad in (torch.zeros(3), torch.zeros(3, 4)):
        with pytest.raises(ValueError, match="emotion must be"):
            class_weights(bad, 2)


@pytest.mark.parametrize("part", ["audio", "history", "source", "emotion", "speech"])
def test_conditioning_changes_output(part):
    flow = make(EXP)
    generator = torch.Generator().manual_seed(5)
    given = {
        "audio": torch.randn(2, 8, generator=generator).double(),
        "history": torch.randn(2, 4, 8, generator=generator).double(),
        "emotion": torch.tensor([0, 1]),
        "speech": torch.tensor([True, True]),
        "source": torch.randn(2, 8, generator=generator).double(),
    }
    x = torch.randn(2, 8, dtype=torch.float64)
    first = flow.log_prob(x, flow.encode(**given))
    given[part] = ~given[part] if part == "speech" else (given[part] + 1) % 3 if part == "emotion" else given[part] + 1
    assert (flow.log_prob(x, flow.encode(**given)) - first).abs().min() > 1e-6


def test_silent_frames_ignore_the_sound():
    flow = make(EXP)
    history, emotion = torch.zeros(1, 4, 8).double(), torch.tensor([0])
    quiet = {"speech": torch.tensor([False]), "source": torch.zeros(1, 8).double()}
    a, b = (flow.encode(torch.randn(1, 8).double(), history, emotion, **quiet).tokens for _ in range(2))
    assert torch.equal(a, b)


def test_data_dropout_masks_only_history():
    encoder = ContextEncoder(8, 8, 2, 10, 8, classes=3, source=True, dropout=0.4).train()
    history = torch.ones(2000, 10, 8)
    dropped = encoder.drop(history, torch.Generator().manual_seed(0))
    frames = dropped.mean(-1)
    assert set(frames.unique().tolist()) == {0.0, 1.0}, "whole frames go, and what stays is not rescaled"
    count, trials = int((frames == 0).sum()), frames.numel()
    assert abs(count - 0.4 * trials) < 4 * (trials * 0.4 * 0.6) ** 0.5
    encoder.dropout = 0.999999
    given = {"speech": torch.ones(5, dtype=torch.bool), "source": torch.randn(5, 8)}
    audio, emotion = torch.randn(5, 8), torch.eye(3)[:1].expand(5, -1)
    hidden = encoder(audio, torch.randn(5, 10, 8), emotion, **given).tokens
    assert torch.allclose(hidden, encoder(audio, torch.zeros(5, 10, 8), emotion, **given).tokens, atol=1e-6)
    for name, other in (("audio", audio + 1), ("emotion", torch.eye(3)[1:2].expand(5, -1))):
        changed = encoder(
            other if name == "audio" else audio, torch.zeros(5, 10, 8), emotion if name == "audio" else other, **given
        )
        assert not torch.allclose(hidden, changed.tokens, atol=1e-3), f"{name} must never be dropped"
    encoder.eval()
    assert torch.equal(encoder.drop(history), history)


def test_history_holds_the_frames_before():
    sequence = torch.arange(8.0)[None, :, None]  # three frames of past, five frames
    history = history_of(sequence, 3)
    assert history.shape == (1, 5, 3, 1)
    assert history[0, :, :, 0].tolist() == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize("config", [EXP, replace(EXP, layers=2), POSE])
def test_fused_inverse_equals_the_flow(config):
    flow = make(config, torch.float32)
    flow.data_std.copy_(torch.linspace(0.5, 2, config.dim))
    context = context_of(flow, 1)
    weights = torch.full((1, config.classes), 1 / config.classes)
    context = replace(context, emotion=weights)
    z = torch.randn(1, config.dim)
    assert torch.allclose(FusedInverse(flow, weights)(z, context), flow.inverse(z, context), atol=1e-5)


def test_contain_bends_back_only_what_is_far_out():
    flow = make(EXP, torch.float32)
    flow.data_std.fill_(0.5)
    x = torch.linspace(-100, 100, 2001)[:, None].expand(-1, 8)
    bent = flow.soft_clamp(x)
    inside = x.abs() <= 0.6 * EXP.soft_clamp * 0.5
    assert torch.equal(bent[inside], x[inside])
    assert float(bent.abs().max()) <= EXP.soft_clamp * 0.5 + 1e-5
    assert (bent[1:] >= bent[:-1]).all(), "order is kept"


def test_a_flow_that_runs_away_is_held():
    """A prior that doubles the last frame leaves any bound unless draws are contained."""
    flow = make(replace(EXP, soft_clamp=3.0), torch.float32)
    with torch.no_grad():
        flow.encoder.ar_prior.gain.fill_(2.0)
    windows = torch.randn(2, 60 + 4, 6, 8)
    drawn = rollout(flow, windows, torch.tensor([0, 1]), torch.Generator(), source=torch.zeros(2, 8))
    left = drawn - flow.predict_lips(flow.audio(windows)).detach()
    assert torch.isfinite(drawn).all()
    assert 2 < float(left.abs().max()) < 3.001


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
