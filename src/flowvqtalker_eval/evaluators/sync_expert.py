"""The sync expert: our own small network that scores lip sync, for where SyncNet's weights cannot be had.

Two towers embed five frames of the mouth and their 0.2 s of sound, as SyncNet does (Chung and Zisserman 2016);
:mod:`flowvqtalker_eval.evaluators.sync_training` trains them. Its numbers are called *Sync-expert C*, *D* and *offset*.
They are on another scale than SyncNet's and are never printed as LSE-C or LSE-D. Embeddings have unit length, so D lies
between 0 and 2, and unrelated pairs are about 1.41 apart. At each shift only frames that have sound are compared (no
zeros around the clip), because a clip may be as short as one second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from flowvqtalker import weights
from flowvqtalker.constants import SAMPLE_RATE
from flowvqtalker.errors import UserError
from flowvqtalker_eval.evaluators.mouths import HEIGHT, WIDTH, cut_mouths
from flowvqtalker_eval.metrics.analysis import Array, ClipExtractor, FrameExtractor, Frames, Settings, Wave
from flowvqtalker_eval.metrics.sync import REACH, SyncScore, sync_score

__all__ = [
    "BANDS",
    "COLUMNS",
    "SPAN",
    "MouthExtractor",
    "SyncExpert",
    "SyncExpertConfig",
    "SyncExpertExtractor",
    "band_energies",
    "load_sync_expert",
    "sync_expert_score",
]

#: Frames of a window, and columns of sound that belong to a frame.
SPAN, COLUMNS = 5, 4
#: Mel bands of the sound.
BANDS = 40

_HOP, _WINDOW, _FFT = 160, 400, 512

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@lru_cache(maxsize=1)
def _filters() -> npt.NDArray[np.float64]:
    """Triangular filters (257, 40), evenly spaced in mel (2595 log10(1 + f / 700)) from 60 to 7600 Hz."""
    low, high = (float(2595 * np.log10(1 + hertz / 700)) for hertz in (60.0, 7600.0))
    mel = np.linspace(low, high, BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = np.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.asarray(np.maximum(0, np.minimum(rising, falling)))


def band_energies(wave: npt.NDArray[np.floating[Any]]) -> Floats:
    """Log mel energies (4 T, 40) of sound (640 T,) in [-1, 1]: four columns for each frame, centred in time.

    In nepers, with the 95 % quantile over the columns at zero and a floor of -7 (-61 dB).
    """
    wave = np.asarray(wave, np.float64)
    if wave.ndim != 1:
        raise UserError(f"sound of shape (n,) is needed, got {wave.shape}")
    count = len(wave) // (COLUMNS * _HOP) * COLUMNS
    if count == 0:
        return np.zeros((0, BANDS), np.float32)
    emphasised = wave - 0.97 * np.concatenate([wave[:1], wave[:-1]])
    margin = (_WINDOW - _HOP) // 2
    padded = np.pad(emphasised, (margin, margin + _HOP))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[: count * _HOP : _HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), _FFT)) ** 2
    energies = 0.5 * np.log(power @ _filters() + 1e-9)
    energies -= np.quantile(energies.max(1), 0.95)
    return np.maximum(energies, -7).astype(np.float32)


@dataclass(frozen=True)
class SyncExpertConfig:
    """Size of the sync expert."""

    video: tuple[int, ...] = (32, 64, 96, 128, 160)
    """Channels of the video tower's convolutions."""
    audio: tuple[int, ...] = (96, 128, 160)
    """Channels of the audio tower's convolutions."""
    dim: int = 128
    """Length of an embedding."""
    dropout: float = 0.2
    """Dropout rate before each tower's last layer."""


