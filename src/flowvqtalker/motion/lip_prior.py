"""Lip prior: a linear prediction of expression from the speech alone (ours, not in the paper)."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["LipPrior"]


class LipPrior(nn.Linear):
    """Linear map from audio features to expression, trained by regression; starts at zero.

    The previous frames tell nearly all of the next one, so a flow on β itself learns to continue them and hardly uses
    the speech: its samples drift and the lips do not follow. With the prior, the flow models the residual β - prior(a),
    and its history holds residuals too. That shifts β by a function of the context, so log p(β) does not change.

    Arguments:
        width: size of an audio feature.
        dim: D of a frame.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__(width, dim)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, audio: Tensor, speech: Tensor | None = None) -> Tensor:
        """(..., width) to (..., D); zeros where ``speech`` (...) is given and false."""
        lips: Tensor = super().forward(audio)
        return lips if speech is None else lips * speech[..., None].to(lips.dtype)
