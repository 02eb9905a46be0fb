"""Training clips from RAVDESS's performances: an emotional voice with the emotion's face (ours).

The data set gives the voice and facial action units, but no coefficients. So a performance is put together: the small
movements and blinks of a neutral speaker of the training data, the lips that the lip prior hears in the voice, the
difference of the emotion (:mod:`flowvqtalker.data.retarget`), whose strength follows the voice's energy, and the time
course of the action units around their mean. (Their level is calibrated clip by clip and says nothing.)

Reference:
    Livingstone and Russo, RAVDESS, PLoS ONE 13(5), 2018.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from flowvqtalker.constants import EMOTIONS, FPS
from flowvqtalker.data.retarget import Retargeter, emotion_of
from flowvqtalker.data.shards import SAMPLES
from flowvqtalker.errors import UserError
from flowvqtalker.io.audio import load
from flowvqtalker.motion.flow import Flow
from flowvqtalker.speech.features import log_mel
from flowvqtalker.train.corpus import NEUTRAL, Corpus, Floats, MotionClip, encode_corpus, ping_pong

__all__ = ["perform"]

#: Frames per second of the action units.
_UNIT_FPS = 29.97


def perform(root: Path, flow: Flow, corpus: Corpus, retarget: Retargeter, copies: int = 1, seed: int = 0) -> Corpus:
    """The corpus and a clip for each performance.

    Arguments:
        root: folder with ``ravdess_au/frames.npz`` (``names``, and (T, 17) action units by recording) and the
            recordings, ``speech/ravdess/*.opus``.
        flow: its frozen speech encoder and lip prior give the lips.
        corpus: encoded clips; needs a neutral speaker.
        retarget: draws the differences of the emotions.
        copies: versions of each voice, see :func:`encode_corpus`.
        seed: of all draws.

    Raises:
        UserError: if the files are missing.
    """
    path = root / "ravdess_au" / "frames.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [str(name) for name in file["names"]]
            units = {key: file[key].astype(np.float32) for key in file.files if key != "names"}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} holds no action units of RAVDESS ({error}); check performances") from error
    shown = retarget.action_units(names)
    voices = []
    for name in units:
        wave = load(root / "speech" / "ravdess" / f"{name}.opus")
        frontend = flow.audio.config.frontend
        mel = log_mel(wave, frontend).astype(np.float16)
        still = np.zeros((len(wave) // SAMPLES, flow.config.dim), np.float32)
        emotion = EMOTIONS.index(emotion_of(name))
        voices.append(MotionClip(still, mel, emotion, True, name, frontend=frontend, retargeted=True))
    encoded = Corpus(voices)
    encode_corpus(encoded, flow.audio, copies, seed)
    speakers = [n for n, clip in enumerate(corpus.clips) if clip.speech and corpus.labels[n] == NEUTRAL]
    clips = []
    for number, (voice, course) in enumerate(zip(encoded.clips, units.values(), strict=True)):
        random = np.random.default_rng([seed, number])
        speaker = corpus.clips[speakers[random.integers(len(speakers))]]
        length = len(voice.frames)
        chosen = ping_pong(len(speaker.frames), length, int(random.integers(len(speaker.frames))))
        frames = (speaker.frames - _lips(flow, speaker))[chosen] + _lips(flow, voice)
        time = np.minimum(np.arange(length) / FPS * _UNIT_FPS, len(course) - 1).astype(np.int64)
        frames = frames + (course - np.nanmean(course, 0))[time] @ shown
        if voice.emotion != NEUTRAL:
            frames = retarget(frames, EMOTIONS[voice.emotion], random, voice.energy)
        clips.append(replace(voice, frames=frames.astype(np.float32), identity=speaker.identity))
    return corpus.extended(clips)


@torch.no_grad()
def _lips(flow: Flow, clip: MotionClip) -> Floats:
    """What the lip prior hears in a clip, (L, D)."""
    assert clip.features is not None
    lips: Floats = flow.predict_lips(torch.from_numpy(clip.features[0].astype(np.float32))).numpy()
    return lips
