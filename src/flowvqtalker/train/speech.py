"""Stage ``speech``: the speech encoder, trained before the flows that use it (ours).

It starts from the first layers of Whisper (:mod:`flowvqtalker.speech.encoder`). Its tasks: reproduce the features of
Whisper's last layer (distillation), predict the lips of tracked clips, and, with small weights, facial action units and
an animator's mouth curves. The speech set varies pitch and formants;
:func:`flowvqtalker.speech.augment.spectral_augment` varies the rest of voice and room.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from flowvqtalker.data.speech_sets import CURVES, TEACHER, UNITS, SpeechSet
from flowvqtalker.data.teacher import read_variables
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import EXPRESSION
from flowvqtalker.speech.augment import spectral_augment
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.speech.features import FRONTENDS
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.flow_stage import face_model, lip_directions, lip_gap, load_speech_encoder
from flowvqtalker.train.stage import Stage

__all__ = ["Config", "SpeechStage", "Tasks", "build"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """Weights of the tasks; each loss is the unexplained share of its target's variance."""

    teacher: float = 1.0
    lips: float = 1.0
    units: float = 0.1
    curves: float = 0.1


@dataclass(frozen=True)
class Config:
    """Configuration of the audio encoder's stage."""

    sets: tuple[Path, ...] = (Path("data/speech"),)
    """Folders of `flowvqtalker prepare-speech`."""
    face_model: Path | None = None
    """Face model of the coefficients, for the motion of the lips; None: the package's own."""
    whisper: Path | None = None
    """Folder of Whisper base for CTranslate2, stored as float16, to start from; None: random weights."""
    start: Path | None = None
    """Weights of an earlier run of this stage to start from instead."""
    speech_encoder: SpeechEncoderConfig = field(default_factory=SpeechEncoderConfig)
    frames: int = 64
    """Frames of an item."""
    lips_share: float = 0.6
    """Share of the items from recordings with tracked lips."""
    augment: float = 0.8
    """Probability that an item's voice and room are varied."""
    weights: Weights = field(default_factory=Weights)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(lr=4e-4, batch_size=16, warmup=200, decay="cosine", ema=0.998)
    )

    def __post_init__(self) -> None:
        check(
            (len(self.sets) > 0, "no speech sets were given"),
            (self.frames > 0, f"frames must be positive, got {self.frames}"),
            (0 <= self.lips_share <= 1, f"lips_share must be in [0, 1], got {self.lips_share}"),
            (0 <= self.augment <= 1, f"augment must be in [0, 1], got {self.augment}"),
        )


class Tasks(nn.Module):
    """The speech encoder with a linear head per task; the flow takes over ``lip_prior`` (to β)."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.audio = SpeechEncoder(config)
        self.lip_prior = nn.Linear(config.width, EXPRESSION)
        nn.init.zeros_(self.lip_prior.weight)
        nn.init.zeros_(self.lip_prior.bias)
        self.teacher = nn.Linear(config.width, TEACHER)
        self.units = nn.Linear(config.width, UNITS)
        self.curves = nn.Linear(config.width, CURVES)

    def forward(self, windows: Tensor) -> dict[str, Tensor]:
        """(B, lookback + T + lookahead, mels, columns) to (B, T, ·) for each task."""
        features = self.audio(windows)
        return {
            "lips": self.lip_prior(features),
            "teacher": self.teacher(features),
            "units": self.units(features),
            "curves": self.curves(features),
        }


class _Items(Dataset[dict[str, Any]]):
    """Pieces of recordings; a speaker's share grows with the square root of the recorded time."""

    def __init__(self, sets: list[SpeechSet], split: str, config: Config, plain: bool) -> None:
        self.sets, self.config, self.plain = sets, config, plain
        self.places: list[tuple[int, int]] = []
        tracked: list[bool] = []
        for which, one in enumerate(sets):
            for number in np.flatnonzero((one.split == split) & (one.length > 0)):
                self.places.append((which, int(number)))
                rows = slice(int(one.start[number]), int(one.start[number] + one.length[number]))
                tracked.append(bool(np.isfinite(one.lips[rows, 0]).any()))
        if not self.places:
            raise UserError(f"the speech sets hold no {split} recordings; add some with `flowvqtalker prepare-speech`")
        speakers = np.array([str(sets[which].speaker[number]) for which, number in self.places])
        lengths = np.array([sets[which].length[number] for which, number in self.places], np.float64)
        # Numbers and cumulative shares of the recordings with tracked lips, and of the others.
        self.orders = []
        for chosen in (np.flatnonzero(tracked), np.flatnonzero(~np.array(tracked))):
            if len(chosen) == 0:
                self.orders.append((chosen, np.zeros(0)))
                continue
            _, who = np.unique(speakers[chosen], return_inverse=True)
            weights = lengths[chosen] / np.sqrt(np.bincount(who, lengths[chosen])[who])
            self.orders.append((chosen, np.cumsum(weights / weights.sum())))

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = np.random.default_rng([self.config.loop.seed, i])
        order = 0 if random.random() < self.config.lips_share else 1
        chosen, shares = self.orders[order if len(self.orders[order][0]) else 1 - order]
        place = min(int(np.searchsorted(shares, random.random())), len(chosen) - 1)
        which, number = self.places[int(chosen[place])]
        start = int(random.integers(max(1, int(self.sets[which].length[number]) - self.config.frames + 1)))
        return self.item(which, number, start, self.config.frames, random)

    def item(self, which: int, number: int, start: int, frames: int, random: np.random.Generator) -> dict[str, Any]:
        """``frames`` frames of a recording from ``start`` on; missing targets are NaN."""
        one, audio = self.sets[which], self.config.speech_encoder
        length = int(one.length[number])
        first, columns = int(one.mel_start[number]), int(one.mel_length[number])
        index = np.clip(start + np.arange(-audio.lookback, frames + audio.lookahead), 0, length - 1)
        frontend = FRONTENDS[audio.frontend]
        starts = np.array([frontend.first(int(i)) for i in index])
        low = np.clip(starts[:, None] + np.arange(frontend.columns), 0, columns - 1)
        begin, end = int(low.min()), int(low.max()) + 1
        mel = np.asarray(one.mel[first + begin : first + end], np.float32)
        if not self.plain and random.random() < self.config.augment:
            mel = spectral_augment(mel, random, audio.frontend)
        windows = np.ascontiguousarray(mel[low - begin].transpose(0, 2, 1))
        rows = slice(int(one.start[number]) + start, int(one.start[number]) + min(start + frames, length))
        result: dict[str, Any] = {"windows": torch.from_numpy(windows)}
        for key, column in (("teacher", one.teacher), ("lips", one.lips), ("units", one.units), ("curves", one.curves)):
            values = np.full((frames, column.shape[1]), np.nan, np.float32)
            values[: rows.stop - rows.start] = column[rows]
            result[key] = torch.from_numpy(values)
        return result


