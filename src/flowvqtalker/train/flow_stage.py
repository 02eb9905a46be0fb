"""Common parts of the stages ``expflow``, ``poseflow`` and ``speech``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from flowvqtalker import weights
from flowvqtalker.data.retarget import Retargeter
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS
from flowvqtalker.motion.flow import Flow
from flowvqtalker.motion.likelihood import Sequences, consistency, negative_log_likelihood
from flowvqtalker.speech.encoder import SpeechEncoder, SpeechEncoderConfig
from flowvqtalker.train.config import LoopConfig, check, from_dict
from flowvqtalker.train.corpus import Corpus, encode_corpus
from flowvqtalker.train.performances import perform
from flowvqtalker.train.sequences import SequenceDataset, collate
from flowvqtalker.train.stage import Stage

__all__ = [
    "Features",
    "FlowStage",
    "Losses",
    "correlation",
    "evaluating",
    "face_model",
    "lip_directions",
    "lip_gap",
    "load_speech_encoder",
    "whole_clips",
]

logger = logging.getLogger(__name__)

#: Middle vertices of the upper and of the lower inner lip.
_UPPER, _LOWER = 13, 14

#: Items that initialise the multi-actnorms; half are drawn class by class, so every emotion occurs.
_START_ITEMS = 64


@dataclass(frozen=True)
class Losses:
    """Losses beside the likelihood."""

    consistency: float = 0.1
    """Weight λ of L_con (eq. 11); the paper gives none."""
    pairs: int = 64
    """Pairs of frames per batch for L_con; sampling frames costs about as much as their likelihood."""
    lips: float = 1.0
    """Weight of a regression of the lips from the audio features (ours); 0: none. The likelihood alone trains the
    encoder slowly, because the previous frames predict most of the next one."""


@dataclass(frozen=True)
class Features:
    """Speech features of the flow's context."""

    speech_encoder: Path | None = None
    """Run of the stage `speech`, or its weights, which stay frozen; None trains a small audio encoder with the flow."""
    copies: int = 2
    """With a speech encoder: versions of each clip's speech, the original and varied voices."""

    def __post_init__(self) -> None:
        check((self.copies > 0, f"copies must be positive, got {self.copies}"))


