"""Sequences of consecutive frames with their speech, for the flows.

Most speech at hand is neutral or natural, and most emotional clips are short and silent. So a part of the items is
drawn class by class, all classes alike (they teach the emotions), and the rest from the clips with speech (they teach
the lips), where the people share the items by the square root of how much there is of each. Three augmentations (ours)
fill in what few clips show: a *graft* puts the lips of a speech clip on an emotional clip; a *transplant* then moves
the emotion, as its difference to the person's neutral face, to the speaker's face; and a changed *strength* moves the
mean expression of an emotional clip towards the person's neutral face or away from it. Where no neutral clip of a
person is known, the neutral face is estimated (:mod:`flowvqtalker.train.neutral_estimate`).
"""

from __future__ import annotations

import copy
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
from flowvqtalker.errors import UserError
from flowvqtalker.loading import fast_dtype
from flowvqtalker.motion.flow import Sequences
from flowvqtalker.speech.augment import degrade, spectral_augment
from flowvqtalker.speech.encoder import AudioConfig, AudioEncoder, SpeechEncoder
from flowvqtalker.speech.features import FRONTENDS, MELS, log_mel
from flowvqtalker.train.neutral_estimate import estimate_neutral

__all__ = ["Corpus", "MotionClip", "SequenceConfig", "SequenceDataset", "collate", "encode_corpus", "load_corpus"]

Floats = npt.NDArray[np.float32]

NEUTRAL = EMOTIONS.index("neutral")
#: Seed of what the speech is played through.
_DEGRADE_SEED = 7
#: Classes without a marked emotion.
CALM = (NEUTRAL, EMOTIONS.index("natural"))


@dataclass(frozen=True)
class SequenceConfig:
    """What an item of the training data is."""

    frames: int = 32
    """T: consecutive frames of an item, each with its true past."""
    balanced: float = 0.5
    """Share of the items that is drawn class by class, all emotions alike."""
    known: float = 0.7
    """Of these, the share of people whose neutral face is known too, where a class has both: only with them does the
    source tell the emotion from the face."""
    audio_dropout: float = 0.15
    """Share of the items with speech whose speech is hidden, so that the "no audio" token knows every face."""
    no_source: float = 0.2
    """Share of the items whose source is hidden (zeros, the mean face), so that the emotion is not only read off it."""
    other_source: float = 0.7
    """Share of the items whose source is a frame of another clip of the same person, where there is one."""
    retarget_lips: float = 0.5
    """Share of the emotional items that get the lips and the sound of a neutral clip with speech."""
    retarget_expression: float = 0.6
    """Share of the grafted items in which the emotion's difference to the person's neutral face moves to the speaker's
    face, and the source is the speaker's: a calm portrait that is to show an emotion, as in use."""
    estimate: bool = True
    """Transplant the emotions of people whose neutral face is only estimated, too."""
    strength: float = 0.4
    """Share of the emotional items whose strength is changed; their class weights say to what (see motion.sampler)."""
    strongest: float = 1.6
    """Strengths are drawn evenly between 0 (neutral) and this."""
    augment: bool = True
    """Vary the speech's voice and room (train.voices)."""
    degraded: float = 0.5
    """Share of the varied speech that is first played through a room, noise and a line (audio.degrade)."""
    shortest: int = 12
    """Clips with fewer frames are left out."""


