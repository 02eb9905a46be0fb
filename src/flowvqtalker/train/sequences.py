"""Sequences of consecutive frames with their speech, for the flows.

Most recorded speech is neutral, and most emotional clips are short and silent. So one part of the items is drawn class
by class with equal shares, to learn emotions, and the rest from clips with speech, to learn lips; there, people share
the items by the square root of their footage. Three augmentations (ours) fill the gaps:

- *lip retargeting* puts the lips and sound of a neutral speech clip on an emotional clip;
- *expression retargeting* then moves the emotion, as the difference to the person's neutral face, to the speaker;
- *strength* scales the difference of an emotional clip's mean to the person's neutral face.

Where a person has no neutral clip, the neutral face is estimated (:mod:`flowvqtalker.train.neutral_estimate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import Shard
from flowvqtalker.motion.likelihood import Sequences
from flowvqtalker.speech.augment import degrade
from flowvqtalker.speech.encoder import AudioConfig, SpeechEncoderConfig
from flowvqtalker.speech.features import log_mel
from flowvqtalker.train.corpus import NEUTRAL, Corpus, MotionClip, ping_pong

__all__ = ["SequenceConfig", "SequenceDataset", "collate", "load_corpus"]

Floats = npt.NDArray[np.float32]

_DEGRADE_SEED = 7


@dataclass(frozen=True)
class SequenceConfig:
    """What an item of the training data is. Shares and probabilities are in [0, 1]."""

    frames: int = 32
    """T: consecutive frames of an item, each with its true past."""
    balanced: float = 0.5
    """Share of the items drawn class by class, all emotions alike."""
    known_neutral: float = 0.7
    """Share of people with a neutral clip among these, where a class has both kinds: without one, a source shows person
    and emotion at once."""
    audio_dropout: float = 0.15
    """Share of the items with speech whose speech is hidden, so that the "no audio" token knows every face."""
    source_dropout: float = 0.2
    """Share of the items whose source is hidden (zeros, the mean face), so that the emotion is not only read off it."""
    source_noise: float = 0.25
    """Standard deviation of the noise on the other sources, the persons' neutral faces: their estimate has errors."""
    retarget_lips: float = 0.5
    """Share of the emotional items that get the lips and the sound of a neutral clip with speech."""
    retarget_expression: float = 0.6
    """Share of these in which the emotion also moves to the speaker's face, with the speaker's neutral face as source:
    a neutral portrait that is to show an emotion, as in use."""
    estimate: bool = True
    """Retarget also the expressions of people whose neutral face is only estimated."""
    strength: float = 0.4
    """Share of the emotional items whose strength changes; their class weights follow (see motion.sampler)."""
    max_strength: float = 1.6
    """Strengths are uniform between 0 (neutral) and this."""
    augment: bool = True
    """Vary the voice and the room of the speech (:func:`flowvqtalker.speech.augment.spectral_augment`)."""
    degraded: float = 0.5
    """Share of the varied speech that first passes through a room, noise and a line (speech.augment.degrade)."""
    min_length: int = 12
    """Clips with fewer frames are left out."""


def load_corpus(
    shards: Sequence[str | Path],
    split: str,
    config: SequenceConfig,
    *,
    pose: bool = False,
    lips: Floats | None = None,
    gap: Floats | None = None,
    frontend: str = "mel",
) -> Corpus:
    """Read the clips of a split into memory (a hundred minutes take about 150 MB).

    Arguments:
        shards: folders.
        split: "train" or "val".
        config: which clips are wanted.
        pose: read the head pose relative to the clip's mean, also of clips without a known emotion, instead of the
            expression.
        lips, gap: see :class:`Corpus`.
        frontend: frontend of the speech.
    """
    clips = []
    for folder in shards:
        shard = Shard(folder)
        for number in shard.select(split, is_image=False, min_length=config.min_length):
            emotion = int(shard.emotion[number])
            if emotion < 0 and not pose:
                continue
            rows = shard.rows(int(number))
            frames = np.array(shard.pose[rows] if pose else shard.expression[rows], np.float32)
            speech = bool(shard.speech[number] and shard.sound[number])
            wave = shard.wave(int(number)) if speech else None
            degraded = None
            if wave is not None and config.augment and config.degraded > 0 and split == "train":
                degraded = degrade(wave, np.random.default_rng([_DEGRADE_SEED, int(number)]))
            mel, other = (None if w is None else log_mel(w, frontend).astype(np.float16) for w in (wave, degraded))
            if pose:
                frames = frames - frames.mean(0)
            settings: dict[str, Any] = {"frontend": frontend, "degraded": other, "share": config.degraded}
            clips.append(MotionClip(frames, mel, max(emotion, 0), speech, str(shard.identity[number]), **settings))
    return Corpus(clips, lips, gap, config.known_neutral, config.estimate and not pose)


