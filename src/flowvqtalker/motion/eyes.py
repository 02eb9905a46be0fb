"""Keep the eyes open and the brows on the forehead, above the eyes (ours).

Anger, disgust and laughter narrow the eyes. On a face whose eyes are narrow at rest they would stay shut for the whole
video, and brows that lie low at rest would sink into them. So lids are held apart by a share of their distance at rest,
on average over time: blinks still close them. Brows move ever less, the lower or the higher they are: surprise would
stretch some foreheads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import MOUTH_CORNERS
from flowvqtalker.motion.gaps import Gaps

__all__ = ["EyeLimiter"]

#: Frames (time constant) of the mean that is limited.
_SLOW = 10.0
#: Least mean opening of an eye, as a share of its opening at rest.
_LIDS = 0.45
#: Shares of the distance at rest between which brows move freely, and those that they never reach.
_BROWS_FREE, _BROWS_ENDS = (0.65, 1.4), (0.3, 1.65)
# Vertices above and below each gap: the lids of both eyes; the inner brow and the inner eye corner, the middle of the
# brow and both eye corners, which a blink does not move.
_LID_GAPS = (((159, 158, 160), (145, 153, 144)), ((386, 385, 387), (374, 380, 373)))
_BROW_GAPS = (((55,), (133,)), ((285,), (362,)), ((52, 65), (133, 33)), ((282, 295), (362, 263)))
# What stays in place: corners of eyes and mouth, brows and cheeks; for the brows lids, nose and lips.
_LID_KEPT = (33, 133, 263, 362, 105, 334, 55, 285, 50, 280, *MOUTH_CORNERS)
_BROW_KEPT = (33, 133, 263, 362, 159, 145, 386, 374, 50, 280, 1, 4, 13, 14, *MOUTH_CORNERS)
_RIDGE = 1e-5


def _hold_lids(gap: Tensor, rest: Tensor) -> Tensor:
    return torch.maximum(gap, _LIDS * rest)


def _hold_brows(gap: Tensor, rest: Tensor) -> Tensor:
    """Equal within ``_BROWS_FREE``, from there on monotone towards ``_BROWS_ENDS``."""
    held = gap
    for free, end in zip(_BROWS_FREE, _BROWS_ENDS, strict=True):
        beyond = ((gap / rest - free) / (end - free)).clamp(min=0)
        held = torch.where(beyond > 0, (free + (end - free) * -torch.expm1(-beyond)) * rest, held)
    return held


class EyeLimiter:
    """Holds lids and brows of a stream of expressions.

    Arguments:
        model: the face model.
        identity: (80,) α of the person.
        neutral: (64,) β of the person's neutral face.
    """

    def __init__(self, model: FaceModel, identity: Tensor, neutral: Tensor) -> None:
        brows, lids = (
            Gaps(model, identity, gaps, kept, _RIDGE)
            for gaps, kept in ((_BROW_GAPS, _BROW_KEPT), (_LID_GAPS, _LID_KEPT))
        )
        self._limits = [_Limit(brows, neutral, _hold_brows), _Limit(lids, neutral, _hold_lids)]

    def __call__(self, expression: Tensor) -> Tensor:
        """The next frames (T, 64)."""
        for limit in self._limits:
            expression = limit(expression)
        return expression


class _Limit:
    """Moves the mean over time of gaps to where ``hold(gaps, gaps at rest)`` wants it."""

    def __init__(self, gaps: Gaps, neutral: Tensor, hold: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._gaps, self._hold, self._rest = gaps, hold, gaps.measure(neutral)
        self._level: Tensor | None = None

    def __call__(self, expression: Tensor) -> Tensor:
        lifts = []
        for gap in self._gaps.measure(expression):
            self._level = gap if self._level is None else torch.lerp(self._level, gap, 1 / _SLOW)
            lifts.append(self._hold(self._level, self._rest) - self._level)
        return self._gaps.widen(expression, torch.stack(lifts)) if lifts else expression
