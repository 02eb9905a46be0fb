"""Speech encoders: a small one that is trained with its flow, and a student of Whisper that both flows share (ours).

Lips depend on the sounds of a language and little on the voice, and a hundred minutes of clips do not teach that
difference. The first layers of Whisper, trained on 680,000 hours, know it already. :class:`SpeechEncoder` keeps its two
convolutions and some of its transformer layers. Each frame attends only to its neighbours, without positions, so the
encoder can follow a stream. Stage ``speech`` trains it to reproduce the features of all of Whisper's layers and to
predict lips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowvqtalker.errors import UserError
from flowvqtalker.speech.blocks import STEPS, AttentiveBlock, TemporalBlock

__all__ = [
    "AudioConfig",
    "AudioEncoder",
    "AudioStream",
    "SpeechEncoder",
    "SpeechEncoderConfig",
    "TransformerGraph",
    "TransformerStream",
]


@dataclass(frozen=True)
class AudioConfig:
    """Size and reach of the small audio encoder."""

    frontend: ClassVar[str] = "mel"

    mels: int = 80
    """Mel bands of a window."""
    columns: int = 16
    """Columns of a window."""
    width: int = 128
    """Size of an audio feature."""
    layers: int = 4
    """Temporal convolutions over 3 frames each, so a feature sees 2 layers + 1 windows."""
    lookahead: int = 3
    """Windows after the frame that a feature sees, of the 2 layers around it."""

    def __post_init__(self) -> None:
        positive = min(self.mels, self.width, self.layers) >= 1 and self.columns >= 4
        if not positive or not 0 <= self.lookahead <= 2 * self.layers:
            raise UserError(f"audio: sizes must be positive and 0 <= lookahead <= 2 layers, got {self}")

    @property
    def lookback(self) -> int:
        """Windows before the frame that a feature sees."""
        return 2 * self.layers - self.lookahead


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Size and reach of the speech encoder."""

    frontend: ClassVar[str] = "whisper"
    mels: ClassVar[int] = 80
    columns: ClassVar[int] = 7

    dim: int = 512
    """Width of the transformer layers (Whisper base: 512)."""
    heads: int = 8
    """Attention heads."""
    attention: int = 2
    """Number of transformer layers."""
    back: int = 16
    """Frames before a frame that each layer attends to."""
    ahead: int = 2
    """Frames after it."""
    reach: tuple[tuple[int, int], ...] = ((1, 1), (2, 0), (2, 0))
    """Convolutions after the transformer: frames back and ahead of their outer taps."""
    width: int = 128
    """Size of an audio feature."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reach", tuple((int(back), int(ahead)) for back, ahead in self.reach))
        rules = (
            (min(self.dim, self.heads, self.attention, self.width) >= 1, "sizes must be positive"),
            (self.dim % max(self.heads, 1) == 0, f"dim {self.dim} must be a multiple of heads {self.heads}"),
            (min(self.back, self.ahead, *(n for pair in self.reach for n in pair)) >= 0, "reach must not be negative"),
        )
        problems = [message for holds, message in rules if not holds]
        if problems:
            raise UserError("speech encoder: " + "; ".join(problems))

    @property
    def lookahead(self) -> int:
        """Windows after the frame that a feature sees."""
        return self.attention * self.ahead + sum(ahead for _, ahead in self.reach)

    @property
    def lookback(self) -> int:
        """Windows before the frame that a feature sees."""
        return self.attention * self.back + sum(back for back, _ in self.reach)


class TransformerStream(Protocol):
    """A stream through all that comes before the temporal blocks, the join included."""

    def push(self, window: Tensor) -> Tensor:
        """Take a window (mels, columns); returns the (1, width) that is now complete, late by the layers' look-ahead.

        Before the first window lie copies of it.
        """


class TransformerGraph(Protocol):
    """The transformer in a form that is faster frame by frame (:mod:`flowvqtalker.speech.graph`)."""

    def start(self) -> TransformerStream:
        """A new stream."""


class AudioEncoder(nn.Module):
    """Speech features from log-mel windows: a convolution within each window, then blocks over neighbouring windows.

    The blocks see coarticulation (lips prepare the next sound) at a fixed look-ahead. A subclass may replace
    :meth:`embed`, :meth:`after_block` and :meth:`finish`; :class:`AudioStream` runs them once per frame.
    """

    config: AudioConfig | SpeechEncoderConfig
    graph: TransformerGraph | None = None

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

    def after_block(self, number: int, features: Tensor) -> Tensor:
        """What follows directly on block ``number``: here nothing."""
        return features

    def finish(self, features: Tensor) -> Tensor:
        """Audio features from the output of the last block."""
        result: Tensor = self.final(features)
        return result

    def mix(self, features: Tensor) -> Tensor:
        """(B, lookback + T + lookahead, ...) embedded windows to (B, T, width)."""
        for number, block in enumerate(self.blocks):
            features = self.after_block(number, block(features))
        return self.finish(features)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, lookback + T + lookahead, mels, columns) to (B, T, width)."""
        embedded = self.embed(windows.flatten(0, 1))
        return self.mix(embedded.view(*windows.shape[:2], *embedded.shape[1:]))

    @torch.no_grad()
    def encode_clip(self, windows: Tensor) -> Tensor:
        """Features (T, width) of a clip's windows (T, mels, columns); the outermost windows are repeated."""
        if len(windows) == 0:
            return windows.new_zeros(0, self.config.width)
        features = self.embed(windows)
        before = features[:1].expand(self.config.lookback, *features.shape[1:])
        after = features[-1:].expand(self.config.lookahead, *features.shape[1:])
        return self.mix(torch.cat([before, features, after])[None])[0]


