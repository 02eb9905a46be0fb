"""Emotion-FAN (Meng et al., "Frame attention networks for facial expression recognition in videos", 2019): Acc_emo with
the published weights.

The network and its names are those of ``yuangan/evaluation_eat`` (``code/emotionfan_basiccode/networks.py``), whose
checkpoint, fine-tuned on MEAD, is the one behind the column Acc_emo of the papers that follow EAT: a ResNet-18, one
weight α for each frame, one weight β for each frame and its relation to the clip, eight classes.

That repository's evaluation differs from its training in one point: it divides Σ α [f; v] by Σ α β, without β in the
numerator. ``protocol="eat"`` does the same, for numbers beside published ones; ``"paper"`` is the definition.

**Not run here on the published weights**: they could not be had. The network, the loader and the attentions are tested
on made-up weights and against slow, plain versions. The faces are dlib's chips as its five-point alignment defines
them; size 224 and padding 0.25 are what the sources suggest, not verified on their files.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker import weights as bundled
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.alignment import similarity, warp
from flowvqtalker_eval.metrics.accuracy import CLASSES
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, FrameExtractor, Settings

__all__ = [
    "ORDER",
    "EmotionFan",
    "EmotionFanExtractor",
    "EmotionFanScores",
    "clip_vector",
    "face_chips",
    "find_emotion_fan",
    "load_emotion_fan",
    "related",
    "to_project_order",
]

VARIABLE = "FLOWVQTALKER_EMOTION_FAN"
SIZE = 224

#: The published order of the classes, by this project's names.
ORDER = ("happy", "angry", "disgusted", "fear", "sad", "neutral", "surprised", "contempt")

Protocol = Literal["paper", "eat"]

# dlib's mean places of five landmarks in a chip without padding (image_transforms/interpolation.h): outer and inner
# corner of the eye at the right of the picture, of the one at the left, and the base of the nose.
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


def clip_vector(features: Tensor, alpha: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-attention: v = Σ α f / Σ α.

    Arguments:
        features: (B, T, D) f.
        alpha: (B, T) in (0, 1).
        mask: (B, T), true where a frame counts.
    """
    weight = alpha if mask is None else alpha * mask.to(alpha)
    total = (features * weight[..., None]).sum(1)
    return total / weight.sum(1, keepdim=True).clamp_min(1e-12)


