"""Manifold projection (end of section 3.2): move a sampled latent towards the latents of the training data.

References:
    Lu, Chai and Cao, Live Speech Portraits, arXiv 2109.10595 (section 3.1), after Roweis and Saul's LLE.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LatentBank", "nearest", "project", "reconstruction_weights"]


@dataclass(frozen=True)
class LatentBank:
    """Latents of training frames: the prior 𝓓 of the paper.

    Attributes:
        latents: (N, D).
        emotion: (N,) class of each.
        minimum: a class with fewer latents uses those of all classes.
    """

    latents: Tensor
    emotion: Tensor
    minimum: int = 200

    def __post_init__(self) -> None:
        if self.latents.ndim != 2 or self.emotion.shape != self.latents.shape[:1]:
            shapes = f"{tuple(self.latents.shape)} and {tuple(self.emotion.shape)}"
            raise ValueError(f"a bank needs latents (N, D) and emotion (N,), got {shapes}")

    def of(self, emotion: int | None) -> Tensor:
        """Latents (n, D) of a class; of all classes for None or a class with too few."""
        return self.latents[self._rows(emotion)]

    def offsets(self, emotion: int | None, means: Tensor) -> Tensor:
        """As :meth:`of`, relative to the means (C, D) of the latents' own classes."""
        rows = self._rows(emotion)
        return self.latents[rows] - means.to(self.latents)[self.emotion[rows]]

    def _rows(self, emotion: int | None) -> Tensor:
        every = torch.ones_like(self.emotion, dtype=torch.bool)
        if emotion is None:
            return every
        chosen = self.emotion == emotion
        return chosen if int(chosen.sum()) >= self.minimum else every

    def tensors(self) -> dict[str, Tensor]:
        """The bank as tensors for a weights file."""
        return {"bank.latents": self.latents, "bank.emotion": self.emotion.to(torch.int16)}

    @classmethod
    def load(cls, state: dict[str, Tensor]) -> LatentBank | None:
        """The bank of a weights file, if it has one."""
        if "bank.latents" not in state:
            return None
        return cls(state["bank.latents"].to(torch.get_default_dtype()), state["bank.emotion"].long())


def nearest(z: Tensor, bank: Tensor, count: int) -> Tensor:
    """Indices (B, min(count, N)) of the points of a bank (N, D) nearest to z (B, D), nearest first."""
    if count < 1 or len(bank) == 0:
        raise ValueError(f"need at least one neighbour and a bank that is not empty, got {count} and {len(bank)}")
    squared = (bank.square().sum(-1) - 2 * z @ bank.mT + z.square().sum(-1, keepdim=True)).clamp_min(0)
    return torch.topk(squared, min(count, len(bank)), dim=1, largest=False)[1]


def reconstruction_weights(z: Tensor, neighbours: Tensor, ridge: float = 1e-3) -> Tensor:
    r"""Weights :math:`w` that minimise :math:`\|z - \sum_k w_k \bar z_k\|^2` subject to :math:`\sum_k w_k = 1`.

    The nearest point eliminates the constraint: with the differences of the others to it as the columns of A,
    :math:`(A^\top A + \epsilon \operatorname{tr}(A^\top A)/K\, I) w_{2..K} = A^\top (z - \bar z_1)`. The ridge keeps
    the system regular where neighbours coincide.

    Arguments:
        z: (B, D).
        neighbours: (B, K, D), nearest first.
        ridge: ε.

    Returns:
        (B, K).
    """
    count = neighbours.shape[1]
    if count == 1:
        return torch.ones_like(neighbours[:, :, 0])
    difference = neighbours[:, 1:] - neighbours[:, :1]  # B K-1 D, rows are the columns of A
    gram = difference @ difference.mT
    trace = gram.diagonal(dim1=1, dim2=2).sum(-1)
    tiny = torch.finfo(z.dtype).tiny ** 0.5
    load = (ridge * trace / count).clamp_min(tiny)  # for equal neighbours, where any weights do
    gram = gram + load[:, None, None] * torch.eye(count - 1, dtype=z.dtype, device=z.device)
    target = difference @ (z - neighbours[:, 0])[..., None]
    others = torch.linalg.solve(gram, target)[..., 0]
    return torch.cat([1 - others.sum(-1, keepdim=True), others], dim=1)


def project(z: Tensor, bank: Tensor, count: int = 10, blend: float = 1.0, ridge: float = 1e-3) -> Tensor:
    """Project latents onto the manifold spanned by their nearest neighbours.

    Arguments:
        z: (B, D).
        bank: (N, D).
        count: neighbours 𝒦 (Live Speech Portraits uses 10).
        blend: 1 is the projection, 0 is z.
        ridge: see :func:`reconstruction_weights`.

    Returns:
        (B, D).
    """
    if not 0 <= blend <= 1:
        raise ValueError(f"blend must be in [0, 1], got {blend}")
    if blend == 0:
        return z
    neighbours = bank[nearest(z, bank, count)]
    weights = reconstruction_weights(z, neighbours, ridge)
    projected = (weights[:, None] @ neighbours)[:, 0]
    return torch.lerp(z, projected, blend)
