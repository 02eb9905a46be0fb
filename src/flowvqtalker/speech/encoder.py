"""The listener: an audio encoder whose first layers come from a large pretrained speech encoder (ours).

What lips do depends on the sounds of a language and little on the voice, and a hundred minutes of clips do not teach
that difference. The first layers of Whisper, trained on 680,000 hours, know it already. The listener keeps its two
convolutions and some of its transformer layers, lets each frame attend only to its neighbourhood, without positions, so
that it can follow a stream, and is tuned to reproduce the features of all of Whisper's layers and to foretell lips
(stage ``speech``).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowvqtalker.errors import UserError
from flowvqtalker.motion.context import FRAME_MS, AudioEncoder, TemporalBlock

__all__ = ["AttentiveBlock", "Listener", "ListenerConfig"]

#: What the window of a frame reaches past the frame's start: its last column is centred 40 ms after it and 25 ms wide.
_WINDOW_AHEAD_MS = 40 + 12.5
#: Whisper's steps of 20 ms in a video frame.
_STEPS = 2


@dataclass(frozen=True)
class ListenerConfig:
    """Size and reach of the listener."""

    dim: int = 512
    """Width of the transformer layers (Whisper base: 512)."""
    heads: int = 8
    """Their attention heads."""
    attention: int = 2
    """How many of them there are."""
    back: int = 16
    """Frames before a frame that it attends to, in each layer."""
    ahead: int = 2
    """Frames after it."""
    reach: tuple[tuple[int, int], ...] = ((1, 1), (2, 0), (2, 0))
    """Convolutions behind them: how many frames back and ahead their outer taps lie."""
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
            raise UserError("listener: " + "; ".join(problems))

    @property
    def front(self) -> str:
        """The front end of its windows (:data:`flowvqtalker.speech.features.FRONTS`)."""
        return "fine"

    @property
    def mels(self) -> int:
        """Mel bins of a window."""
        return 80

    @property
    def columns(self) -> int:
        """Columns of a window."""
        return 7

    @property
    def lookahead(self) -> int:
        """Windows after the frame that a feature sees."""
        return self.attention * self.ahead + sum(ahead for _, ahead in self.reach)

    @property
    def lookback(self) -> int:
        """Windows before it."""
        return self.attention * self.back + sum(back for back, _ in self.reach)

    @property
    def lookahead_ms(self) -> float:
        """How much speech after the start of a frame must be known."""
        return self.lookahead * FRAME_MS + _WINDOW_AHEAD_MS


class AttentiveBlock(nn.Module):
    """A transformer layer (pre-norm, GELU, as Whisper's) in which the two steps of a frame attend to those of ``back``
    frames before and ``ahead`` frames after it; without padding, so T frames become T - back - ahead."""

    def __init__(self, dim: int, heads: int, back: int, ahead: int) -> None:
        super().__init__()
        self.heads, self.back, self.ahead = heads, back, ahead
        self.norm_attention = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.attended = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 4 * dim)
        self.contract = nn.Linear(4 * dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 2, dim) to (B, T - back - ahead, 2, dim)."""
        length = x.shape[1] - self.back - self.ahead
        query, key, value = self.project(x)
        query = query[:, :, _STEPS * self.back : _STEPS * (self.back + length)]
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=self._mask(length, x.device))
        return self.complete(x[:, self.back : self.back + length], found)

    def start(self) -> _AttentiveState:
        """What a stream through this block needs to remember."""
        return _AttentiveState(self)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, heads, 2 T, dim / heads), of (B, T, 2, dim)."""
        y = self.norm_attention(x).flatten(1, 2)
        query = self._split(self.query(y))
        key, value = (self._split(part) for part in self.key_value(y).chunk(2, dim=-1))
        return query, key, value

    def complete(self, x: Tensor, found: Tensor) -> Tensor:
        """The rest of the layer on (B, T, 2, dim), given what its attention found (B, heads, 2 T, dim / heads)."""
        x = x + rearrange(self.attended(rearrange(found, "b h t d -> b t (h d)")), "b (t s) d -> b t s d", s=_STEPS)
        result: Tensor = x + self.contract(functional.gelu(self.expand(self.norm(x))))
        return result

    def _mask(self, length: int, device: torch.device) -> Tensor:
        """(2 T, 2 (T + back + ahead)): where a query of frame t may look, the frames t to t + back + ahead."""
        frame = torch.arange(length + self.back + self.ahead, device=device).repeat_interleave(_STEPS)
        query = torch.arange(length, device=device).repeat_interleave(_STEPS)
        distance = frame[None] - query[:, None]
        return (distance >= 0) & (distance <= self.back + self.ahead)


class _AttentiveState:
    """A stream through an :class:`AttentiveBlock`: keys and values of a frame are computed once."""

    def __init__(self, block: AttentiveBlock) -> None:
        self.block = block
        size = block.back + block.ahead + 1
        self._frames: deque[tuple[Tensor, Tensor]] = deque(maxlen=block.ahead + 1)  # with their queries
        self._keys: deque[Tensor] = deque(maxlen=size)
        self._values: deque[Tensor] = deque(maxlen=size)

    def push(self, x: Tensor) -> Tensor | None:
        """Take a frame (1, 2, dim); returns the frame that is now complete, or None."""
        query, key, value = self.block.project(x[:, None])
        self._frames.append((x, query))
        self._keys.append(key)
        self._values.append(value)
        if len(self._keys) < (self._keys.maxlen or 0):
            return None
        frame, query = self._frames[0]
        keys, values = torch.cat(list(self._keys), dim=2), torch.cat(list(self._values), dim=2)
        found = functional.scaled_dot_product_attention(query, keys, values)
        return self.block.complete(frame[:, None], found)[:, 0]


class Listener(AudioEncoder):
    """Audio features (T, width) from windows (T, 80, 7) of the front end ``fine``.

    It has the interface of :class:`~flowvqtalker.motion.context.AudioEncoder`; between its two halves a frame is
    (2, dim), Whisper's steps of 20 ms.
    """

    config: ListenerConfig  # type: ignore[assignment]

    def __init__(self, config: ListenerConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        dim, width = config.dim, config.width
        self.first = nn.Conv1d(config.mels, dim, 3)
        self.second = nn.Conv1d(dim, dim, 3, stride=2)
        self.offset = nn.Parameter(torch.zeros(dim))
        attentive = [AttentiveBlock(dim, config.heads, config.back, config.ahead) for _ in range(config.attention)]
        self.join = nn.Sequential(
            nn.Flatten(-2), nn.LayerNorm(_STEPS * dim), nn.Linear(_STEPS * dim, width), nn.LayerNorm(width)
        )
        self.blocks = nn.ModuleList([*attentive, *(TemporalBlock(width, *pair) for pair in config.reach)])
        self.final = nn.LayerNorm(width)

    def embed(self, windows: Tensor) -> Tensor:
        """(N, 80, 7) log-mel to (N, 2, dim)."""
        windows = windows.to(self.offset.dtype)
        x = functional.gelu(self.second(functional.gelu(self.first(windows))))
        result: Tensor = x.mT + self.offset
        return result

    def behind(self, number: int, features: Tensor) -> Tensor:
        """What follows block ``number`` directly, on (B, ..., 2, dim): behind the last attentive one, the join."""
        return self.join(features) if number == self.config.attention - 1 else features

    def finish(self, features: Tensor) -> Tensor:
        """What the last block gives to audio features, in float32."""
        result: Tensor = self.final(features).float()
        return result

    def mix(self, features: Tensor) -> Tensor:
        """(B, lookback + T + lookahead, 2, dim) to (B, T, width)."""
        for number, block in enumerate(self.blocks):
            features = self.behind(number, block(features))
        return self.finish(features)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, lookback + T + lookahead, 80, 7) to (B, T, width)."""
        batch = len(windows)
        return self.mix(rearrange(self.embed(windows.flatten(0, 1)), "(b t) s d -> b t s d", b=batch))

    @torch.no_grad()
    def start_from_whisper(self, variables: dict[str, Tensor]) -> None:
        """Take over the first layers of a Whisper encoder.

        Arguments:
            variables: as :func:`flowvqtalker.data.teacher.read_variables` gives them.

        Raises:
            UserError: if it is of another size.
        """

        def take(parameter: Tensor | None, name: str) -> None:
            value = variables[f"encoder/{name}"].float()
            assert parameter is not None
            if value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)}, not {tuple(parameter.shape)}"
                raise UserError(f"the speech encoder does not fit the listener: {name} has shape {shapes}")
            parameter.copy_(value)

        for module, name in ((self.first, "conv1"), (self.second, "conv2")):
            take(module.weight, f"{name}/weight")
            take(module.bias, f"{name}/bias")
        positions = variables["encoder/position_encodings/encodings"].float()
        self.offset.copy_(positions[: len(positions) // 3].mean(0))
        for number in range(self.config.attention):
            block, layer = self.blocks[number], f"layer_{number}"
            assert isinstance(block, AttentiveBlock)
            for norm, name in ((block.norm_attention, "self_attention"), (block.norm, "ffn")):
                take(norm.weight, f"{layer}/{name}/layer_norm/gamma")
                take(norm.bias, f"{layer}/{name}/layer_norm/beta")
            for kind in ("weight", "bias"):
                joint = variables[f"encoder/{layer}/self_attention/linear_0/{kind}"].float()
                getattr(block.query, kind).copy_(joint[: self.config.dim])
                getattr(block.key_value, kind).copy_(joint[self.config.dim :])
                take(getattr(block.attended, kind), f"{layer}/self_attention/linear_1/{kind}")
                take(getattr(block.expand, kind), f"{layer}/ffn/linear_0/{kind}")
                take(getattr(block.contract, kind), f"{layer}/ffn/linear_1/{kind}")
