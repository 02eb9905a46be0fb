"""Quick forms of layers give what the plain forms give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowvqtalker.render.layers import GroupNorm, blockwise, instance_norm
from flowvqtalker.render.mesh_flow import identity_grid, warp
from flowvqtalker.render.warp import WarpConfig, WarpingNetwork


@pytest.mark.parametrize("side", [4, 40])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norms_are_those_of_torch(side: int, layout: torch.memory_format) -> None:
    x = (torch.randn(2, 8, side, side, generator=torch.Generator().manual_seed(0)) * 3 + 1).contiguous(
        memory_format=layout
    )
    plain, quick = nn.GroupNorm(4, 8, eps=1e-6), GroupNorm(4, 8, eps=1e-6)
    nn.init.normal_(quick.weight)
    nn.init.normal_(quick.bias)
    plain.load_state_dict(quick.state_dict())
    torch.testing.assert_close(quick(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(instance_norm(x), F.instance_norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "block", "bias"), [(7, 4, True), (7, 2, True), (3, 4, False), (1, 8, True)])
def test_blockwise_is_the_convolution(kernel: int, block: int, bias: bool) -> None:
    torch.manual_seed(1)
    conv = nn.Conv2d(5, 2, kernel, padding=kernel // 2, bias=bias)
    x = torch.randn(2, 5, 16, 24)
    torch.testing.assert_close(blockwise(conv, x, block), conv(x), rtol=1e-4, atol=1e-5)


def test_w_gives_the_same_flow_with_and_without_gradients() -> None:
    torch.manual_seed(2)
    network = WarpingNetwork(WarpConfig(input_size=64, flow_size=32, width=8, max_width=32, descriptor=16))
    nn.init.normal_(network.out.weight, std=0.1)
    nn.init.normal_(network.out.bias)  # type: ignore[arg-type]
    given = torch.rand(2, 3, 64, 64), torch.randn(2, 16), torch.randn(2, 2, 32, 32) * 0.1
    slow = network(*given)
    with torch.inference_mode():
        quick = network(*given)
    assert slow.requires_grad
    assert slow.std() > 0.1
    torch.testing.assert_close(quick, slow.detach(), rtol=1e-4, atol=1e-5)


def test_the_norm_may_come_before_the_enlargement() -> None:
    torch.manual_seed(3)
    network = WarpingNetwork(WarpConfig(input_size=64, flow_size=32, width=8, max_width=32, descriptor=16))
    up: Any = network.ups[1]
    sigma, x = torch.randn(2, 16), torch.randn(2, 64, 8, 8)
    gamma, beta = up.style(sigma)[..., None, None].chunk(2, dim=1)
    after = F.instance_norm(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(
        up(x, sigma), up.conv(F.leaky_relu((1 + gamma) * after + beta, 0.1)), rtol=1e-4, atol=1e-4
    )


def test_warp_does_not_depend_on_the_layout_of_the_flow() -> None:
    torch.manual_seed(4)
    image, flow = torch.rand(2, 3, 32, 32), torch.randn(2, 2, 8, 8) * 0.2
    plain = F.grid_sample(
        image,
        identity_grid(32, 32) + F.interpolate(flow, (32, 32), mode="bilinear").permute(0, 2, 3, 1),
        padding_mode="border",
        align_corners=False,
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(warp(image, flow.contiguous(memory_format=layout)), plain)
