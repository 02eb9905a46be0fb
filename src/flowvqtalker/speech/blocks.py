"""Blocks of the speech encoders, for whole clips and for streams."""

from __future__ import annotations

from collections import deque

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["STEPS", "AttentiveBlock", "TemporalBlock"]

#: Whisper's steps of 20 ms in one video frame.
STEPS = 2


class TemporalBlock(nn.Module):
    """A residual convolution over time with taps ``back`` frames before a frame, at it, and ``ahead`` frames after it.

    Without padding: T frames become T - back - ahead.
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
        """State of a stream through this block."""
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


class AttentiveBlock(nn.Module):
    """A transformer layer (pre-norm, GELU, as Whisper's) with local attention.

    The two steps of a frame attend to those of ``back`` frames before and ``ahead`` frames after it. Without padding: T
    frames become T - back - ahead.
    """

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

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 2, dim) to (B, T - back - ahead, 2, dim)."""
        length = x.shape[1] - self.back - self.ahead
        query, key, value = self.project(x)
        query = query[:, :, STEPS * self.back : STEPS * (self.back + length)]
        read = functional.scaled_dot_product_attention(query, key, value, attn_mask=self._mask(length, x.device))
        return self.complete(x[:, self.back : self.back + length], read)

    def start(self) -> _AttentiveState:
        """State of a stream through this block."""
        return _AttentiveState(self)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each (B, heads, 2 T, dim / heads), of (B, T, 2, dim)."""
        y = self.norm_attention(x).flatten(1, 2)
        parts = (self.query(y), *self.key_value(y).chunk(2, dim=-1))
        query, key, value = (rearrange(part, "b t (h d) -> b h t d", h=self.heads) for part in parts)
        return query, key, value

    def complete(self, x: Tensor, read: Tensor) -> Tensor:
        """The rest of the layer for (B, T, 2, dim) and the attention's output (B, heads, 2 T, dim / heads)."""
        x = x + rearrange(self.attended(rearrange(read, "b h t d -> b t (h d)")), "b (t s) d -> b t s d", s=STEPS)
        result: Tensor = x + self.contract(functional.gelu(self.expand(self.norm(x))))
        return result

    def _mask(self, length: int, device: torch.device) -> Tensor:
        """(2 T, 2 (T + back + ahead)): a query of frame t reads the frames t to t + back + ahead."""
        frame = torch.arange(length + self.back + self.ahead, device=device).repeat_interleave(STEPS)
        query = torch.arange(length, device=device).repeat_interleave(STEPS)
        distance = frame[None] - query[:, None]
        return (distance >= 0) & (distance <= self.back + self.ahead)


class _AttentiveState:
    """A stream through an :class:`AttentiveBlock`; keys and values of a frame are computed once."""

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
        read = functional.scaled_dot_product_attention(query, keys, values)
        return self.block.complete(frame[:, None], read)[:, 0]
