"""Numbers and names that every part of the system shares, declared once."""

from __future__ import annotations

__all__ = ["CROP", "EMOTIONS", "FPS", "SAMPLE_RATE"]

#: The nine classes in the order of every model, table and label: the eight emotions of MEAD, then ``natural``
#: (speech without a marked emotion, as in HDTF; paper section 4.1).
EMOTIONS = ("angry", "contempt", "disgusted", "fear", "happy", "neutral", "sad", "surprised", "natural")
#: Video frames per second of all motion and video.
FPS = 25
#: Audio samples per second of everything that listens.
SAMPLE_RATE = 16_000
#: Side of the square face crop in pixels.
CROP = 512
