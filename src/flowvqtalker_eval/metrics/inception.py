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


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _A(nn.Module):
    """35x35: 1x1, 5x5, twice 3x3, pool."""

    def __init__(self, inp: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inp, 64)
        self.branch5x5_1, self.branch5x5_2 = _Conv(inp, 48), _Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inp, 64), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3)
        self.branch_pool = _Conv(inp, pool)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class _B(nn.Module):
    """From 35x35 to 17x17."""

    def __init__(self, inp: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(inp, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inp, 64), _Conv(64, 96, 3)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, 2)], 1)


class _C(nn.Module):
    """17x17: 1x1, 7x7 split in two, twice that, pool."""

    def __init__(self, inp: int, mid: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(inp, 192)
        self.branch7x7_1, self.branch7x7_2 = _Conv(inp, mid), _Conv(mid, mid, (1, 7))
        self.branch7x7_3 = _Conv(mid, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = _Conv(inp, mid), _Conv(mid, mid, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = _Conv(mid, mid, (1, 7)), _Conv(mid, mid, (7, 1))
        self.branch7x7dbl_5 = _Conv(mid, 192, (1, 7))
        self.branch_pool = _Conv(inp, 192)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], 1)


class _D(nn.Module):
    """From 17x17 to 8x8."""

    def __init__(self, inp: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = _Conv(inp, 192), _Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = _Conv(inp, 192), _Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = _Conv(192, 192, (7, 1)), _Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)


class _E(nn.Module):
    """8x8: 1x1, 3x3 forked, twice that, pool (``largest``: the maximum, as in the last block)."""

    def __init__(self, inp: int, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = _Conv(inp, 320)
        self.branch3x3_1 = _Conv(inp, 384)
        self.branch3x3_2a, self.branch3x3_2b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = _Conv(inp, 448), _Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = _Conv(384, 384, (1, 3)), _Conv(384, 384, (3, 1))
        self.branch_pool = _Conv(inp, 192)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        forked = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        forked += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        return torch.cat([self.branch1x1(x), *forked, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """Images (B, 3, H, W) in [0, 1] to features (B, 2048), the last average pool."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c = _C(768, 128), _C(768, 160)
        self.Mixed_6d, self.Mixed_6e = _C(768, 160), _C(768, 192)
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280, largest=False), _E(2048, largest=True)

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
