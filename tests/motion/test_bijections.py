"""Bijections: inverses, log-determinants, equation 5, multi-actnorm."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.motion.bijections import (
    AffineCoupling,
    Bijection,
    Context,
    InvertibleLinear,
    MultiActNorm,
    class_weights,
)

from .flows import shake


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