def load_speech_encoder(path: Path) -> tuple[SpeechEncoder, dict[str, Tensor]]:
    """The frozen speech encoder that the stage ``speech`` exported, and the weights of its lip prior.

    Raises:
        UserError: if the path holds no such weights.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    settings = file.with_suffix(".json") if file.with_suffix(".json").is_file() else file.with_name("config.json")
    try:
        state = weights.read_tensors(file)
        about = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{file} is no finished run of `flowvqtalker train speech` ({error}); train one or choose another"
        ) from error
    if about.get("stage") != "speech":
        raise UserError(
            f"{file} is of stage {about.get('stage')!r}; features.speech_encoder must be a run of stage 'speech'"
        )
    speech_encoder = SpeechEncoder(from_dict(SpeechEncoderConfig, about["config"]))
    parts: dict[str, dict[str, Tensor]] = {"audio": {}, "lip_prior": {}}
    for key, value in state.items():
        part, _, name = key.partition(".")
        part = {"voicing": "lip_prior"}.get(part, part)  # its name in exports of version 0.1
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
    """The first ``frames`` frames of some clips as one batch; shorter clips are masked at the end."""
    plain = SequenceDataset(corpus, replace(dataset.config, frames=frames), dataset.audio, dataset.history, plain=True)
    return collate(default_collate([plain.item(n, 0, np.random.default_rng([0, n])) for n in numbers]))


class FlowStage(Stage):
    """Maximum likelihood of a flow on sequences with teacher forcing, L_con, and an auxiliary loss.

    Arguments:
        config: the stage's configuration, with ``loop``, ``losses``, ``features`` and ``sequences``.
        flow: the flow to train.
        train, val: clips of the two splits; without ``val``, validation uses the training clips.
        retarget: adds emotional versions of neutral clips to both splits.
        performances: folder of RAVDESS's performances, to train on as well (:mod:`flowvqtalker.train.performances`).
    """

    monitor = "nll"

    def __init__(
        self,
        config: Any,
        flow: Flow,
        train: Corpus,
        val: Corpus | None,
        retarget: Retargeter | None = None,
        performances: Path | None = None,
    ) -> None:
        self.config = config
        self.flow = flow
        self.module = nn.ModuleDict({"flow": flow})
        if flow.config.speech_encoder:
            for corpus, copies in ((train, config.features.copies), (val, 1)):
                if corpus is not None and corpus.clips[0].features is None:
                    encode_corpus(corpus, flow.audio, copies, config.loop.seed)
        self.retarget = retarget
        if performances is not None and retarget is not None:
            train = perform(performances, flow, train, retarget, config.features.copies, config.loop.seed)
        if retarget is not None:  # after encoding: both versions of a clip share its features
            train = train.with_retargeted(retarget, config.loop.seed)
            val = None if val is None else val.with_retargeted(retarget, config.loop.seed)
        self.losses: Losses = config.losses
        self.train_corpus, self.val_corpus = train, val or train
        loop: LoopConfig = config.loop
        settings = config.sequences, flow.audio.config, flow.config.history
        self.train_data = SequenceDataset(train, *settings, loop.seed)
        self.val_data = SequenceDataset(self.val_corpus, *settings, 1, plain=True)
        counts = len(train.clips), train.frames, len(self.val_corpus.clips)
        logger.info("%d clips to train on (%d frames), %d to validate", *counts)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        frozen = set(self.flow.audio.parameters()) if self.flow.config.speech_encoder else set()
        return {"flow": [parameter for parameter in self.module.parameters() if parameter not in frozen]}

    def dataset(self, split: str) -> Dataset[Any]:
        return self.train_data if split == "train" else self.val_data

    def on_start(self, batch: Any) -> None:
        """Initialise the multi-actnorms from a batch that mixes the emotions."""
        with torch.no_grad():
            negative_log_likelihood(self.flow, self.batch([self.train_data[i] for i in range(_START_ITEMS)]))

    def batch(self, items: list[dict[str, Any]]) -> Sequences:
        """Items as one batch on the flow's device."""
        device = next(self.flow.parameters()).device
        tensors = {key: value.to(device) for key, value in default_collate(items).items()}
        return collate(tensors, self.flow.config.source)

    def loss(self, group: str, batch: Any, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        sequences = collate(batch, self.flow.config.source)
        audio = self.flow.encode_speech(sequences.windows)
        nll = negative_log_likelihood(self.flow, sequences, audio).mean()
        total, logs = nll, {"nll": nll.detach()}
        if self.losses.consistency > 0:
            moving = consistency(self.flow, sequences, self.losses.pairs, audio)
            total = total + self.losses.consistency * moving
            logs["consistency"] = moving.detach()
        extra, extra_logs = self.auxiliary(batch, audio)
        if extra is not None:
            total = total + extra
        return total, {**logs, **extra_logs}

    def auxiliary(self, batch: Any, audio: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """An additional loss, and what to log."""
        return None, {}

    def held_out(self, items: int = 96, size: int = 24) -> dict[str, float]:
        """Mean negative log-likelihood in nats per frame on fixed validation items."""
        batches = (self.batch([self.val_data[i + n] for n in range(size)]) for i in range(0, items, size))
        return {"nll": float(torch.cat([negative_log_likelihood(self.flow, batch) for batch in batches]).mean())}

    def held_out_speakers(self, count: int = 16) -> list[int]:
        """Numbers of one long validation clip with speech for each of up to ``count`` people."""
        corpus = self.val_corpus
        return corpus.longest([number for number, clip in enumerate(corpus.clips) if clip.speech], count)


def correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation over the masked time of each row, (B,)."""
    weight = mask.to(a.dtype)
    count = weight.sum(1, keepdim=True).clamp_min(1)
    a, b = ((x - (x * weight).sum(1, keepdim=True) / count) * weight for x in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt().clamp_min(1e-9)


def lip_directions(expression: Tensor, count: int = 16) -> Tensor:
    """Orthogonal directions (64, count) of β in which the lips move most, scaled by how far they move.

    ``expression`` is the expression basis (64, 478, 3) of a face model.
    """
    u, s, _ = torch.linalg.svd(expression[:, list(LIPS)].flatten(1), full_matrices=False)
    directions: Tensor = (u * s)[:, :count] / s.square().sum().sqrt()
    return directions


def lip_gap(expression: Tensor) -> Tensor:
    """Direction (64,) of β that opens the lips: the product with β is the distance of the inner lips' middles."""
    return expression[:, _LOWER, 1] - expression[:, _UPPER, 1]


def face_model(path: Path | None) -> FaceModel:
    """The face model at a path; None is the package's own."""
    return FaceModel.load(weights.folder() / "face_model.safetensors" if path is None else path)
