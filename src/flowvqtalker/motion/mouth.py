"""Shut lips while nobody speaks (ours).

The paper's flow has hardly seen silence: clips are cut to speech. So its lips keep moving in pauses, in noise and in
music. Where a voice activity detector hears no speech, the expression is moved by the smallest change of β that closes
the lips; corners of the mouth, lids and brows keep their place, so the emotion stays.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import MOUTH_CORNERS
from flowvqtalker.motion.emotion import smoothstep
from flowvqtalker.motion.gaps import Gaps
from flowvqtalker.speech.activity import WINDOW, SpeechActivity

__all__ = ["CLOSED", "MouthCloser", "MouthGate"]

#: Largest distance of shut lips in distances between the outer eye corners; the trackers' shut mouths lie below.
CLOSED = 0.02
#: What closing aims at: touching lips keep a line between them.
_TARGET = 0.005
# Pairs of vertices of the upper and the lower inner lip, and what closing leaves in place: corners, lids and brows.
_UPPER, _LOWER = (13, 82, 312, 81, 311), (14, 87, 317, 178, 402)
_KEPT = (*MOUTH_CORNERS, 159, 145, 386, 374, 105, 334)
_RIDGE = 1e-6

_FRAME = SAMPLE_RATE // FPS
# Samples after a frame's start that decide on it: what the encoder with the shortest look-ahead waits for, too.
_AHEAD = 1480
#: Least probability of speech, and windows of which one must reach it: they span the frame and its look-ahead.
_SPEECH, _WINDOWS = 0.15, 3
#: Frames in which the lips are released before a sound, and in which they close after it.
_OPENING, _CLOSING = 2, 3
#: Frames for which an interruption keeps the mouth shut: until the detector has forgotten the speech.
_SHUT = 7


class MouthCloser:
    """The smallest change of β that closes the lips.

    Arguments:
        model: the face model.
        identity: (80,) α of the person, whose lips may lie apart at β = 0.
    """

    def __init__(self, model: FaceModel, identity: Tensor) -> None:
        lips = [((upper,), (lower,)) for upper, lower in zip(_UPPER, _LOWER, strict=True)]
        self._gaps = Gaps(model, identity, lips, _KEPT, _RIDGE)

    def gap(self, expression: Tensor) -> Tensor:
        """Largest distance (T,) between the lips for (T, 64), in distances between the outer eye corners."""
        return self._gaps.measure(expression).amax(1).to(expression.dtype)

    def __call__(self, expression: Tensor, share: Tensor) -> Tensor:
        """(T, 64) with the given share (T,) of the way to shut lips; 0 returns the same values."""
        excess = (self._gaps.measure(expression) - _TARGET).clamp_min(0)
        return self._gaps.widen(expression, -share[:, None] * excess)


class MouthGate:
    """Closes the mouth of a stream of motion while its sound holds no speech.

    Frame t is decided on by the windows of the detector that end within 92.5 ms after its start, so the lips part
    before a sound begins and are shut within 200 ms after speech stops. The result does not depend on how the sound is
    cut.
    """

    def __init__(self, closer: MouthCloser) -> None:
        self.closer = closer
        self._activity = SpeechActivity()
        # At the start there is nothing to judge by yet, so the mouth stays as it is.
        self._recent: deque[float] = deque([1.0] * _WINDOWS, _WINDOWS)
        self._known: deque[float] = deque()
        self._windows = self._frame = 0
        self._open = 1.0
        self._shut = 0
        #: Whether the last frame was one of speech.
        self.speaking = False

    def push(self, wave: npt.NDArray[np.float32]) -> None:
        """Take the next samples (n,) at 16 kHz, before the frames that they complete."""
        self._known.extend(self._activity.push(wave))

    def shut(self) -> None:
        """Close the mouth at once, whatever the sound that was pushed holds."""
        self._shut = _SHUT

    def __call__(self, expression: Tensor) -> Tensor:
        """The next frames (T, 64) with the mouth shut where nobody speaks."""
        share = torch.tensor([1 - smoothstep(self._advance()) for _ in expression], dtype=torch.float64)
        return self.closer(expression, share)

    def _advance(self) -> float:
        """How far the next frame's lips are released, 0 to 1."""
        while self._known and (self._windows + 1) * WINDOW <= self._frame * _FRAME + _AHEAD:
            self._recent.append(self._known.popleft())
            self._windows += 1
        self._frame += 1
        self.speaking = not self._shut and max(self._recent) > _SPEECH
        self._shut = max(0, self._shut - 1)
        step = 1 / _OPENING if self.speaking else -1 / _CLOSING
        self._open = min(max(self._open + step, 0.0), 1.0)
        return self._open
