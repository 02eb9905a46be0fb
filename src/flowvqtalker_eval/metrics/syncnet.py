"""SyncNet (Chung and Zisserman, "Out of time", 2016): LSE-C, LSE-D and offset with the published weights.

The network and its names are those of ``joonson/syncnet_python`` (``SyncNetModel.py``), the steps those of its
``SyncNetInstance.py``, facts of the protocol: 25 fps, 16 kHz, 13 MFCC every 10 ms, windows of 5 frames and 20 columns,
``min(frames, samples // 640) - 5`` windows, pictures 224x224 BGR in 0..255, shifts of up to 15 frames.

Sound and faces come from :mod:`flowvqtalker_eval.metrics.syncnet_input`; the crop (``eat`` or ``native``) changes the
values, so each number is printed with it.

**Not run here on the published weights**: they could not be had. The network, the loader, the front end and the crops
are tested on made-up weights and against slow, plain versions.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker import weights as bundled
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.sync import REACH, SyncScore, sync_score
from flowvqtalker_eval.metrics.syncnet_input import Crop, face_crops, mfcc

__all__ = ["SHA256", "URL", "SyncNet", "SyncNetModel", "download_syncnet", "find_syncnet", "load_model"]

URL = "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model"
#: Of ``syncnet_v2.model``, as several public projects that checked it state.
SHA256 = "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442"
VARIABLE = "FLOWVQTALKER_SYNCNET"

_SPAN, _COLUMNS, _SAMPLES = 5, 4, 640

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]


def _layers2(*specs: tuple[Any, ...]) -> nn.Sequential:
    return _layers(nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, specs)


def _layers3(*specs: tuple[Any, ...]) -> nn.Sequential:
    return _layers(nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d, specs)


def _layers(conv: Any, norm: Any, pool: Any, specs: Iterable[tuple[Any, ...]]) -> nn.Sequential:
    """Convolution, norm and ReLU for (in, out, kernel, stride, padding), pooling for (kernel, stride, ...)."""
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
    """The two towers; the names of the weights are those of the published file."""

    def __init__(self, dim: int = 1024) -> None:
        super().__init__()
        self.netcnnaud = _layers2(
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
        self.netcnnlip = _layers3(
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

    def video(self, pictures: Tensor) -> Tensor:
        """Embeddings (n, dim) of windows (n, 3, 5, 224, 224), BGR in 0..255."""
        embedding: Tensor = self.netfclip(self.netcnnlip(pictures).flatten(1))
        return embedding


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flowvqtalker" / "syncnet_v2.model"


def _check(path: Path, expected: str | None) -> str:
    digest = bundled.sha256(path)
    if expected is not None and digest != expected:
        raise MissingDependency(f"SyncNet weights {path} have sha256 {digest}, not {expected}; download {URL} again")
    return digest


def find_syncnet(path: str | Path | None = None, sha256: str | None = SHA256) -> tuple[Path, str]:
    """The file ``syncnet_v2.model`` and its sha256: at ``path``, at the path in FLOWVQTALKER_SYNCNET, or in the cache.

    Arguments:
        path: where to look first.
        sha256: what its hash must be; None takes any file, whose hash is still recorded with the numbers.

    Raises:
        MissingDependency: if it is nowhere or its hash differs.
    """
    for given in (path, os.environ.get(VARIABLE)):
        if given:
            if not Path(given).is_file():
                raise MissingDependency(f"SyncNet weights not found at {given}; download them from {URL}")
            return Path(given), _check(Path(given), sha256)
    cached = _cache()
    if cached.is_file():
        return cached, _check(cached, sha256)
    raise MissingDependency(
        f"SyncNet weights not found; download {URL} (52 MB) to {cached}, or set {VARIABLE} to its path"
    )


def download_syncnet(url: str = URL, sha256: str | None = SHA256) -> Path:
    """Download the weights into the cache and check them; returns where they are.

    Raises:
        MissingDependency: if the address cannot be reached or what came is something else.
    """
    from urllib.request import urlopen

    target = _cache()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    try:
        with urlopen(url, timeout=30) as answer, open(beside, "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
        _check(beside, sha256)
        os.replace(beside, target)
    except OSError as error:
        raise MissingDependency(
            f"SyncNet weights cannot be downloaded from {url} ({error}); copy them to {target}"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
    return target


def load_model(path: Path) -> SyncNetModel:
    """The network with the weights of a file: a state dict, with or without the counters of its batch norms.

    Raises:
        UserError: if the file holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"SyncNet weights {path} cannot be read ({str(error).splitlines()[0]}); download {URL}"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"SyncNet weights {path} hold no state dict; download {URL}")
    model = SyncNetModel()
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
        raise UserError(f"SyncNet weights {path} do not fit: {'; '.join(problems[:3])}{more}; download {URL}")
    model.load_state_dict({**own, **state})
    return model.eval()


class SyncNet:
    """SyncNet with its weights; they are read when it is made.

    Arguments:
        weights: ``syncnet_v2.model``; None: see :func:`find_syncnet`.
        crop: ``eat`` or ``native``.
        sha256: what the hash of the weights must be; None takes any.
        device: where to compute.
        batch: windows at a time.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        crop: Crop = "eat",
        sha256: str | None = SHA256,
        device: str | torch.device = "cpu",
        batch: int = 20,
    ) -> None:
        path, self.sha256 = find_syncnet(weights, sha256)
        self.crop: Crop = crop
        self.batch = batch
        self.device = torch.device(device)
        self.model = load_model(path).to(self.device)

    def settings(self) -> dict[str, str | float | int]:
        """What the numbers depend on."""
        return {"weights": self.sha256, "crop": self.crop, "reach": REACH}

    @torch.no_grad()
    def embed(self, faces: Iterable[Pixels], wave: Floats) -> tuple[Floats, Floats]:
        """Embeddings (n, 1024) of faces (224, 224, 3) RGB and of sound (S,) in [-1, 1], n = min(T, S // 640) - 5.

        Raises:
            UserError: if the clip has fewer than six frames, or no sound.
        """
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
            if len(waiting) == self.batch:
                video.append(self._lips(waiting))
                waiting = []
        if waiting:
            video.append(self._lips(waiting))
        windows = min(count, limit) - _SPAN
        if windows < 1:
            raise UserError(f"SyncNet needs more than {_SPAN} frames with sound, this clip has {min(count, limit)}")
        cepstra = torch.from_numpy(mfcc(np.round(np.asarray(wave, np.float64) * 32768)).T.astype(np.float32))
        parts = cepstra.unfold(1, _SPAN * _COLUMNS, _COLUMNS).transpose(0, 1)[:windows, None]
        audio = [self.model.audio(part.to(self.device)).cpu() for part in torch.split(parts, self.batch)]
        return torch.cat(video)[:windows].numpy(), torch.cat(audio).numpy()

    def _lips(self, windows: list[Tensor]) -> Tensor:
        return self.model.video(torch.stack(windows).to(self.device, torch.float32)).cpu()

    def score(self, frames: Iterable[Pixels], landmarks: Floats, wave: Floats) -> SyncScore:
        """LSE-C (confidence), LSE-D (distance) and offset of a clip.

        Arguments:
            frames: (H, W, 3) uint8 RGB at 25 fps, read one after the other.
            landmarks: (T, 68, 2) in pixels, NaN where no face was found.
            wave: (S,) 16 kHz mono in [-1, 1], sample 640 t at frame t.
        """
        return sync_score(*self.embed(face_crops(frames, landmarks, self.crop), wave), REACH)
