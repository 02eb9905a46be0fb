"""Latent distributions against closed forms, and the manifold projection."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from flowvqtalker.motion.latents import Gaussian, GaussianMixture, StudentTMixture, build_latent
from flowvqtalker.motion.manifold import LatentBank, nearest, project, reconstruction_weights


def test_student_t_matches_scipy():
    latent = StudentTMixture(5, 3, seed=1, nu=7)
    z = 2 * torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    emotion = torch.arange(20) % 3
    for row in range(20):
        mean = latent.mean[emotion[row]].double().numpy()
        expected = scipy.stats.multivariate_t(mean, shape=1, df=7).logpdf(z[row].double().numpy())
        assert float(latent.log_prob(z[row : row + 1], emotion[row : row + 1])) == pytest.approx(expected, abs=1e-4)


def test_student_t_integrates_to_one():
    latent = StudentTMixture(1, 1, nu=3)
    grid = torch.linspace(-400, 400, 400001)[:, None]
    mass = torch.trapezoid(
        latent.log_prob(grid, torch.zeros(len(grid), dtype=torch.long)).double().exp(), grid[:, 0].double()
    )
    assert float(mass) == pytest.approx(1, abs=1e-4)


def test_student_t_tends_to_the_gaussian():
    z, emotion = torch.randn(50, 8, dtype=torch.float64), torch.arange(50) % 2
    gaussian = GaussianMixture(8, 2, seed=3).double().log_prob(z, emotion)
    gaps = [
        float((StudentTMixture(8, 2, seed=3, nu=nu).double().log_prob(z, emotion) - gaussian).abs().max())
        for nu in (10, 100, 1e3, 1e7)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4


def test_gradient_norm_is_bounded():
    """At most (ν + D) / (2 √ν) = 8.06, reached at a distance of √ν."""
    latent = StudentTMixture(64, 9, nu=50)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    distance = torch.cat([torch.linspace(0, 100, 201), torch.tensor([math.sqrt(50)])])
    z = (latent.mean[4] + distance[:, None] * direction).requires_grad_()
    latent.log_prob(z, torch.full((len(z),), 4)).sum().backward()
    norms = z.grad.norm(dim=1)
    assert float(norms.max()) == pytest.approx(114 / (2 * math.sqrt(50)), abs=1e-3)
    assert float(norms[-1]) == pytest.approx(8.06, abs=5e-3)
    far = GaussianMixture(64, 9)
    w = z.detach().clone().requires_grad_()
    far.log_prob(w, torch.full((len(w),), 4)).sum().backward()
    assert float(w.grad.norm(dim=1).max()) > 90, "the Gaussian's pull grows without bound"


def test_sample_moments():
    latent = StudentTMixture(6, 2, seed=0, nu=8)
    emotion = torch.tensor([0, 1]).repeat(20000)
    z = latent.sample(emotion, torch.Generator().manual_seed(0), temperature=0.5)
    for label in (0, 1):
        part = z[emotion == label]
        assert torch.allclose(part.mean(0), latent.mean[label], atol=0.02)
        covariance = torch.cov(part.mT) / 0.25
        assert torch.allclose(covariance, 8 / 6 * torch.eye(6), atol=0.07)
    # One chi-square for all values of a frame: their squares are correlated, as those of independent draws are not.
    squares = ((z - latent.centre(emotion)) / 0.5).square()
    assert float(torch.corrcoef(squares[:, :2].mT)[0, 1]) > 0.1
    distance = squares.sum(1) / 6  # F-distributed with 6 and 8 degrees of freedom
    assert scipy.stats.kstest(distance.double().numpy(), scipy.stats.f(6, 8).cdf).pvalue > 0.001


def test_sampling_is_deterministic_given_the_generator():
    latent = StudentTMixture(6, 2)
    draws = [latent.sample(torch.tensor([0, 1, 1]), torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("kind", ["student", "gaussian-mixture"])
def test_mixture_log_prob_is_logsumexp(kind):
    latent = build_latent(kind, 4, 3, seed=2)
    z = torch.randn(10, 4)
    parts = torch.stack([latent.log_prob(z, torch.full((10,), label)) for label in range(3)])
    assert torch.allclose(latent.marginal_log_prob(z), torch.logsumexp(parts - math.log(3), dim=0), atol=1e-5)


def test_means_are_a_buffer_drawn_once_unless_learnt():
    fixed, learnt = StudentTMixture(64, 9, seed=7), StudentTMixture(64, 9, seed=7, learn_means=True)
    assert [name for name, _ in fixed.named_parameters()] == []
    assert [name for name, _ in learnt.named_parameters()] == ["mean"]
    assert "mean" in fixed.state_dict()
    assert torch.equal(fixed.mean, learnt.mean)
    assert not torch.equal(fixed.mean, StudentTMixture(64, 9, seed=8).mean)
    gaps = torch.pdist(fixed.mean)
    assert 8 < float(gaps.mean()) < 15  # √128 = 11.3 expected


def test_gaussian_matches_torch_and_ignores_the_class():
    latent = Gaussian(6)
    z = torch.randn(4, 6)
    normal = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    assert torch.allclose(latent.log_prob(z, torch.zeros(4, dtype=torch.long)), normal, atol=1e-5)
    with pytest.raises(ValueError, match="latent must be"):
        build_latent("cauchy", 4, 3)
    with pytest.raises(ValueError, match="nu must be positive"):
        StudentTMixture(4, 3, nu=-1)


# ------------------------------------------------------------------------------------------------ manifold projection


def test_nearest_is_by_distance():
    generator = torch.Generator().manual_seed(0)
    z, bank = torch.randn(4, 5, generator=generator), torch.randn(103, 5, generator=generator)
    assert torch.equal(nearest(z, bank, 6), torch.cdist(z, bank).argsort(dim=1)[:, :6])
    assert nearest(z, bank[:3], 6).shape == (4, 3)
    with pytest.raises(ValueError, match="not empty"):
        nearest(z, bank[:0], 6)


def test_manifold_weights_sum_to_one_and_are_optimal():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    neighbours = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    weights = reconstruction_weights(z, neighbours, ridge=1e-12)
    assert torch.allclose(weights.sum(1), torch.ones(3, dtype=torch.float64), atol=1e-12)
    error = (z - (weights[:, None] @ neighbours)[:, 0]).norm(dim=1)
    for _ in range(20):
        step = 0.01 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
        other = weights + step - step.mean(1, keepdim=True)
        assert ((z - (other[:, None] @ neighbours)[:, 0]).norm(dim=1) >= error).all()


def test_point_in_the_hull_is_reproduced():
    bank = torch.randn(40, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = bank[:1] * 0.3 + bank[1:2] * 0.7
    assert torch.allclose(project(z, bank, count=6, ridge=1e-10), z, atol=1e-6)


def test_one_neighbour_returns_the_nearest():
    bank = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    z = bank[[7, 21]] + 0.001
    assert torch.equal(project(z, bank, count=1), bank[[7, 21]])


def test_duplicate_neighbours_do_not_crash():
    point = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(project(torch.zeros(2, 3), point.expand(20, 3), count=10), point.expand(2, 3), atol=1e-4)
    mixed = torch.cat([point.expand(5, 3), point + 1])
    assert torch.isfinite(project(torch.randn(4, 3), mixed, count=6)).all()


def test_blend_moves_between_draw_and_projection():
    bank = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    z = 5 * torch.ones(2, 4)
    whole = project(z, bank, 3)
    assert project(z, bank, 3, blend=0) is z
    assert torch.allclose(project(z, bank, 3, blend=0.25), 0.75 * z + 0.25 * whole, atol=1e-5)
    with pytest.raises(ValueError, match="blend"):
        project(z, bank, 3, blend=1.5)


def test_bank_by_emotion_falls_back_to_the_pool_and_round_trips():
    latents, emotion = torch.randn(50, 4), torch.cat([torch.zeros(40), torch.ones(10)]).long()
    bank = LatentBank(latents, emotion, minimum=20)
    assert torch.equal(bank.of(0), latents[:40])
    assert torch.equal(bank.of(1), latents)
    assert torch.equal(bank.of(None), latents)
    means = torch.randn(2, 4)
    assert torch.allclose(bank.offsets(0, means), latents[:40] - means[0])
    assert torch.allclose(bank.offsets(1, means), latents - means[emotion])
    again = LatentBank.load(bank.tensors())
    assert again is not None
    assert torch.equal(again.emotion, emotion)
    assert LatentBank.load({}) is None
    with pytest.raises(ValueError, match="bank needs"):
        LatentBank(latents, emotion[:3])
