"""The codebook stage: encoder E_h, codebook C and decoder D_h (paper section 3.3 "Codebook", eq. 13-17, fig. 3a)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.render.layers import Attention2d, Downsample, ResBlock, Upsample, group_norm, silu

__all__ = ["Codebook", "CodebookConfig", "Decoder", "Encoder", "Quantized", "VQAutoencoder"]


@dataclass(frozen=True)
class CodebookConfig:
    """Sizes of E_h, C and D_h. Level i works at image side / 2**i; the last level holds the codes (16x16 at 512)."""

    channels: tuple[int, ...] = (64, 128, 128, 256, 256, 512)
    """Encoder channels from full resolution down to the code map (CodeFormer: 64 x 1,2,2,4,4,8)."""
    decoder_channels: tuple[int, ...] = (64, 128, 128, 256, 256, 512)
    """Decoder channels, same order as ``channels``."""
    blocks: int = 2
    """Residual blocks a level."""
    decoder_blocks: int = 2
    """Residual blocks a level in the decoder."""
    attention: bool = True
    """Self-attention at the resolution of the codes."""
    full_resolution: bool = True
    """Residual blocks at full resolution; off, level 0 is one strided convolution in and a pixel shuffle out."""
    upsample_kernel: Literal[1, 3] = 3
    """Kernel of the upsampling convolutions, see :class:`~flowvqtalker.render.layers.Upsample`."""
    codes: int = 1024
    """N, the number of codes."""
    dim: int = 256
    """d, the length of a code."""

    def __post_init__(self) -> None:
        problems = []
        if len(self.channels) != len(self.decoder_channels) or len(self.channels) < 2:
            problems.append(
                f"channels {self.channels} and decoder_channels {self.decoder_channels} need the same length >= 2"
            )
        if any(c % 4 for c in (*self.channels, *self.decoder_channels)):
            problems.append("channels must be multiples of 4")
        if min(self.codes, self.dim, self.blocks, self.decoder_blocks) < 1:
            problems.append("codes, dim, blocks and decoder_blocks must be at least 1")
        if problems:
            raise ValueError("codebook: " + "; ".join(problems))

    @classmethod
    def paper(cls) -> CodebookConfig:
        """512x512 -> 16x16, d = 256, N = 1024 with the channels of CodeFormer (the paper gives no others)."""
        return cls()

    @classmethod
    def lite(cls) -> CodebookConfig:
        """Small sizes, to train the ablation of fig. 7 on CPUs: E_h 6 GFLOP and D_h 12 GFLOP a 512x512 picture."""
        return cls(
            channels=(16, 16, 48, 96, 160, 256),
            decoder_channels=(16, 32, 64, 128, 192, 256),
            blocks=1,
            decoder_blocks=1,
            attention=False,
            full_resolution=False,
            upsample_kernel=1,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodebookConfig:
        """Inverse of :meth:`to_dict` (lists become tuples)."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @property
    def stride(self) -> int:
        """Pixels a code covers along one side."""
        return int(2 ** (len(self.channels) - 1))


class Encoder(nn.Module):
    """E_h (and, fine-tuned, E_w): image to latent map.

    ``forward`` gives (B, d, H / stride, W / stride); ``features`` gives that and the feature map of every level but
    the last, finest first, which the image generator's AdaIN reads.
    """

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        ch = config.channels
        self.stem = nn.Conv2d(
            3, ch[0] if config.full_resolution else ch[1], 3, stride=1 if config.full_resolution else 2, padding=1
        )
        first = 0 if config.full_resolution else 1
        self.levels = nn.ModuleList()
        self.downs = nn.ModuleList()
        for i in range(first, len(ch)):
            last = i == len(ch) - 1
            blocks = [ResBlock(ch[i]) for _ in range(config.blocks + last)]
            if last and config.attention:
                blocks.insert(-1, Attention2d(ch[i]))  # type: ignore[arg-type]
            self.levels.append(nn.Sequential(*blocks))
            if not last:
                self.downs.append(Downsample(ch[i], ch[i + 1]))
        self.norm = group_norm(ch[-1])
        self.out = nn.Conv2d(ch[-1], config.dim, 3, padding=1)

    def features(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Latent map and the levels' feature maps, finest first, without the last level's, of (B, 3, H, W)."""
        x = self.stem(image)
        maps = []
        for i, level in enumerate(self.levels):
            x = level(x)
            if i < len(self.downs):
                maps.append(x)
                x = self.downs[i](x)
        return self.out(silu(self.norm(x))), maps

    def forward(self, image: Tensor) -> Tensor:
        return self.features(image)[0]


class Decoder(nn.Module):
    """D_h: latent map (B, d, h, w) to image (B, 3, H, W) in about [-1, 1].

    ``modulate(level, x)``, where given, is applied to the input of each level's blocks but the coarsest (level 0 is the
    finest); this is where the image generator's image-level AdaIN enters the frozen decoder.
    """

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        ch = config.decoder_channels
        self.stem = nn.Conv2d(config.dim, ch[-1], 3, padding=1)
        first = 0 if config.full_resolution else 1
        self.level_ids = tuple(range(len(ch) - 1, first - 1, -1))
        self.levels = nn.ModuleList()
        self.ups = nn.ModuleList()
        for i in self.level_ids:
            coarsest = i == len(ch) - 1
            blocks = [ResBlock(ch[i]) for _ in range(config.decoder_blocks + coarsest)]
            if coarsest and config.attention:
                blocks.insert(1, Attention2d(ch[i]))  # type: ignore[arg-type]
            self.levels.append(nn.Sequential(*blocks))
            if i > first:
                self.ups.append(Upsample(ch[i], ch[i - 1], config.upsample_kernel))
        self.norm = group_norm(ch[first])
        if config.full_resolution:
            self.out: nn.Module = nn.Conv2d(ch[first], 3, 3, padding=1)
        else:
            self.out = nn.Sequential(nn.Conv2d(ch[first], 12, 3, padding=1), nn.PixelShuffle(2))

    @property
    def last_weight(self) -> Tensor:
        """Weight of the final convolution, on which VQGAN's adaptive adversarial weight is measured."""
        conv = self.out[0] if isinstance(self.out, nn.Sequential) else self.out
        weight: Tensor = conv.weight  # type: ignore[assignment]
        return weight

    def forward(self, z: Tensor, modulate: nn.Module | None = None) -> Tensor:
        x = self.stem(z)
        for n, (i, level) in enumerate(zip(self.level_ids, self.levels, strict=True)):
            if modulate is not None and n > 0:
                x = modulate(i, x)
            x = level(x)
            if n < len(self.ups):
                x = self.ups[n](x)
        image: Tensor = self.out(silu(self.norm(x)))
        return image


