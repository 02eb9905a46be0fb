"""Streams of samples: any blocks, latency, types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker.io import audio as decode
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.motion.stream import MotionStream

from ..conftest import babble, write_wav
from .conftest import joined


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_of_any_blocks_equals_the_file(talker, tmp_path, seed):
    path = write_wav(tmp_path / "speech.wav", babble(2.0))
    whole = joined(talker.motion(path, emotion="happy:0.6,angry:0.4", seed=5))
    wave = decode.load(path)
    generator = np.random.default_rng(seed)
    stream, parts, at = talker.stream(options=MotionOptions(emotion="happy:0.6,angry:0.4", seed=5)), [], 0
    while at < len(wave):
        size = int(generator.integers(640, 4000)) if seed else int(generator.integers(0, 700))
        parts.append(stream.push(wave[at : at + size]))
        at += size
    parts.append(stream.finish())
    beta, pose = joined(parts)
    assert torch.equal(beta, whole[0]) and torch.equal(pose, whole[1])
    assert stream.frames == len(whole[0]) == 50


def test_frames_come_within_the_latency_and_not_sooner(talker):
    stream = talker.stream()
    assert isinstance(stream, MotionStream)
    given = []  # samples heard when a frame came
    for heard in range(160, 16_000 * 2, 160):
        given += [heard] * len(stream.push(np.full(160, 0.01, np.float32)))
    delays = [heard / 16 - 40 * frame for frame, heard in enumerate(given)]
    assert max(delays) <= stream.latency_ms + 10  # blocks of 10 ms
    assert min(delays[10:]) > stream.latency_ms - 25
    assert stream.latency_ms == pytest.approx(stream.generator.lookahead * 40 + 137.5)


def test_samples_of_other_types(talker):
    wave = (babble(0.6) * 20_000).astype(np.int16)
    whole = joined(talker.stream().run([wave]))[0]
    scaled = wave.astype(np.float64) / 32768
    assert torch.equal(whole, joined(talker.stream().run([torch.from_numpy(scaled)]))[0])
    for samples, message in ((np.zeros((5, 2), np.float32), "one channel"), (np.zeros(5, np.int32), "float in")):
        with pytest.raises(ValueError, match=message):
            talker.stream().push(samples)
    assert len(talker.stream().finish()) == 0


def test_valence_and_arousal_choose_the_emotion(talker, tmp_path):
    path = write_wav(tmp_path / "speech.wav", babble(0.8))
    neutral, middle, happy, pleasant = (
        joined(talker.motion(path, **given))[0]
        for given in ({}, {"valence": 0.0}, {"emotion": "happy"}, {"valence": 0.81, "arousal": 0.51})
    )
    assert torch.equal(middle, neutral)
    assert (pleasant - happy).norm() < 0.1 * (happy - neutral).norm()
