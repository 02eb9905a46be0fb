"""The codebook of the lite generator (ours): E_h, C and D_h on a region of interest around the inner face.

The paper spends 16x16 codes of 32 pixels on the whole crop (section 3.3 "Codebook", eq. 13-17). Here 20x18 codes of 16
pixels cover the inner face alone, so that teeth, lids and irises get codes of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.constants import CROP
from flowvqtalker.render.layers import silu

__all__ = ["Block", "ChannelNorm", "Codes", "RegionAttention", "RegionCodebookConfig", "RegionVQVAE"]

#: Pixels that one code covers along a side.
STRIDE = 16


@dataclass(frozen=True)
class RegionCodebookConfig:
    """Sizes of E_h, C and D_h of the region."""

    roi: tuple[int, int, int, int] = (160, 112, 320, 288)
    """Top, left, height and width of the region in pixels of the crop; multiples of 16."""
    channels: tuple[int, int, int, int] = (32, 64, 128, 256)
    """Channels at 1/2 (D_h alone), 1/4, 1/8 and 1/16."""
    bottleneck: int = 128
    """Channels inside the residual blocks at 1/16."""
    codes: int = 1024
    """N, the number of codes."""
    dim: int = 256
    """d, the length of a code."""

    def __post_init__(self) -> None:
        top, left, height, width = self.roi
        outside = min(top, left) < 0 or min(height, width) < STRIDE or max(top + height, left + width) > CROP
        if outside or any(value % STRIDE for value in self.roi):
            raise ValueError(f"codebook: region {self.roi} must lie in {CROP}x{CROP} pixels, in steps of {STRIDE}")
        if len(self.channels) != 4 or min(*self.channels, self.bottleneck, self.codes, self.dim) < 1:
            raise ValueError("codebook: four channels, bottleneck, codes and dim are needed, each at least 1")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes."""
        return self.roi[2] // STRIDE, self.roi[3] // STRIDE

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegionCodebookConfig:
        """Inverse of ``dataclasses.asdict`` (lists become tuples)."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position: (B, C, H, W) -> (B, C, H, W).

    Group norm takes statistics of the whole map: a mouth that opens would change the forehead, which flickers. This
    norm is local, and it keeps the channels-last layout.
    """

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # autocast would return float32
            weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.layer_norm(x.movedim(1, -1), (self.channels,), weight, bias, 1e-6).movedim(-1, 1)


class Block(nn.Module):
    """Residual block: norm, 3x3 convolution, SiLU, 3x3 convolution. Starts as the identity."""

    def __init__(self, channels: int, hidden: int | None = None, *, norm: bool = True) -> None:
        super().__init__()
        hidden = hidden or channels
        self.norm = ChannelNorm(channels) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv2(silu(self.conv1(self.norm(x))))
        return out


