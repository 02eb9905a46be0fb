"""What the stages ``expflow`` and ``poseflow`` have in common."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from flowvqtalker.errors import UserError
from flowvqtalker.motion.flow import Flow, Sequences
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.train.config import LoopConfig, check, from_dict, to_dict
from flowvqtalker.train.loop import Stage
from flowvqtalker.train.sequences import Corpus, SequenceConfig, SequenceDataset, collate, encode_corpus

__all__ = ["Features", "FlowStage", "Losses", "correlation", "evaluating", "load_speech_encoder", "whole_clips"]

logger = logging.getLogger(__name__)

#: Items from which the multi-actnorms take their start: half of them are drawn class by class, so every emotion is
#: there.
_START_ITEMS = 64


@dataclass(frozen=True)
class Losses:
    """Weights of the losses beside the likelihood."""

    consistency: float = 0.1
    """λ of L_con (eq. 11); the paper gives none."""
    pairs: int = 64
    """Pairs of frames of a batch on which L_con is taken; drawing frames costs about as much as their likelihood."""
    lips: float = 1.0
    """Weight of an auxiliary regression of the lips from the audio encoder's features (ours): likelihood alone teaches
    the encoder slowly, because the previous frames already tell most of the next one. 0: none."""


@dataclass(frozen=True)
class Features:
    """Who listens for the flow."""

    speech_encoder: Path | None = None
    """Run of the stage `speech`, or its weights, which are then not trained any further; None trains a small audio
    encoder with the flow."""
    copies: int = 2
    """With a speech encoder: versions of each clip's sound, the first as it is and the others of varied voices."""

    def __post_init__(self) -> None:
        check((self.copies > 0, f"copies must be positive, got {self.copies}"))


def load_speech_encoder(path: Path) -> tuple[SpeechEncoder, dict[str, Tensor]]:
    """The speech encoder that the stage ``speech`` exported, and the weights of its map to β.

    Raises:
        UserError: if the path holds no such weights.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    settings = file.with_suffix(".json") if file.with_suffix(".json").is_file() else file.with_name("config.json")
    try:
        state = load_file(str(file))
        about = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is no finished run of `flowvqtalker train speech` ({error})") from error
    if about.get("stage") != "speech":
        raise UserError(
            f"{file} is of stage {about.get('stage')!r}; features.speech_encoder must be a run of stage 'speech'"
        )
    speech_encoder = SpeechEncoder(from_dict(SpeechEncoderConfig, about["config"]))
    parts: dict[str, dict[str, Tensor]] = {"audio": {}, "lip_prior": {}}
    for key, value in state.items():
        part, _, name = key.partition(".")
        parts[part][name] = value.float()
    speech_encoder.load_state_dict(parts["audio"])
    return speech_encoder.requires_grad_(False).eval(), parts["lip_prior"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the module is in eval mode and no gradients are kept."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def whole_clips(corpus: Corpus, numbers: list[int], dataset: SequenceDataset, frames: int) -> Sequences:
    """The first ``frames`` frames of some clips as one batch (shorter clips are masked at the end)."""
    config = SequenceConfig(**{**to_dict(dataset.config), "frames": frames})
    plain = SequenceDataset(corpus, config, dataset.audio, dataset.history, plain=True)
    return collate(default_collate([plain.item(n, 0, np.random.default_rng([0, n])) for n in numbers]))


class FlowStage(Stage):
    """Maximum likelihood of a flow on sequences with teacher forcing, L_con, and an auxiliary loss.

    Arguments:
        config: the stage's configuration; has ``loop``, ``losses`` and ``sequences``.
        flow: what is trained.
        train, val: clips of the two splits; without ``val`` the likelihood is measured on the training clips.
    """

    monitor = "nll"

    def __init__(self, config: Any, flow: Flow, train: Corpus, val: Corpus | None) -> None:
        self.config = config
        self.flow = flow
        self.module = nn.ModuleDict({"flow": flow})
        if flow.config.speech_encoder:
            for corpus, copies in ((train, config.features.copies), (val, 1)):
                if corpus is not None and corpus.clips[0].features is None:
                    encode_corpus(corpus, flow.audio, copies, config.loop.seed)
        self.losses: Losses = config.losses
        self.train_corpus, self.val_corpus = train, val or train
        loop: LoopConfig = config.loop
        settings = config.sequences, flow.audio.config, flow.config.history
        self.train_data = SequenceDataset(train, *settings, loop.seed)
        self.val_data = SequenceDataset(self.val_corpus, *settings, 1, plain=True)
        counts = len(train.clips), train.frames, len(self.val_corpus.clips)
        logger.info("%d clips to train on (%d frames), %d to validate", *counts)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        kept = set(self.flow.audio.parameters()) if self.flow.config.speech_encoder else set()
        return {"flow": [parameter for parameter in self.module.parameters() if parameter not in kept]}

    def dataset(self, split: str) -> Dataset[Any]:
        return self.train_data if split == "train" else self.val_data

    def on_start(self, batch: Any) -> None:
        """Start of the multi-actnorms from a batch that mixes the emotions."""
        device = batch["frames"].device
        items = default_collate([self.train_data[i] for i in range(_START_ITEMS)])
        first = collate({key: value.to(device) for key, value in items.items()}, self.flow.config.source)
        self.prepare(first)
        with torch.no_grad():
            self.flow.negative_log_likelihood(first)

    def prepare(self, first: Sequences) -> None:
        """Called before the multi-actnorms start."""

    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        sequences = collate(batch, self.flow.config.source)
        audio = self.flow.encode_speech(sequences.windows)
        nll = self.flow.negative_log_likelihood(sequences, audio).mean()
        total, logs = nll, {"nll": nll.detach()}
        if self.losses.consistency > 0:
            consistency = self.flow.consistency(sequences, self.losses.pairs, audio)
            total = total + self.losses.consistency * consistency
            logs["consistency"] = consistency.detach()
        extra, extra_logs = self.auxiliary(batch, audio)
        if extra is not None:
            total = total + extra
        return total, {**logs, **extra_logs}

    def auxiliary(self, batch: Any, audio: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """A further loss, and what to log."""
        return None, {}

    def held_out(self, items: int = 96, size: int = 24) -> dict[str, float]:
        """Mean negative log-likelihood in nats per frame on fixed items of the held-out people, half of them drawn
        class by class, with their speech."""
        device = next(self.flow.parameters()).device
        total, count = 0.0, 0
        for start in range(0, items, size):
            batch = default_collate([self.val_data[i] for i in range(start, start + size)])
            nll = self.flow.negative_log_likelihood(
                collate({key: value.to(device) for key, value in batch.items()}, self.flow.config.source)
            )
            total, count = total + float(nll.sum()), count + len(nll)
        return {"nll": total / count}

    def longest(self, corpus: Corpus, count: int, speech: bool = True) -> list[int]:
        """Numbers of the longest clip of up to ``count`` people, most frames first."""
        best: dict[str, int] = {}
        for number, clip in enumerate(corpus.clips):
            if speech and not clip.speech:
                continue
            if clip.identity not in best or len(clip.frames) > len(corpus.clips[best[clip.identity]].frames):
                best[clip.identity] = number
        return sorted(best.values(), key=lambda n: (-len(corpus.clips[n].frames), n))[:count]


def correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation over the masked time of each row, (B,)."""
    weight = mask.to(a.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    a, b = ((x - (x * weight).sum(1, keepdim=True) / count) * weight for x in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-9)