class Quantized(NamedTuple):
    """Result of :class:`Codebook`."""

    features: Tensor
    """z_c, (B, d, h, w); the gradient passes straight through to z_h."""
    indices: Tensor
    """(B, h, w) int64, code of each position."""
    code_loss: Tensor
    """||sg(z_h) - z_c||^2 of eq. 16, mean over elements: moves the codes."""
    commitment_loss: Tensor
    """||z_h - sg(z_c)||^2 of eq. 16, mean over elements: moves the encoder."""


class Codebook(nn.Module):
    """C: N codes of length d, looked up by the nearest Euclidean distance (eq. 13).

    The two losses are returned apart so that each gets its own weight (1 and lambda_feat = 0.25, eq. 17); several
    public VQGAN codes put 0.25 on the wrong one. A code that no position has used for a while is revived at a random
    latent.
    """

    usage: Tensor

    def __init__(self, codes: int = 1024, dim: int = 256) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codes, dim).uniform_(-1.0 / codes, 1.0 / codes))
        self.register_buffer("usage", torch.ones(codes))

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code for (..., d) latents."""
        flat = z.reshape(-1, z.shape[-1]).float()
        codes = self.weight.float()
        distance = codes.square().sum(1) - 2 * flat @ codes.T
        return distance.argmin(1).view(z.shape[:-1])

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, h, w) indices to (B, d, h, w) codes."""
        return F.embedding(indices, self.weight).movedim(-1, 1)

    def forward(self, z: Tensor) -> Quantized:
        indices = self.nearest(z.detach().movedim(1, -1))
        codes = self.lookup(indices).to(z.dtype)
        if self.training:
            with torch.no_grad():
                counts = torch.bincount(indices.flatten(), minlength=len(self.weight)).to(self.usage)
                self.usage.lerp_(counts, 0.01)
        return Quantized(
            z + (codes - z).detach(),
            indices,
            F.mse_loss(codes.float(), z.detach().float()),
            F.mse_loss(z.float(), codes.detach().float()),
        )

    @torch.no_grad()
    def revive(self, z: Tensor, generator: torch.Generator, threshold: float = 0.05) -> int:
        """Move every code used less than ``threshold`` times a batch (running mean) to a random latent of ``z``.

        Arguments:
            z: (B, d, h, w) latents of the current batch.

        Returns:
            how many codes were moved.
        """
        dead = (self.usage < threshold).nonzero().flatten()
        if len(dead):
            flat = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
            pick = torch.randint(len(flat), (len(dead),), generator=generator)
            noise = torch.randn(len(dead), flat.shape[1], generator=generator) * 0.01
            self.weight[dead] = flat[pick.to(z.device)] + noise.to(z.device) * flat.std()
            self.usage[dead] = 1.0
        return len(dead)


class VQAutoencoder(nn.Module):
    """E_h, C and D_h together: self-reconstruction through the codebook (fig. 3a)."""

    def __init__(self, config: CodebookConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.codebook = Codebook(config.codes, config.dim)
        self.decoder = Decoder(config)

    def forward(self, image: Tensor) -> tuple[Tensor, Quantized]:
        """(B, 3, H, W) in [-1, 1], sides divisible by the stride, to the reconstruction and the quantised latent."""
        side = self.config.stride
        if image.shape[1] != 3 or image.shape[2] % side or image.shape[3] % side:
            raise ValueError(f"expected (B, 3, H, W) with H and W divisible by {side}, got {tuple(image.shape)}")
        quantized = self.codebook(self.encoder(image))
        return self.decoder(quantized.features), quantized

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """z_h (B, d, h, w) and the code indices (B, h, w)."""
        z = self.encoder(image)
        return z, self.codebook.nearest(z.movedim(1, -1))

    def decode(self, indices: Tensor) -> Tensor:
        """(B, h, w) code indices to images."""
        image: Tensor = self.decoder(self.codebook.lookup(indices))
        return image
