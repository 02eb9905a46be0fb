"""Blinks: their shape in expression coefficients, and when they come (ours).

The paper's flow blinks by itself. Trained for minutes instead of days, ours seldom does: a blink is a large, rare
excursion of five frames. So the typical blink of the training clips is stored with the flow and added to the sampled
expression.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.constants import FPS

__all__ = ["BLINK_FRAMES", "Blinks", "measure_blinks"]

#: Frames of a blink at 25 fps; the lids are closed at frame 5.
BLINK_FRAMES = 12
_PEAK = 5
_SHUT, _RISE = 0.45, 0.3


def measure_blinks(clips: Iterable[npt.NDArray[np.float32]], lids: npt.NDArray[np.float32]) -> tuple[Tensor, float]:
    """The typical blink of some clips.

    A blink is a local maximum of the lid blendshape above 0.45 that rises and falls by 0.3 within a blink's length. The
    straight line from before to after is subtracted from each, and the median over all blinks is taken.

    Arguments:
        clips: (T, 64) expression each.
        lids: (65,) map from [beta, 1] to the blendshape ``eyeBlink``.

    Returns:
        template (12, 64), zeros without a blink, and blinks per minute.
    """
    found: list[npt.NDArray[np.float32]] = []
    frames = 0
    line = np.linspace(0, 1, BLINK_FRAMES, dtype=np.float32)[:, None]
    for beta in clips:
        frames += len(beta)
        shut = beta @ lids[:-1] + lids[-1]
        t = _PEAK
        while t < len(beta) - BLINK_FRAMES + _PEAK:
            start, stop = t - _PEAK, t - _PEAK + BLINK_FRAMES
            high = shut[t]
            if high >= shut[start:stop].max() and high > _SHUT and high - max(shut[start], shut[stop - 1]) > _RISE:
                found.append(beta[start:stop] - (beta[start] * (1 - line) + beta[stop - 1] * line))
                t += BLINK_FRAMES // 2
            t += 1
    width = len(lids) - 1
    if not found:
        return torch.zeros(BLINK_FRAMES, width), 0.0
    template = np.median(np.stack(found), axis=0).astype(np.float32)
    return torch.from_numpy(template), len(found) / (frames / FPS / 60)


class Blinks:
    """A stream of blinks: one (64,) offset of the expression per frame.

    The time between blinks is a blink's length plus an exponentially distributed time; strength varies by a tenth.

    Arguments:
        template: (12, 64) from :func:`measure_blinks`.
        rate: blinks per minute, 0 for none; times ``factor``, which may change between blinks.
        seed: of times and strengths.
    """

    def __init__(self, template: Tensor, rate: float, seed: int) -> None:
        self.template, self.rate, self.factor = template, rate, 1.0
        self._generator = torch.Generator().manual_seed(seed)
        self._none = torch.zeros_like(template[:1])
        self._age, self._strength = BLINK_FRAMES, 1.0
        self._pause = self._draw_pause() - BLINK_FRAMES if rate > 0 else 0

    def _draw_pause(self) -> int:
        """Frames from the start of one blink to the next."""
        mean = max(60 * FPS / (self.factor * self.rate) - BLINK_FRAMES, 1.0)
        uniform = torch.rand((), generator=self._generator).item()
        return BLINK_FRAMES + int(-mean * np.log1p(-uniform))

    def next(self) -> Tensor:
        """The offset (1, 64) of the next frame."""
        if self.rate <= 0:
            return self._none
        if self._pause <= 0:
            self._age, self._pause = 0, self._draw_pause()
            self._strength = 0.9 + 0.2 * torch.rand((), generator=self._generator).item()
        self._pause -= 1
        self._age += 1
        return self._strength * self.template[self._age - 1 : self._age] if self._age <= BLINK_FRAMES else self._none