class SequenceDataset(Dataset[dict[str, Any]]):
    """Training items; item ``i`` is a pure function of the seed and ``i``.

    Arguments:
        corpus: the clips.
        config: what an item is.
        audio: settings of the audio encoder, which give its reach in time.
        history: τ, previous frames of the context.
        seed: seed of the draws.
        plain: for validation: no augmentation, no hidden speech, sources without noise.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: SequenceConfig,
        audio: AudioConfig | SpeechEncoderConfig,
        history: int,
        seed: int = 0,
        plain: bool = False,
    ) -> None:
        self.corpus, self.config, self.audio, self.history = corpus, config, audio, history
        self.seed, self.plain = seed, plain

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, i])
        number = self.corpus.pick(random, self.config.balanced)
        emotional = not self.plain and self.corpus.labels[number] != NEUTRAL
        speaker = None
        retarget = self.corpus.can_retarget and not self.corpus.clips[number].retargeted
        if emotional and retarget and random.random() < self.config.retarget_lips:
            speaker = self.corpus.pick_speaker(random)
        strength = 1.0
        if emotional and random.random() < self.config.strength:
            strength = float(random.uniform(0, self.config.max_strength))
        length = len(self.corpus.clips[number if speaker is None else speaker].frames)
        start = int(random.integers(max(1, length - self.config.frames + 1)))
        return self.item(number, start, random, speaker, strength)

    def item(
        self, number: int, start: int, random: np.random.Generator, speaker: int | None = None, strength: float = 1.0
    ) -> dict[str, Any]:
        """An item from a given clip.

        Arguments:
            number: the clip.
            start: first frame of the item, of the speaker's clip if there is one.
            random: generator of all draws.
            speaker: clip whose lips and sound replace the clip's own.
            strength: strength of the emotion.

        Returns:
            ``frames`` (τ + T, D), ``windows`` (or features) of the speech, ``emotion`` (9,) class weights,
            ``has_speech``, ``speech`` (not hidden), ``mean`` (D,) of the clip, ``source`` (D,), ``mask`` (T,).
        """
        config = self.config
        moved = speaker is not None and self.corpus.has_neutral(number) and random.random() < config.retarget_expression
        clip, weights = self._clip(number, random, speaker, strength, moved)
        total = self.history + config.frames
        frames = np.zeros((total, clip.frames.shape[1]), np.float32)
        before = min(start, self.history)
        part = clip.frames[start - before : start + config.frames]
        frames[self.history - before : self.history - before + len(part)] = part
        changed = config.augment and clip.speech and not self.plain
        if clip.features is not None:
            which = int(random.integers(len(clip.features))) if changed else 0
            where = np.clip(start + np.arange(config.frames), 0, clip.features.shape[1] - 1)
            windows = clip.features[which, where].astype(np.float32)
        else:
            reach = np.arange(-self.audio.lookback, config.frames + self.audio.lookahead)
            windows = clip.windows(np.clip(start + reach, 0, len(clip.frames) - 1), random if changed else None)
        shown = speaker if moved and speaker is not None else number
        source = (
            self.corpus.neutral(shown).astype(np.float32)
            if self.plain
            else self.corpus.source(shown, random, config.source_dropout, config.source_noise)
        )
        return {
            "frames": torch.from_numpy(frames),
            "windows": torch.from_numpy(windows),
            "emotion": torch.from_numpy(weights),
            "has_speech": clip.speech,
            "speech": clip.speech and (self.plain or random.random() >= config.audio_dropout),
            "mean": torch.from_numpy(clip.frames.mean(0)),
            "source": torch.from_numpy(np.ascontiguousarray(source)),
            "mask": torch.arange(config.frames) < len(clip.frames) - start,
        }

    def _clip(
        self, number: int, random: np.random.Generator, speaker: int | None, strength: float, moved: bool
    ) -> tuple[MotionClip, Floats]:
        """The clip after retargeting and a change of strength, and its class weights (9,)."""
        corpus = self.corpus
        clip, frames, mean = corpus.clips[number], corpus.clips[number].frames, corpus.means[number]
        weights = np.zeros(len(EMOTIONS), np.float32)
        weights[NEUTRAL] += 1 - strength
        weights[clip.emotion] += strength
        if speaker is not None and corpus.lips is not None:
            spoken = corpus.clips[speaker]
            frames = frames[ping_pong(len(frames), len(spoken.frames), int(random.integers(len(frames))))]
            change = spoken.frames - corpus.means[speaker] - (frames - mean)
            frames = frames + change @ corpus.lips
            if corpus.gap is not None:  # a mouth that is always open would never close on a b, m or p
                frames = frames - (mean - corpus.neutral(number)) @ corpus.gap * corpus.gap
            clip = replace(spoken, emotion=clip.emotion, identity=clip.identity)
            if moved:
                frames = frames + corpus.means[speaker] - corpus.neutral(number)
        if strength != 1:
            frames = frames + (strength - 1) * (mean - corpus.neutral(number))
        return replace(clip, frames=frames.astype(np.float32, copy=False)), weights


def collate(batch: dict[str, Tensor], source: bool = True) -> Sequences:
    """The part of a default-collated batch that a flow reads."""
    return Sequences(
        frames=batch["frames"],
        windows=batch["windows"],
        emotion=batch["emotion"],
        speech=batch["speech"],
        mask=batch["mask"],
        source=batch["source"] if source else None,
    )
