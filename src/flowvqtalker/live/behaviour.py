"""What a face does besides speaking: it breathes and looks around when idle, and nods when it listens (ours)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from flowvqtalker.constants import FPS
from flowvqtalker.motion.emotion import smoothstep

__all__ = ["Behaviour"]

# Pose is (pitch, yaw, roll in radians, tx, ty, tz in distances between the outer eye corners).
_BREATH_SECONDS, _BREATH_PITCH, _BREATH_HEIGHT = 4.2, math.radians(0.35), 0.012
#: Seconds between two glances, between two nods; length of a nod; largest turn of a glance, depth of a nod.
_GLANCES, _NODS, _NOD_SECONDS = (2.5, 7.0), (2.5, 7.0), 0.7
_GLANCE_YAW, _GLANCE_PITCH, _NOD = math.radians(5.0), math.radians(2.0), math.radians(4.5)
#: Seconds (time constant) of a turn of the head, and of a passage from one state to another.
_TURN, _PASSAGE = 0.35, 0.5


class Behaviour:
    """Adds small movements of the head to the sampled motion; between states they fade over half a second.

    Arguments:
        seed: of their times and sizes.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 3])
        self._frame = 0
        self._calm = self._attention = 0.0
        self._target = np.zeros(2)
        self._turn = np.zeros(2)
        self._next_glance, self._next_nod = self._in(_GLANCES), self._in(_NODS)
        self._depth = 0.0

    def __call__(self, talking: bool, listening: bool) -> Tensor:
        """The offset (6,) of the next frame's pose."""
        self._calm += (float(not talking) - self._calm) / (_PASSAGE * FPS)
        self._attention += (float(listening and not talking) - self._attention) / (_PASSAGE * FPS)
        breath = math.sin(2 * math.pi * self._frame / (_BREATH_SECONDS * FPS))
        if self._frame >= self._next_glance:
            # Back to the viewer every other time; a listener keeps looking at who speaks.
            away = not self._target.any() and self._attention < 0.5
            self._target = self._random.uniform(-1, 1, 2) * (_GLANCE_PITCH, _GLANCE_YAW) if away else np.zeros(2)
            self._next_glance = self._frame + self._in(_GLANCES)
        self._turn += (self._target * self._calm - self._turn) / (_TURN * FPS)
        nod = self._nod()
        self._frame += 1
        pitch = self._turn[0] + self._calm * _BREATH_PITCH * breath + nod
        return torch.tensor([pitch, self._turn[1], 0, 0, -self._calm * _BREATH_HEIGHT * breath, 0], dtype=torch.float32)

    def _nod(self) -> float:
        if self._frame >= self._next_nod + _NOD_SECONDS * FPS:
            self._next_nod = self._frame + self._in(_NODS)
            self._depth = self._random.uniform(0.5, 1.0) * _NOD if self._attention > 0.5 else 0.0
        part = (self._frame - self._next_nod) / (_NOD_SECONDS * FPS)
        return self._depth * smoothstep(1 - abs(2 * part - 1)) if 0 <= part <= 1 else 0.0

    def _in(self, seconds: tuple[float, float]) -> int:
        return round(self._random.uniform(*seconds) * FPS)
