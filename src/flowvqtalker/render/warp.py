"""The mapping network psi and the warping network W (paper section 3.3 "VQIG", fig. 3b; sizes of PIRender)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.render.layers import blockwise, instance_norm
from flowvqtalker.render.mesh_flow import warp

__all__ = ["MOTION", "WINDOW", "MappingNetwork", "WarpConfig", "WarpingNetwork"]

#: Frames of coefficients that describe one frame's motion: 13 before, itself, 13 after (PIRender).
WINDOW = 27
#: Coefficients of a frame: 64 of expression, 6 of pose.
MOTION = 70


@dataclass(frozen=True)
class WarpConfig:
    """Sizes of psi and W."""

    prior: Literal["mesh", "none"] = "mesh"
    """mesh: W corrects the flow of the 3D morphable model; none: W finds all of the flow (the paper)."""
    descriptor: int = 256
    """Length of the motion descriptor sigma."""
    input_size: int = 512
    """Side to which the source picture is reduced for W."""
    flow_size: int = 128
    """Side of the flow (PIRender: a quarter of the picture)."""
    width: int = 32
    """Channels at the input."""
    max_width: int = 256
    """Most channels."""

    def __post_init__(self) -> None:
        if self.input_size < self.flow_size or self.flow_size % 8 or self.input_size % self.flow_size:
            raise ValueError(
                f"warp: input_size {self.input_size} must be a multiple of flow_size {self.flow_size}, that one of 8"
            )


class MappingNetwork(nn.Module):
    """psi: a window of coefficients to the motion descriptor sigma, (B, 27, 70) -> (B, 256).

    PIRender's mapping net: a convolution of kernel 7, three dilated ones with cropped residuals (27 -> 21 -> 15 -> 9 ->
    3 frames), and the mean.
    """

    def __init__(self, descriptor: int = 256) -> None:
        super().__init__()
        self.first = nn.Conv1d(MOTION, descriptor, 7)
        self.layers = nn.ModuleList(nn.Conv1d(descriptor, descriptor, 3, dilation=3) for _ in range(3))

    def forward(self, motion: Tensor) -> Tensor:
        if motion.shape[1:] != (WINDOW, MOTION):
            raise ValueError(f"expected windows of shape (B, {WINDOW}, {MOTION}), got {tuple(motion.shape)}")
        x = self.first(motion.transpose(1, 2))
        for layer in self.layers:
            x = layer(F.leaky_relu(x, 0.1)) + x[:, :, 3:-3]
        sigma: Tensor = x.mean(2)
        return sigma


class _AdaINBlock(nn.Module):
    """Convolution of an input whose channel statistics sigma sets: InstanceNorm, (1 + gamma) x + beta.

    With ``enlarge`` the input is doubled by nearest neighbours: after the norm, which that does not change.
    """

    def __init__(
        self, channels: int, out_channels: int, descriptor: int, stride: int = 1, *, enlarge: bool = False
    ) -> None:
        super().__init__()
        self.enlarge = enlarge
        self.style = nn.Linear(descriptor, 2 * channels)
        self.conv = nn.Conv2d(channels, out_channels, 3, stride, 1)
        nn.init.normal_(self.style.weight, std=0.02)
        nn.init.zeros_(self.style.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        gamma, beta = self.style(sigma)[..., None, None].chunk(2, dim=1)
        x = torch.addcmul(beta, instance_norm(x), 1 + gamma)
        x = F.leaky_relu(x, 0.1, inplace=True)
        if self.enlarge:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        out: Tensor = self.conv(x)
        return out


class WarpingNetwork(nn.Module):
    """W: source picture and motion descriptor to a backward flow, an hourglass with AdaIN (PIRender's warping net).

    Arguments of forward:
        source: (B, 3, H, W) in [-1, 1].
        sigma: (B, 256).
        prior: (B, 2, flow_size, flow_size) flow of the face mesh, for ``prior="mesh"``.

    Returns:
        flow (B, 2, flow_size, flow_size) in units of half the picture's side. The last layer starts at zero, so an
        untrained network returns the prior (or no motion).
    """

    def __init__(self, config: WarpConfig) -> None:
        super().__init__()
        self.config = config
        bottom = config.flow_size // 8
        downs = (config.input_size // bottom).bit_length() - 1
        widths = [min(config.width * 2**i, config.max_width) for i in range(downs + 1)]
        self.stem = nn.Conv2d(8 if config.prior == "mesh" else 3, widths[0], 7, padding=3)
        self.downs = nn.ModuleList(_AdaINBlock(widths[i], widths[i + 1], config.descriptor, 2) for i in range(downs))
        self.middle = _AdaINBlock(widths[-1], widths[-1], config.descriptor)
        self.ups = nn.ModuleList(
            _AdaINBlock(widths[downs - i] * (2 if i else 1), widths[downs - i - 1], config.descriptor, enlarge=True)
            for i in range(3)
        )
        self.out = nn.Conv2d(widths[downs - 3] * 2, 2, 7, padding=3)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def reduce(self, source: Tensor) -> Tensor:
        """The source picture at the size in which W sees it; pictures of that size are returned as they are."""
        size = self.config.input_size
        return F.interpolate(source, (size, size), mode="area") if source.shape[-1] != size else source

    def forward(self, source: Tensor, sigma: Tensor, prior: Tensor | None = None) -> Tensor:
        size = self.config.input_size
        x = image = self.reduce(source)
        if self.config.prior == "mesh":
            if prior is None:
                raise ValueError('a warping network with prior="mesh" needs the mesh flow')
            coarse = F.interpolate(prior, (size, size), mode="bilinear", align_corners=False)
            x = torch.cat([image, warp(image, coarse), coarse.to(image.dtype) * 8], dim=1)
        x = self.stem(x)
        skips = []
        for down in self.downs:
            skips.append(x)
            x = down(x, sigma)
        x = x + self.middle(x, sigma)
        for up in self.ups:
            x = up(x, sigma)
            x = torch.cat([x, skips.pop()], dim=1)
        x = F.leaky_relu(x, 0.1)
        flow = (self.out(x) if torch.is_grad_enabled() else blockwise(self.out, x)).float()
        return flow if prior is None or self.config.prior == "none" else flow + prior
