"""Stage ``poseflow``: the head pose flow (section 3.2): L_pose (eq. 12) and λ L_con (eq. 11) of the pose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from flowvqtalker.motion.flow import PoseFlow, PoseFlowConfig
from flowvqtalker.motion.likelihood import rollout
from flowvqtalker.speech.encoder import SpeechEncoder
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.corpus import Corpus
from flowvqtalker.train.flow_stage import Features, FlowStage, Losses, load_speech_encoder, whole_clips
from flowvqtalker.train.sequences import SequenceConfig, load_corpus

__all__ = ["Config", "PoseFlowStage", "build"]


@dataclass(frozen=True)
class Config:
    """Configuration of the pose flow's stage."""

    shards: tuple[Path, ...] = (Path("data/shard"),)
    """Folders of `flowvqtalker prepare`."""
    features: Features = field(default_factory=Features)
    flow: PoseFlowConfig = field(default_factory=PoseFlowConfig)
    sequences: SequenceConfig = field(
        default_factory=lambda: SequenceConfig(frames=48, balanced=0.2, strength=0, min_length=25)
    )
    losses: Losses = field(default_factory=lambda: Losses(lips=0))
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(lr=1e-3, batch_size=16, warmup=200, decay="cosine", ema=0.998)
    )

    def __post_init__(self) -> None:
        check(
            (self.losses.lips == 0, "losses.lips must be 0: a head pose has no lips"),
            (len(self.shards) > 0, "no shards were given"),
        )


class PoseFlowStage(FlowStage):
    """Maximum likelihood of the pose flow. Poses are relative to their clip's mean: a generated head moves around the
    source's pose."""

    name = "poseflow"

    def __init__(
        self, config: Config, train: Corpus, val: Corpus | None, speech_encoder: SpeechEncoder | None = None
    ) -> None:
        torch.manual_seed(config.loop.seed)
        super().__init__(config, PoseFlow(config.flow, speech_encoder), train, val)

    def on_start(self, batch: Any) -> None:
        """Scale radians and model units to numbers near one, then initialise as every flow."""
        frames = np.concatenate([clip.frames for clip in self.train_corpus.clips])
        self.flow.data_std.copy_(torch.from_numpy(frames.std(0)).clamp_min(1e-4))
        super().on_start(batch)

    def validate(self, fabric: Fabric) -> dict[str, float]:
        results = self.held_out()
        numbers = self.held_out_speakers()
        if numbers:
            results.update(self._motion_scores(numbers, fabric.device))
        return results

    def _motion_scores(self, numbers: list[int], device: torch.device) -> dict[str, float]:
        """Standard deviation within a clip and mean speed of sampled motion, relative to the real clips."""
        batch = whole_clips(self.val_corpus, numbers, self.val_data, 75)
        generator = torch.Generator().manual_seed(0)
        emotion = torch.zeros_like(batch.emotion).to(device)
        drawn = rollout(self.flow, batch.windows.to(device), emotion, generator).cpu()
        true = batch.frames[:, self.flow.config.history :]
        spans, speeds = zip(*(_motion(x, batch.mask) for x in (drawn, true)), strict=True)
        return {
            "range": float((spans[0] / spans[1]).log().mean().exp()),
            "speed": float((speeds[0] / speeds[1]).log().mean().exp()),
        }

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.flow.own_state(), to_dict(self.flow.config)


def _motion(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Standard deviation within a clip and mean speed, both (D,), averaged over the clips."""
    spans = torch.stack([clip[keep].std(0) for clip, keep in zip(x, mask, strict=True)]).mean(0)
    return spans, (x[:, 1:] - x[:, :-1]).abs()[mask[:, 1:]].mean(0)


def build(config: Config) -> PoseFlowStage:
    """The stage for a configuration; reads the shards."""
    run = config.features.speech_encoder
    speech_encoder = None if run is None else load_speech_encoder(run)[0]
    config = replace(config, flow=replace(config.flow, speech_encoder=speech_encoder is not None))
    frontend = speech_encoder.config.frontend if speech_encoder else config.flow.audio.frontend
    train, val = (
        load_corpus(config.shards, split, config.sequences, pose=True, frontend=frontend) for split in ("train", "val")
    )
    return PoseFlowStage(config, train, val, speech_encoder)
