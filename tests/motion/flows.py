"""Small flows, their contexts and batches, for the tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flowvqtalker.motion.bijections import (
    Context,
)
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, Flow, PoseFlow, PoseFlowConfig
from flowvqtalker.motion.likelihood import Sequences
from flowvqtalker.speech.encoder import AudioConfig

AUDIO = AudioConfig(mels=6, columns=8, width=8, layers=2, lookahead=1)
EXP = ExpFlowConfig(dim=8, classes=3, steps=3, width=8, heads=2, history=4, soft_clamp=50.0, audio=AUDIO)
POSE = PoseFlowConfig(dim=5, steps=3, width=8, heads=2, history=4, audio=AUDIO)
FLOWS = [
    EXP,
    replace(EXP, linear="full", layers=2, learn_means=True),
    replace(EXP, latent="gaussian-mixture", ar_prior=False),
    POSE,
]


def shake(module: torch.nn.Module, amount: float = 0.15) -> None:
    """Away from the start, where the last layers are zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += amount * torch.randn(p.shape, generator=generator).to(p)


def make(config: ExpFlowConfig | PoseFlowConfig, dtype: torch.dtype = torch.float64) -> Flow:
    torch.manual_seed(0)
    flow = (PoseFlow if isinstance(config, PoseFlowConfig) else ExpFlow)(config).to(dtype)
    shake(flow)
    return flow.eval()


def context_of(flow: Flow, count: int = 7) -> Context:
    config = flow.config
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(flow.data_std)

    return flow.encode(
        draw(count, config.audio.width),
        draw(count, config.history, config.dim),
        torch.arange(count) % config.classes,
        speech=torch.arange(count) % 3 > 0,
        source=draw(count, config.dim) if config.source else None,
    )


def sequences(config: ExpFlowConfig | PoseFlowConfig, count: int = 4, length: int = 6) -> Sequences:
    generator = torch.Generator().manual_seed(3)
    reach = config.audio.lookback + config.audio.lookahead
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[0, 4:] = False
    return Sequences(
        frames=torch.randn(count, config.history + length, config.dim, generator=generator),
        windows=torch.randn(count, length + reach, config.audio.mels, config.audio.columns, generator=generator),
        emotion=torch.arange(count) % config.classes,
        speech=torch.arange(count) % 2 == 0,
        mask=mask,
        source=torch.randn(count, config.dim, generator=generator) if config.source else None,
    )
