"""Stage ``expflow``: the expression flow (section 3.2): L = L_exp + λ L_con (eq. 10, 11), and the bank of latents."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import default_collate

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS
from flowvqtalker.motion.blink import measure_blinks
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, Flow
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.speech.encoder import SpeechEncoder
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.emotion_bias import fit_emotion_bias
from flowvqtalker.train.flow_stage import (
    Features,
    FlowStage,
    Losses,
    correlation,
    evaluating,
    load_speech_encoder,
    whole_clips,
)
from flowvqtalker.train.loop import Stage
from flowvqtalker.train.sequences import Corpus, SequenceConfig, SequenceDataset, collate, load_corpus

__all__ = ["Config", "ExpFlowStage", "build", "face_model", "lip_directions", "lip_gap", "start_from"]

logger = logging.getLogger(__name__)

#: Middle of the upper and of the lower lip, inner side.
_UPPER, _LOWER = 13, 14


@dataclass(frozen=True)
class Config:
    """Configuration of the expression flow's stage."""

    shards: tuple[Path, ...] = (Path("data/shard"),)
    """Folders of `python -m flowvqtalker.data.prepare`."""
    face_model: Path | None = None
    """Face model of the coefficients, which says what the lips do; None takes the package's own."""
    start: Path | None = None
    """Run of this stage, or its weights, of the same shape, to go on from with new settings; None starts anew."""
    features: Features = field(default_factory=Features)
    flow: ExpFlowConfig = field(default_factory=ExpFlowConfig)
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    losses: Losses = field(default_factory=Losses)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(lr=1e-3, batch_size=16, warmup=200, decay="cosine", ema=0.998)
    )
    bank: int = 1000
    """Latents kept of each emotion for the manifold projection."""

    def __post_init__(self) -> None:
        check(
            (self.bank > 0, f"bank must be positive, got {self.bank}"),
            (len(self.shards) > 0, "no shards were given"),
        )


def lip_directions(expression: Tensor, count: int = 16) -> Tensor:
    """Orthogonal directions (64, count) of β in which the lips move most, each as long as it moves them, of a face
    model's expression basis (64, 478, 3)."""
    u, s, _ = torch.linalg.svd(expression[:, list(LIPS)].flatten(1), full_matrices=False)
    directions: Tensor = (u * s)[:, :count] / s.square().sum().sqrt()
    return directions


def lip_gap(expression: Tensor) -> Tensor:
    """What of β (64,) opens the lips: the middles of their inner rims part by the scalar product with it."""
    return expression[:, _LOWER, 1] - expression[:, _UPPER, 1]


