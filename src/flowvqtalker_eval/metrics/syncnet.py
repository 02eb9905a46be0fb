"""LSE-C, LSE-D and offset by SyncNet with its published weights (Chung and Zisserman, "Out of time", 2016).

Network and names are those of ``joonson/syncnet_python`` (``SyncNetModel.py``), the steps those of its
``SyncNetInstance.py``: 25 fps, 16 kHz, 13 MFCC every 10 ms, windows of 5 frames and 20 columns,
``min(frames, samples // 640) - 5`` windows, images 224x224 BGR in 0..255, shifts of up to 15 frames.

MFCC and faces come from :mod:`flowvqtalker_eval.metrics.syncnet_input`. The crop (``eat`` or ``native``) changes the
values, so each number is printed with it.

**Never run here on the published weights**, which could not be had. Tests check the network, the front end and the
crops on made-up weights and against plain computations.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.analysis import Array, Frames, Settings, StreamExtractor, Wave
from flowvqtalker_eval.metrics.published import PublishedWeights
from flowvqtalker_eval.metrics.sync import REACH, distance_curve
from flowvqtalker_eval.metrics.syncnet_input import Crop, face_crops, mfcc

__all__ = ["WEIGHTS", "SyncNetExtractor", "SyncNetModel", "embed", "load_syncnet"]

#: The hash is that of ``syncnet_v2.model`` as several public projects that checked it state.
WEIGHTS = PublishedWeights(
    "SyncNet weights",
    "FLOWVQTALKER_SYNCNET",
    "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model (52 MB)",
    "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
    "syncnet_v2.model",
)

_SPAN, _COLUMNS, _SAMPLES = 5, 4, 640
_BATCH = 20

Floats = npt.NDArray[np.floating[Any]]


def _layers(dimensions: int, *specs: tuple[Any, ...]) -> nn.Sequential:
    """Convolution, norm and ReLU for (in, out, kernel, stride, padding), pooling for (kernel, stride, ...)."""
    conv, norm, pool = (getattr(nn, f"{kind}{dimensions}d") for kind in ("Conv", "BatchNorm", "MaxPool"))
    layers: list[nn.Module] = []
    for spec in specs:
        if len(spec) == 5:
            layers += [conv(*spec), norm(spec[1]), nn.ReLU(inplace=True)]
        else:
            layers.append(pool(*spec))
    return nn.Sequential(*layers)


def _head(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, dim))


class SyncNetModel(nn.Module):
    """The two towers; weights have the names of the published file."""

    def __init__(self, dim: int = 1024) -> None:
        super().__init__()
        self.netcnnaud = _layers(
            2,
            (1, 64, 3, 1, 1),
            (1, 1),
            (64, 192, 3, 1, 1),
            (3, (1, 2)),
            (192, 384, 3, 1, 1),
            (384, 256, 3, 1, 1),
            (256, 256, 3, 1, 1),
            (3, 2),
            (256, 512, (5, 4), 1, 0),
        )
        self.netfcaud = _head(dim)
        self.netfclip = _head(dim)
        self.netcnnlip = _layers(
            3,
            (3, 96, (5, 7, 7), (1, 2, 2), 0),
            ((1, 3, 3), (1, 2, 2)),
            (96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)),
            ((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            (256, 256, (1, 3, 3), 1, (0, 1, 1)),
            (256, 256, (1, 3, 3), 1, (0, 1, 1)),
            (256, 256, (1, 3, 3), 1, (0, 1, 1)),
            ((1, 3, 3), (1, 2, 2)),
            (256, 512, (1, 6, 6), 1, 0),
        )

    def audio(self, cepstra: Tensor) -> Tensor:
        """Embeddings (n, dim) of windows (n, 1, 13, 20)."""
        embedding: Tensor = self.netfcaud(self.netcnnaud(cepstra).flatten(1))
        return embedding

    def video(self, images: Tensor) -> Tensor:
        """Embeddings (n, dim) of windows (n, 3, 5, 224, 224), BGR in 0..255."""
        embedding: Tensor = self.netfclip(self.netcnnlip(images).flatten(1))
        return embedding


def load_syncnet(path: str | Path) -> SyncNetModel:
    """The network with the weights of a file.

    Raises:
        UserError: if the file holds something else.
    """
    model = SyncNetModel()
    WEIGHTS.load(model, path)
    return model


@torch.inference_mode()
def embed(
    model: SyncNetModel, faces: Iterable[Frames], wave: Floats, device: str | torch.device = "cpu"
) -> tuple[Floats, Floats]:
    """Embeddings (n, 1024) of a clip's faces and of its sound, n = min(T, S // 640) - 5.

    Arguments:
        model: on the device.
        faces: T of (224, 224, 3) uint8 RGB, read one after the other.
        wave: (S,) in [-1, 1] at 16 kHz, sample 640 t at frame t.
        device: where the model is.

    Raises:
        UserError: if the clip has fewer than six frames with sound.
    """

    def lips(windows: list[Tensor]) -> Tensor:
        return model.video(torch.stack(windows).to(device, torch.float32)).cpu()

    limit = len(wave) // _SAMPLES
    window: deque[Tensor] = deque(maxlen=_SPAN)
    waiting: list[Tensor] = []
    video: list[Tensor] = []
    count = 0
    for face in faces:
        count += 1
        if count >= limit:  # one window less than would fit, as in SyncNetInstance.py
            continue
        window.append(torch.from_numpy(np.ascontiguousarray(face[..., ::-1].transpose(2, 0, 1))))
        if len(window) == _SPAN:
            waiting.append(torch.stack(list(window), dim=1))
        if len(waiting) == _BATCH:
            video.append(lips(waiting))
            waiting = []
    if waiting:
        video.append(lips(waiting))
    windows = min(count, limit) - _SPAN
    if windows < 1:
        raise UserError(f"SyncNet needs more than {_SPAN} frames with sound, this clip has {min(count, limit)}")
    cepstra = torch.from_numpy(mfcc(np.round(np.asarray(wave, np.float64) * 32768)).T.astype(np.float32))
    parts = cepstra.unfold(1, _SPAN * _COLUMNS, _COLUMNS).transpose(0, 1)[:windows, None]
    audio = [model.audio(part.to(device)).cpu() for part in torch.split(parts, _BATCH)]
    return torch.cat(video)[:windows].numpy(), torch.cat(audio).numpy()


class SyncNetExtractor(StreamExtractor):
    """``syncnet_curve`` (31,): mean distance of lips and sound for each shift; empty where nothing can be compared.

    Arguments:
        weights: ``syncnet_v2.model``; None looks in the usual places.
        crop: see :mod:`flowvqtalker_eval.metrics.syncnet_input`.
        device: where it runs.

    Raises:
        MissingDependency: if the weights are nowhere.
    """

    name = "syncnet"
    needs = ("landmarks68",)
    gives = ("syncnet_curve",)

    def __init__(self, weights: str | Path | None = None, crop: Crop = "eat", device: str = "cpu") -> None:
        self._path, self._sha256 = WEIGHTS.find(weights)
        self._crop: Crop = crop
        self._device = device

    def settings(self) -> Settings:
        return {"weights": self._sha256[:16], "crop": self._crop, "reach": REACH}

    def __call__(self, frames: Iterable[Frames], known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        landmarks = known["landmarks68"]
        if wave is None or not np.isfinite(landmarks).all((1, 2)).any():
            return {"syncnet_curve": np.zeros(0)}
        if self._model is None:
            self._model = load_syncnet(self._path).to(self._device)
        try:
            video, audio = embed(self._model, face_crops(frames, landmarks, self._crop), wave, self._device)
        except UserError:  # too short
            return {"syncnet_curve": np.zeros(0)}
        return {"syncnet_curve": distance_curve(video, audio)}
