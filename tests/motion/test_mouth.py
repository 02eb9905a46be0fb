"""Lips that close where nobody speaks, and the detector that says where."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker.face.topology import LIDS, MOUTH_CORNERS
from flowvqtalker.io import audio as decode
from flowvqtalker.motion.mouth import CLOSED, MouthCloser, MouthGate
from flowvqtalker.speech.activity import SpeechActivity


@pytest.fixture(scope="module")
def closer(face):
    return MouthCloser(face, torch.zeros(80))


@pytest.fixture(scope="module")
def spoken(sample_speech):
    """Half a second of silence, two seconds of speech, a second of quiet noise."""
    wave = decode.load(sample_speech)[:32_000]
    noise = np.random.default_rng(0).normal(size=16_000) * 0.003
    return np.concatenate([np.zeros(8_000), wave, noise]).astype(np.float32)


def test_closing_brings_the_lips_together_and_moves_little_else(face, closer):
    beta = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    shut = closer(beta, torch.ones(50))
    assert closer.gap(beta).max() > 0.2 and closer.gap(shut).max() <= CLOSED
    moved = (face.shape(torch.zeros(80), shut) - face.shape(torch.zeros(80), beta)).norm(dim=-1)
    assert moved[:, list(MOUTH_CORNERS)].max() < 0.005 < moved[:, 14].max()
    assert moved[:, list(LIDS)].mean() < 0.02
    assert torch.equal(closer(beta, torch.zeros(50)), beta)
    half = closer.gap(closer(beta, torch.full((50,), 0.5)))
    assert ((half <= closer.gap(beta)) & (half >= closer.gap(shut))).all()


def test_the_gate_follows_the_speech(closer, spoken):
    """250 ms after speech the mouth is shut, and within it the motion is the sampled one."""
    beta = torch.randn(87, 64, generator=torch.Generator().manual_seed(1))
    gate = MouthGate(closer)
    gate.push(spoken)
    gated = gate(beta)
    assert closer.gap(gated[6:10]).max() <= CLOSED
    assert closer.gap(gated[70:]).max() <= CLOSED
    same = (gated == beta).all(1)
    assert same[16:50].float().mean() > 0.85


def test_the_gate_does_not_depend_on_blocks(closer, spoken):
    beta = torch.randn(80, 64, generator=torch.Generator().manual_seed(2))
    whole = MouthGate(closer)
    whole.push(spoken)
    expected = whole(beta)
    parts, gate, at = [], MouthGate(closer), 0
    for frame in range(80):
        end = min(len(spoken), 640 * frame + 1480)
        gate.push(spoken[at:end])
        parts.append(gate(beta[frame : frame + 1]))
        at = end
    assert torch.equal(torch.cat(parts), expected)


def test_an_order_to_shut_is_obeyed_at_once(closer, spoken):
    beta = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    gate = MouthGate(closer)
    gate.push(spoken)
    gate(torch.zeros(25, 64))
    assert gate.speaking
    gate.shut()
    assert closer.gap(gate(beta)[3:7]).max() <= CLOSED


def test_music_and_noise_are_not_speech(spoken):
    time = np.arange(32_000) / 16_000
    chord = sum(np.sin(2 * np.pi * f * time) for f in (220, 277, 330)) * 0.1
    noise = np.random.default_rng(0).normal(size=32_000) * 0.05
    heard = {name: np.mean(np.array(SpeechActivity().push(wave.astype(np.float32))) > 0.15) for name, wave in
             (("speech", spoken[8_000:40_000]), ("music", chord), ("noise", noise))}  # fmt: skip
    assert heard["speech"] > 0.8 and heard["music"] < 0.3 and heard["noise"] < 0.1


def test_speech_after_a_rest_in_zeros_is_heard_as_before(spoken):
    pause = np.zeros(40 * 512, np.float32)
    activity = SpeechActivity()
    activity.push(spoken)
    rest = activity.push(pause)
    again = np.array(activity.push(spoken)) > 0.15
    fresh = np.array(SpeechActivity().push(spoken)) > 0.15
    assert max(rest[8:]) < 0.05 and set(rest[16:]) == {0.0}
    assert fresh.any() and np.mean(again == fresh) > 0.98