class SpeechEncoder(AudioEncoder):
    """Audio features (T, width) from windows (T, 80, 7) of the frontend ``whisper``.

    Up to the join a frame is (2, dim), Whisper's steps of 20 ms.
    """

    config: SpeechEncoderConfig

    def __init__(self, config: SpeechEncoderConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        dim, width = config.dim, config.width
        self.first = nn.Conv1d(config.mels, dim, 3)
        self.second = nn.Conv1d(dim, dim, 3, stride=2)
        self.offset = nn.Parameter(torch.zeros(dim))
        attentive = [AttentiveBlock(dim, config.heads, config.back, config.ahead) for _ in range(config.attention)]
        self.join = nn.Sequential(
            nn.Flatten(-2), nn.LayerNorm(STEPS * dim), nn.Linear(STEPS * dim, width), nn.LayerNorm(width)
        )
        self.blocks = nn.ModuleList([*attentive, *(TemporalBlock(width, *pair) for pair in config.reach)])
        self.final = nn.LayerNorm(width)

    def embed(self, windows: Tensor) -> Tensor:
        """(N, 80, 7) log-mel to (N, 2, dim)."""
        windows = windows.to(self.offset.dtype)
        x = functional.gelu(self.second(functional.gelu(self.first(windows))))
        result: Tensor = x.mT + self.offset
        return result

    def after_block(self, number: int, features: Tensor) -> Tensor:
        """The join of a frame's two steps, after the last attentive block."""
        if number != self.config.attention - 1:
            return features
        joined: Tensor = self.join(features).to(self.final.weight.dtype)
        return joined

    def finish(self, features: Tensor) -> Tensor:
        """Audio features from the output of the last block, in float32."""
        result: Tensor = self.final(features).float()
        return result

    @torch.no_grad()
    def start_from_whisper(self, variables: dict[str, Tensor]) -> None:
        """Take over the first layers of a Whisper encoder.

        Arguments:
            variables: from :func:`flowvqtalker.data.teacher.read_variables`.

        Raises:
            UserError: if it is of another size.
        """

        def take(module: nn.Module, name: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
            for own, kind in zip(("weight", "bias"), kinds, strict=True):
                value, parameter = variables[f"encoder/{name}/{kind}"].float(), getattr(module, own)
                if value.shape != parameter.shape:
                    shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
                    raise UserError(f"these weights do not fit the speech encoder: {name} has shape {shapes}")
                parameter.copy_(value)

        take(self.first, "conv1")
        take(self.second, "conv2")
        positions = variables["encoder/position_encodings/encodings"].float()
        self.offset.copy_(positions[: len(positions) // 3].mean(0))
        for number in range(self.config.attention):
            block, layer = cast("AttentiveBlock", self.blocks[number]), f"layer_{number}"
            take(block.norm_attention, f"{layer}/self_attention/layer_norm", ("gamma", "beta"))
            take(block.norm, f"{layer}/ffn/layer_norm", ("gamma", "beta"))
            take(block.attended, f"{layer}/self_attention/linear_1")
            take(block.expand, f"{layer}/ffn/linear_0")
            take(block.contract, f"{layer}/ffn/linear_1")
            for kind in ("weight", "bias"):
                joint = variables[f"encoder/{layer}/self_attention/linear_0/{kind}"].float()
                getattr(block.query, kind).copy_(joint[: self.config.dim])
                getattr(block.key_value, kind).copy_(joint[self.config.dim :])


class AudioStream:
    """An encoder fed window by window. Features come late by its look-ahead; each part runs once per frame.

    The first window is repeated before the start and the last one after the end, as in training.
    """

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder, config = encoder, encoder.config
        self._graph = None if encoder.graph is None else encoder.graph.start()
        # What the graph does: its blocks, the copies of the first window that they need, and those that it returns.
        self._done = self._early = 0
        self._copies = config.lookback
        if self._graph is not None and isinstance(config, SpeechEncoderConfig):
            self._done, self._early = config.attention, config.attention * config.ahead
            self._copies -= config.attention * config.back
        blocks = cast("list[TemporalBlock]", list(encoder.blocks))[self._done :]
        self._states = [block.start() for block in blocks]
        self._last: Tensor | None = None

    def _feed(self, feature: Tensor) -> list[Tensor]:
        for number, state in enumerate(self._states, self._done):
            done = state.push(feature)
            if done is None:
                return []
            feature = self.encoder.after_block(number, done)
        return [self.encoder.finish(feature)]

    def push(self, window: Tensor) -> list[Tensor]:
        """Take a window (mels, columns); returns no or one feature (1, width)."""
        feature = self.encoder.embed(window[None]) if self._graph is None else self._graph.push(window)
        if self._last is None:
            for _ in range(self._copies):
                self._feed(feature)
        self._last = window
        if self._early:
            self._early -= 1
            return []
        return self._feed(feature)

    def finish(self) -> list[Tensor]:
        """End the stream; returns the remaining features."""
        last = self._last
        if last is None:
            return []
        return [feature for _ in range(self.encoder.config.lookahead) for feature in self.push(last)]