class ExpFlowStage(FlowStage):
    """See the module.

    Arguments:
        config: the configuration.
        train, val: clips of the two splits.
        expression: (64, 478, 3) basis of the face model, for the lips.
        lids: (65,) map from [β, 1] to the blendshape of shut lids; None: no blink is measured.
        heard: the speech encoder and the weights of its lip prior, from which the flow's starts; None: the flow has its
            own audio encoder.
    """

    name = "expflow"

    def __init__(
        self,
        config: Config,
        train: Corpus,
        val: Corpus | None,
        expression: Tensor,
        lids: Tensor | None = None,
        heard: tuple[SpeechEncoder, dict[str, Tensor]] | None = None,
    ) -> None:
        torch.manual_seed(config.loop.seed)
        flow = ExpFlow(config.flow, heard[0] if heard else None)
        if heard and flow.lip_prior is not None:
            flow.lip_prior.load_state_dict(heard[1])
        super().__init__(config, flow, train, val)
        self.flow: ExpFlow
        self.lips, self.gap = lip_directions(expression), lip_gap(expression)
        flow.opening.copy_(self.gap)
        if lids is not None:
            template, rate = measure_blinks((clip.frames for clip in train.clips), lids.numpy())
            flow.blink.copy_(template)
            flow.blink_rate.fill_(rate)

    def auxiliary(self, batch: Any, audio: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Regression of the lips from the audio features, on frames with speech: their shape relative to the clip's
        mean, as a share of its variance."""
        if self.losses.lips == 0 or self.flow.lip_prior is None:
            return None, {}
        heard = batch["mask"] & batch["has_speech"][:, None]
        lips = self.lips.to(audio)
        target = (batch["frames"][:, self.flow.config.history :] - batch["mean"][:, None]) @ lips
        error = (self.flow.predict_lips(audio) @ lips - target).square().sum(-1)
        weight = heard.to(error.dtype)
        count = weight.sum().clamp_min(1)
        share = (error * weight).sum() / count / ((target.square().sum(-1) * weight).sum() / count).clamp_min(1e-6)
        # In nats per frame, so that the weight is about one: the likelihood of as many dimensions.
        return self.losses.lips * len(lips.T) * share, {"lips": share.detach()}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        results = self.held_out()
        numbers = self.longest(self.val_corpus, 16)
        if numbers:
            results.update(self._lip_scores(numbers, fabric.device))
        return results

    def _lip_scores(self, numbers: list[int], device: torch.device) -> dict[str, float]:
        """Correlation of lip opening with the real clips', of one draw for each person and of the regression; range
        and speed of the drawn opening as shares of the real one's."""
        batch = whole_clips(self.val_corpus, numbers, self.val_data, 75)
        generator = torch.Generator().manual_seed(0)
        windows, emotion = batch.windows.to(device), batch.emotion.to(device)
        source = None if batch.source is None else batch.source.to(device)
        drawn = self.flow.rollout(windows, emotion, generator, source=source, temperature=0.7).cpu()
        true = batch.frames[:, self.flow.config.history :]
        score = correlation(drawn @ self.gap, true @ self.gap, batch.mask)
        guess = self.flow.predict_lips(self.flow.encode_speech(windows)).cpu() @ self.gap
        regression = correlation(guess, true @ self.gap, batch.mask)
        moves = [(x @ self.gap)[batch.mask].std() for x in (drawn, true)]
        speed = [(x[:, 1:] - x[:, :-1]).abs()[batch.mask[:, 1:]].mean() for x in (drawn, true)]
        return {
            "lips": float(score.mean()),
            "lips_regression": float(regression.mean()),
            "lips_range": float(moves[0] / moves[1]),
            "speed": float(speed[0] / speed[1]),
        }

    def bank(self) -> LatentBank:
        """Latents of training frames, up to ``config.bank`` of each emotion, given their true past and speech."""
        generator = torch.Generator().manual_seed(0)
        device = next(self.flow.parameters()).device
        plain = SequenceDataset(
            self.train_corpus, self.config.sequences, self.flow.audio.config, self.flow.config.history, plain=True
        )
        latents, labels = [], []
        with evaluating(self.flow):
            for label in range(len(EMOTIONS)):
                numbers = [n for n, clip in enumerate(self.train_corpus.clips) if clip.emotion == label]
                starts = [
                    (n, start)
                    for n in numbers
                    for start in range(0, len(self.train_corpus.clips[n].frames), self.config.sequences.frames)
                ]
                wanted = 2 * self.config.bank // self.config.sequences.frames + 2
                order = torch.randperm(len(starts), generator=generator)[:wanted]
                found: list[Tensor] = []
                chosen = [starts[i] for i in order.tolist()]
                for part in (chosen[i : i + 16] for i in range(0, len(chosen), 16)):
                    items = [plain.item(n, start, np.random.default_rng([0, n])) for n, start in part]
                    tensors = {key: value.to(device) for key, value in default_collate(items).items()}
                    batch = self.flow.residual(collate(tensors, self.flow.config.source))
                    targets = batch.frames[:, self.flow.config.history :][batch.mask]
                    found.append(self.flow.forward_and_logdet(targets, self.flow.contexts(batch))[0].cpu())
                if found:
                    every = torch.cat(found)
                    latents.append(every[torch.randperm(len(every), generator=generator)[: self.config.bank]])
                    labels.append(torch.full((len(latents[-1]),), label))
        return LatentBank(torch.cat(latents), torch.cat(labels))

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The flow, with what its emotions lack, and its latent bank."""
        with evaluating(self.flow):
            fit_emotion_bias(self.flow, self.train_corpus, self.train_data)
        return {**self.flow.own_state(), **self.bank().tensors()}, to_dict(self.flow.config)


def build(config: Config) -> Stage:
    """The stage for a configuration; reads the shards."""
    heard = None if config.features.speech_encoder is None else load_speech_encoder(config.features.speech_encoder)
    config = replace(config, flow=replace(config.flow, speech_encoder=heard is not None))
    face = face_model(config.face_model)
    expression = face.expression
    lids = face.arkit[[arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]].mean(0)
    frontend = heard[0].config.frontend if heard else config.flow.audio.frontend
    basis = torch.linalg.qr(lip_directions(expression))[0]
    lips, gap = (basis @ basis.mT).numpy(), lip_gap(expression).numpy()
    train, val = (
        load_corpus(config.shards, split, config.sequences, lips=lips, gap=gap, frontend=frontend)
        for split in ("train", "val")
    )
    stage = ExpFlowStage(config, train, val, expression, lids, heard)
    if config.start is not None:
        start_from(stage.flow, config.start)
    return stage


def start_from(flow: Flow, path: Path) -> None:
    """Take over the weights of an earlier run; what was measured on the data (blinks) stays.

    Raises:
        UserError: if they are missing or of another shape.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    try:
        given = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"start: {file} is no finished run of `flowvqtalker train expflow` ({error})") from error
    own = {key: value for key, value in flow.own_state().items() if key not in flow.optional}
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if wrong:
        raise UserError(f"start: {file} does not fit this flow: {wrong[0]} ({len(wrong)} differ); use its settings")
    kept = {key: given[key] for key in own if not key.startswith("blink")}
    flow.load_state_dict(kept, strict=False)


def face_model(path: Path | None) -> FaceModel:
    """The face model of a path; None is the package's own."""
    if path is not None:
        return FaceModel.load(path)
    from flowvqtalker import weights

    return FaceModel.load(weights.folder() / "face_model.safetensors")