def related(
    features: Tensor,
    clip: Tensor,
    alpha: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    protocol: Protocol = "paper",
) -> Tensor:
    """Relation attention: Σ α β [f; v] / Σ α β, (B, 2 D).

    Arguments:
        features: (B, T, D) f.
        clip: (B, D) v of :func:`clip_vector`.
        alpha, beta: (B, T) in (0, 1).
        mask: (B, T), true where a frame counts.
        protocol: ``eat`` leaves β out of the numerator, see the module.
    """
    pairs = torch.cat([features, clip[:, None].expand_as(features)], dim=2)
    weight = alpha * beta
    above = weight if protocol == "paper" else alpha
    if mask is not None:
        weight, above = weight * mask.to(weight), above * mask.to(above)
    return (pairs * above[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1e-12)


def to_project_order(scores: Tensor) -> Tensor:
    """Scores (..., 8) in the published order of classes, in that of :data:`flowvqtalker_eval.metrics.accuracy.CLASSES`."""
    return scores[..., [ORDER.index(name) for name in CLASSES]]


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or inp != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        short = x if self.downsample is None else self.downsample(x)
        return torch.relu(y + short)


class EmotionFan(nn.Module):
    """Faces (B, T, 3, 224, 224) RGB in [0, 1] -> logits (B, 8) in the published order :data:`ORDER`.

    The names of the weights are those of the published file. ``pred_fc1`` classifies v alone; it is in the file and not
    used with both attentions.

    Arguments:
        protocol: of the relation attention, see the module.
    """

    def __init__(self, protocol: Protocol = "eat") -> None:
        super().__init__()
        self.protocol: Protocol = protocol
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
        self.dropout, self.dropout2 = nn.Dropout(0.5), nn.Dropout(0.6)

    def frames(self, faces: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, 512) and α (N,) of faces (N, 3, 224, 224)."""
        if faces.ndim != 4 or faces.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"faces of shape (N, 3, {SIZE}, {SIZE}) are needed, got {tuple(faces.shape)}")
        x = torch.relu(self.bn1(self.conv1(faces)))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        features = x.mean((2, 3))
        return features, self.alpha(self.dropout(features))[:, 0]

    def classify(self, features: Tensor, alpha: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, 8) of features (B, T, 512) and α (B, T)."""
        clip = clip_vector(features, alpha, mask)
        pairs = torch.cat([features, clip[:, None].expand_as(features)], dim=2)
        beta = self.beta(self.dropout(pairs))[..., 0]
        # The protocol is one of evaluation; the network was trained by the definition.
        protocol: Protocol = "paper" if self.training else self.protocol
        logits: Tensor = self.pred_fc2(self.dropout2(related(features, clip, alpha, beta, mask, protocol)))
        return logits

    def forward(self, faces: Tensor, mask: Tensor | None = None) -> Tensor:
        features, alpha = self.frames(faces.flatten(0, 1))
        shape = faces.shape[:2]
        return self.classify(features.reshape(*shape, -1), alpha.reshape(shape), mask)


def find_emotion_fan(path: str | Path | None = None, sha256: str | None = None) -> tuple[Path, str]:
    """The checkpoint at ``path`` or at the path in FLOWVQTALKER_EMOTION_FAN, and its sha256.

    The authors publish no hash; the one found is printed with every number.

    Raises:
        MissingDependency: if none was named, it is not there, or its hash is not the one asked for.
    """
    given = path or os.environ.get(VARIABLE)
    if not given:
        raise MissingDependency(
            "no Emotion-FAN checkpoint was named; give the one fine-tuned on MEAD that yuangan/evaluation_eat links to "
            f"(or its path in {VARIABLE})"
        )
    if not Path(given).is_file():
        raise MissingDependency(
            f"Emotion-FAN checkpoint not found at {given}; download it as yuangan/evaluation_eat says"
        )
    digest = bundled.sha256(given)
    if sha256 is not None and digest != sha256:
        raise MissingDependency(f"Emotion-FAN checkpoint {given} has sha256 {digest}, not {sha256}; download it again")
    return Path(given), digest


def load_emotion_fan(path: str | Path, protocol: Protocol = "eat") -> EmotionFan:
    """The network with the weights of a published checkpoint: a state dict, by itself or under ``state_dict``, whose
    names may begin with ``module.``.

    Raises:
        UserError: if the file holds something else; says what does not fit.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"Emotion-FAN checkpoint not found at {path}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"Emotion-FAN checkpoint {path} cannot be read ({reason[0] if reason else 'empty'}); download it again"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"Emotion-FAN checkpoint {path} holds no state dict; give the file fine-tuned on MEAD")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key not in ("fc.weight", "fc.bias")}  # left of FER+
    model = EmotionFan(protocol)
    own = model.state_dict()
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    problems = [f"{key} is missing" for key in needed if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in needed
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if problems[3:] else ""
        raise UserError(
            f"Emotion-FAN checkpoint {path} does not fit: {'; '.join(problems[:3])}{more}; "
            "a checkpoint of eight classes with both attentions is needed"
        )
    model.load_state_dict({**own, **state})
    return model.eval()


def face_chips(frames: npt.NDArray[np.uint8], landmarks: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
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
        checkpoint: the published weights; None: see :func:`find_emotion_fan`.
        device: where it runs.
        batch: faces at a time.

    Raises:
        MissingDependency: if there is no checkpoint.
    """

    name = "emotion_fan_frames"
    needs: tuple[str, ...] = ("landmarks68",)
    gives = ("emotion_fan_features", "emotion_fan_alpha")

    def __init__(self, checkpoint: str | Path | None = None, device: str = "cpu", batch: int = 16) -> None:
        self._path, self._sha256 = find_emotion_fan(checkpoint)
        self._device, self._batch = device, batch
        self._model: EmotionFan | None = None

    def settings(self) -> Settings:
        """The weights and the crop."""
        return {"weights": self._sha256, "crop": f"dlib chip {SIZE}, padding {_PADDING}"}

    def __call__(self, frames: npt.NDArray[np.uint8], known: dict[str, Array]) -> dict[str, Array]:
        """Of frames (n, H, W, 3)."""
        if self._model is None:
            self._model = load_emotion_fan(self._path).to(self._device)
        features = np.full((len(frames), 512), np.nan, np.float32)
        alpha = np.full(len(frames), np.nan, np.float32)
        seen = np.flatnonzero(np.isfinite(known["landmarks68"]).all((1, 2)))
        for start in range(0, len(seen), self._batch):
            chosen = seen[start : start + self._batch]
            chips = face_chips(frames[chosen], known["landmarks68"][chosen])
            faces = torch.from_numpy(chips).to(self._device).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                found = self._model.frames(faces)
            features[chosen], alpha[chosen] = (part.cpu().numpy() for part in found)
        return {"emotion_fan_features": features, "emotion_fan_alpha": alpha}


class EmotionFanScores(ClipExtractor):
    """``emotion_fan`` (8,): the clip's probabilities in the project's order; NaN where there is no face.

    Arguments:
        checkpoint: see :class:`EmotionFanExtractor`.
        protocol: see the module.
    """

    name = "emotion_fan"
    needs: tuple[str, ...] = ("emotion_fan_features", "emotion_fan_alpha")
    gives = ("emotion_fan",)

    def __init__(self, checkpoint: str | Path | None = None, protocol: Protocol = "eat") -> None:
        self._path, self._sha256 = find_emotion_fan(checkpoint)
        self._protocol: Protocol = protocol
        self._model: EmotionFan | None = None

    def settings(self) -> Settings:
        """The weights and the protocol."""
        return {"weights": self._sha256, "protocol": self._protocol}

    def __call__(self, known: dict[str, Array], wave: npt.NDArray[np.float32] | None) -> dict[str, Array]:
        """Of a whole clip."""
        if self._model is None:
            self._model = load_emotion_fan(self._path, self._protocol)
        alpha = known["emotion_fan_alpha"]
        seen = np.isfinite(alpha)
        if not seen.any():
            return {"emotion_fan": np.full(len(CLASSES), np.nan, np.float32)}
        with torch.inference_mode():
            features = torch.from_numpy(np.asarray(known["emotion_fan_features"], np.float32)[seen])[None]
            logits = self._model.classify(features, torch.from_numpy(np.asarray(alpha, np.float32)[seen])[None])
            return {"emotion_fan": to_project_order(logits.softmax(1))[0].numpy()}
