"""What the flows are conditioned on: speech, emotion, the previous frames and the source's expression.

The paper's context is c = [β0, a, β_pre, e] for ExpFlow and [a, ρ_pre] for PoseFlow (section 3.2). All of it becomes a
handful of tokens, once per frame; the K steps of a flow share them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowvqtalker.errors import UserError
from flowvqtalker.motion.bijections import Context, CrossBlock

__all__ = ["AudioConfig", "AudioEncoder", "AudioStream", "ContextEncoder", "Forecast", "TemporalBlock", "history_of"]

#: One video frame lasts this long.
FRAME_MS = 40
#: What a log-mel window itself reaches past the start of its frame: its 16 columns of 12.5 ms start two frames before.
WINDOW_AHEAD_MS = 16 * 12.5 - 2 * FRAME_MS


@dataclass(frozen=True)
class AudioConfig:
    """Size and reach of the small audio encoder, which is trained with its flow."""

    mels: int = 80
    """Mel bins of a window."""
    columns: int = 16
    """Columns of a window."""
    width: int = 128
    """Size of an audio feature."""
    layers: int = 4
    """Temporal convolutions over 3 frames each, so a feature sees 2 layers + 1 windows."""
    lookahead: int = 3
    """Windows after the frame that a feature sees (of the 2 layers); the rest lie before it."""

    def __post_init__(self) -> None:
        positive = min(self.mels, self.width, self.layers) >= 1 and self.columns >= 4
        if not positive or not 0 <= self.lookahead <= 2 * self.layers:
            raise UserError(f"audio: sizes must be positive and 0 <= lookahead <= 2 layers, got {self}")

    @property
    def front(self) -> str:
        """The front end of its windows (:data:`flowvqtalker.speech.features.FRONTS`)."""
        return "mel"

    @property
    def lookback(self) -> int:
        """Windows before the frame that a feature sees."""
        return 2 * self.layers - self.lookahead

    @property
    def lookahead_ms(self) -> float:
        """How much speech after the start of a frame must be known: 240 ms with the defaults."""
        return self.lookahead * FRAME_MS + WINDOW_AHEAD_MS


class TemporalBlock(nn.Module):
    """A residual convolution over time with taps ``back`` frames before a frame, at it, and ``ahead`` frames after it.

    There is no padding: T frames become T - back - ahead.
    """

    def __init__(self, width: int, back: int, ahead: int) -> None:
        super().__init__()
        self.back, self.ahead = back, ahead
        self.norm = nn.LayerNorm(width)
        self.convolution = nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to (B, T - back - ahead, width)."""
        length = x.shape[1] - self.back - self.ahead
        y = self.norm(x)
        taps = [y[:, start : start + length] for start in (0, self.back, self.back + self.ahead)]
        y = functional.gelu(self.convolution(torch.cat(taps, dim=-1)), approximate="tanh")
        result: Tensor = x[:, self.back : self.back + length] + y
        return result

    def start(self) -> _TemporalState:
        """What a stream through this block needs to remember."""
        return _TemporalState(self)


class _TemporalState:
    """A stream through a :class:`TemporalBlock`."""

    def __init__(self, block: TemporalBlock) -> None:
        self.block = block
        self._held: deque[Tensor] = deque(maxlen=block.back + block.ahead + 1)

    def push(self, x: Tensor) -> Tensor | None:
        """Take a frame (1, width); returns the frame that is now complete, or None."""
        self._held.append(x)
        if len(self._held) < (self._held.maxlen or 0):
            return None
        result: Tensor = self.block(torch.stack(list(self._held), dim=1))[:, 0]
        return result


class AudioEncoder(nn.Module):
    """Speech features from log-mel windows: a convolution within each window, then blocks over a neighbourhood of
    windows.

    The blocks make coarticulation visible (lips prepare the next sound) at a fixed look-ahead
    (:attr:`AudioConfig.lookahead_ms`). :meth:`embed` and :meth:`mix` are the two halves; :class:`AudioStream` computes
    each of their parts once for every frame of a stream.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        length = (config.columns + 3) // 4  # after two strides of two
        self.window = nn.Sequential(
            nn.Conv1d(config.mels, width, 3, stride=2, padding=1),
            nn.GELU(approximate="tanh"),
            nn.Conv1d(width, width, 3, stride=2, padding=1),
            nn.GELU(approximate="tanh"),
            nn.Flatten(),
            nn.Linear(length * width, width),
            nn.LayerNorm(width),
        )
        self.blocks = nn.ModuleList(TemporalBlock(width, 1, 1) for _ in range(config.layers))
        self.final = nn.LayerNorm(width)

    def embed(self, windows: Tensor) -> Tensor:
        """(N, mels, columns) log-mel in [-4, 4] to (N, width)."""
        features: Tensor = self.window(windows / 4)
        return features

    def behind(self, number: int, features: Tensor) -> Tensor:
        """What follows block ``number`` directly: nothing."""
        return features

    def finish(self, features: Tensor) -> Tensor:
        """What the last block gives to audio features."""
        result: Tensor = self.final(features)
        return result

    def mix(self, features: Tensor) -> Tensor:
        """(B, lookback + T + lookahead, width) window features to (B, T, width)."""
        for number, block in enumerate(self.blocks):
            features = self.behind(number, block(features))
        return self.finish(features)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, lookback + T + lookahead, mels, columns) to (B, T, width)."""
        batch, count = windows.shape[:2]
        return self.mix(self.embed(windows.flatten(0, 1)).view(batch, count, -1))

    @torch.no_grad()
    def of_clip(self, windows: Tensor) -> Tensor:
        """Features (T, width) of a whole clip's windows (T, mels, columns), the outermost repeated."""
        if len(windows) == 0:
            return windows.new_zeros(0, self.config.width)
        features = self.embed(windows)
        before = features[:1].expand(self.config.lookback, *features.shape[1:])
        after = features[-1:].expand(self.config.lookahead, *features.shape[1:])
        return self.mix(torch.cat([before, features, after])[None])[0]


