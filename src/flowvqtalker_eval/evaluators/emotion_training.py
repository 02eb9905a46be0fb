"""Stage ``emotion``: train the classifier of a talking face's emotion (:mod:`flowvqtalker_eval.evaluators.emotion`).

Few clips are labelled, so training has two steps. First the backbone (from ImageNet) learns to see expression: it
predicts the tracker's blendshapes of people of whom no emotion is known. Then the classifier learns the emotions from
three frames of a clip at a time, as Emotion-FAN does, and keeps predicting the blendshapes beside.

The faces come from ``flowvqtalker prepare-emotion-faces``. The first step sees nobody with a labelled clip, so all
folds of the cross-validation can share it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn

from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import face_template
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.perceptual import find_weights
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.loop import Stage, fit
from flowvqtalker_eval.evaluators.emotion import FEATURES, EmotionClassifier
from flowvqtalker_eval.evaluators.emotion_data import (
    BalancedDraw,
    ClipItems,
    FaceClips,
    FaceItems,
    centre_crop,
    load_faces,
)
from flowvqtalker_eval.evaluators.folds import Labelled, grouped_folds, write_report
from flowvqtalker_eval.metrics.accuracy import CLASSES

__all__ = ["Config", "EmotionStage", "ExpressionStage", "cross_validate", "fit_temperature", "run"]

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


# Blocks of the backbone, counted from the input, that the second step does not train.
_FROZEN = 7
# Weights in the second step's loss: of the blendshapes, and of half the squared weights of the last layer.
_SHAPES, _L2 = 0.5, 0.02
_SMOOTHING = 0.1  # of the labels


@dataclass(frozen=True)
class Config:
    """Configuration of the stage."""

    shard: Path = Path("data/shard")
    """Folder of `flowvqtalker prepare`, with the faces of `flowvqtalker prepare-emotion-faces`."""
    face_model: Path | None = None
    """Face model of the shard; None: the package's own."""
    imagenet: Path | None = None
    """ImageNet weights of MobileNetV2; None: look in the usual places."""
    folds: int = 0
    """Folds by identity of the cross-validation before the final training; 0: none."""
    pretrain: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=1200, batch_size=32, lr=1e-3, warmup=50, decay="cosine", ema=0.99)
    )
    """The first step."""
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=250, batch_size=12, lr=5e-4, warmup=30, decay="cosine", ema=0.97)
    )
    """The second step, in each fold and at the end."""

    def __post_init__(self) -> None:
        check((self.folds == 0 or self.folds >= 2, f"folds must be 0 or at least 2, got {self.folds}"))


