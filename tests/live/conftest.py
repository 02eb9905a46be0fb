"""One talker with tiny weights and its portrait."""

from __future__ import annotations

import pytest

from flowvqtalker.pipeline import Talker


@pytest.fixture(scope="session")
def live_talker(tiny_weights):
    return Talker.from_pretrained(tiny_weights, device="cpu", dtype="float32", components=("face", "motion", "render"))


@pytest.fixture(scope="session")
def live_portrait(live_talker, astronaut):
    return live_talker.portrait(astronaut)
