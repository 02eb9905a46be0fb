"""PatchGAN discriminator and the adversarial losses (paper eq. 15)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PatchDiscriminator", "adversarial_loss", "discriminator_loss"]


class PatchDiscriminator(nn.Module):
    """A map of logits, one for every overlapping patch: (B, channels, H, W) -> (B, 1, h, w).

    Isola et al. 2017 as used by VQGAN (``taming/modules/discriminator``), with spectral normalisation in place of
    BatchNorm: batches of a few pictures make BatchNorm's statistics noise.
    """

    def __init__(self, width: int = 64, layers: int = 4, channels: int = 3) -> None:
        super().__init__()

        def conv(i: int, o: int, stride: int) -> nn.Module:
            return nn.utils.parametrizations.spectral_norm(nn.Conv2d(i, o, 4, stride, 1))

        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for i in range(1, layers):
            out = width * min(2**i, 8)
            blocks += [conv(channels, out, 2), nn.LeakyReLU(0.2)]
            channels = out
        blocks += [conv(channels, channels, 1), nn.LeakyReLU(0.2), nn.Conv2d(channels, 1, 4, 1, 1)]
        self.net = nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image)
        return logits


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge", weight: Tensor | float = 1.0) -> Tensor:
    """Loss of the discriminator: ``hinge`` (VQGAN, CodeFormer) or ``log`` (eq. 15 as written, negated to be
    minimised); ``weight`` is that of each patch."""
    if kind == "hinge":
        return 0.5 * ((weight * F.relu(1 - real)).mean() + (weight * F.relu(1 + fake)).mean())
    return 0.5 * ((weight * F.softplus(-real)).mean() + (weight * F.softplus(fake)).mean())


def adversarial_loss(fake: Tensor, kind: str = "hinge", weight: Tensor | float = 1.0) -> Tensor:
    """Loss of the generator: ``-D(fake)`` for hinge, the non-saturating ``-log D(fake)`` for ``log``; ``weight`` is
    that of each patch."""
    return (weight * (-fake if kind == "hinge" else F.softplus(-fake))).mean()
