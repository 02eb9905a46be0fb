r"""The latent distributions: Student-t mixture (eq. 7, 8), Gaussian mixture (ablation), Gaussian (PoseFlow).

All have :math:`\Sigma_i = I`; mixtures have one component per emotion.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from flowvqtalker.motion.bijections import class_weights

__all__ = ["Gaussian", "GaussianMixture", "Latent", "StudentTMixture", "build_latent"]


class Latent(nn.Module):
    """A distribution of latent vectors (N, D) with one component :math:`p(z | e)` per emotion.

    Arguments:
        dim: D.
        classes: number of components C.
        seed: of the means, sampled from N(0, I).
        learn_means: train the means (the paper does not say; the default is fixed).
    """

    mean: Tensor

    def __init__(self, dim: int, classes: int, seed: int = 0, learn_means: bool = False) -> None:
        super().__init__()
        self.dim, self.classes = dim, classes
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(classes, dim, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())
        if learn_means:
            self.mean = nn.Parameter(mean)
        else:
            self.register_buffer("mean", mean)

    @abstractmethod
    def log_radial(self, squared: Tensor) -> Tensor:
        """Log-density at squared distances ‖z - μ‖² of any shape."""

    @abstractmethod
    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """(count, D) samples around zero, on the generator's device (without one: on the mean's)."""

    def centre(self, emotion: Tensor) -> Tensor:
        """Means (N, D) of class numbers (N,) or class weights (N, C)."""
        return class_weights(emotion, self.classes).to(self.mean) @ self.mean

    def log_prob(self, z: Tensor, emotion: Tensor) -> Tensor:
        """log p(z | e), eq. 7.

        Arguments:
            z: (N, D).
            emotion: (N,) class numbers or (N, C) weights.

        Returns:
            (N,) in nats.
        """
        return self.log_radial((z - self.centre(emotion)).square().sum(-1))

    def marginal_log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of the mixture with equal weights π = 1/C, eq. 8; (N, D) to (N,)."""
        squared = (z[:, None] - self.mean).square().sum(-1)  # N C
        return torch.logsumexp(self.log_radial(squared), dim=-1) - math.log(self.classes)

    def place(self, noise: Tensor, emotion: Tensor, temperature: float = 1.0) -> Tensor:
        """Latents (N, D) from noise (N, D): mean + temperature · noise."""
        return self.centre(emotion) + temperature * noise

    def sample(self, emotion: Tensor, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Sample latents (N, D) for class numbers (N,) or class weights (N, C)."""
        return self.place(self.noise(len(emotion), generator).to(self.mean), emotion, temperature)


class StudentTMixture(Latent):
    r"""Student-t mixture: :math:`t_\nu(z | \mu_e, I)`, whose heavy tails bound the pull of outliers.

    The norm of the gradient of the log-density is at most :math:`(\nu + D) / (2\sqrt\nu)`: 8.06 for ν = 50, D = 64.

    References:
        Alexanderson and Henter, Robust model training and generalisation with Studentising flows, arXiv 2006.06599.

    Arguments:
        dim, classes, seed, learn_means: see :class:`Latent`.
        nu: degrees of freedom ν.
    """

    def __init__(self, dim: int, classes: int, seed: int = 0, learn_means: bool = False, nu: float = 50.0) -> None:
        super().__init__(dim, classes, seed, learn_means)
        if nu <= 0:
            raise ValueError(f"nu must be positive, got {nu}")
        self.nu = float(nu)
        self.constant = (
            math.lgamma((self.nu + dim) / 2) - math.lgamma(self.nu / 2) - dim / 2 * math.log(self.nu * math.pi)
        )

    def log_radial(self, squared: Tensor) -> Tensor:
        return self.constant - (self.nu + self.dim) / 2 * torch.log1p(squared / self.nu)

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        normal = torch.randn(count, self.dim, generator=generator, device=device)
        shape = torch.full((count, 1), self.nu / 2, device=device)
        chi2 = 2 * torch._standard_gamma(shape, generator=generator)  # one per frame, for all D values
        return normal * torch.sqrt(self.nu / chi2)


class GaussianMixture(Latent):
    """Gaussian mixture with the same means: the ablation "GMM" of the paper (Fig. 6)."""

    def log_radial(self, squared: Tensor) -> Tensor:
        return -0.5 * squared - self.dim / 2 * math.log(2 * math.pi)

    def noise(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.mean.device if generator is None else generator.device
        return torch.randn(count, self.dim, generator=generator, device=device)


class Gaussian(GaussianMixture):
    """N(0, I) for every class: the latent of PoseFlow (eq. 12)."""

    def __init__(self, dim: int, classes: int = 1) -> None:
        super().__init__(dim, classes)
        self.mean.zero_()


def build_latent(
    kind: str, dim: int, classes: int, *, seed: int = 0, learn_means: bool = False, nu: float = 50.0
) -> Latent:
    """The latent of a configuration: "student", "gaussian-mixture" or "gaussian"."""
    if kind == "student":
        return StudentTMixture(dim, classes, seed, learn_means, nu)
    if kind == "gaussian-mixture":
        return GaussianMixture(dim, classes, seed, learn_means)
    if kind == "gaussian":
        return Gaussian(dim, classes)
    raise ValueError(f"latent must be 'student', 'gaussian-mixture' or 'gaussian', got {kind!r}")
