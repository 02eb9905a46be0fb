"""Stage ``emotion``: our classifier of the emotion of a talking face (:mod:`flowvqtalker_eval.evaluators.emotion`).

Few clips are labelled, so it is trained in two steps. First the backbone (from ImageNet) learns to see expression: it
predicts the tracker's blendshapes of faces of people of whom no emotion is known. Then the classifier learns the
emotions, three frames of a clip at a time as Emotion-FAN does, and goes on predicting the blendshapes beside.

The faces are those of ``flowvqtalker prepare-emotion-faces``. Nobody with a labelled clip is in the first step,
so that every fold of the cross-validation can share it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import face_template
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.perceptual import find_weights
from flowvqtalker.train.config import LoopConfig, check, to_dict
from flowvqtalker.train.loop import Stage, fit
from flowvqtalker_eval.evaluators.emotion import DIM, EmotionClassifier, EmotionConfig
from flowvqtalker_eval.evaluators.emotion_data import ClipItems, FaceItems, plain
from flowvqtalker_eval.evaluators.emotion_faces import Faces
from flowvqtalker_eval.evaluators.folds import (
    NEUTRAL,
    BalancedDraw,
    Labelled,
    by_person,
    cross_validate,
    fit_temperature,
    held_out_logits,
    held_out_numbers,
    spread_out,
    write_report,
)

__all__ = ["Config", "EmotionStage", "ExpressionStage", "FaceClips", "build_backbone", "load_faces", "run"]

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_SHAPES = len(ARKIT_NAMES)


@dataclass(frozen=True)
class Config:
    """Configuration of the stage."""

    shard: Path = Path("data/shard")
    """Folder of `flowvqtalker prepare`, with the faces of `flowvqtalker prepare-emotion-faces`."""
    face_model: Path | None = None
    """Face model of the shard; None: the package's own."""
    imagenet: Path | None = None
    """ImageNet weights of MobileNetV2, if they are not found by themselves."""
    model: EmotionConfig = field(default_factory=EmotionConfig)
    pictures: float = 0.4
    """Share of the first step's faces that are stills; the rest are frames of clips."""
    frozen: int = 7
    """Blocks of the backbone, from the input on, that the second step leaves as they are."""
    shapes: float = 0.5
    """Weight of the blendshapes in the second step."""
    balance: float = 1.0
    """Classes are drawn by the number of their people to the power of one minus this; 1: all alike."""
    natural: float = 0.3
    """Share of the neutral items that come from natural speech (which counts as neutral in training only)."""
    smoothing: float = 0.1
    """Label smoothing."""
    l2: float = 0.02
    """Weight of the squared weights of the last layer in the loss."""
    per_person: int = 2
    """At most so many clips of one person and class are measured."""
    folds: int = 0
    """Cross-validation before the final training, in so many folds by identity; 0: none."""
    pretrain: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, batch_size=32, lr=1e-3, warmup=50, decay="cosine", ema=0.99)
    )
    """The first step."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=250, batch_size=12, lr=5e-4, warmup=30, decay="cosine", ema=0.97)
    )
    """The second step, in each fold and at the end."""

    def __post_init__(self) -> None:
        shares = ("pictures", "balance", "natural")
        check(
            *((0 <= getattr(self, n) <= 1, f"{n} must be in [0, 1], got {getattr(self, n)}") for n in shares),
            *((getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}") for n in ("shapes", "l2")),
            (0 <= self.frozen <= 17, f"frozen must be in 0 to 17 (of 18 blocks), got {self.frozen}"),
            (self.folds == 0 or self.folds >= 2, f"folds must be 0 or at least 2, got {self.folds}"),
            (self.per_person > 0, f"per_person must be positive, got {self.per_person}"),
        )


@dataclass(frozen=True)
class FaceClips:
    """The faces of a shard, sorted.

    Attributes:
        faces: all of them.
        shapes: (M, 52) blendshapes of each face; NaN where the tracker gave none.
        numbers: faces of each labelled clip, in the order of time.
        data: labels and people of these clips; natural speech has the label neutral and is not measured.
        natural: (n,) bool.
        free: stills and frames of clips in the training split, of people without a labelled clip; by person each.
        validation: faces of such people in the validation split.
    """

    faces: Any
    shapes: Floats
    numbers: tuple[Ints, ...]
    data: Labelled
    natural: npt.NDArray[np.bool_]
    free: tuple[list[Ints], list[Ints]]
    validation: Ints


def load_faces(folder: Path, per_person: int) -> FaceClips:
    """Read a shard's faces and labels.

    Raises:
        UserError: if the faces are missing or show fewer than two emotions.
    """
    shard, faces = Shard(folder), Faces(folder)
    clips = np.unique(faces.clip)
    clips = clips[(shard.emotion[clips] >= 0) & ~shard.picture[clips]]
    natural = np.array([EMOTIONS[int(shard.emotion[clip])] == "natural" for clip in clips], bool)
    labels = np.array(
        [NEUTRAL if own else int(shard.emotion[c]) for c, own in zip(clips, natural, strict=True)], np.int64
    )
    if len(set(labels.tolist())) < 2:
        raise UserError(f"the faces of {folder} show fewer than two emotions; label the clips and prepare again")
    identities = tuple(str(shard.identity[clip]) for clip in clips)
    measured = spread_out(labels, identities, per_person) & ~natural
    known = {who for who, own in zip(identities, natural, strict=True) if not own}
    who = [str(shard.identity[clip]) for clip in faces.clip]
    unknown = np.array([name not in known for name in who], bool)
    split = np.array([split_of(name) for name in who])
    picture = shard.picture[faces.clip]
    stills, frames = (
        by_person(np.flatnonzero(unknown & (split == "train") & (picture == kind)), who) for kind in (True, False)
    )
    return FaceClips(
        faces,
        np.asarray(shard.blendshapes[faces.row], np.float32),
        tuple(np.flatnonzero(faces.clip == clip) for clip in clips),
        Labelled(labels, identities, measured),
        natural,
        (stills, frames),
        np.flatnonzero(unknown & (split == "val")),
    )


class _Shapes(nn.Module):
    """Blendshapes of a face from the backbone's features, standardised over the training faces."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, _SHAPES)
        self.register_buffer("mean", torch.zeros(_SHAPES))
        self.register_buffer("scale", torch.ones(_SHAPES))

    def loss(self, features: Tensor, shapes: Tensor) -> Tensor:
        """Mean squared error of features (N, 320) for blendshapes (N, 52); NaN do not count."""
        seen = torch.isfinite(shapes)
        wanted = ((shapes - self.mean) / self.scale).nan_to_num().clamp(-5, 5)
        error = (self.layer(features).float() - wanted).square() * seen
        loss: Tensor = error.sum() / seen.sum().clamp_min(1)
        return loss


