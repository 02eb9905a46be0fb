"""Manifold projection and the latent bank."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.motion.manifold import LatentBank, nearest, project, reconstruction_weights


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


def test_blend_interpolates_to_the_projection():
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
