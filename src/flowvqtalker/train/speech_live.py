"""Stage ``speech-live``: a speech encoder with a short look-ahead that reproduces the features of the long one (ours).

It starts from the long encoder's weights, attends to fewer frames ahead and learns, by distillation, to give the same
features for the same speech. So the flows that were trained with the long encoder take either.
"""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowvqtalker import weights
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.io.audio import load
from flowvqtalker.loading import load_speech_encoder
from flowvqtalker.speech.augment import spectral_augment
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.features import FRONTENDS, log_mel
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.flow_stage import face_model, lip_directions, lip_gap
from flowvqtalker.train.stage import Stage

__all__ = ["Config", "SpeechLiveStage", "build"]

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Config:
    """Configuration of the live speech encoder's stage."""

    shards: tuple[Path, ...] = (Path("data/shards"),)
    """Folders of `flowvqtalker prepare`."""
    recordings: Path | None = None
    """Folder with speech.csv (columns file and speaker, files under speech/); more speech without faces."""
    weights: Path | None = None
    """Folder of weights with the long encoder; None: the package's own."""
    ahead: int = 0
    """Frames ahead that each transformer layer attends to. With 0, one frame of look-ahead is left to a convolution:
    92.5 ms with the reach of the log-mel window."""
    frames: int = 64
    """Frames of an item."""
    augment: float = 0.8
    """Probability that an item's voice and room are varied."""
    lips: float = 1.0
    """Weight of the lips that the features predict, beside the features themselves."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(lr=4e-4, batch_size=8, warmup=100, decay="cosine", ema=0.998)
    )

    def __post_init__(self) -> None:
        check(
            (len(self.shards) > 0 or self.recordings is not None, "no speech was given"),
            (self.ahead >= 0, f"ahead must not be negative, got {self.ahead}"),
            (self.frames > 0, f"frames must be positive, got {self.frames}"),
            (0 <= self.augment <= 1, f"augment must be in [0, 1], got {self.augment}"),
            (self.lips >= 0, f"lips must not be negative, got {self.lips}"),
        )


class _Items(Dataset[Tensor]):
    """Log-mel windows of pieces of recordings, with the long encoder's reach around them."""

    def __init__(self, mels: list[Floats], config: Config, teacher: SpeechEncoderConfig) -> None:
        self.mels, self.config, self.teacher = mels, config, teacher
        self.shares = np.cumsum([len(mel) for mel in mels]) / sum(len(mel) for mel in mels)

    def __getitem__(self, i: int) -> Tensor:
        random = np.random.default_rng([self.config.loop.seed, i])
        mel = self.mels[min(int(np.searchsorted(self.shares, random.random())), len(self.mels) - 1)]
        start = int(random.integers(max(1, len(mel) // 4 - self.config.frames + 1)))
        return self.item(mel, start, self.config.frames, random)

    def item(self, mel: Floats, start: int, frames: int, random: np.random.Generator | None = None) -> Tensor:
        """(lookback + frames + lookahead, 80, 7) from ``start`` on; ``random`` varies voice and room."""
        frontend = FRONTENDS[self.teacher.frontend]
        last = max(0, len(mel) // 4 - 1)
        index = np.clip(start + np.arange(-self.teacher.lookback, frames + self.teacher.lookahead), 0, last)
        columns = np.array([frontend.first(int(i)) for i in index])[:, None] + np.arange(frontend.columns)
        columns = np.clip(columns, 0, len(mel) - 1)
        begin = int(columns.min())
        part = np.asarray(mel[begin : int(columns.max()) + 1], np.float32)
        if random is not None and random.random() < self.config.augment:
            part = spectral_augment(part, random, self.teacher.frontend)
        return torch.from_numpy(np.ascontiguousarray(part[columns - begin].transpose(0, 2, 1)))


class SpeechLiveStage(Stage):
    """Distils the long encoder.

    Arguments:
        config: the configuration.
        teacher: the long encoder in float32.
        lip_prior: (D, width) of the long encoder, the weights of its prediction of β.
        mels: log-mel of the recordings of the two splits.
    """

    name = "speech-live"
    monitor = "features"

    def __init__(
        self, config: Config, teacher: SpeechEncoder, lip_prior: Tensor, mels: dict[str, list[Floats]]
    ) -> None:
        torch.manual_seed(config.loop.seed)
        settings = to_dict(teacher.config)
        self.config, self.teacher = config, teacher.requires_grad_(False).eval()
        student = SpeechEncoder(SpeechEncoderConfig(**{**settings, "ahead": config.ahead}))
        if student.config.lookahead >= teacher.config.lookahead:
            raise UserError(f"ahead {config.ahead} does not shorten the look-ahead; give less than {settings['ahead']}")
        student.load_state_dict(teacher.state_dict())
        self.student, self.module = student, nn.ModuleDict({"audio": student})
        expression = face_model(None).expression
        self.lips = lip_prior.T @ lip_directions(expression)
        self.gap = lip_prior.T @ lip_gap(expression)
        self.mels = mels
        self.data = {split: _Items(found, config, teacher.config) for split, found in mels.items()}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"speech_encoder": list(self.module.parameters())}

    def dataset(self, split: str) -> Dataset[Any]:
        return self.data[split]

    def _pair(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, T, width) of the student and of the teacher for the teacher's windows."""
        student, long = self.student.config, self.teacher.config
        short = windows[:, long.lookback - student.lookback : windows.shape[1] - long.lookahead + student.lookahead]
        with torch.no_grad():
            wanted = self.teacher.to(windows.device)(windows)
        return self.student(short), wanted

    def _shares(self, given: Tensor, wanted: Tensor) -> dict[str, Tensor]:
        """Unexplained share of the variance of the features and of the lips that they predict."""
        both = {"features": (given, wanted), "lips": (given @ self.lips.to(given), wanted @ self.lips.to(given))}
        return {
            key: (a - b).square().mean() / (b - b.mean((0, 1))).square().mean().clamp_min(1e-9)
            for key, (a, b) in both.items()
        }

    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        shares = self._shares(*self._pair(batch))
        total = shares["features"] + self.config.lips * shares["lips"]
        return total, {key: share.detach() for key, share in shares.items()}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Unexplained shares and the correlation of the predicted lips' opening with the teacher's, on up to 64
        held-out recordings."""
        found: dict[str, list[float]] = {}
        mels = self.mels["val"]
        for mel in mels[:: max(1, len(mels) // 64)]:
            windows = self.data["val"].item(mel, 0, len(mel) // 4)[None].to(fabric.device)
            given, wanted = self._pair(windows)
            scores = self._shares(given, wanted)
            opening = torch.stack([given[0], wanted[0]]) @ self.gap.to(given)
            scores["opening_correlation"] = torch.corrcoef(opening)[0, 1]
            for key, score in scores.items():
                found.setdefault(key, []).append(float(score))
        return {key: float(np.mean(values)) for key, values in found.items()}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.module.state_dict(), to_dict(self.student.config)


def build(config: Config) -> SpeechLiveStage:
    """The stage for a configuration; reads the speech."""
    teacher = load_speech_encoder(config.weights, exact=True)
    tensors, _ = weights.load("speech_encoder", config.weights)
    mels: dict[str, list[Floats]] = {"train": [], "val": []}
    for speaker, wave in _waves(config):
        if len(wave) > 8000:
            mels[split_of(speaker)].append(log_mel(wave, teacher.config.frontend).astype(np.float16))
    for split, found in mels.items():
        if not found:
            raise UserError(f"the shards and recordings hold no {split} speech; give more")
        logger.info("%s: %d recordings, %.0f minutes", split, len(found), sum(map(len, found)) / 6000)
    return SpeechLiveStage(config, teacher, tensors["lip_prior.weight"], mels)


def _waves(config: Config) -> Any:
    """Speaker and samples (n,) at 16 kHz of every recording."""
    for folder in config.shards:
        shard = Shard(folder)
        for number in np.flatnonzero(shard.speech & shard.sound & ~shard.is_image):
            yield str(shard.identity[number]), shard.wave(int(number))
    if config.recordings is not None:
        with open(config.recordings / "speech.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield row["speaker"], load(config.recordings / "speech" / row["file"])
