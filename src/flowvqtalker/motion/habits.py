"""How emotions change head and blinks (ours, off by default): only what the data supports (docs/motion.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowvqtalker.constants import EMOTIONS, FPS
from flowvqtalker.motion.emotion import EmotionCondition

__all__ = ["HABITS", "Habits"]

#: Degrees by which the head is lowered, and factors on its movement and on the blink rate, relative to neutral.
HABITS = {
    "angry": (4.3, 1.0, 1.0),
    "fear": (0.0, 1.3, 0.4),
    "happy": (0.0, 1.45, 1.0),
    "surprised": (0.0, 1.0, 0.5),
}
_PLAIN = (0.0, 1.0, 1.0)
#: Seconds (time constant) in which a habit follows a change of emotion.
_SETTLE = 0.6


class Habits:
    """Follows the emotion frame by frame."""

    def __init__(self) -> None:
        self._table = torch.tensor([HABITS.get(name, _PLAIN) for name in EMOTIONS]) - torch.tensor(_PLAIN)
        self._now: Tensor | None = None

    def follow(self, condition: EmotionCondition) -> float:
        """Move on by a frame under an emotion, whose mixture and intensity scale the habits; returns the factor on the
        blink rate."""
        wanted = condition.intensity * (condition.weights[0].cpu() @ self._table)
        self._now = wanted if self._now is None else torch.lerp(self._now, wanted, 1 / (_SETTLE * FPS))
        return max(1 + float(self._now[2]), 0.1)

    def turn(self, motion: Tensor) -> Tensor:
        """The motion (1, 6) of the head around the source's pose, with the habits."""
        if self._now is None:
            return motion
        turned = (1 + self._now[1].to(motion)) * motion
        turned[:, 0] += math.radians(float(self._now[0]))
        return turned