def _block2(inp: int, out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def _block1(inp: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm1d(out), nn.ReLU(inplace=True))


def _normalise(embeddings: Tensor, clips: int) -> Tensor:
    """Embeddings (B n, dim) as (B, n, dim) float32 of unit length."""
    return nn.functional.normalize(embeddings.float(), dim=-1).reshape(clips, -1, embeddings.shape[-1])


class SyncExpert(nn.Module):
    """Embeddings (..., dim) of unit length of mouths and of sound.

    The mouths are halved to 24x48 first: most training clips have no more detail, and sharpness must not influence the
    score. Each image is brought to zero mean and unit variance, so that lighting does not either.
    """

    def __init__(self, config: SyncExpertConfig | None = None) -> None:
        super().__init__()
        self.config = config or SyncExpertConfig()
        a, b, c, d, e = self.config.video
        self.lips = nn.Sequential(
            _block2(SPAN, a, 5, 2),  # 12x24
            _block2(a, b, 3, 2),  # 6x12
            _block2(b, c, 3, 1),
            _block2(c, d, 3, 2),  # 3x6
            _block2(d, e, 3, 1),
            nn.Flatten(),
            nn.Dropout(self.config.dropout),
            nn.Linear(e * (HEIGHT // 16) * (WIDTH // 16), self.config.dim),
        )
        f, g, h = self.config.audio
        self.sound = nn.Sequential(
            _block1(BANDS, f, 1),
            _block1(f, g, 2),
            _block1(g, h, 2),
            nn.Flatten(),
            nn.Dropout(self.config.dropout),
            nn.Linear(h * SPAN * COLUMNS // 4, self.config.dim),
        )

    def video(self, mouths: Tensor) -> Tensor:
        """Embeddings (B, T - 4, dim) of mouths (B, T, 48, 96) in 0..255; row t sees the frames t ... t + 4."""
        if mouths.ndim != 4 or mouths.shape[2:] != (HEIGHT, WIDTH) or mouths.shape[1] < SPAN:
            raise ValueError(f"mouths of shape (B, T >= {SPAN}, {HEIGHT}, {WIDTH}) are needed, got {mouths.shape}")
        small = nn.functional.avg_pool2d(mouths, 2)
        small = small - small.mean((2, 3), keepdim=True)
        small = small / (small.square().mean((2, 3), keepdim=True).sqrt() + 4)
        windows = small.unfold(1, SPAN, 1).movedim(-1, 2).flatten(0, 1)  # (B (T - 4), 5, 24, 48)
        return _normalise(self.lips(windows), len(mouths))

    def audio(self, energies: Tensor) -> Tensor:
        """Embeddings (B, T - 4, dim) of sound (B, 4 T, 40), see :func:`band_energies`."""
        if energies.ndim != 3 or energies.shape[2] != BANDS or energies.shape[1] < SPAN * COLUMNS:
            raise ValueError(f"sound of shape (B, 4 T >= {SPAN * COLUMNS}, {BANDS}) is needed, got {energies.shape}")
        windows = energies.unfold(1, SPAN * COLUMNS, COLUMNS).flatten(0, 1)  # (B (T - 4), 40, 20)
        windows = windows / 3 + 1
        return _normalise(self.sound(windows), len(energies))

    @torch.no_grad()
    def embed(self, mouths: Pixels, wave: npt.NDArray[np.floating[Any]], batch: int = 256) -> tuple[Floats, Floats]:
        """Embeddings (n, dim) of a clip's mouths (T, 48, 96) and sound (S,), n = min(T, S // 640) - 4.

        Windows with a frame without a face (all zeros) are NaN in the video's.

        Raises:
            UserError: if the clip is shorter than five frames.
        """
        count = min(len(mouths), len(wave) // (COLUMNS * _HOP))
        if count < SPAN:
            raise UserError(f"lips and sound can be compared over {SPAN} frames or more, this clip has {count}")
        device = next(self.parameters()).device
        energies = torch.from_numpy(band_energies(wave[: count * COLUMNS * _HOP])).to(device)
        pictures = torch.from_numpy(np.array(mouths[:count]))
        parts: list[tuple[Tensor, Tensor]] = []
        for start in range(0, count - SPAN + 1, batch):
            end = min(start + batch, count - SPAN + 1) + SPAN - 1
            lips = self.video(pictures[None, start:end].to(device, torch.float32))[0]
            parts.append((lips, self.audio(energies[None, start * COLUMNS : end * COLUMNS])[0]))
        video, audio = (torch.cat([part[i] for part in parts]).cpu().numpy() for i in range(2))
        absent = ~np.any(np.asarray(mouths[:count]), axis=(1, 2))
        video[np.lib.stride_tricks.sliding_window_view(absent, SPAN).any(1)] = np.nan
        return video, audio


def sync_expert_score(video: Floats, audio: Floats, reach: int = REACH) -> SyncScore:
    """Sync-expert C (confidence), D (distance) and offset from the expert's embeddings (n, dim)."""
    return sync_score(video, audio, reach, padding="none")


def load_sync_expert(path: str | Path | None = None) -> SyncExpert:
    """The trained expert (``sync.safetensors``) of a folder of weights (None: the package's own).

    Raises:
        UserError: if the weights are missing or do not fit.
    """
    tensors, config = weights.load("sync", path)
    try:
        sizes: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
        }
        expert = SyncExpert(SyncExpertConfig(**sizes))
    except (TypeError, ValueError) as error:
        raise weights.mismatch("sync", str(error), path) from error
    counters = {key: value for key, value in expert.state_dict().items() if key.endswith("num_batches_tracked")}
    weights.restore(expert, {**counters, **tensors}, "sync", path)
    return expert.eval()


class MouthExtractor(FrameExtractor):
    """``mouth`` (n, 48, 96) uint8 from frames and their ``mesh``; zeros where there is no face."""

    name = "mouth"
    needs: tuple[str, ...] = ("mesh",)
    gives = ("mouth",)

    def settings(self) -> Settings:
        return {"height": HEIGHT, "width": WIDTH, "landmarks": "mediapipe"}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        return {"mouth": cut_mouths(frames, known["mesh"])}


class SyncExpertExtractor(ClipExtractor):
    """``sync_expert_video`` and ``sync_expert_audio`` (T - 4, dim) of a clip from its ``mouth`` and its sound.

    A clip without sound, or with less than five frames, gets arrays without rows.
    """

    name = "sync_expert"
    needs: tuple[str, ...] = ("mouth",)
    gives = ("sync_expert_video", "sync_expert_audio")

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = folder
        self._model: SyncExpert | None = None

    def settings(self) -> Settings:
        entry = weights.manifest(self._folder).get("sync.safetensors")
        return {"weights": entry.sha256 if entry is not None else "missing", "reach": REACH, "window": SPAN}

    def __call__(self, known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        if self._model is None:
            self._model = load_sync_expert(self._folder)
        mouths = cast(Pixels, known["mouth"])
        if wave is None or min(len(mouths), len(wave) // (COLUMNS * _HOP)) < SPAN:
            nothing = np.zeros((0, self._model.config.dim), np.float32)
            return {"sync_expert_video": nothing, "sync_expert_audio": nothing}
        video, audio = self._model.embed(mouths, wave)
        return {"sync_expert_video": video, "sync_expert_audio": audio}
