"""Segments of clips with speech, mouths and sound together, for the stage ``sync``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.data.order import item_generator
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.errors import UserError
from flowvqtalker.train.config import check
from flowvqtalker_eval.evaluators.mouths import HEIGHT, WIDTH, mouths_of
from flowvqtalker_eval.evaluators.sync_expert import BANDS, COLUMNS, SPAN, band_energies

__all__ = [
    "SegmentConfig",
    "SegmentDataset",
    "SpeechClip",
    "augment_mouths",
    "augment_sound",
    "load_speech_clips",
    "part_of",
]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SegmentConfig:
    """What an item of the training data is."""

    frames: int = 26
    """Frames of a segment; clips with fewer are left out."""
    augment: bool = True
    """Vary light, size, place, mirror and sharpness of the mouth, and voice, loudness and noise of the sound."""

    def __post_init__(self) -> None:
        check((self.frames >= 2 * SPAN + 2, f"frames must be at least {2 * SPAN + 2}, got {self.frames}"))


@dataclass(frozen=True)
class SpeechClip:
    """One clip with speech.

    Attributes:
        mouths: (T, 48, 96) uint8.
        wave: (T * 640,) int16, sample 640 t at frame t.
        energies: (4 T, 40) float16, see :func:`flowvqtalker_eval.evaluators.sync_expert.band_energies`.
        identity: who it is.
    """

    mouths: Pixels
    wave: npt.NDArray[np.int16]
    energies: npt.NDArray[np.float16]
    identity: str

    def sound(self, start: int = 0, end: int | None = None) -> Floats:
        """Samples of the frames start ... end in [-1, 1)."""
        part = self.wave[start * SAMPLES : len(self.wave) if end is None else end * SAMPLES]
        return part.astype(np.float32) / np.float32(32768)


def part_of(clip: SpeechClip, start: int, end: int) -> SpeechClip:
    """Frames start ... end of a clip."""
    columns = clip.energies[start * COLUMNS : end * COLUMNS]
    return SpeechClip(clip.mouths[start:end], clip.wave[start * SAMPLES : end * SAMPLES], columns, clip.identity)


def load_speech_clips(paths: Sequence[Path], split: str, shortest: int) -> list[SpeechClip]:
    """Clips of a split whose sound is known to be in step with the lips (the shard's ``lag`` is a number).

    Their ends are cut off: where the sound was moved there is silence that the lips know nothing of, and encoders treat
    the first frame of picture and sound unlike the others, which would give away where both begin.

    Arguments:
        paths: the shards.
        split: ``train`` or ``val``.
        shortest: clips with fewer frames after the cut are left out.
    """
    clips: list[SpeechClip] = []
    for path in paths:
        shard = Shard(path)
        mouths = mouths_of(shard)
        chosen = set(shard.select(split, speech=True, picture=False, min_length=shortest).tolist())
        for number in sorted(chosen & set(mouths)):
            if np.isfinite(shard.lag[number]):
                moved = float(shard.shifted[number])
                first = max(1, math.ceil(moved))
                end = len(mouths[number]) - max(1, math.ceil(-moved))
                if end - first < shortest:
                    continue
                wave = shard.wave(number, stored=True)[first * SAMPLES : end * SAMPLES]
                energies = band_energies(wave).astype(np.float16)
                whole = np.round(wave * 32768).astype(np.int16)
                clips.append(SpeechClip(mouths[number][first:end], whole, energies, str(shard.identity[number])))
    return clips


class SegmentDataset(Dataset[dict[str, Tensor]]):
    """Segments of clips: ``mouths`` (frames, 48, 96) uint8 and ``sound`` (4 frames, 40) float32.

    People share the items by the square root of how much there is of each. Item ``i`` is a pure function of the seed
    and ``i``.
    """

    def __init__(self, clips: Sequence[SpeechClip], config: SegmentConfig, seed: int = 0) -> None:
        if not clips:
            raise UserError(f"no clips with mouths and {config.frames} frames; check the shards and segment.frames")
        self.clips, self.config, self.seed = list(clips), config, seed
        total: dict[str, float] = {}
        for clip in clips:
            total[clip.identity] = total.get(clip.identity, 0.0) + len(clip.mouths)
        shares = np.cumsum([len(clip.mouths) / total[clip.identity] ** 0.5 for clip in clips])
        self._shares = shares / shares[-1]

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        random = item_generator(self.seed, i)
        clip = self.clips[min(int(np.searchsorted(self._shares, random.random(), side="right")), len(self.clips) - 1)]
        frames = self.config.frames
        start = int(random.integers(len(clip.mouths) - frames + 1))
        mouths: Pixels = np.array(clip.mouths[start : start + frames])
        sound = clip.energies[start * COLUMNS : (start + frames) * COLUMNS].astype(np.float32)
        if self.config.augment:
            mouths, sound = augment_mouths(mouths, random), augment_sound(sound, random)
        return {"mouths": torch.from_numpy(mouths), "sound": torch.from_numpy(sound)}


def augment_mouths(mouths: Pixels, random: np.random.Generator) -> Pixels:
    """The same movement (T, 48, 96) of another mouth: one change for all frames, and a tremble of the crop."""
    angle, scale = math.radians(random.uniform(-6, 6)), random.uniform(0.88, 1.12)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn[:, 1] *= random.uniform(0.92, 1.08)
    if random.random() < 0.5:
        turn[:, 0] *= -1
    centre = np.array([WIDTH / 2 - 0.5, HEIGHT / 2 - 0.5])
    shift = centre - turn @ centre + random.uniform(-1, 1, 2) * [5, 4]
    tremble = random.normal(0, random.uniform(0, 0.5), (len(mouths), 2))
    coarse = random.uniform(0.3, 1.0) if random.random() < 0.3 else 1.0
    gain, lift, gamma = random.uniform(0.65, 1.3), random.uniform(-25, 20), random.uniform(0.75, 1.33)
    table = np.clip((np.linspace(0, 1, 256) ** gamma * 255 - 128) * gain + 128 + lift, 0, 255).astype(np.uint8)
    noise = random.uniform(0, 6) if random.random() < 0.5 else 0.0
    varied = np.empty_like(mouths)
    for t, mouth in enumerate(mouths):
        matrix = np.concatenate([turn, (shift + tremble[t])[:, None]], axis=1)
        moved = cv2.warpAffine(
            mouth, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        if coarse < 1:
            small = cv2.resize(moved, (round(WIDTH * coarse), round(HEIGHT * coarse)), interpolation=cv2.INTER_AREA)
            moved = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
        varied[t] = cv2.LUT(moved, table)
    if noise > 0:
        grain = random.normal(0, noise, varied.shape).astype(np.float32)
        varied = np.clip(varied + grain, 0, 255).astype(np.uint8)
    return varied


def augment_sound(sound: Floats, random: np.random.Generator) -> Floats:
    """The same speech (m, 40) by another voice in another room: one change for all columns."""
    bands = np.arange(BANDS, dtype=np.float32)
    where = np.clip(bands * random.uniform(0.88, 1.12) + random.uniform(-1, 1), 0, BANDS - 1)
    low = np.minimum(where.astype(np.int64), BANDS - 2)
    part = (where - low).astype(np.float32)
    varied = sound[:, low] * (1 - part) + sound[:, low + 1] * part
    tilt = (bands / (BANDS - 1) - 0.5) * random.uniform(-1, 1)
    varied = varied + np.float32(random.uniform(-0.6, 0.6)) + tilt.astype(np.float32)
    floor = random.uniform(-9, -2)  # noise fills what lies below it
    if floor > -7:
        grain = floor + random.normal(0, 0.25, varied.shape)
        varied = np.logaddexp(2 * varied, 2 * grain) / 2
    limited: Floats = np.maximum(varied, -7).astype(np.float32)
    return limited
