"""Stage ``sync``: train the sync expert to tell which sound belongs to which lips.

A batch holds segments of clips. Every window of five frames has to find its own 0.2 s of sound, and the sound its
window, among those of its own segment (where the speaker's identity says nothing) and among those of all segments. A
second loss does what the expert is used for: the mean similarity of a segment must be highest where the sound is not
shifted. Windows one frame apart share four of five frames, so they are no negatives of each other.

A shard knows the lag of a collection better than that of each clip; clips cut from broadcasts differ by two frames
either way. So, from step ``slack_from`` on, the best shift of a segment within ``slack`` frames counts as right. At
step 1,000 of the first run this raised the share of found offsets from 0.54 to 0.69 in 500 steps.

Validation shifts the sound of unseen people by known offsets and counts how often the smallest distance lies within a
frame of it, as SyncNet's authors do.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.loop import Stage
from flowvqtalker_eval.evaluators.sync_data import SegmentConfig, SegmentDataset, SpeechClip, load_speech_clips
from flowvqtalker_eval.evaluators.sync_expert import SPAN, SyncExpert, SyncExpertConfig, sync_expert_score
from flowvqtalker_eval.metrics.sync import REACH, SyncScore

__all__ = ["Config", "SyncLosses", "SyncStage", "build", "exchanged_score", "offset_scores"]

logger = logging.getLogger(__name__)

# Largest offset in validation, and the least number of frames that remain when the sound is shifted.
_OFFSETS, _LEFT = 10, 20


@dataclass(frozen=True)
class SyncLosses:
    """Weights of the losses beside the contrastive loss within a segment, which has weight one."""

    across: float = 0.25
    """Contrastive loss among all windows of the batch."""
    offset: float = 1.0
    """Cross-entropy of the shift of a segment."""


@dataclass(frozen=True)
class Config:
    """Configuration of the sync expert's stage."""

    shards: tuple[Path, ...] = (Path("data/shard"),)
    """Shards with mouths (`flowvqtalker prepare-mouths`)."""
    expert: SyncExpertConfig = field(default_factory=SyncExpertConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    losses: SyncLosses = field(default_factory=SyncLosses)
    slack: int = 2
    """Largest difference in frames between a clip's lag and the shard's; 0 trusts the shard."""
    slack_from: int = 500
    """First step that allows it."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(lr=2e-3, batch_size=20, warmup=200, decay="cosine", ema=0.995)
    )

    def __post_init__(self) -> None:
        check(
            (len(self.shards) > 0, "no shards were given"),
            (
                0 <= self.slack <= (self.segment.frames - SPAN - 6) // 2,
                f"slack must be between 0 and {(self.segment.frames - SPAN - 6) // 2} for segments of "
                f"{self.segment.frames} frames, got {self.slack}",
            ),
            (self.slack_from >= 0, f"slack_from must not be negative, got {self.slack_from}"),
        )


def offset_scores(expert: SyncExpert, clip: SpeechClip, late: int) -> SyncScore:
    """Score of a clip whose sound was delayed by ``late`` frames (negative: advanced), both cut to what overlaps."""
    count = len(clip) - abs(late)
    lips, sound = max(late, 0), max(-late, 0)
    return sync_expert_score(*expert.embed(clip.mouths[lips : lips + count], clip.part(sound, sound + count).sound()))


def exchanged_score(expert: SyncExpert, clip: SpeechClip, other: SpeechClip) -> SyncScore:
    """Score of a clip with the sound of another, as far as both go."""
    count = min(len(clip), len(other))
    return sync_expert_score(*expert.embed(clip.mouths[:count], other.part(0, count).sound()))


class SyncStage(Stage):
    """See the module.

    Arguments:
        config: the configuration.
        train, val: clips of the two splits; without ``val`` the training clips are validated on.
    """

    name = "sync"
    monitor = "miss"

    def __init__(self, config: Config, train: Sequence[SpeechClip], val: Sequence[SpeechClip]) -> None:
        torch.manual_seed(config.loop.seed)
        self.config = config
        self.expert = SyncExpert(config.expert)
        self.sharpness = nn.ParameterList([nn.Parameter(torch.tensor(math.log(s))) for s in (10.0, 40.0)])
        self.module = nn.ModuleDict({"expert": self.expert, "sharpness": self.sharpness})
        self.data = SegmentDataset(train, config.segment, config.loop.seed)
        self.val = list(val or train)
        frames = sum(len(clip) for clip in train)
        logger.info("%d clips to train on (%d frames), %d to validate", len(train), frames, len(self.val))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"expert": list(self.module.parameters())}

    def dataset(self, split: str) -> Dataset[Any]:
        return self.data if split == "train" else SegmentDataset(self.val, SegmentConfig(augment=False))

    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        video = self.expert.video(batch["mouths"].float())
        audio = self.expert.audio(batch["sound"])
        with torch.autocast(video.device.type, enabled=False):
            return self._contrast(*_aligned(video, audio, self.config.slack if step >= self.config.slack_from else 0))

    def _contrast(self, video: Tensor, audio: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Losses of embeddings (B, n, dim)."""
        sharp, sharp_offset = (s.exp().clamp(1, 200) for s in self.sharpness)
        segments, count = video.shape[:2]
        index = torch.arange(count, device=video.device)
        near = (index[:, None] - index).abs() == 1
        alike = video @ audio.mT  # (B, n, n)
        inside = (sharp * alike).masked_fill(near, -math.inf)
        every = sharp * video.flatten(0, 1) @ audio.flatten(0, 1).mT
        same = torch.eye(segments, dtype=torch.bool, device=video.device)
        every = every.masked_fill(torch.kron(same, near), -math.inf)
        within = _both_ways(inside.flatten(0, 1), inside.mT.flatten(0, 1), index.repeat(segments))
        across = _both_ways(every, every.mT, torch.arange(len(every), device=video.device))
        reach = min(REACH, count - SPAN)
        curve = torch.stack([alike.diagonal(k, 1, 2).mean(1) for k in range(-reach, reach + 1)], dim=1)
        wanted = curve.new_zeros(2 * reach + 1)
        wanted[reach - 1 : reach + 2] = curve.new_tensor([0.1, 0.8, 0.1])  # lags are known to about a frame
        offset = nn.functional.cross_entropy(sharp_offset * curve, wanted.expand_as(curve))
        found = ((curve.argmax(1) - reach).abs() <= 1).float().mean()
        total = within + self.config.losses.across * across + self.config.losses.offset * offset
        logs: dict[str, float | Tensor] = {"within": within.detach(), "across": across.detach()}
        return total, {**logs, "offset": offset.detach(), "found": found}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Share of known offsets that are found within a frame, and mean scores of real and of exchanged sound."""
        plain = [offset_scores(self.expert, clip, 0) for clip in self.val]
        hits = []
        for number, clip in enumerate(self.val):
            most = max(0, min(_OFFSETS, len(clip) - _LEFT))
            late = int(np.random.default_rng([1, number]).integers(-most, most + 1))
            hits.append(abs(offset_scores(self.expert, clip, late).offset + late) <= 1)
        others = [*self.val[len(self.val) // 2 :], *self.val[: len(self.val) // 2]]
        exchanged = [exchanged_score(self.expert, *pair) for pair in zip(self.val, others, strict=True)]
        found = float(np.mean(hits))
        numbers = {"found": found, "miss": 1 - found, "chance": 3 / (2 * REACH + 1), "clips": len(hits)}
        for name, scores in (("", plain), ("_exchanged", exchanged)):
            numbers["confidence" + name] = float(np.mean([score.confidence for score in scores]))
            numbers["distance" + name] = float(np.mean([score.distance for score in scores]))
        return numbers

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The expert without the counters of its batch norms."""
        state = {k: v for k, v in self.expert.state_dict().items() if not k.endswith("num_batches_tracked")}
        return state, cast("dict[str, Any]", to_dict(self.config.expert))


def _both_ways(rows: Tensor, columns: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (nn.functional.cross_entropy(rows, target) + nn.functional.cross_entropy(columns, target))


def _aligned(video: Tensor, audio: Tensor, slack: int) -> tuple[Tensor, Tensor]:
    """Embeddings (B, n - 2 slack, dim) at the shift of the sound, up to ``slack``, where each segment agrees best."""
    if slack == 0:
        return video, audio
    with torch.no_grad():
        alike = video @ audio.mT
        curve = torch.stack([alike.diagonal(k, 1, 2).mean(1) for k in range(-slack, slack + 1)], dim=1)
        index = torch.arange(video.shape[1] - 2 * slack, device=video.device) + curve.argmax(1, keepdim=True)
    chosen = audio.gather(1, index[..., None].expand(-1, -1, audio.shape[2]))
    return video[:, slack : video.shape[1] - slack], chosen


def build(config: Config) -> Stage:
    """The stage for a configuration; reads the shards."""
    train = load_speech_clips(config.shards, "train", config.segment.frames)
    return SyncStage(config, train, load_speech_clips(config.shards, "val", _LEFT + SPAN))
