"""Distances between lips, lids and brows on a face, and the smallest change of β that widens or narrows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowvqtalker.face.model import FaceModel

__all__ = ["Gaps", "ridge_inverse"]


def ridge_inverse(rows: Tensor, ridge: float) -> Tensor:
    """(D, N): times N targets the smallest β whose products with (N, D) rows are near them."""
    inverse: Tensor = rows.T @ torch.linalg.inv(rows @ rows.T + ridge * torch.eye(len(rows), dtype=rows.dtype))
    return inverse


class Gaps:
    """Vertical distances on a face, and the smallest change of β that widens them.

    Arguments:
        model: the face model.
        identity: (80,) α of the person.
        gaps: vertices above and below each gap, whose means are compared.
        kept: vertices that a change leaves in place.
        ridge: of the least squares; the larger, the smaller the change.
    """

    def __init__(
        self,
        model: FaceModel,
        identity: Tensor,
        gaps: Sequence[tuple[Sequence[int], Sequence[int]]],
        kept: Sequence[int],
        ridge: float,
    ) -> None:
        basis = model.expression.cpu().double()
        mean = (model.mean.flatten() + identity.to(model.mean) @ model.identity.flatten(1)).view(-1, 3).cpu().double()
        pairs = [(list(above), list(below)) for above, below in gaps]
        self._slope = torch.stack([basis[:, low, 1].mean(1) - basis[:, up, 1].mean(1) for up, low in pairs], dim=1)
        self._mean = torch.stack([mean[low, 1].mean() - mean[up, 1].mean() for up, low in pairs])
        rows = torch.cat([self._slope.T, basis[:, list(kept)].flatten(1).T])
        self._widen = ridge_inverse(rows, ridge)[:, : len(pairs)].T

    def measure(self, expression: Tensor) -> Tensor:
        """The gaps (..., G) for β (..., 64), in distances between the outer eye corners."""
        return expression.double() @ self._slope + self._mean

    def widen(self, expression: Tensor, by: Tensor) -> Tensor:
        """β (T, 64) with gaps wider by (T, G); frames without a change stay bit for bit."""
        wider = expression + (by @ self._widen).to(expression.dtype)
        return torch.where(by.any(1, keepdim=True), wider, expression)
