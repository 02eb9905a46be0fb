"""Acc_emo by Emotion-FAN with its published weights (Meng et al., "Frame attention networks for facial expression
recognition in videos", 2019).

Network and names are those of ``yuangan/evaluation_eat`` (``code/emotionfan_basiccode/networks.py``), whose checkpoint,
fine-tuned on MEAD, stands behind the column Acc_emo of EAT and the papers after it: a ResNet-18, a weight α for each
frame, a weight β for each frame and its relation to the clip, eight classes.

That repository evaluates otherwise than it trains: it divides Σ α [f; v] by Σ α β, without β in the numerator, as the
definition has it. The network here does the same, for numbers beside published ones.

**Never run here on the published weights**, which could not be had. Tests check network and attentions on made-up
weights and against plain computations. Faces are dlib's chips by its five-point alignment; size 224 and padding 0.25
are what the sources suggest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from flowvqtalker.face.alignment import similarity, warp
from flowvqtalker_eval.metrics.accuracy import CLASSES
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, FrameExtractor, Frames, Settings, Wave
from flowvqtalker_eval.metrics.published import PublishedWeights

__all__ = [
    "WEIGHTS",
    "EmotionFan",
    "EmotionFanExtractor",
    "EmotionFanScores",
    "face_chips",
    "load_emotion_fan",
    "to_project_order",
]

#: The authors publish no hash; the one found is printed with every number.
WEIGHTS = PublishedWeights(
    "Emotion-FAN weights",
    "FLOWVQTALKER_EMOTION_FAN",
    "the checkpoint fine-tuned on MEAD that github.com/yuangan/evaluation_eat links to",
)
SIZE = 224

#: The published order of the classes, by this project's names.
ORDER = ("happy", "angry", "disgusted", "fear", "sad", "neutral", "surprised", "contempt")

# dlib's mean places of five landmarks in a chip without padding (image_transforms/interpolation.h): outer and inner
# corner of the eye at the right of the image, of the one at the left, and the base of the nose.
_CHIP = np.array(
    [
        (0.8595674595992, 0.2134981538014),
        (0.6460604764104, 0.2289674387677),
        (0.1205750620789, 0.2137274526848),
        (0.3340850613712, 0.2290642403242),
        (0.4901123135679, 0.6277975316475),
    ]
)
_CHIP_POINTS = (45, 42, 36, 39, 33)  # the same of the 68
_PADDING = 0.25


def to_project_order(scores: Tensor) -> Tensor:
    """Scores (..., 8) in the published order of classes, reordered as ``accuracy.CLASSES``."""
    return scores[..., [ORDER.index(name) for name in CLASSES]]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        if inp != out:
            self.downsample = nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class EmotionFan(nn.Module):
    """Faces (B, T, 3, 224, 224) RGB in [0, 1] -> logits (B, 8) in the published order :data:`ORDER`.

    Weights have the names of the published file. ``pred_fc1``, which classifies v alone, is in the file and not used
    here. Without dropout: for evaluation only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            inp, out, stride = widths[i - 1], widths[i], 1 if i == 1 else 2
            setattr(self, f"layer{i}", nn.Sequential(_Block(inp, out, stride), _Block(out, out, 1)))
        self.alpha = nn.Sequential(nn.Linear(512, 1), nn.Sigmoid())
        self.beta = nn.Sequential(nn.Linear(1024, 1), nn.Sigmoid())
        self.pred_fc1 = nn.Linear(512, len(ORDER))
        self.pred_fc2 = nn.Linear(1024, len(ORDER))

    def frames(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 512) and α (N,) of faces (N, 3, 224, 224)."""
        if faces.ndim != 4 or faces.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"faces of shape (N, 3, {SIZE}, {SIZE}) are needed, got {tuple(faces.shape)}")
        x = torch.relu(self.bn1(self.conv1(faces)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        features = x.mean((2, 3))
        return features, self.alpha(features)[:, 0]

    def classify(self, features: Tensor, alpha: Tensor) -> Tensor:
        """Logits (B, 8) of features (B, T, 512) and α (B, T)."""
        clip = (features * alpha[..., None]).sum(1) / alpha.sum(1, keepdim=True).clamp_min(1e-12)
        pairs = torch.cat([features, clip[:, None].expand_as(features)], dim=2)
        weight = alpha * self.beta(pairs)[..., 0]
        related = (pairs * alpha[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-12)
        logits: Tensor = self.pred_fc2(related)
        return logits

    def forward(self, faces: Tensor) -> Tensor:
        features, alpha = self.frames(faces.flatten(0, 1))
        shape = faces.shape[:2]
        return self.classify(features.reshape(*shape, -1), alpha.reshape(shape))


def load_emotion_fan(path: str | Path) -> EmotionFan:
    """The network with the weights of a published checkpoint.

    Raises:
        UserError: if the file holds something else.
    """
    model = EmotionFan()
    WEIGHTS.load(model, path, unused=("fc.",))  # the classifier left over from pre-training on FER+
    return model


def face_chips(frames: Frames, landmarks: Array) -> Frames:
    """dlib's face chips (T, 224, 224, 3), zeros where there is no face.

    Arguments:
        frames: (T, H, W, 3) uint8 RGB.
        landmarks: (T, 68, 2) in pixels, NaN where there is no face.
    """
    places = (_CHIP + _PADDING) / (1 + 2 * _PADDING) * SIZE
    matrices = similarity(landmarks[:, _CHIP_POINTS], places)
    return np.stack([warp(frame, matrix, SIZE) for frame, matrix in zip(frames, matrices, strict=True)])


class EmotionFanExtractor(FrameExtractor):
    """``emotion_fan_features`` (T, 512) and ``emotion_fan_alpha`` (T,) of each frame; NaN where there is no face.

    Arguments:
        checkpoint: the published weights; None looks in their usual place.
        device: where it runs.

    Raises:
        MissingDependency: if there is no checkpoint.
    """

    name = "emotion_fan_frames"
    needs = ("landmarks68",)
    gives = ("emotion_fan_features", "emotion_fan_alpha")

    def __init__(self, checkpoint: str | Path | None = None, device: str = "cpu") -> None:
        (self._path, self._sha256), self._device = WEIGHTS.find(checkpoint), device

    def settings(self) -> Settings:
        return {"weights": self._sha256, "crop": f"dlib chip {SIZE}, padding {_PADDING}"}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        if self._model is None:
            self._model = load_emotion_fan(self._path).to(self._device)
        features = np.full((len(frames), 512), np.nan, np.float32)
        alpha = np.full(len(frames), np.nan, np.float32)
        seen = np.isfinite(known["landmarks68"]).all((1, 2))
        if seen.any():
            chips = face_chips(frames[seen], known["landmarks68"][seen])
            faces = torch.from_numpy(chips).to(self._device).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                found = self._model.frames(faces)
            features[seen], alpha[seen] = (part.cpu().numpy() for part in found)
        return {"emotion_fan_features": features, "emotion_fan_alpha": alpha}


class EmotionFanScores(ClipExtractor):
    """``emotion_fan`` (8,): the clip's probabilities in the project's order; NaN where there is no face.

    Arguments:
        checkpoint: see :class:`EmotionFanExtractor`.
    """

    name = "emotion_fan"
    needs = ("emotion_fan_features", "emotion_fan_alpha")
    gives = ("emotion_fan",)

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._path, self._sha256 = WEIGHTS.find(checkpoint)

    def settings(self) -> Settings:
        return {"weights": self._sha256, "protocol": "eat"}

    def __call__(self, known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        if self._model is None:
            self._model = load_emotion_fan(self._path)
        seen = np.isfinite(known["emotion_fan_alpha"])
        if not seen.any():
            return {"emotion_fan": np.full(len(CLASSES), np.nan, np.float32)}
        features, alpha = (torch.from_numpy(known[name][seen])[None] for name in self.needs)
        with torch.inference_mode():
            logits = self._model.classify(features, alpha)
            return {"emotion_fan": to_project_order(logits.softmax(1))[0].numpy()}