class ExpressionStage(Stage):
    """The first step: blendshapes of faces.

    Arguments:
        imagenet: state of MobileNetV2, or None to begin with noise.
    """

    name = "emotion-expression"

    def __init__(self, config: Config, clips: FaceClips, imagenet: dict[str, Tensor] | None) -> None:
        torch.manual_seed(config.pretrain.seed)
        self.config, self.clips = config, clips
        self.model = EmotionClassifier(config.model)
        if imagenet is not None:
            own = {key.removeprefix("features."): v for key, v in imagenet.items() if key.startswith("features.")}
            self.model.backbone.load_state_dict({k: own[k] for k in self.model.backbone.state_dict() if k in own})
        self.shapes = _Shapes()
        known = clips.shapes[np.isfinite(clips.shapes).all(1)]
        self.shapes.mean.copy_(torch.from_numpy(known.mean(0)))
        self.shapes.scale.copy_(torch.from_numpy(known.std(0)).clamp_min(0.01))
        self.module = nn.ModuleDict({"backbone": self.model.backbone, "shapes": self.shapes})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"backbone": [*self.model.backbone.parameters(), *self.shapes.parameters()]}

    def dataset(self, split: str) -> FaceItems:
        return FaceItems(
            self.clips.faces, self.clips.shapes, self.clips.free, self.config.pictures, self.config.pretrain.seed
        )

    def loss(self, group: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        return self.shapes.loss(self.model.frames(batch["face"]), batch["shapes"]), {}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Share of the blendshapes' variance that is explained, over the faces of held-out people."""
        numbers = self.clips.validation[:: max(1, len(self.clips.validation) // 400)]
        numbers = numbers[np.isfinite(self.clips.shapes[numbers]).all(1)]
        if len(numbers) < 2:
            return {}
        device = self.shapes.mean.device
        parts = []
        for chosen in np.array_split(numbers, -(-len(numbers) // 50)):
            faces = torch.stack([plain(self.clips.faces.face(int(n))) for n in chosen]).to(device)
            parts.append(self.shapes.layer(self.model.frames(faces)).float())
        wanted = (torch.from_numpy(self.clips.shapes[numbers]).to(device) - self.shapes.mean) / self.shapes.scale
        rest = (torch.cat(parts) - wanted).square().mean(0) / wanted.var(0).clamp_min(1e-4)
        moving = self.shapes.scale > 0.02
        return {"explained": float(1 - rest[moving].mean())}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.module.state_dict(), {}


class EmotionStage(Stage):
    """The second step: emotions of clips.

    Arguments:
        clips: all clips.
        train, held: numbers of the labelled clips to train on and to measure.
        start: state of the first step (names ``backbone.`` and ``shapes.``).
        template: see :func:`flowvqtalker.face.alignment.face_template`.
        temperature: of the exported classifier; training and validation are without.
    """

    name = "emotion"

    def __init__(
        self,
        config: Config,
        clips: FaceClips,
        train: Ints,
        held: Ints,
        start: dict[str, Tensor],
        template: Tensor,
        temperature: float = 1.0,
    ) -> None:
        torch.manual_seed(config.loop.seed)
        self.config, self.clips, self.held, self.temperature = config, clips, held, temperature
        self.model = EmotionClassifier(config.model)
        self.model.template.copy_(template)
        self.model.fixed_norm = True
        self.shapes = _Shapes()
        self.module = nn.ModuleDict({"classifier": self.model, "shapes": self.shapes})
        own = nn.ModuleDict({"backbone": self.model.backbone, "shapes": self.shapes})
        own.load_state_dict({**own.state_dict(), **start})
        for block in list(self.model.backbone)[: config.frozen]:
            block.requires_grad_(False)
        draws = BalancedDraw(clips.data, train, clips.natural, config.balance, config.natural)
        self.items = ClipItems(clips.faces, clips.shapes, clips.numbers, draws, config.loop.seed)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        frozen = {id(p) for block in list(self.model.backbone)[: self.config.frozen] for p in block.parameters()}
        return {"classifier": [p for p in self.module.parameters() if id(p) not in frozen]}

    def dataset(self, split: str) -> ClipItems:
        return self.items

    def loss(self, group: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        faces = batch["faces"]
        features = self.model.frames(faces.flatten(0, 1))
        logits = self.model.classify(features.reshape(*faces.shape[:2], -1)).float()
        entropy = nn.functional.cross_entropy(logits, batch["label"], label_smoothing=self.config.smoothing)
        shapes = self.shapes.loss(features, batch["shapes"].flatten(0, 1))
        right = (logits.argmax(1) == batch["label"]).float().mean()
        size = 0.5 * self.config.l2 * self.model.head.weight.square().sum()
        logs: dict[str, float | Tensor] = {
            "cross_entropy": entropy.detach(),
            "shapes": shapes.detach(),
            "accuracy": right,
        }
        return entropy + self.config.shapes * shapes + size, logs

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`export` gave."""
        self.model.load_state_dict(state)

    def logits(self, numbers: Ints) -> Tensor:
        """Logits (k, 8) of clips, from all their faces."""
        device = self.model.mean.device
        found = []
        for number in numbers:
            faces = torch.stack([plain(self.clips.faces.face(int(n))) for n in self.clips.numbers[number]])
            found.append(self.model(faces[None].to(device)))
        return torch.cat(found)

    def validate(self, fabric: Fabric) -> dict[str, float]:
        measured = self.held[self.clips.data.measured[self.held]]
        if not len(measured):
            return {}
        return held_out_numbers(self.clips.data, held_out_logits(self, measured), measured)

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {**self.model.state_dict(), "temperature": torch.tensor(self.temperature)}, to_dict(self.config.model)


def build_backbone(config: Config, clips: FaceClips, out: Path, resume: bool) -> dict[str, Tensor]:
    """Run the first step in ``out/expression``, or read what it left there; returns its state."""
    from safetensors.torch import load_file

    folder = out / "expression"
    if not (resume and (folder / "done").is_file()):
        imagenet = torch.load(find_weights("mobilenet", config.imagenet), map_location="cpu", weights_only=True)
        fit(ExpressionStage(config, clips, imagenet), config.pretrain, folder, resume)
        (folder / "done").touch()
    state = load_file(folder / "weights.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def run(config: Config, out: Path, resume: bool = False) -> dict[str, float]:
    """Both steps, with cross-validation if asked for; everything goes into ``out``."""
    from flowvqtalker.loading import load_face_model

    face = FaceModel.load(config.face_model) if config.face_model is not None else load_face_model()
    template = face_template(face)
    clips = load_faces(config.shard, config.per_person)
    start = build_backbone(config, clips, out, resume)
    results: dict[str, float] = {}
    temperature = 1.0
    if config.folds:

        def make(train: Ints, held: Ints, fold: int) -> EmotionStage:
            return EmotionStage(config, clips, train, held, start, template)

        accuracy, logits = cross_validate(make, clips.data, config.loop, out, config.folds, resume)
        temperature = fit_temperature(clips.data, logits)
        write_report(out, "Emotion of talking faces", accuracy, {"temperature": temperature})
        logger.info("%s", accuracy.text())
        results.update(pooled=accuracy.accuracy, pooled_balanced=accuracy.balanced)
    split = np.array([split_of(who) for who in clips.data.identities])
    train, held = (np.flatnonzero(split == name) for name in ("train", "val"))
    stage = EmotionStage(config, clips, train, held, start, template, temperature)
    results.update(fit(stage, config.loop, out, resume))
    return results
