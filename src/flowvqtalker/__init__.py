"""flowvqtalker: one portrait, a speech recording and an emotion in, an emotional talking-face video out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowvqtalker.constants import EMOTIONS

if TYPE_CHECKING:
    from flowvqtalker.pipeline import Talker

__all__ = ["EMOTIONS", "Talker", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Talker pulls in torch and mediapipe; whoever needs only a name of this package does not wait for them.
    if name == "Talker":
        from flowvqtalker.pipeline import Talker

        return Talker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
