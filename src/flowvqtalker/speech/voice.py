"""The emotion of a voice, from running statistics of the audio features and the spectrum (ours).

Features of the speech encoder tell sounds more than moods, yet their mean and spread over some seconds, with those of
the spectrum, tell the emotion of unseen speakers in half of the cases. A logistic regression reads them; stage
``voice-emotion`` fits it. Only loud frames count, so pauses change nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowvqtalker.constants import EMOTIONS, FPS

__all__ = ["VOICES", "VoiceEmotion", "VoiceState", "spectrum"]

#: The emotions that it tells apart.
VOICES = tuple(name for name in EMOTIONS if name not in ("contempt", "natural"))
#: Memory (frames) of the statistics; a frame counts if it is at most 40 dB below the loudest so far, which decays by
#: 40 dB in ``_DECAY`` frames.
_MEMORY, _RANGE, _DECAY = 2.0 * FPS, 1.0, 20.0 * FPS


def spectrum(window: Tensor) -> Tensor:
    """Mean log-mel spectrum (..., 80) of a frame from its window (..., 80, 7) of the frontend ``whisper``."""
    return window[..., 2:-1].mean(-1)


class VoiceState:
    """Running mean and spread of what a voice sounds like.

    Attributes:
        heard: loud frames so far.
    """

    def __init__(self) -> None:
        self.heard = 0
        self._peak = -math.inf
        self._mean, self._square = torch.zeros(()), torch.zeros(())

    def push(self, feature: Tensor, mel: Tensor) -> bool:
        """Take a frame's audio feature (width,) and spectrum (80,); returns whether it was loud enough to count."""
        level = float(mel.mean())
        self._peak = max(level, self._peak - _RANGE / _DECAY)
        if level < self._peak - _RANGE:
            return False
        if self.heard and float(self._mean[-len(mel) :].mean()) < self._peak - _RANGE:
            self.heard = 0  # what was loud so far was the silence before the speech
        self.heard += 1
        x, part = torch.cat([feature, mel]), max(1 / self.heard, 1 / _MEMORY)
        self._mean = self._mean + part * (x - self._mean)
        self._square = self._square + part * (x * x - self._square)
        return True

    def statistics(self) -> Tensor:
        """(2 width + 160,): mean and standard deviation."""
        return torch.cat([self._mean, (self._square - self._mean**2).clamp_min(0).sqrt()])


class VoiceEmotion(nn.Module):
    """Logistic regression on a voice's statistics.

    Arguments:
        width: size of an audio feature.
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, width: int = 128, mels: int = 80) -> None:
        super().__init__()
        size = 2 * (width + mels)
        self.width = width
        self.register_buffer("centre", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.linear = nn.Linear(size, len(VOICES))

    def forward(self, statistics: Tensor) -> Tensor:
        """Log-odds (..., 7) in the order of :data:`VOICES`."""
        logits: Tensor = self.linear((statistics - self.centre) / self.scale)
        return logits
