"""Clips in memory from which the flows' training items are drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.retarget import Retargeter
from flowvqtalker.errors import UserError
from flowvqtalker.loading import fast_dtype
from flowvqtalker.speech.augment import spectral_augment
from flowvqtalker.speech.encoder import AudioEncoder, SpeechEncoder
from flowvqtalker.speech.features import FRONTENDS, MELS
from flowvqtalker.train.neutral_estimate import NeutralEstimate, estimate_neutral

__all__ = ["NEUTRAL", "NEUTRAL_CLASSES", "Corpus", "MotionClip", "encode_corpus", "ping_pong"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]

NEUTRAL = EMOTIONS.index("neutral")
#: Classes without a marked emotion.
NEUTRAL_CLASSES = (NEUTRAL, EMOTIONS.index("natural"))


@dataclass(frozen=True)
class MotionClip:
    """One clip in memory.

    Attributes:
        frames: (L, D) coefficients.
        mel: (m, 80) log-mel spectrogram, or None without sound.
        emotion: class number.
        speech: whether the sound is this face's speech.
        identity: name of the person.
        features: (copies, L, width) features of a frozen audio encoder, first of the original speech, then of varied
            voices; None: the encoder is trained and needs windows.
        frontend: name of the frontend (:data:`flowvqtalker.speech.features.FRONTENDS`).
        degraded: ``mel`` of the same speech through a room, noise and a line; None: not needed.
        share: share of the varied windows that come from ``degraded``.
        retargeted: whether it was made from a neutral clip (:mod:`flowvqtalker.data.retarget`).
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
    retargeted: bool = False

    @property
    def energy(self) -> Floats | None:
        """Loudness (L,) of the speech by frame, in the spectrogram's unit; None without sound."""
        if self.mel is None:
            return None
        level = np.asarray(self.mel, np.float32).mean(1)
        place = np.linspace(0, len(level) - 1, len(self.frames))
        energy: Floats = np.interp(place, np.arange(len(level)), level).astype(np.float32)
        return energy

    def windows(self, index: Ints, random: np.random.Generator | None = None) -> Floats:
        """Windows (n, 80, columns) of some frames, as :func:`flowvqtalker.speech.features.windows` gives them; with a
        generator, of a varied voice in a varied room."""
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
    """Clips in memory, and how they are drawn.

    Arguments:
        clips: at least one.
        lips: (D, D) projection on the directions in which lips move; None: no retargeting.
        gap: (D,) direction in which the lips open.
        known_neutral, estimate: see :class:`flowvqtalker.train.sequences.SequenceConfig`.
    """

    def __init__(
        self,
        clips: Sequence[MotionClip],
        lips: Floats | None = None,
        gap: Floats | None = None,
        known_neutral: float = 0.7,
        estimate: bool = True,
    ) -> None:
        if not clips:
            raise UserError("no clips to train on; check the split and the shards")
        self.clips = list(clips)
        self.lips = lips
        self._shares_of_people = known_neutral, estimate
        self.gap = None if gap is None else gap / np.linalg.norm(gap)
        self.means = np.stack([clip.frames.mean(0) for clip in clips])
        self.labels = [NEUTRAL if clip.emotion in NEUTRAL_CLASSES else clip.emotion for clip in clips]
        self.people = _by_identity(clips, range(len(clips)))
        neutral = [number for number, label in enumerate(self.labels) if label == NEUTRAL]
        self.can_retarget = lips is not None and any(clips[number].speech for number in neutral)
        self._neutral = {who: self.means[numbers].mean(0) for who, numbers in _by_identity(clips, neutral).items()}
        self._everyone = self.means[neutral].mean(0) if neutral else np.zeros_like(self.means[0])
        self._estimated: dict[str, Floats] = {}
        if estimate and neutral:
            found = self.neutral_estimate()
            strangers = self.people.keys() - self._neutral.keys()
            self._estimated = {who: found.face(who, NEUTRAL).astype(np.float32) for who in strangers}
        lengths = np.array([len(clip.frames) for clip in clips], np.float64)
        self.classes = self._classes(lengths, known_neutral)
        speech = [number for number, clip in enumerate(clips) if clip.speech] or list(range(len(clips)))
        total = {who: lengths[numbers].sum() for who, numbers in _by_identity(clips, speech).items()}
        weights = np.array([lengths[n] / total[clips[n].identity] ** 0.5 for n in speech])
        self.speech = (np.array(speech), _shares(weights))

    def _classes(self, lengths: npt.NDArray[np.float64], known_neutral: float) -> list[tuple[Ints, Shares]]:
        """Numbers and cumulative shares of each class's clips: by length, people with a neutral clip up to a share."""
        emotions = np.array([clip.emotion for clip in self.clips])
        known = np.array([clip.identity in self._neutral for clip in self.clips])
        classes = []
        for label in np.unique(emotions):
            chosen = np.flatnonzero(emotions == label)
            weights, own = lengths[chosen].copy(), known[chosen]
            if own.any() and not own.all():
                weights[own] *= known_neutral / weights[own].sum()
                weights[~own] *= (1 - known_neutral) / weights[~own].sum()
            classes.append((chosen, _shares(weights)))
        return classes

    def with_retargeted(self, retarget: Retargeter, seed: int) -> Corpus:
        """These clips and emotional versions of the neutral ones with speech, which share their sound and features."""
        made, emotions = [], retarget.emotions()
        for number, clip in enumerate(self.clips):
            calm = clip.speech and self.labels[number] == NEUTRAL and not clip.retargeted
            for copy_ in range(retarget.config.copies if calm else 0):
                random = np.random.default_rng([seed, number, copy_])
                name = emotions[int(random.integers(len(emotions)))]
                frames = retarget(clip.frames, name, random, clip.energy)
                made.append(replace(clip, frames=frames, emotion=EMOTIONS.index(name), retargeted=True))
        return self.extended(made)

    def extended(self, clips: Sequence[MotionClip]) -> Corpus:
        """These clips and others."""
        return Corpus([*self.clips, *clips], self.lips, self.gap, *self._shares_of_people)

    def neutral_estimate(self) -> NeutralEstimate:
        """Emotions and people apart, from the means of all clips."""
        return estimate_neutral(self.means, self.labels, [clip.identity for clip in self.clips])

    @property
    def frames(self) -> int:
        """Frames of all clips."""
        return sum(len(clip.frames) for clip in self.clips)

    def neutral(self, number: int) -> Floats:
        """Mean neutral expression (D,) of a clip's person; without a neutral clip the estimate, or everyone's mean."""
        who = self.clips[number].identity
        face: Floats = self._neutral[who] if who in self._neutral else self._estimated.get(who, self._everyone)
        return face

    def has_neutral(self, number: int) -> bool:
        """Whether the neutral face of a clip's person is known or estimated."""
        return self.clips[number].identity in self._neutral or self.clips[number].identity in self._estimated

    def pick(self, random: np.random.Generator, balanced: float) -> int:
        """Number of a clip, drawn class by class with probability ``balanced``, else from the clips with speech."""
        if random.random() < balanced:
            numbers, shares = self.classes[random.integers(len(self.classes))]
        else:
            numbers, shares = self.speech
        return int(numbers[np.searchsorted(shares, random.random(), side="right")])

    def pick_speaker(self, random: np.random.Generator) -> int:
        """Number of a neutral clip with speech."""
        while True:
            number = self.pick(random, 0)
            if self.labels[number] == NEUTRAL:
                return number

    def longest(self, numbers: Iterable[int], count: int) -> list[int]:
        """The longest of the given clips of each person, for the ``count`` people with the longest ones."""
        best: dict[str, int] = {}
        for number in numbers:
            other = best.setdefault(self.clips[number].identity, number)
            if len(self.clips[number].frames) > len(self.clips[other].frames):
                best[self.clips[number].identity] = number
        return sorted(best.values(), key=lambda n: (-len(self.clips[n].frames), n))[:count]

    def source(self, number: int, random: np.random.Generator, dropout: float, noise: float) -> Floats:
        """Expression (D,) of a source for a clip: the person's neutral face, or zeros.

        ``dropout`` is the probability of zeros, ``noise`` the standard deviation of what the estimate of a neutral face
        (:meth:`flowvqtalker.motion.flow.ExpFlow.neutral_face`) is wrong by.
        """
        neutral = self.neutral(number)
        if random.random() < dropout:
            return np.zeros_like(neutral)
        source: Floats = (neutral + noise * random.standard_normal(neutral.shape)).astype(np.float32)
        return source


