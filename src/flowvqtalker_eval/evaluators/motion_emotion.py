"""Which emotion a sequence of expression coefficients β shows: a small classifier that knows no pictures.

It reads β through the face model's map to the ARKit blendshapes (without its clamp): held-out people are told apart
better there than in β itself, because one unit means the same everywhere on the face. What is read is how the face is
held and how far it moves: mean, standard deviation and quantiles over time of every blendshape. It is differentiable
and costs about a millisecond a clip, so that a training can steer by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import EXPRESSION
from flowvqtalker_eval.metrics.accuracy import CLASSES

__all__ = ["MIRRORED", "MotionEmotion", "MotionEmotionConfig", "load_motion_emotion"]

QUANTILES = (0.1, 0.5, 0.9)
_SHAPES = len(ARKIT_NAMES)


def _mirrored() -> tuple[int, ...]:
    swap = {"Left": "Right", "Right": "Left"}
    names = [
        next((name[: -len(side)] + other for side, other in swap.items() if name.endswith(side)), name)
        for name in ARKIT_NAMES
    ]
    return tuple(ARKIT_NAMES.index(name) for name in names)


#: Number of the blendshape that each is in the mirror (``mouthSmileLeft`` is ``mouthSmileRight`` there).
MIRRORED = _mirrored()


@dataclass(frozen=True)
class MotionEmotionConfig:
    """Shape of the classifier."""

    width: int = 0
    """Channels of a convolution over time beside the statistics; 0: none (24 were no better on held-out people: 46.0 %
    against 48.2 % balanced, one run of 300 steps each)."""
    kernel: int = 5
    """Frames that one convolution sees."""
    dropout: float = 0.3
    """Share of the statistics hidden in training."""


class MotionEmotion(nn.Module):
    """β (B, T, 64) -> logits (B, 8) in the order of :data:`flowvqtalker_eval.metrics.accuracy.CLASSES`.

    Attributes:
        basis: (64, 52), bias: (52,) the map from β to blendshapes.
        centre, scale: (5 * 52,) of the statistics over the training clips.
        temperature: scalar; logits are divided by it so that probabilities of unseen people are right on average.
    """

    basis: Tensor
    bias: Tensor
    centre: Tensor
    scale: Tensor
    temperature: Tensor

    def __init__(self, config: MotionEmotionConfig | None = None) -> None:
        super().__init__()
        self.config = config or MotionEmotionConfig()
        features = _SHAPES * (2 + len(QUANTILES))
        self.register_buffer("basis", torch.zeros(EXPRESSION, _SHAPES))
        self.register_buffer("bias", torch.zeros(_SHAPES))
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("temperature", torch.ones(()))
        self.dropout = nn.Dropout(self.config.dropout)
        self.head = nn.Linear(features, len(CLASSES))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        width = self.config.width
        if width:
            self.convolutions = nn.ModuleList(
                nn.Conv1d(
                    _SHAPES if layer == 0 else width, width, self.config.kernel, dilation=2**layer, padding="same"
                )
                for layer in range(2)
            )
            self.motion = nn.Linear(width, len(CLASSES), bias=False)
            nn.init.zeros_(self.motion.weight)

    def shapes(self, expression: Tensor) -> Tensor:
        """Blendshapes (..., 52) of β (..., 64), not limited to [0, 1]."""
        return expression @ self.basis + self.bias

    def statistics(self, shapes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean, standard deviation and quantiles over time, standardised: (B, 5 * 52) of (B, T, 52)."""
        if mask is None:
            count = shapes.new_full((1, 1), float(shapes.shape[1]))
            weight = shapes.new_ones(1, shapes.shape[1], 1)
            levels = torch.quantile(shapes, shapes.new_tensor(QUANTILES), dim=1)
        else:
            weight = mask.to(shapes)[..., None]
            count = weight.sum(1).clamp_min(1)
            hidden = shapes.masked_fill(~mask[..., None].bool(), float("nan"))
            levels = torch.nanquantile(hidden, shapes.new_tensor(QUANTILES), dim=1)
        mean = (shapes * weight).sum(1) / count
        variance = ((shapes - mean[:, None]).square() * weight).sum(1) / count
        parts = torch.cat([mean, (variance + 1e-8).sqrt(), *levels], dim=1)
        return (parts - self.centre) / self.scale

    def classify_shapes(self, shapes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, 8) of blendshapes (B, T, 52)."""
        statistics = self.statistics(shapes, mask)
        logits: Tensor = self.head(self.dropout(statistics))
        if self.config.width:
            mean, scale = self.centre[:_SHAPES], self.scale[:_SHAPES]
            x = (shapes - mean) / scale
            keep = None if mask is None else mask.to(x)[:, None]
            x = x.mT if keep is None else x.mT * keep
            for layer in self.convolutions:
                x = nn.functional.silu(layer(x))
                x = x if keep is None else x * keep
            pooled = x.mean(2) if keep is None else x.sum(2) / keep.sum(2).clamp_min(1)
            logits = logits + self.motion(self.dropout(pooled))
        return logits / self.temperature

    def forward(self, expression: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, 8).

        Arguments:
            expression: (B, T, 64) β at 25 fps, T of at least 1.
            mask: (B, T), true where a frame counts; every sequence needs one such frame. None: all count.

        Raises:
            UserError: if the shapes are others.
        """
        if expression.ndim != 3 or expression.shape[2] != EXPRESSION or expression.shape[1] == 0:
            raise UserError(f"expression of shape (B, T, {EXPRESSION}) is needed, got {tuple(expression.shape)}")
        if mask is not None and mask.shape != expression.shape[:2]:
            raise UserError(f"the mask must have shape {tuple(expression.shape[:2])}, got {tuple(mask.shape)}")
        return self.classify_shapes(self.shapes(expression), mask)

    def classify(self, expression: Tensor) -> Tensor:
        """Probabilities (8,) of one sequence (T, 64), or (B, 8) of (B, T, 64); differentiable."""
        batch = expression if expression.ndim == 3 else expression[None]
        probabilities: Tensor = self(batch).softmax(1)
        return probabilities if expression.ndim == 3 else probabilities[0]


def load_motion_emotion(path: str | Path | None = None) -> MotionEmotion:
    """The trained classifier of a folder of weights (None: the package's own), in evaluation mode.

    Raises:
        UserError: if it is missing or does not fit.
    """
    tensors, config = weights.load("motion_emotion", path)
    try:
        model = MotionEmotion(MotionEmotionConfig(**config))
    except TypeError as error:
        raise weights.mismatch("motion_emotion", str(error), path) from error
    weights.restore(model, tensors, "motion_emotion", path)
    return model.eval()