class _Shapes(nn.Module):
    """Blendshapes (N, 52) of a face from the backbone's features, standardised over the training faces."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, len(ARKIT_NAMES))
        self.register_buffer("mean", torch.zeros(len(ARKIT_NAMES)))
        self.register_buffer("scale", torch.ones(len(ARKIT_NAMES)))

    def loss(self, features: Tensor, shapes: Tensor) -> Tensor:
        """Mean squared error for blendshapes (N, 52) of features (N, 320); NaN do not count."""
        seen = torch.isfinite(shapes)
        target = ((shapes - self.mean) / self.scale).nan_to_num().clamp(-5, 5)
        error = (self.layer(features).float() - target).square() * seen
        loss: Tensor = error.sum() / seen.sum().clamp_min(1)
        return loss


class ExpressionStage(Stage):
    """The first step: blendshapes of faces.

    Arguments:
        imagenet: state of MobileNetV2; None starts from random weights.
    """

    name = "emotion-expression"

    def __init__(self, config: Config, clips: FaceClips, imagenet: dict[str, Tensor] | None) -> None:
        torch.manual_seed(config.pretrain.seed)
        self.config, self.clips = config, clips
        self.model = EmotionClassifier()
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
        return FaceItems(self.clips, self.config.pretrain.seed)

    def loss(self, group: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        features = self.model.frames(batch["faces"].flatten(0, 1))
        return self.shapes.loss(features, batch["shapes"].flatten(0, 1)), {}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Share of the blendshapes' variance that is explained, over the faces of held-out people."""
        numbers = self.clips.validation[:: max(1, len(self.clips.validation) // 400)]
        numbers = numbers[np.isfinite(self.clips.shapes[numbers]).all(1)]
        if len(numbers) < 2:
            return {}
        device = self.shapes.mean.device
        parts = []
        for chosen in np.array_split(numbers, -(-len(numbers) // 50)):
            faces = torch.stack([centre_crop(self.clips.faces.face(int(n))) for n in chosen]).to(device)
            parts.append(self.shapes.layer(self.model.frames(faces)).float())
        target = (torch.from_numpy(self.clips.shapes[numbers]).to(device) - self.shapes.mean) / self.shapes.scale
        rest = (torch.cat(parts) - target).square().mean(0) / target.var(0).clamp_min(1e-4)
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
        temperature: of the exported classifier; training and validation use none.
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
        self.model = EmotionClassifier()
        self.model.template.copy_(template)
        self.model.freeze_norm = True
        self.shapes = _Shapes()
        self.module = nn.ModuleDict({"classifier": self.model, "shapes": self.shapes})
        own = nn.ModuleDict({"backbone": self.model.backbone, "shapes": self.shapes})
        own.load_state_dict({**own.state_dict(), **start})
        self.frozen = list(self.model.backbone)[:_FROZEN]
        for block in self.frozen:
            block.requires_grad_(False)
        draws = BalancedDraw(clips.data, train)
        self.items = ClipItems(clips, draws, config.loop.seed)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        frozen = {id(p) for block in self.frozen for p in block.parameters()}
        return {"classifier": [p for p in self.module.parameters() if id(p) not in frozen]}

    def dataset(self, split: str) -> ClipItems:
        return self.items

    def loss(self, group: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
        faces = batch["faces"]
        features = self.model.frames(faces.flatten(0, 1))
        logits = self.model.classify(features.reshape(*faces.shape[:2], -1)).float()
        entropy = nn.functional.cross_entropy(logits, batch["label"], label_smoothing=_SMOOTHING)
        shapes = self.shapes.loss(features, batch["shapes"].flatten(0, 1))
        size = 0.5 * _L2 * self.model.head.weight.square().sum()
        logs: dict[str, float | Tensor] = {
            "cross_entropy": entropy.detach(),
            "shapes": shapes.detach(),
            "accuracy": (logits.argmax(1) == batch["label"]).float().mean(),
        }
        return entropy + _SHAPES * shapes + size, logs

    @torch.no_grad()
    def logits(self, numbers: Sequence[int] | Ints) -> Floats:
        """Logits (k, 8) of clips, from all their faces, in evaluation mode."""
        self.module.eval()
        device = self.model.mean.device
        found = []
        for number in numbers:
            faces = torch.stack([centre_crop(self.clips.faces.face(int(n))) for n in self.clips.numbers[number]])
            found.append(self.model(faces[None].to(device))[0].float().cpu().numpy())
        return np.stack(found)

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Cross-entropy and accuracies over the measured clips of held-out people."""
        measured = self.held[self.clips.data.measured[self.held]]
        if not len(measured):
            return {}
        logits = np.zeros((len(self.clips.data.labels), len(CLASSES)), np.float32)
        logits[measured] = self.logits(measured)
        truth = torch.from_numpy(self.clips.data.labels[measured])
        accuracy = self.clips.data.score(logits, measured)
        nll = nn.functional.cross_entropy(torch.from_numpy(logits[measured]), truth)
        return {"nll": float(nll), "accuracy": accuracy.accuracy, "balanced": accuracy.balanced}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {**self.model.state_dict(), "temperature": torch.tensor(self.temperature)}, {}


def _fit_once(stage: Stage, loop: LoopConfig, folder: Path, resume: bool) -> dict[str, Tensor]:
    """Train in a folder, unless a resumed run finds it done there; returns the exported weights."""
    if not (resume and (folder / "done").is_file()):
        fit(stage, loop, folder, resume)
        (folder / "done").touch()
    state = load_file(folder / "weights.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def cross_validate(
    make: Callable[[Ints, Ints], EmotionStage], data: Labelled, loop: LoopConfig, out: Path, folds: int, resume: bool
) -> Floats:
    """Logits (n, 8) of all measured clips by stages that have not seen their people; zeros of the others.

    ``make`` gives a new stage for the numbers of the clips to train on and of those held out; fold k is trained in
    ``out/fold-k``.
    """
    logits = np.zeros((len(data.labels), len(CLASSES)), np.float32)
    for number, (train, held) in enumerate(grouped_folds(data, folds)):
        stage = make(train, held)
        stage.model.load_state_dict(_fit_once(stage, loop, out / f"fold-{number}", resume))
        keep = held[data.measured[held]]
        if len(keep):
            logits[keep] = stage.logits(keep)
            part = data.score(logits, keep).accuracy
            logger.info("fold %d of %d: %d clips, accuracy %.3f", number + 1, folds, len(keep), part)
    return logits


def fit_temperature(data: Labelled, logits: Floats) -> float:
    """The divisor of the logits, in 1/8 to 8, that maximises the balanced likelihood of the measured clips.

    Guo et al., On calibration of modern neural networks, 2017.

    Raises:
        UserError: if the logits are not finite.
    """
    from scipy.optimize import minimize_scalar

    values, truth = torch.from_numpy(logits[data.measured]), torch.from_numpy(data.labels[data.measured])
    if not torch.isfinite(values).all():
        raise UserError("the logits of the folds are not finite; lower loop.lr")
    weight = 1 / torch.bincount(truth, minlength=len(CLASSES)).clamp_min(1)

    def loss(power: float) -> float:
        return float(nn.functional.cross_entropy(values / 2**power, truth, weight=weight))

    return math.pow(2, float(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def run(config: Config, out: Path, resume: bool = False) -> dict[str, float]:
    """Both steps, with cross-validation if asked for; everything goes into ``out``."""
    from flowvqtalker.loading import load_face_model

    face = FaceModel.load(config.face_model) if config.face_model is not None else load_face_model()
    template = face_template(face)
    clips = load_faces(config.shard)
    imagenet = torch.load(find_weights("mobilenet", config.imagenet), map_location="cpu", weights_only=True)
    start = _fit_once(ExpressionStage(config, clips, imagenet), config.pretrain, out / "expression", resume)
    results: dict[str, float] = {}
    temperature = 1.0
    if config.folds:

        def make(train: Ints, held: Ints) -> EmotionStage:
            return EmotionStage(config, clips, train, held, start, template)

        logits = cross_validate(make, clips.data, config.loop, out, config.folds, resume)
        temperature = fit_temperature(clips.data, logits)
        accuracy = clips.data.score(logits, np.arange(len(logits)))
        write_report(out, "Emotion of talking faces", accuracy, temperature=temperature)
        logger.info("%s", accuracy.text())
        results.update(pooled=accuracy.accuracy, pooled_balanced=accuracy.balanced)
    split = np.array([split_of(who) for who in clips.data.identities])
    train, held = (np.flatnonzero(split == name) for name in ("train", "val"))
    stage = EmotionStage(config, clips, train, held, start, template, temperature)
    results.update(fit(stage, config.loop, out, resume))
    return results
