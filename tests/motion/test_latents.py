"""Latent distributions against closed forms."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from flowvqtalker.motion.latents import Gaussian, GaussianMixture, StudentTMixture, build_latent


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


def test_means_are_a_buffer_sampled_once_unless_learnt():
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
