"""Keep the eyes open in emotions that narrow them (ours).

Anger, disgust and laughter narrow the eyes. On a face whose eyes are narrow at rest they would stay shut for the whole
video. So the lids are held apart by a share of their distance at rest, on average over time: blinks still close them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import MOUTH_CORNERS
from flowvqtalker.motion.mouth import ridge_inverse

__all__ = ["LidLimiter"]

#: Least mean opening of an eye, as a share of its opening at rest, and frames (time constant) of that mean.
_LEAST, _SLOW = 0.45, 10.0
# Pairs of vertices of the upper and the lower lid, of one eye and the other, and what stays: corners of eyes and mouth,
# brows, cheeks.
_UPPER, _LOWER = ((159, 158, 160), (386, 385, 387)), ((145, 153, 144), (374, 380, 373))
_KEPT = (33, 133, 263, 362, 105, 334, 55, 285, 50, 280, *MOUTH_CORNERS)
_RIDGE = 1e-5


class LidLimiter:
    """Holds the lids of a stream of expressions apart.

    Arguments:
        model: the face model.
        identity: (80,) α of the person.
        neutral: (64,) β of the person's neutral face.
    """

    def __init__(self, model: FaceModel, identity: Tensor, neutral: Tensor) -> None:
        basis = model.expression.cpu().double()
        mean = (model.mean.flatten() + identity.to(model.mean) @ model.identity.flatten(1)).view(-1, 3).cpu().double()
        eyes = [(list(lower), list(upper)) for upper, lower in zip(_UPPER, _LOWER, strict=True)]
        self._gap = torch.stack([(basis[:, low, 1] - basis[:, up, 1]).mean(1) for low, up in eyes], dim=1)
        self._rest = torch.stack([(mean[low, 1] - mean[up, 1]).mean() for low, up in eyes])
        rows = torch.cat([self._gap.T, basis[:, list(_KEPT)].flatten(1).T])
        self._open = ridge_inverse(rows, _RIDGE)[:, :2].T
        self._least = _LEAST * self.opening(neutral)
        self._level: Tensor | None = None

    def opening(self, expression: Tensor) -> Tensor:
        """Opening of both eyes (..., 2) for β (..., 64), in distances between the outer eye corners."""
        return expression.double() @ self._gap + self._rest

    def __call__(self, expression: Tensor) -> Tensor:
        """The next frames (T, 64)."""
        lifts = []
        for opening in self.opening(expression):
            level = opening if self._level is None else torch.lerp(self._level, opening, 1 / _SLOW)
            self._level = level
            lifts.append((self._least - level).clamp_min(0))
        if not lifts:
            return expression
        lift = torch.stack(lifts)
        raised = expression + (lift @ self._open).to(expression.dtype)
        return torch.where(lift.any(1, keepdim=True), raised, expression)
