"""Inception v3 (Szegedy et al. 2015) as the Fréchet inception distance needs it: 2048 features of an image.

The FID is defined on TensorFlow's weights of 2015-12-05, which ``mseitzer/pytorch-fid`` ported. Its ``inception.py``
states how they differ from torchvision's network: averages leave out the padding, the pool of the last block takes the
maximum, batch norms have ε = 0.001, images are resized to 299x299 bilinearly without antialiasing and scaled to
[-1, 1]. Modules have the names of the published file; its classifier is not used.

**Never run here on the published weights**, which could not be had. Tests check names and shapes on a made-up file of
the same form, and the blocks against plain computations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker_eval.metrics.published import PublishedWeights

__all__ = ["WEIGHTS", "InceptionV3", "load_inception"]

_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS = PublishedWeights(
    "FID Inception weights",
    "FLOWVQTALKER_INCEPTION",
    f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_FILE} (91 MB)",
    "6726825d",
    _FILE,
)

Sizes = int | tuple[int, int]


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU. Keeps the size unless the stride is 2 or ``padding`` is given."""

    def __init__(self, inp: int, out: int, kernel: Sizes = 1, stride: int = 1, padding: Sizes | None = None) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        same: Sizes = (high // 2, wide // 2) if stride == 1 else 0
        self.conv = nn.Conv2d(inp, out, (high, wide), stride, same if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches of convolutions side by side, and a 3x3 pool.

    Arguments:
        inp: channels of the input.
        branches: (channels, kernel, stride) of each convolution, by the branch's published name; a list forks the end.
        pool: channels of the convolution after a pool that keeps the size; 0: a maximum that halves it.
        largest: the pool that keeps the size takes the maximum, not the average.
    """

    def __init__(self, inp: int, branches: dict[str, list[Any]], pool: int = 0, largest: bool = False) -> None:
        super().__init__()
        self.largest, self.paths = largest, list[list[list[str]]]()
        for branch, layers in branches.items():
            width, path = inp, []
            for number, layer in enumerate(layers, 1):
                ends = layer if isinstance(layer, list) else [layer]
                name = f"{branch}_{number}" if len(layers) > 1 else branch
                path.append([name + letter for letter in ("ab" if len(ends) > 1 else [""])])
                for own, end in zip(path[-1], ends, strict=True):
                    self.add_module(own, _Conv(width, *end))
                width = ends[0][0]
            self.paths.append(path)
        self.branch_pool = _Conv(inp, pool) if pool else None

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for path in self.paths:
            ends = [x]
            for names in path:
                ends = [self.get_submodule(name)(ends[0]) for name in names]
            found += ends
        if self.branch_pool is None:
            pooled = F.max_pool2d(x, 3, 2)
        elif self.largest:
            pooled = self.branch_pool(F.max_pool2d(x, 3, 1, 1))
        else:
            pooled = self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))
        return torch.cat([*found, pooled], 1)


def _a(inp: int, pool: int) -> _Mixed:
    """35x35."""
    twice = [(64,), (96, 3), (96, 3)]
    return _Mixed(inp, {"branch1x1": [(64,)], "branch5x5": [(48,), (64, 5)], "branch3x3dbl": twice}, pool)


def _b(inp: int) -> _Mixed:
    """From 35x35 to 17x17."""
    return _Mixed(inp, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64,), (96, 3), (96, 3, 2)]})


def _c(inp: int, mid: int) -> _Mixed:
    """17x17, with 7x7 split in two."""
    once = [(mid,), (mid, (1, 7)), (192, (7, 1))]
    twice = [(mid,), (mid, (7, 1)), (mid, (1, 7)), (mid, (7, 1)), (192, (1, 7))]
    return _Mixed(inp, {"branch1x1": [(192,)], "branch7x7": once, "branch7x7dbl": twice}, 192)


def _d(inp: int) -> _Mixed:
    """From 17x17 to 8x8."""
    seven = [(192,), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]
    return _Mixed(inp, {"branch3x3": [(192,), (320, 3, 2)], "branch7x7x3": seven})


def _e(inp: int, largest: bool) -> _Mixed:
    """8x8, with forked ends."""
    ends = [(384, (1, 3)), (384, (3, 1))]
    twice = [(448,), (384, 3), ends]
    return _Mixed(inp, {"branch1x1": [(320,)], "branch3x3": [(384,), ends], "branch3x3dbl": twice}, 192, largest)


class InceptionV3(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to features (B, 2048), the last average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c = _c(768, 128), _c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _c(768, 160), _c(768, 192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, largest=False), _e(2048, largest=True)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # 147x147
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # 71x71
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # 35x35
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # 17x17
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # 8x8
        return x.mean((2, 3))


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of a file.

    Raises:
        UserError: if the file holds something else.
    """
    model = InceptionV3()
    WEIGHTS.load(model, path, unused=("fc.", "AuxLogits."))
    return model
