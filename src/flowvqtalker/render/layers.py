"""Convolutional blocks shared by the codebook autoencoder and the image generator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Attention2d",
    "Downsample",
    "GroupNorm",
    "ResBlock",
    "Upsample",
    "adain",
    "blockwise",
    "group_norm",
    "instance_norm",
    "silu",
    "take_over",
]

# Maps of fewer positions than this take up to twenty times as long to normalise in the channels-last layout on CPUs.
_SMALL = 1024


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``, quick for small maps too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_normable(x))


def instance_norm(x: Tensor) -> Tensor:
    """Instance norm as a group norm of one channel a group, which does not leave the channels-last layout."""
    return F.group_norm(_normable(x), x.shape[1])


def _normable(x: Tensor) -> Tensor:
    return x.contiguous() if x.device.type == "cpu" and x.shape[-2:].numel() < _SMALL else x


def blockwise(conv: nn.Conv2d, x: Tensor, block: int = 4) -> Tensor:
    """A convolution of stride 1 to few channels, computed for blocks of pixels, whose sides divide those of ``x``.

    CPUs compute sixteen channels in the time of one, so the pixels of a block become the channels of one large kernel.
    """
    last = block - 1
    kernels = [F.pad(conv.weight, (j, last - j, i, last - i)) for i in range(block) for j in range(block)]
    bias = None if conv.bias is None else conv.bias.repeat_interleave(block**2)
    blocks = F.conv2d(x, torch.stack(kernels, 1).flatten(0, 1), bias, block, conv.padding)
    return F.pixel_shuffle(blocks, block)


def group_norm(channels: int) -> GroupNorm:
    """GroupNorm with eps 1e-6 (taming-transformers) and at most 32 groups of at least 4 channels."""
    groups = min(32, channels // 4)
    while channels % groups:
        groups -= 1
    return GroupNorm(groups, channels, eps=1e-6)


def take_over(module: nn.Module, given: Mapping[str, Tensor]) -> list[str]:
    """Copy the tensors that have the names and shapes of a module's own, or are the first rows of those.

    Returns:
        their names.
    """
    taken = []
    for name, own in module.state_dict().items():
        value = given.get(name)
        if value is None or value.ndim != own.ndim or value.shape[1:] != own.shape[1:] or value.numel() > own.numel():
            continue
        (own[: len(value)] if own.ndim else own).copy_(value)
        taken.append(name)
    return taken


def silu(x: Tensor) -> Tensor:
    """SiLU of a tensor that nobody needs afterwards: in place where no gradient is taken."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def adain(content: Tensor, style: Tensor, eps: float = 1e-5) -> Tensor:
    """Adaptive instance normalisation: give ``content`` the channel means and deviations of ``style``.

    Huang and Belongie 2017; used at feature level as in CodeFormer (paper section 3.3).

    Arguments:
        content, style: (B, C, H, W).
    """
    style_std, style_mean = torch.std_mean(style.float(), dim=(2, 3), keepdim=True)
    std, mean = torch.std_mean(content.float(), dim=(2, 3), keepdim=True)
    scale = (style_std + eps) / (std + eps)
    return (content - mean.to(content.dtype)) * scale.to(content.dtype) + style_mean.to(content.dtype)


class ResBlock(nn.Module):
    """Pre-activation residual block: (GroupNorm, SiLU, 3x3 convolution) twice. (B, C, H, W) -> (B, C', H, W)."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1) if out_channels != channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        out: Tensor = h.add_(self.skip(x)) if not torch.is_grad_enabled() else h + self.skip(x)
        return out


class Attention2d(nn.Module):
    """Multi-head self- or cross-attention over positions, GroupNorm on both inputs and a residual on the query.

    With a second input it is the MHCA of RestoreFormer (``vqvae_arch.py``), paper section 3.3.

    Arguments of forward:
        x: (B, C, H, W) queries and residual.
        memory: (B, C, H', W') keys and values; ``x`` itself when left out.
    """

    def __init__(self, channels: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query = group_norm(channels)
        self.norm_memory = group_norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key_value = nn.Conv2d(channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        height = x.shape[2]
        q = rearrange(self.query(self.norm_query(x)), "b (n c) h w -> b n (h w) c", n=self.heads)
        # Contiguous: torch 2.13 crashes on CPUs in GroupNorm's backward for a channels-last input without gradient.
        kv = self.key_value(self.norm_memory(x if memory is None else memory.contiguous()))
        k, v = rearrange(kv, "b (two n c) h w -> two b n (h w) c", two=2, n=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(rearrange(h, "b n (h w) c -> b (n c) h w", h=height))
        return out


class Downsample(nn.Module):
    """Halve the resolution: pad right and bottom by one, 3x3 convolution of stride 2 (taming-transformers)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double the resolution by nearest neighbours and change the channels.

    Arguments:
        kernel: 3 convolves after the upsampling (taming-transformers); 1 mixes channels before it, at a ninth of
            a quarter of the cost, and leaves the spatial work to the residual blocks that follow (``lite``).
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)
        self.before = kernel == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            x = self.conv(x)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x if self.before else self.conv(x)
