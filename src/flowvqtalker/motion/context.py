"""Context encoder of the flows: speech, emotion, previous frames and the source's expression.

The paper's context is c = [β0, a, β_pre, e] for ExpFlow and [a, ρ_pre] for PoseFlow (section 3.2). It is encoded once
per frame into a few tokens, which all K steps of a flow share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowvqtalker.motion.bijections import Context, CrossBlock

__all__ = ["AutoregressivePrior", "ContextEncoder", "history_of"]


class AutoregressivePrior(nn.Module):
    """Autoregressive prediction of the next frame, from which the flow's steps start (ours).

    A frame is mostly the previous one. Learning that through sixteen near-identity steps takes thousands of iterations,
    so the flow models (x - centre) / scale, a bijection of x given the context with log-determinant -Σ log scale.
    Centre and scale come from the latest previous frame that is not dropped, with gains and scales that depend on its
    age and start as those of a slow process, and from the tokens, whose part starts at zero.

    Arguments:
        dim: D.
        width: size of a token.
        tokens: number of tokens.
        history: τ.
    """

    #: Initial correlation of a coefficient with itself one frame later.
    MEMORY = 0.95

    def __init__(self, dim: int, width: int, tokens: int, history: int) -> None:
        super().__init__()
        gain = self.MEMORY ** torch.arange(history, 0, -1.0)  # oldest first, like the history
        gain = torch.cat([gain, torch.zeros(1)])  # last: no frame at all
        self.gain = nn.Parameter(gain[:, None].repeat(1, dim))
        self.log_scale = nn.Parameter(0.5 * torch.log1p(-gain.square())[:, None].repeat(1, dim))
        self.expand = nn.Linear(tokens * width, 2 * width)
        self.contract = nn.Linear(2 * width, 2 * dim)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, history: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and log-scale, both (N, D), from a history (N, τ, D) with zeros for missing frames and tokens (N, M,
        width)."""
        count, size, _ = history.shape
        there = history.abs().amax(-1) > 0
        age = torch.arange(1, size + 1, device=history.device) * there
        latest = age.amax(1) - 1  # -1: none
        recent = history[torch.arange(count, device=history.device), latest]
        picked = functional.one_hot(latest % (size + 1), size + 1).to(history)
        hidden = functional.gelu(self.expand(tokens.flatten(1)), approximate="tanh")
        shift, change = self.contract(hidden).chunk(2, dim=-1)
        return recent * (picked @ self.gain) + shift, picked @ self.log_scale + 3 * torch.tanh(change / 3)


def history_of(sequence: Tensor, frames: int) -> Tensor:
    """The previous frames of every frame.

    Arguments:
        sequence: (B, τ + T, D), the T frames after the τ before them (zeros before the start of a clip).
        frames: τ.

    Returns:
        (B, T, τ, D), oldest first.
    """
    return sequence.unfold(1, frames, 1)[:, :-1].transpose(2, 3)


class ContextEncoder(nn.Module):
    """Encode one frame's context to (N, M, width) tokens.

    Tokens of speech, emotion, source and the last frame, and one learnt token, read each other and the τ previous
    frames in one transformer block. A missing previous frame is zeros (the mean face). In training, *data dropout* sets
    previous frames to the same zeros, each independently and without rescaling; it touches nothing else.

    Arguments:
        dim: D of a frame.
        width: size of a token.
        heads: attention heads.
        history: τ.
        audio: size of an audio feature.
        classes: number of emotions; 1: no emotion token.
        source: use a source token (β0).
        dropout: probability that a previous frame is dropped.
        ar_prior: use an :class:`AutoregressivePrior`.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        heads: int,
        history: int,
        audio: int,
        *,
        classes: int = 1,
        source: bool = False,
        dropout: float = 0.0,
        ar_prior: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.frame = nn.Linear(dim, width)
        self.age = nn.Parameter(torch.randn(history, width) * 0.02)
        self.audio = nn.Linear(audio, width)
        self.no_audio = nn.Parameter(torch.randn(width) * 0.02)
        self.emotion = nn.Parameter(torch.randn(classes, width)) if classes > 1 else None
        self.source = nn.Linear(dim, width) if source else None
        self.summary = nn.Parameter(torch.randn(width) * 0.02)
        kinds = 3 + (classes > 1) + source
        self.kind = nn.Parameter(torch.randn(kinds, width) * 0.02)
        self.norm_memory = nn.LayerNorm(width)
        self.block = CrossBlock(width, heads, 2 * width)
        self.norm = nn.LayerNorm(width)
        self.ar_prior = AutoregressivePrior(dim, width, kinds, history) if ar_prior else None

    def drop(self, history: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Data dropout: (N, τ, D) with whole frames set to zero, in training only."""
        if not self.training or self.dropout == 0:
            return history
        draw = torch.rand(history.shape[:2], generator=generator, device=history.device)
        return history * (draw >= self.dropout).to(history.dtype)[..., None]

    def forward(
        self,
        audio: Tensor,
        history: Tensor,
        emotion: Tensor,
        *,
        speech: Tensor | None = None,
        source: Tensor | None = None,
    ) -> Context:
        """
        Arguments:
            audio: (N, audio) features.
            history: (N, τ, D), oldest first.
            emotion: (N, C) weights.
            speech: (N,) bool; where false, the learnt "no audio" token replaces the features.
            source: (N, D) expression of the source image.
        """
        spoken = self.audio(audio)
        if speech is not None:
            spoken = torch.where(speech[:, None], spoken, self.no_audio)
        history = self.drop(history)
        past = self.frame(history) + self.age
        given = [spoken]
        if self.emotion is not None:
            given.append(emotion @ self.emotion)
        if self.source is not None:
            if source is None:
                raise ValueError("this flow is conditioned on a source expression: give source")
            given.append(self.source(source))
        given += [past[:, -1], self.summary.expand(len(spoken), -1)]
        queries = torch.stack(given, dim=1) + self.kind
        memory = torch.cat([queries[:, :-2], past], dim=1)
        tokens = self.norm(self.block(queries, self.norm_memory(memory)))
        if self.ar_prior is None:
            return Context(tokens, emotion)
        return Context(tokens, emotion, *self.ar_prior(history, tokens))