class AudioStream:
    """An audio encoder fed window by window: features come late by its look-ahead, each part is computed once a frame.

    The first window is repeated before the start, and the last one after the end, as training repeats them.
    """

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder
        blocks = cast("list[TemporalBlock]", list(encoder.blocks))
        self._states = [block.start() for block in blocks]
        self._last: Tensor | None = None

    def _feed(self, feature: Tensor) -> list[Tensor]:
        for number, state in enumerate(self._states):
            done = state.push(feature)
            if done is None:
                return []
            feature = self.encoder.behind(number, done)
        return [self.encoder.finish(feature)]

    def push(self, window: Tensor) -> list[Tensor]:
        """Take a window (mels, columns); returns no or one feature (1, width)."""
        feature = self.encoder.embed(window[None])
        if self._last is None:
            for _ in range(self.encoder.config.lookback):
                self._feed(feature)
        self._last = feature
        return self._feed(feature)

    def finish(self) -> list[Tensor]:
        """The features still held back."""
        last = self._last
        if last is None:
            return []
        return [feature for _ in range(self.encoder.config.lookahead) for feature in self._feed(last)]


class Forecast(nn.Module):
    """Where the next frame is expected, and how far from there it may be: what the flow's steps start from (ours).

    A frame is mostly the one before it. Learning that through sixteen near-identity steps takes thousands of
    iterations, so the flow works on (x - centre) / scale, a bijection of x given the context with log-determinant -Σ
    log scale. Both come from the latest previous frame that is there (data dropout hides some), with gains and scales
    that depend on its age and start as those of a slowly varying process, and from the tokens, whose part starts at
    zero.

    Arguments:
        dim: D.
        width: size of a token.
        tokens: number of tokens.
        history: τ.
    """

    #: Correlation of a coefficient with itself one frame later, at the start.
    MEMORY = 0.95

    def __init__(self, dim: int, width: int, tokens: int, history: int) -> None:
        super().__init__()
        gain = self.MEMORY ** torch.arange(history, 0, -1.0)  # oldest first, like the history
        gain = torch.cat([gain, torch.zeros(1)])  # and last, no frame at all
        self.gain = nn.Parameter(gain[:, None].repeat(1, dim))
        self.log_scale = nn.Parameter(0.5 * torch.log1p(-gain.square())[:, None].repeat(1, dim))
        self.expand = nn.Linear(tokens * width, 2 * width)
        self.contract = nn.Linear(2 * width, 2 * dim)
        nn.init.zeros_(self.contract.weight)
        nn.init.zeros_(self.contract.bias)

    def forward(self, history: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(N, τ, D) with zeros where there is no frame, and (N, M, width), to centre and log-scale, both (N, D)."""
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

    Tokens of speech, emotion, source and the last frame, and one learnt token, read all of these and the τ previous
    frames in one transformer block. A previous frame that does not exist is zeros (the mean face); *data dropout* sets
    whole previous frames to the same zeros in training, each on its own, without rescaling, and touches nothing else.

    Arguments:
        dim: D of a frame.
        width: size of a token.
        heads: attention heads.
        history: τ.
        audio: size of an audio feature.
        classes: number of emotions; 1: no emotion token.
        source: whether there is a source token (β0).
        dropout: probability that a previous frame is dropped.
        forecast: see :class:`Forecast`.
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
        forecast: bool = False,
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
        self.forecast = Forecast(dim, width, kinds, history) if forecast else None

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
            speech: (N,) bool; where false, the learnt "no audio" token takes the place of the features.
            source: (N, D) expression of the source picture.
        """
        heard = self.audio(audio)
        if speech is not None:
            heard = torch.where(speech[:, None], heard, self.no_audio)
        history = self.drop(history)
        past = self.frame(history) + self.age
        given = [heard]
        if self.emotion is not None:
            given.append(emotion @ self.emotion)
        if self.source is not None:
            if source is None:
                raise ValueError("this flow is conditioned on a source expression: give source")
            given.append(self.source(source))
        given += [past[:, -1], self.summary.expand(len(heard), -1)]
        queries = torch.stack(given, dim=1) + self.kind
        memory = torch.cat([queries[:, :-2], past], dim=1)
        tokens = self.norm(self.block(queries, self.norm_memory(memory)))
        if self.forecast is None:
            return Context(tokens, emotion)
        return Context(tokens, emotion, *self.forecast(history, tokens))
