"""flowvqtalker: one portrait, a speech recording and an emotion in, an emotional talking-face video out."""

from __future__ import annotations

__all__ = ["EMOTIONS", "__version__"]

__version__ = "0.1.0"

#: The nine classes, in the order that every model, table and label uses: the eight emotions of MEAD and ``natural``
#: (speech without a marked emotion, as in HDTF; paper section 4.1).
EMOTIONS = ("angry", "contempt", "disgusted", "fear", "happy", "neutral", "sad", "surprised", "natural")