@dataclass(frozen=True)
class MotionClip:
    """One clip in memory.

    Attributes:
        frames: (L, D) coefficients.
        mel: (m, 80) log-mel of the front end ``frontend``, or None without sound.
        emotion: class number.
        speech: whether the sound is this face's speech.
        identity: who it is.
        features: (copies, L, width) audio features of a frozen encoder, the first of the speech as it is and the others
            of varied voices; None: the encoder is trained and needs windows.
        frontend: name of the front end (:data:`flowvqtalker.speech.features.FRONTENDS`).
        degraded: ``mel`` of the same speech through a room, noise and a line; None: not needed.
        share: of the varied windows that are taken from ``degraded``.
    """

    frames: Floats
    mel: npt.NDArray[np.float16] | None
    emotion: int
    speech: bool
    identity: str
    features: npt.NDArray[np.float16] | None = None
    frontend: str = "mel"
    degraded: npt.NDArray[np.float16] | None = None
    share: float = 0.5

    def windows(self, index: npt.NDArray[np.int64], random: np.random.Generator | None = None) -> Floats:
        """Windows (n, 80, columns) of some frames, as :func:`flowvqtalker.speech.features.windows` gives them; with a
        generator, of another voice in another room."""
        frontend = FRONTENDS[self.frontend]
        if self.mel is None:
            return np.full((len(index), MELS, frontend.columns), -4, np.float32)
        first = np.array([frontend.first(int(i)) for i in index], np.int64)
        columns = np.clip(first[:, None] + np.arange(frontend.columns), 0, len(self.mel) - 1)
        begin, end = int(columns.min()), int(columns.max()) + 1
        degraded = self.degraded is not None and random is not None and random.random() < self.share
        mel = np.asarray((self.degraded if degraded and self.degraded is not None else self.mel)[begin:end], np.float32)
        if random is not None:
            mel = spectral_augment(mel, random, self.frontend)
        return np.ascontiguousarray(mel[columns - begin].transpose(0, 2, 1))


class Corpus:
    """Clips with the orders in which they are drawn.

    Arguments:
        clips: at least one.
        lips: (D, D) projection on the directions in which lips move; None: no grafts.
        gap: (D,) direction in which the lips open.
        known, estimate: see :class:`SequenceConfig`.
    """

    def __init__(
        self,
        clips: Sequence[MotionClip],
        lips: Floats | None = None,
        gap: Floats | None = None,
        known: float = SequenceConfig.known,
        estimate: bool = SequenceConfig.estimate,
    ) -> None:
        if not clips:
            raise UserError("no clips to train on; check the split and the shards")
        self.clips = list(clips)
        self.lips = lips
        self.gap = None if gap is None else gap / np.linalg.norm(gap)
        self.means = np.stack([clip.frames.mean(0) for clip in clips])
        calm = [number for number, clip in enumerate(clips) if clip.emotion in CALM]
        self.speakers = any(clips[number].speech for number in calm)
        neutral: dict[str, list[int]] = {}
        for number in calm:
            neutral.setdefault(clips[number].identity, []).append(number)
        self._neutral = {who: self.means[numbers].mean(0) for who, numbers in neutral.items()}
        self._everyone = self.means[calm].mean(0) if calm else np.zeros_like(self.means[0])
        self._estimated: dict[str, Floats] = {}
        if estimate and calm:
            alike = [NEUTRAL if clip.emotion in CALM else clip.emotion for clip in clips]
            found = estimate_neutral(self.means, alike, [clip.identity for clip in clips])
            strangers = {clip.identity for clip in clips} - self._neutral.keys()
            self._estimated = {who: found.face(who, NEUTRAL).astype(np.float32) for who in strangers}
        lengths = np.array([len(clip.frames) for clip in clips], np.float64)
        emotions = np.array([clip.emotion for clip in clips])
        familiar = np.array([clip.identity in self._neutral for clip in clips])
        self.classes = []
        for label in range(len(EMOTIONS)):
            chosen = np.flatnonzero(emotions == label)
            if len(chosen) == 0:
                continue
            weights, own = lengths[chosen].copy(), familiar[chosen]
            if own.any() and not own.all():
                weights[own] *= known / weights[own].sum()
                weights[~own] *= (1 - known) / weights[~own].sum()
            self.classes.append((chosen, _shares(weights)))
        speech = [number for number, clip in enumerate(clips) if clip.speech] or list(range(len(clips)))
        people: dict[str, list[int]] = {}
        for number, clip in enumerate(clips):
            people.setdefault(clip.identity, []).append(number)
        self.people = {identity: np.array(numbers) for identity, numbers in people.items()}
        total: dict[str, float] = {}
        for number in speech:
            total[clips[number].identity] = total.get(clips[number].identity, 0.0) + lengths[number]
        weights = np.array([lengths[n] / total[clips[n].identity] ** 0.5 for n in speech])
        self.speech = (np.array(speech), _shares(weights))

    @property
    def frames(self) -> int:
        """Frames of all clips."""
        return sum(len(clip.frames) for clip in self.clips)

    def neutral(self, number: int) -> Floats:
        """Mean neutral expression (D,) of the person of a clip; where there is none, as estimated, or everyone's."""
        who = self.clips[number].identity
        face: Floats = self._neutral[who] if who in self._neutral else self._estimated.get(who, self._everyone)
        return face

    def has_neutral(self, number: int) -> bool:
        """Whether the neutral face of the person of a clip is known or estimated."""
        return self.clips[number].identity in self._neutral or self.clips[number].identity in self._estimated

    def pick(self, random: np.random.Generator, balanced: float) -> int:
        """Number of a clip."""
        if random.random() < balanced:
            numbers, shares = self.classes[random.integers(len(self.classes))]
        else:
            numbers, shares = self.speech
        return int(numbers[np.searchsorted(shares, random.random(), side="right")])

    def pick_speaker(self, random: np.random.Generator) -> int:
        """Number of a neutral clip with speech, drawn as the clips with speech are."""
        while True:
            number = self.pick(random, 0)
            if self.clips[number].emotion in CALM:
                return number

    def source(self, number: int, random: np.random.Generator, config: SequenceConfig) -> Floats:
        """Expression (D,) of a source picture for a clip: a frame of the same person, or zeros."""
        clip = self.clips[number]
        if random.random() < config.no_source:
            return np.zeros_like(clip.frames[0])
        others = self.people[clip.identity]
        others = others[others != number]
        if len(others) and random.random() < config.other_source:
            clip = self.clips[int(random.choice(others))]
        frame: Floats = clip.frames[random.integers(len(clip.frames))]
        return frame


