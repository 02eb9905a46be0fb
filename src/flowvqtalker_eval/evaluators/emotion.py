"""Our own classifier of the emotion of a talking face: the two attentions of Emotion-FAN on a small backbone.

It differs from :mod:`flowvqtalker_eval.metrics.emotion_fan` in its backbone (MobileNetV2, 1.8 million weights, instead
of ResNet-18), its faces (112 pixels, aligned by points over bone, so that a smile does not move the crop) and its data
(very few labelled clips). Its accuracy is reported under its own name, never in Emotion-FAN's column.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import SIZE, align_faces
from flowvqtalker.face.topology import RIGID
from flowvqtalker.render.perceptual import MobileNetV2Features
from flowvqtalker_eval.metrics.accuracy import CLASSES
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, FrameExtractor, Settings
from flowvqtalker_eval.metrics.emotion_fan import clip_vector, related

__all__ = ["FEATURES", "EmotionClassifier", "EmotionExtractor", "EmotionScores", "load_emotion"]

#: Channels of the backbone's features.
FEATURES = 320


class EmotionClassifier(nn.Module):
    """Faces (B, T, 3, 112, 112) RGB in [0, 1] -> logits (B, 8) in the order of CLASSES.

    Attributes:
        template: (46, 2) where the points over bone lie in a crop.
        temperature: scalar that divides the logits, so that probabilities of unseen people are calibrated.
        freeze_norm: keep the statistics of the batch norms in training too.
    """

    mean: Tensor
    std: Tensor
    template: Tensor
    temperature: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.freeze_norm = False
        self.backbone = cast(nn.Sequential, MobileNetV2Features().features)
        self.alpha = nn.Linear(FEATURES, 1)
        self.beta = nn.Linear(2 * FEATURES, 1)
        self.head = nn.Linear(2 * FEATURES, len(CLASSES))
        self.dropout, self.dropout2 = nn.Dropout(0.5), nn.Dropout(0.6)  # as in Emotion-FAN
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.register_buffer("template", torch.zeros(len(RIGID), 2))
        self.register_buffer("temperature", torch.ones(()))

    def train(self, mode: bool = True) -> EmotionClassifier:
        """Set the mode, except of frozen batch norms."""
        super().train(mode)
        if self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def frames(self, faces: Tensor) -> Tensor:
        """Features (N, 320) of faces (N, 3, 112, 112)."""
        if faces.ndim != 4 or faces.shape[1:] != (3, SIZE, SIZE):
            raise UserError(f"faces of shape (N, 3, {SIZE}, {SIZE}) are needed, got {tuple(faces.shape)}")
        features: Tensor = self.backbone((faces - self.mean) / self.std)
        return features.mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, 8) of features (B, T, 320)."""
        alpha = self.alpha(self.dropout(features))[..., 0].sigmoid()
        clip = clip_vector(features, alpha)
        pairs = torch.cat([features, clip[:, None].expand_as(features)], dim=2)
        beta = self.beta(self.dropout(pairs))[..., 0].sigmoid()
        logits: Tensor = self.head(self.dropout2(related(features, clip, alpha, beta)))
        return logits / self.temperature

    def forward(self, faces: Tensor) -> Tensor:
        """Logits (B, 8)."""
        features = self.frames(faces.flatten(0, 1))
        return self.classify(features.reshape(*faces.shape[:2], -1))


def load_emotion(path: str | Path | None = None) -> EmotionClassifier:
    """The trained classifier (``emotion.safetensors``) of a folder of weights (None: the package's own).

    Raises:
        UserError: if it is missing or does not fit.
    """
    tensors, _ = weights.load("emotion", path)
    model = EmotionClassifier()
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    weights.restore(model, {**counters, **tensors}, "emotion", path)
    return model.eval()


class _Lazy:
    """Reads the classifier when it is first needed; leaves it out when the object is pickled for another process.

    Arguments:
        folder: folder of weights; None is the package's own.
        device: where it runs.
    """

    def __init__(self, folder: str | Path | None = None, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._model: EmotionClassifier | None = None

    def settings(self) -> Settings:
        """The weights and the crop."""
        entry = weights.manifest(self._folder).get("emotion.safetensors")
        return {"weights": entry.sha256[:16] if entry else "missing", "faces": f"{SIZE} px, aligned by bone points"}

    @property
    def model(self) -> EmotionClassifier:
        """The classifier."""
        if self._model is None:
            self._model = load_emotion(self._folder).to(self._device)
        return self._model


class EmotionExtractor(_Lazy, FrameExtractor):
    """``emotion_features`` (T, 320) of each frame; NaN where there is no face."""

    name = "emotion_frames"
    needs: tuple[str, ...] = ("mesh",)
    gives = ("emotion_features",)

    def __call__(self, frames: npt.NDArray[np.uint8], known: dict[str, Array]) -> dict[str, Array]:
        """Features of frames (n, H, W, 3)."""
        features = np.full((len(frames), FEATURES), np.nan, np.float32)
        seen = np.flatnonzero(np.isfinite(known["mesh"]).all((1, 2)))
        if len(seen):
            faces = align_faces(frames[seen], known["mesh"][seen], self.model.template.cpu().numpy())
            with torch.inference_mode():
                x = torch.from_numpy(faces).to(self._device).permute(0, 3, 1, 2).float() / 255
                features[seen] = self.model.frames(x).cpu().numpy()
        return {"emotion_features": features}


class EmotionScores(_Lazy, ClipExtractor):
    """``emotion`` (8,): the clip's probabilities in the order of CLASSES; NaN where there is no face."""

    name = "emotion"
    needs: tuple[str, ...] = ("emotion_features",)
    gives = ("emotion",)

    def __call__(self, known: dict[str, Array], wave: npt.NDArray[np.float32] | None) -> dict[str, Array]:
        """Probabilities of a whole clip."""
        features = known["emotion_features"]
        features = features[np.isfinite(features).all(1)]
        if not len(features):
            return {"emotion": np.full(len(CLASSES), np.nan, np.float32)}
        with torch.inference_mode():
            logits = self.model.classify(torch.from_numpy(features.astype(np.float32))[None].to(self._device))
            return {"emotion": logits.softmax(1)[0].cpu().numpy()}
