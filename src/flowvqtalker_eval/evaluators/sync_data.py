"""Training data of the stage ``sync``: segments of clips with speech, mouths and sound together."""

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

from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.errors import UserError
from flowvqtalker.train.config import check
from flowvqtalker_eval.evaluators.mouths import HEIGHT, WIDTH, mouths_of
from flowvqtalker_eval.evaluators.sync_expert import BANDS, COLUMNS, SPAN, band_energies

__all__ = ["SegmentConfig", "SegmentDataset", "SpeechClip", "augment_mouths", "augment_sound", "load_speech_clips"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SegmentConfig:
    """One item of the training data."""

    frames: int = 26
    """Frames of a segment; clips with fewer are left out."""
    augment: bool = True
    """Change light, size, place and sharpness of the mouth, mirror it, and change voice, loudness and noise."""

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

    def __len__(self) -> int:
        return len(self.mouths)

    def part(self, start: int, end: int) -> SpeechClip:
        """Frames start ... end."""
        columns = self.energies[start * COLUMNS : end * COLUMNS]
        return SpeechClip(self.mouths[start:end], self.wave[start * SAMPLES : end * SAMPLES], columns, self.identity)

    def sound(self) -> Floats:
        """Samples (T * 640,) in [-1, 1)."""
        return self.wave.astype(np.float32) / np.float32(32768)


def load_speech_clips(paths: Sequence[Path], split: str, shortest: int) -> list[SpeechClip]:
    """Clips of a split whose sound is known to match the lips (the shard's ``lag`` is a number).

    Their ends are cut off. Where the sound was shifted there is silence that does not belong to the lips; and video and
    audio encoders treat their first frame specially, which would give away where both begin.

    Arguments:
        paths: the shards.
        split: ``train`` or ``val``.
        shortest: clips with fewer frames after the cut are left out.
    """
    clips: list[SpeechClip] = []
    for shard in map(Shard, paths):
        mouths = mouths_of(shard)
        chosen = set(shard.select(split, speech=True, is_image=False, min_length=shortest).tolist())
        for number in sorted(chosen & set(mouths)):
            if not np.isfinite(shard.lag[number]):
                continue
            shift = float(shard.shifted[number])
            start, end = max(1, math.ceil(shift)), len(mouths[number]) - max(1, math.ceil(-shift))
            if end - start >= shortest:
                wave = shard.wave(number, stored=True)[start * SAMPLES : end * SAMPLES]
                energies = band_energies(wave).astype(np.float16)
                whole = np.round(wave * 32768).astype(np.int16)
                clips.append(SpeechClip(mouths[number][start:end], whole, energies, str(shard.identity[number])))
    return clips


class SegmentDataset(Dataset[dict[str, Tensor]]):
    """Segments of clips: ``mouths`` (frames, 48, 96) uint8 and ``sound`` (4 frames, 40) float32.

    Each person's share of the items grows with the square root of the person's frames. Item ``i`` is a pure function of
    the seed and ``i``.
    """

    def __init__(self, clips: Sequence[SpeechClip], config: SegmentConfig, seed: int = 0) -> None:
        if not clips:
            raise UserError(f"no clips with mouths and {config.frames} frames; check the shards and segment.frames")
        self.clips, self.config, self.seed = list(clips), config, seed
        total: dict[str, float] = {}
        for clip in clips:
            total[clip.identity] = total.get(clip.identity, 0.0) + len(clip)
        shares = np.array([len(clip) / total[clip.identity] ** 0.5 for clip in clips])
        self._shares = shares / shares.sum()

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        random = np.random.default_rng([self.seed, i])
        clip = self.clips[int(random.choice(len(self.clips), p=self._shares))]
        start = int(random.integers(len(clip) - self.config.frames + 1))
        segment = clip.part(start, start + self.config.frames)
        mouths, sound = np.array(segment.mouths), segment.energies.astype(np.float32)
        if self.config.augment:
            mouths, sound = augment_mouths(mouths, random), augment_sound(sound, random)
        return {"mouths": torch.from_numpy(mouths), "sound": torch.from_numpy(sound)}


def augment_mouths(mouths: Pixels, random: np.random.Generator) -> Pixels:
    """The same movement (T, 48, 96) of another mouth: one change for all frames, and a jitter of the crop."""
    angle, scale = math.radians(random.uniform(-6, 6)), random.uniform(0.88, 1.12)
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn[:, 1] *= random.uniform(0.92, 1.08)
    if random.random() < 0.5:
        turn[:, 0] *= -1
    centre = np.array([WIDTH / 2 - 0.5, HEIGHT / 2 - 0.5])
    shift = centre - turn @ centre + random.uniform(-1, 1, 2) * [5, 4]
    jitter = random.normal(0, random.uniform(0, 0.5), (len(mouths), 2))
    coarse = random.uniform(0.3, 1.0) if random.random() < 0.3 else 1.0
    gain, offset, gamma = random.uniform(0.65, 1.3), random.uniform(-25, 20), random.uniform(0.75, 1.33)
    table = np.clip((np.linspace(0, 1, 256) ** gamma * 255 - 128) * gain + 128 + offset, 0, 255).astype(np.uint8)
    noise = random.uniform(0, 6) if random.random() < 0.5 else 0.0
    changed = np.empty_like(mouths)
    for t, mouth in enumerate(mouths):
        matrix = np.concatenate([turn, (shift + jitter[t])[:, None]], axis=1)
        moved = cv2.warpAffine(
            mouth, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
        )
        if coarse < 1:
            small = cv2.resize(moved, (round(WIDTH * coarse), round(HEIGHT * coarse)), interpolation=cv2.INTER_AREA)
            moved = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR)
        changed[t] = cv2.LUT(moved, table)
    if noise > 0:
        grain = random.normal(0, noise, changed.shape).astype(np.float32)
        changed = np.clip(changed + grain, 0, 255).astype(np.uint8)
    return changed


def augment_sound(sound: Floats, random: np.random.Generator) -> Floats:
    """The same speech (m, 40) by another voice in another room: one change for all columns."""
    bands = np.arange(BANDS, dtype=np.float32)
    source = np.clip(bands * random.uniform(0.88, 1.12) + random.uniform(-1, 1), 0, BANDS - 1)
    low = np.minimum(source.astype(np.int64), BANDS - 2)
    part = (source - low).astype(np.float32)
    changed = sound[:, low] * (1 - part) + sound[:, low + 1] * part
    tilt = (bands / (BANDS - 1) - 0.5) * random.uniform(-1, 1)
    changed = changed + np.float32(random.uniform(-0.6, 0.6)) + tilt.astype(np.float32)
    floor = random.uniform(-9, -2)  # noise fills what lies below it
    if floor > -7:
        grain = floor + random.normal(0, 0.25, changed.shape)
        changed = np.logaddexp(2 * changed, 2 * grain) / 2
    return np.asarray(np.maximum(changed, -7), np.float32)