def ping_pong(length: int, count: int, start: int) -> Ints:
    """``count`` frame numbers of a clip of ``length`` frames, played forwards and backwards in turn."""
    if length == 1:
        return np.zeros(count, np.int64)
    phase = (start + np.arange(count)) % (2 * length - 2)
    return np.minimum(phase, 2 * length - 2 - phase)


def _by_identity(clips: Sequence[MotionClip], numbers: Iterable[int]) -> dict[str, Ints]:
    """Numbers of each person's clips."""
    people: dict[str, list[int]] = {}
    for number in numbers:
        people.setdefault(clips[number].identity, []).append(number)
    return {identity: np.array(found) for identity, found in people.items()}


def _shares(weights: npt.NDArray[np.float64]) -> Shares:
    """Cumulative shares; the last exceeds one, so that rounding cannot leave a draw without a clip."""
    shares: Shares = np.cumsum(weights / weights.sum())
    shares[-1] = 2
    return shares


def encode_corpus(corpus: Corpus, encoder: AudioEncoder, copies: int = 1, seed: int = 0) -> None:
    """Store every clip's audio features, so that a frozen encoder runs once and not in every step.

    Arguments:
        corpus: the clips; changed in place.
        encoder: the encoder.
        copies: versions of each clip's speech: the original, and varied voices.
        seed: seed of the voices.
    """
    if isinstance(encoder, SpeechEncoder):
        encoder = copy.deepcopy(encoder).to(fast_dtype(torch.device("cpu")))  # the type that inference uses
    for number, clip in enumerate(corpus.clips):
        if not clip.speech:
            nothing = np.zeros((1, len(clip.frames), encoder.config.width), np.float16)
            corpus.clips[number] = replace(clip, features=nothing)
            continue
        index = np.arange(len(clip.frames))
        voices = [None, *(np.random.default_rng([seed, number * copies + other]) for other in range(1, copies))]
        found = [encoder.encode_clip(torch.from_numpy(clip.windows(index, voice))) for voice in voices]
        corpus.clips[number] = replace(clip, features=torch.stack(found).numpy().astype(np.float16))