def _shares(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Cumulative shares; the last is above one, whatever the rounding."""
    shares: npt.NDArray[np.float64] = np.cumsum(weights / weights.sum())
    shares[-1] = 2
    return shares


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
        config: what clips are wanted.
        lips, gap: see :class:`Corpus`.
        frontend: front end of the speech.
        pose: head pose relative to the clip's mean instead of expression; then clips without a known emotion count too.
    """
    clips = []
    for folder in shards:
        shard = Shard(folder)
        for number in shard.select(split, is_image=False, min_length=config.shortest):
            emotion = int(shard.emotion[number])
            if emotion < 0 and not pose:
                continue
            rows = shard.rows(int(number))
            frames = np.array(shard.pose[rows] if pose else shard.expression[rows], np.float32)
            speech = bool(shard.speech[number] and shard.sound[number])
            wave = shard.wave(int(number)) if speech else None
            changed = config.augment and config.degraded > 0 and split == "train"
            degraded = (
                degrade(wave, np.random.default_rng([_DEGRADE_SEED, int(number)])) if wave is not None and changed else None
            )
            mel, other = (None if w is None else log_mel(w, frontend).astype(np.float16) for w in (wave, degraded))
            clips.append(
                MotionClip(
                    frames - frames.mean(0) if pose else frames,
                    mel,
                    max(emotion, 0),
                    speech,
                    str(shard.identity[number]),
                    frontend=frontend,
                    degraded=other,
                    share=config.degraded,
                )
            )
    return Corpus(clips, lips, gap, config.known, config.estimate and not pose)


def encode_corpus(corpus: Corpus, encoder: AudioEncoder, copies: int = 1, seed: int = 0) -> None:
    """Give every clip its audio features, so that an encoder that is not trained runs once and not in every step.

    Arguments:
        corpus: the clips; changed in place.
        encoder: the encoder.
        copies: 1, or more for varied voices beside the speech as it is.
        seed: of the voices.
    """
    if isinstance(encoder, SpeechEncoder):
        encoder = copy.deepcopy(encoder).to(fast_dtype(torch.device("cpu")))  # as it will hear in use
    for number, clip in enumerate(corpus.clips):
        if not clip.speech:
            nothing = np.zeros((1, len(clip.frames), encoder.config.width), np.float16)
            corpus.clips[number] = replace(clip, features=nothing)
            continue
        index = np.arange(len(clip.frames))
        voices = [None, *(np.random.default_rng([seed, number * copies + other]) for other in range(1, copies))]
        found = [encoder.encode_clip(torch.from_numpy(clip.windows(index, voice))) for voice in voices]
        corpus.clips[number] = replace(clip, features=torch.stack(found).numpy().astype(np.float16))


class SequenceDataset(Dataset[dict[str, Any]]):
    """Item ``i`` is a pure function of the seed and ``i``.

    Arguments:
        corpus: the clips.
        config: what an item is.
        audio: reach of the audio encoder.
        history: τ.
        seed: of the draws.
        plain: validation: no perturbation, no hidden speech, sources from the clip itself.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: SequenceConfig,
        audio: AudioConfig,
        history: int,
        seed: int = 0,
        plain: bool = False,
    ) -> None:
        self.corpus, self.config, self.audio, self.history = corpus, config, audio, history
        self.seed, self.plain = seed, plain

    def __getitem__(self, i: int) -> dict[str, Any]:
        random = np.random.default_rng([self.seed, i])
        number = self.corpus.pick(random, self.config.balanced)
        emotional = not self.plain and self.corpus.clips[number].emotion not in CALM
        graft = emotional and self.corpus.lips is not None and self.corpus.speakers
        speaker = self.corpus.pick_speaker(random) if graft and random.random() < self.config.retarget_lips else None
        strength = 1.0
        if emotional and random.random() < self.config.strength:
            strength = float(random.uniform(0, self.config.strongest))
        length = len(self.corpus.clips[number if speaker is None else speaker].frames)
        start = int(random.integers(max(1, length - self.config.frames + 1)))
        return self.item(number, start, random, speaker, strength)

    def item(
        self, number: int, start: int, random: np.random.Generator, speaker: int | None = None, strength: float = 1.0
    ) -> dict[str, Any]:
        """The frames of a clip from ``start`` on, and their context.

        Arguments:
            number: the clip.
            start: its first frame, or the speaker's.
            random: of everything that is random.
            speaker: the clip whose lips and sound it gets.
            strength: of its emotion.
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
        source = clip.frames[0] if self.plain else self.corpus.source(shown, random, config)
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
        """The clip as it is, grafted, moved to the speaker's face or of another strength, and class weights (9,)."""
        corpus = self.corpus
        clip, frames, mean = corpus.clips[number], corpus.clips[number].frames, corpus.means[number]
        weights = np.zeros(len(EMOTIONS), np.float32)
        weights[NEUTRAL] += 1 - strength
        weights[clip.emotion] += strength
        if speaker is not None and corpus.lips is not None:
            spoken = corpus.clips[speaker]
            frames = frames[_there_and_back(len(frames), len(spoken.frames), int(random.integers(len(frames))))]
            change = spoken.frames - corpus.means[speaker] - (frames - mean)
            frames = frames + change @ corpus.lips
            if corpus.gap is not None:  # a mouth that hangs open throughout would never close on a b, m or p
                frames = frames - (mean - corpus.neutral(number)) @ corpus.gap * corpus.gap
            clip = replace(spoken, emotion=clip.emotion, identity=clip.identity)
            if moved:
                frames = frames + corpus.means[speaker] - corpus.neutral(number)
        if strength != 1:
            frames = frames + (strength - 1) * (mean - corpus.neutral(number))
        return replace(clip, frames=frames.astype(np.float32, copy=False)), weights


def _there_and_back(length: int, count: int, start: int) -> npt.NDArray[np.int64]:
    """``count`` frame numbers of a clip of ``length`` frames that is played forwards and backwards in turn."""
    if length == 1:
        return np.zeros(count, np.int64)
    phase = (start + np.arange(count)) % (2 * length - 2)
    return np.minimum(phase, 2 * length - 2 - phase)


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
