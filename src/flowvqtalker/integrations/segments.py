"""What shall happen at places in the speech, which waits and is spoken much later than it was pushed."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import numpy as np

from flowvqtalker.live import LiveFrame, LiveTalker

__all__ = ["Segments", "to_pcm"]

T = TypeVar("T")


class Segments(Generic[T]):
    """Follows a live stream and gives each mark back once all speech pushed before it has sounded.

    Arguments:
        live: the engine, to which nobody else pushes speech.
    """

    def __init__(self, live: LiveTalker) -> None:
        self._live, self._heard = live, live.pushed
        self._marks: deque[tuple[int, T]] = deque()

    @property
    def pending(self) -> bool:
        """Whether speech or marks are left."""
        return bool(self._marks) or self._live.pushed > self._heard

    def mark(self, mark: T) -> None:
        """Mark the end of what was pushed so far."""
        self._marks.append((self._live.pushed, mark))

    def interrupt(self) -> None:
        """Stop speaking; drops what waits, with its marks."""
        self._live.interrupt()
        self._marks.clear()
        self._heard = self._live.pushed

    def follow(self, frame: LiveFrame) -> tuple[bool, list[T]]:
        """Whether speech sounds in the next frame of the stream, and the marks that it reaches."""
        speaks = frame.spoken > self._heard
        self._heard = max(self._heard, frame.spoken)
        reached = []
        while self._marks and self._marks[0][0] <= self._heard:
            reached.append(self._marks.popleft()[1])
        return speaks, reached


def to_pcm(frame: LiveFrame) -> bytes:
    """The frame's sound as int16 in mono."""
    return np.round(frame.audio * 32767).astype(np.int16).tobytes()