class SpeechStage(Stage):
    """Trains :class:`Tasks`.

    Arguments:
        config: the configuration.
        sets: speech sets.
        lips: (64, count) see :func:`flowvqtalker.train.flow_stage.lip_directions`.
        gap: (64,) see :func:`flowvqtalker.train.flow_stage.lip_gap`.
    """

    name = "speech"
    monitor = "loss"

    def __init__(self, config: Config, sets: list[SpeechSet], lips: Tensor, gap: Tensor) -> None:
        torch.manual_seed(config.loop.seed)
        self.config, self.sets = config, sets
        self.module = Tasks(config.speech_encoder)
        if config.whisper is not None and config.start is None:
            self.module.audio.start_from_whisper(read_variables(config.whisper))
        if config.start is not None:
            speech_encoder, lip_prior = load_speech_encoder(config.start)
            self.module.audio.load_state_dict(speech_encoder.state_dict())
            self.module.audio.requires_grad_(True)
            self.module.lip_prior.load_state_dict(lip_prior)
        self.lips, self.gap = lips, gap
        self.train_data = _Items(sets, "train", config, plain=False)
        self.val_data = _Items(sets, "val", config, plain=True)
        logger.info("%d recordings to train on, %d to validate", len(self.train_data.places), len(self.val_data.places))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"speech_encoder": list(self.module.parameters())}

    def dataset(self, split: str) -> Dataset[Any]:
        return self.train_data if split == "train" else self.val_data

    def _shares(self, given: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Unexplained share of each target's variance, over the frames where the target is known."""
        result = {}
        for key in ("teacher", "lips", "units", "curves"):
            there = torch.isfinite(batch[key][..., 0])
            if not there.any():
                continue
            wanted, got = batch[key][there], given[key].float()[there]
            if key == "lips":
                wanted, got = wanted @ self.lips.to(wanted), got @ self.lips.to(wanted)
            result[key] = (got - wanted).square().sum() / wanted.square().sum().clamp_min(1e-6)
        return result

    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        shares = self._shares(self.module(batch["windows"]), batch)
        weights = to_dict(self.config.weights)
        total = torch.stack([weights[key] * share for key, share in shares.items()]).sum()
        return total, {key: share.detach() for key, share in shares.items()}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Unexplained shares, and the correlation of the lips' opening, on whole held-out recordings."""
        found: dict[str, list[float]] = {}
        people: dict[str, list[float]] = {}
        for which, number in self.val_data.places:
            one = self.sets[which]
            if "x" in str(one.index["name"][number]).rsplit(" ", 1)[-1][:1]:
                continue  # a copy at another speed
            item = self.val_data.item(which, number, 0, int(one.length[number]), np.random.default_rng([0, 0]))
            batch = {key: value[None].to(fabric.device) for key, value in item.items()}
            given = self.module(batch["windows"])
            for key, share in self._shares(given, batch).items():
                found.setdefault(key, []).append(float(share))
            pair = torch.stack([given["lips"][0].float(), batch["lips"][0]]) @ self.gap.to(batch["lips"])
            pair = pair[:, torch.isfinite(pair[1])]
            if pair.shape[1] > 2:
                score = float(torch.corrcoef(pair)[0, 1]) if float(pair.std(1).min()) > 0 else 0.0
                people.setdefault(str(one.speaker[number]), []).append(score)
        results = {key: float(np.mean(values)) for key, values in found.items()}
        if people:
            results["lips_correlation"] = float(np.mean([np.mean(values) for values in people.values()]))
        weights = to_dict(self.config.weights)
        results["loss"] = sum(weights[key] * results[key] for key in weights if key in results)
        return results

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The speech encoder and its lip prior."""
        kept = ("audio.", "lip_prior.")
        state = {key: value for key, value in self.module.state_dict().items() if key.startswith(kept)}
        return state, to_dict(self.config.speech_encoder)


def build(config: Config) -> SpeechStage:
    """The stage for a configuration; reads the speech sets."""
    expression = face_model(config.face_model).expression
    sets = [SpeechSet(path) for path in config.sets]
    return SpeechStage(config, sets, lip_directions(expression), lip_gap(expression))
