"""Fill the gaps of splatted maps from coarser ones (push-pull), on square maps of a power of two."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["double", "fill"]


def fill(sums: Tensor, weights: Tensor) -> Tensor:
    """Normalise splatted sums and fill empty cells from ever coarser averages (push-pull)."""
    if sums.shape[-1] == 1:
        return sums / weights.clamp(min=1e-12)
    known = weights > 1e-10
    value = torch.where(known, sums / weights.clamp(min=1e-12), 0.0)
    presence = known.to(value)
    coarse = fill(F.avg_pool2d(value * presence, 2), F.avg_pool2d(presence, 2))
    return torch.where(known, value, double(coarse))


def double(maps: Tensor) -> Tensor:
    """Square maps (B, C, s, s) enlarged bilinearly to (B, C, 2 s, 2 s), as two products: twice as fast at this size."""
    shares = _shares(maps.shape[-1], maps.device)
    return shares @ maps @ shares.mT


@lru_cache(maxsize=32)
def _shares(size: int, device: torch.device) -> Tensor:
    """(2 s, s): what every value contributes to the values of a line of twice the length."""
    unit = torch.eye(size, device=device)[:, None]
    return F.interpolate(unit, scale_factor=2, mode="linear", align_corners=False)[:, 0].mT.contiguous()
