"""Stage ``expflow``: the expression flow (section 3.2): L = L_exp + λ L_con (eq. 10, 11), and the bank of latents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.retarget import RetargetConfig, Retargeter
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.model import FaceModel
from flowvqtalker.motion.blink import measure_blinks
from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, Flow
from flowvqtalker.motion.likelihood import contexts, residual, rollout
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.speech.encoder import SpeechEncoder
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.corpus import Corpus, Floats
from flowvqtalker.train.emotion_bias import fit_emotion_bias
from flowvqtalker.train.flow_stage import (
    Features,
    FlowStage,
    Losses,
    correlation,
    evaluating,
    face_model,
    lip_directions,
    lip_gap,
    load_speech_encoder,
    whole_clips,
)
from flowvqtalker.train.identity_split import find_pairs
from flowvqtalker.train.neutral_map import learn_neutral_map
from flowvqtalker.train.sequences import SequenceConfig, SequenceDataset, load_corpus

__all__ = ["Config", "ExpFlowStage", "build", "read", "start_from"]


@dataclass(frozen=True)
class Config:
    """Configuration of the expression flow's stage."""

    shards: tuple[Path, ...] = (Path("data/shard"),)
    """Folders of `flowvqtalker prepare`."""
    face_model: Path | None = None
    """Face model of the coefficients, for the motion of the lips; None: the package's own."""
    start: Path | None = None
    """Run of this stage, or its weights, of the same shape, to fine-tune with new settings; None: start anew."""
    retarget: RetargetConfig = field(default_factory=RetargetConfig)
    performances: Path | None = None
    """Folder with ravdess_au/frames.npz and speech/ravdess: RAVDESS's performances as clips. None: none. Needs a speech
    encoder and retarget.copies."""
    features: Features = field(default_factory=Features)
    flow: ExpFlowConfig = field(default_factory=ExpFlowConfig)
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    losses: Losses = field(default_factory=Losses)
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(lr=1e-3, batch_size=16, warmup=200, decay="cosine", ema=0.998)
    )
    bank: int = 1000
    """Latents stored per emotion for the manifold projection."""

    def __post_init__(self) -> None:
        check(
            (self.bank > 0, f"bank must be positive, got {self.bank}"),
            (len(self.shards) > 0, "no shards were given"),
            (
                self.performances is None or (self.features.speech_encoder is not None and self.retarget.copies > 0),
                "performances needs features.speech_encoder and retarget.copies above 0; give both or leave it out",
            ),
        )


