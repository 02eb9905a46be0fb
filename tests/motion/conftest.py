"""Flows, speech and streams for the tests of motion."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_face_model, load_flows
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.pipeline import Talker
from flowvqtalker.speech.features import COLUMNS, MELS


@pytest.fixture(scope="module")
def talker(tiny_weights):
    return Talker.from_pretrained(tiny_weights, device="cpu", components=("face", "motion"))


@pytest.fixture(scope="module")
def face():
    return load_face_model()


@pytest.fixture(scope="module")
def trained():
    """The packaged flows: only they have learnt what normal motion is."""
    return load_flows()


@pytest.fixture(scope="module")
def tiny(talker):
    return talker._expflow, talker._poseflow, talker._bank


def joined(blocks):
    motion = Motion.join(blocks)
    return motion.expression, motion.pose


def make(flows, **settings):
    given = {"beta0": torch.zeros(64), "pose0": torch.zeros(6), "warm_up": 0, **settings}
    return MotionGenerator(*flows, **given)


def windows(frames, seed=3):
    return (
        torch.randn(frames, MELS, COLUMNS, generator=torch.Generator().manual_seed(seed)).cumsum(0).div(3).clamp(-4, 4)
    )
