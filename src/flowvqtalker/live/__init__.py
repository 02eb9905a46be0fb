"""The real-time engine: speech in, a talking portrait out, without end."""

from flowvqtalker.live.engine import LiveFrame, State
from flowvqtalker.live.talker import LiveTalker

__all__ = ["LiveFrame", "LiveTalker", "State"]