class ExpFlowStage(FlowStage):
    """Maximum likelihood of the expression flow; its export adds the bias of emotions and the bank of latents.

    Arguments:
        config: the configuration.
        train, val: clips of the two splits.
        expression: (64, 478, 3) basis of the face model, for the lips.
        lids: (65,) map from [β, 1] to the blendshape of closed lids; None: no blink is measured.
        speech: the speech encoder and the weights of its lip prior, from which the flow's starts; None: the flow has
            its own audio encoder.
        retarget: draws the emotions that neutral clips also show; None: only real emotional clips.
    """

    name = "expflow"

    def __init__(
        self,
        config: Config,
        train: Corpus,
        val: Corpus | None,
        expression: Tensor,
        lids: Tensor | None = None,
        speech: tuple[SpeechEncoder, dict[str, Tensor]] | None = None,
        retarget: Retargeter | None = None,
    ) -> None:
        torch.manual_seed(config.loop.seed)
        flow = ExpFlow(config.flow, speech[0] if speech else None)
        if speech and flow.lip_prior is not None:
            flow.lip_prior.load_state_dict(speech[1])
        super().__init__(config, flow, train, val, retarget, config.performances)
        self.flow: ExpFlow
        self.lips, self.gap = lip_directions(expression), lip_gap(expression)
        flow.opening.copy_(self.gap)
        if lids is not None:
            template, rate = measure_blinks((clip.frames for clip in train.clips), lids.numpy())
            flow.blink.copy_(template)
            flow.blink_rate.fill_(rate)

    def auxiliary(self, batch: Any, audio: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Unexplained share of the lips' variance around the clip's mean, regressed from speech."""
        if self.losses.lips == 0 or self.flow.lip_prior is None:
            return None, {}
        lips = self.lips.to(audio)
        target = (batch["frames"][:, self.flow.config.history :] - batch["mean"][:, None]) @ lips
        error = (self.flow.predict_lips(audio) @ lips - target).square().sum(-1)
        weight = (batch["mask"] & batch["has_speech"][:, None]).to(error.dtype)
        count = weight.sum().clamp_min(1)
        share = (error * weight).sum() / count / ((target.square().sum(-1) * weight).sum() / count).clamp_min(1e-6)
        # Scaled to nats per frame, the likelihood of as many dimensions, so that a weight near one suits.
        return self.losses.lips * len(lips.T) * share, {"lips": share.detach()}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        results = self.held_out()
        numbers = self.held_out_speakers()
        if numbers:
            results.update(self._lip_scores(numbers, fabric.device))
        return results

    def _lip_scores(self, numbers: list[int], device: torch.device) -> dict[str, float]:
        """Correlation of the lips' opening with the real clips', for one sample per person and for the regression;
        range and speed of the sampled opening relative to the real one."""
        batch = whole_clips(self.val_corpus, numbers, self.val_data, 75)
        generator = torch.Generator().manual_seed(0)
        windows, emotion = batch.windows.to(device), batch.emotion.to(device)
        source = None if batch.source is None else batch.source.to(device)
        drawn = rollout(self.flow, windows, emotion, generator, source=source, temperature=0.7).cpu()
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
        """Latents of training frames, up to ``config.bank`` per emotion, given their true past and speech."""
        generator = torch.Generator().manual_seed(0)
        clips, sequences, flow = self.train_corpus.clips, self.config.sequences, self.flow
        plain = SequenceDataset(self.train_corpus, sequences, flow.audio.config, flow.config.history, plain=True)
        latents, labels = [], []
        for label in range(len(EMOTIONS)):
            starts = [
                (number, start)
                for number, clip in enumerate(clips)
                if clip.emotion == label
                for start in range(0, len(clip.frames), sequences.frames)
            ]
            wanted = 2 * self.config.bank // sequences.frames + 2
            chosen = [starts[i] for i in torch.randperm(len(starts), generator=generator)[:wanted].tolist()]
            found: list[Tensor] = []
            for part in (chosen[i : i + 16] for i in range(0, len(chosen), 16)):
                batch = residual(
                    flow, self.batch([plain.item(n, start, np.random.default_rng([0, n])) for n, start in part])
                )
                targets = batch.frames[:, flow.config.history :][batch.mask]
                found.append(flow.forward_and_logdet(targets, contexts(flow, batch))[0].cpu())
            if found:
                every = torch.cat(found)
                latents.append(every[torch.randperm(len(every), generator=generator)[: self.config.bank]])
                labels.append(torch.full((len(latents[-1]),), label))
        return LatentBank(torch.cat(latents), torch.cat(labels))

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The flow with its bias of emotions and its latent bank."""
        with evaluating(self.flow):
            wanted = None if self.retarget is None else self.retarget.mean_differences()
            tensors = {label: torch.from_numpy(value) for label, value in (wanted or {}).items()}
            fit_emotion_bias(self.flow, self.train_corpus, self.train_data, wanted=tensors)
            bank = self.bank()
        return {**self.flow.own_state(), **bank.tensors()}, to_dict(self.flow.config)


def read(config: Config) -> tuple[Corpus, Corpus]:
    """The clips of both splits."""
    basis, gap = _lips(face_model(config.face_model))
    run = config.features.speech_encoder
    frontend = config.flow.audio.frontend if run is None else load_speech_encoder(run)[0].config.frontend
    train, val = (
        load_corpus(config.shards, split, config.sequences, lips=basis, gap=gap, frontend=frontend)
        for split in ("train", "val")
    )
    return train, val


def _lips(face: FaceModel) -> tuple[Floats, Floats]:
    """Projection (64, 64) on the lips' motion, and the direction (64,) that parts them."""
    basis = torch.linalg.qr(lip_directions(face.expression))[0]
    return (basis @ basis.mT).numpy(), lip_gap(face.expression).numpy()


def build(config: Config, corpora: tuple[Corpus, Corpus] | None = None) -> ExpFlowStage:
    """The stage for a configuration.

    Arguments:
        config: the configuration.
        corpora: what :func:`read` gives, to read it once for several stages.
    """
    run = config.features.speech_encoder
    speech = None if run is None else load_speech_encoder(run)
    config = replace(config, flow=replace(config.flow, speech_encoder=speech is not None))
    face = face_model(config.face_model)
    lids = face.arkit[[arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]].mean(0)
    train, val = corpora or read(config)
    gap = _lips(face)[1]
    retarget = Retargeter(face, gap, config.retarget) if config.retarget.copies else None
    stage = ExpFlowStage(config, train, val, face.expression, lids, speech, retarget)
    if config.start is not None:
        start_from(stage.flow, config.start)
    pairs = [pair for folder in config.shards for pair in find_pairs(Shard(folder)) if pair.split == "train"]
    stage.flow.neutral_map.copy_(learn_neutral_map(face, stage.train_corpus, pairs))
    return stage


def start_from(flow: Flow, path: Path) -> None:
    """Load the weights of an earlier run, except what was measured on the data (blinks).

    Raises:
        UserError: if they are missing or of another shape.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    try:
        given = load_file(str(file))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"start: {file} is no finished run of `flowvqtalker train expflow` ({error}); choose another"
        ) from error
    own = {key: value for key, value in flow.own_state().items() if key not in flow.optional}
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if wrong:
        raise UserError(f"start: {file} does not fit this flow: {wrong[0]} ({len(wrong)} differ); use its settings")
    kept = {key: given[key] for key in own if not key.startswith("blink")}
    flow.load_state_dict(kept, strict=False)
