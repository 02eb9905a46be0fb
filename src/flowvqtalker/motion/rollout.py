"""What one autoregressive sequence of expressions carries from frame to frame."""

from __future__ import annotations

import torch
from torch import Tensor

from flowvqtalker.motion.emotion import EmotionCondition

__all__ = ["Rollout"]


class Rollout:
    """One autoregressive sequence of expressions.

    Attributes:
        condition: its emotion.
        history: (1, τ, D) its previous frames.
        level: (1,) slow average of the lip opening.
        excess: (1, D) slow average of the difference to neutral.
    """

    def __init__(self, condition: EmotionCondition, history: Tensor) -> None:
        self.condition, self.history = condition, history
        self.level: Tensor | None = None
        self.excess = torch.zeros_like(history[:, -1])
