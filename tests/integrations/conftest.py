"""An engine with tiny weights that draws little."""

from __future__ import annotations

import pytest

from flowvqtalker.live import LiveTalker

from ..live.conftest import live_portrait, live_talker

__all__ = ["live_portrait", "live_talker"]


@pytest.fixture
def live(live_talker, live_portrait):
    with LiveTalker(live_talker, live_portrait, audio_rate=16_000, fps=5) as made:
        yield made