class RegionAttention(nn.Module):
    """Multi-head attention over positions with a residual.

    With a second input, keys and values come from it (the paper's MHCA).
    """

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_memory = ChannelNorm(channels), ChannelNorm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Conv2d(channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        b, c, h, w = x.shape
        q = self.query(self.norm_query(x)).view(b, self.heads, c // self.heads, h * w).transpose(2, 3)
        kv = self.key_value(self.norm_memory(x if memory is None else memory))
        k, v = kv.view(kv.shape[0], 2, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        found = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, h, w)
        out: Tensor = x + self.out(found.contiguous(memory_format=torch.channels_last))
        return out


class RegionEncoder(nn.Module):
    """E_h and E_w: region (B, 3, H, W) to latents (B, d, H / 16, W / 16) of unit variance at each position."""

    def __init__(self, config: RegionCodebookConfig) -> None:
        super().__init__()
        _, a, b, c = config.channels
        self.stem = nn.Conv2d(48, a, 3, padding=1)
        self.level4, self.level8, self.level16 = Block(a), Block(b), Block(c, config.bottleneck)
        self.down8 = nn.Conv2d(a, b, 3, 2, 1)
        self.down16 = nn.Conv2d(b, c, 3, 2, 1)
        self.out = nn.Sequential(ChannelNorm(c), nn.Conv2d(c, config.dim, 1), ChannelNorm(config.dim, affine=False))

    def features(self, image: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps at 1/16 (before ``out``), 1/8 and 1/4.

        Arguments:
            image: (B, 3, H, W) in [-1, 1].
            extra: (B, C, H / 4, W / 4), added to the stem's map.
        """
        return self.further(self.first(image, extra))

    def first(self, image: Tensor, extra: Tensor | None = None) -> Tensor:
        """The feature map at 1/4; arguments as :meth:`features`."""
        x = self.stem(F.pixel_unshuffle(image, 4))
        fine: Tensor = self.level4(x if extra is None else x + extra)
        return fine

    def further(self, fine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Feature maps at 1/16, 1/8 and 1/4, given the last."""
        middle = self.level8(self.down8(fine))
        return self.level16(self.down16(middle)), middle, fine

    def forward(self, image: Tensor) -> Tensor:
        latent: Tensor = self.out(self.features(image)[0])
        return latent


class RegionDecoder(nn.Module):
    """D_h: codes (B, d, h, w) to the region (B, 3, 16 h, 16 w) in about [-1, 1].

    ``modulate(scale, x)``, where given, changes the maps at 1/8 and 1/4; this is where the generator's image-level
    AdaIN enters.

    Arguments:
        config: of the codebook.
        attention: whether it attends over positions at 1/16.
        blocks: residual blocks at 1/8 and 1/4.
        extra: channels that follow the colours. They start at 2 everywhere.
    """

    def __init__(
        self,
        config: RegionCodebookConfig,
        *,
        attention: bool = True,
        blocks: tuple[int, int] = (2, 2),
        extra: int = 0,
    ) -> None:
        super().__init__()
        f, a, b, c = config.channels
        self.stem = nn.Conv2d(config.dim, c, 1)
        self.position = nn.Parameter(torch.zeros(1, c, *config.grid))
        self.attention = RegionAttention(c) if attention else nn.Identity()
        self.level16 = Block(c, config.bottleneck)
        self.level8, self.level4 = (
            nn.Sequential(*(Block(width) for _ in range(n))) for width, n in zip((b, a), blocks, strict=True)
        )
        self.level2 = Block(f, norm=False)
        self.up8, self.up4, self.up2 = nn.Conv2d(c, 4 * b, 1), nn.Conv2d(b, 4 * a, 1), nn.Conv2d(a, 4 * f, 1)
        self.out = nn.Conv2d(f, 4 * (3 + extra), 3, padding=1)
        nn.init.zeros_(self.out.weight[12:])
        nn.init.constant_(self.out.bias[12:], 2.0)  # type: ignore[index]

    def forward(self, z: Tensor, modulate: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        x = self.stem(z) + self.position.to(z.dtype)
        x = F.pixel_shuffle(self.up8(self.level16(self.attention(x))), 2)
        if modulate is not None:
            x = modulate(8, x)
        x = F.pixel_shuffle(self.up4(self.level8(x)), 2)
        if modulate is not None:
            x = modulate(4, x)
        return self.picture(self.level2(F.pixel_shuffle(self.up2(self.level4(x)), 2)))

    def picture(self, x: Tensor) -> Tensor:
        """Maps (B, C, H / 2, W / 2) to the region."""
        return F.pixel_shuffle(self.out(silu(x)), 2)


class Codes(nn.Module):
    """C: N codes of length d, looked up by the nearest Euclidean distance (eq. 13).

    A buffer, not a parameter: training moves the codes to averages of the latents that chose them
    (:class:`flowvqtalker.train.region_codebook.CodeAverages`).
    """

    weight: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", F.layer_norm(torch.randn(codes, dim), (dim,)))

    def nearest(self, z: Tensor) -> Tensor:
        """(B, d, h, w) latents to (B, h, w) indices."""
        flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would confuse neighbouring codes
            distance = self.weight.square().sum(1) - 2 * flat @ self.weight.T
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) indices to (B, d, h, w) codes."""
        return F.embedding(indices, self.weight).movedim(-1, 1)

    def expect(self, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        """Expected codes (B, d, h, w) under the softmax of logits (B, h w, N)."""
        codes = logits.float().softmax(-1).to(logits.dtype) @ self.weight.to(logits.dtype)
        return codes.movedim(-1, 1).reshape(len(logits), -1, *grid)


class RegionVQVAE(nn.Module):
    """E_h, C and D_h together: self-reconstruction of the region through the codebook (fig. 3a)."""

    def __init__(self, config: RegionCodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = RegionEncoder(config)
        self.codes = Codes(config.codes, config.dim)
        self.decoder = RegionDecoder(config)

    def cut(self, image: Tensor) -> Tensor:
        """The region of maps (B, C, s, s) of the whole crop, s a divisor of its side."""
        scale = CROP // image.shape[-1]
        top, left, height, width = (value // scale for value in self.config.roi)
        return image[..., top : top + height, left : left + width]

    def encode(self, region: Tensor) -> tuple[Tensor, Tensor]:
        """Latents z_h (B, d, h, w) and code indices (B, h, w) of regions (B, 3, H, W) in [-1, 1]."""
        z = self.encoder(region)
        return z, self.codes.nearest(z)

    def decode(self, indices: Tensor) -> Tensor:
        """(B, h, w) code indices to regions (B, 3, H, W)."""
        image: Tensor = self.decoder(self.codes.lookup(indices))
        return image

    def forward(self, region: Tensor) -> Tensor:
        return self.decode(self.encode(region)[1])
