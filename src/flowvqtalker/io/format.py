"""Frame rate, size and encoding of a written video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from flowvqtalker.constants import CROP, FPS
from flowvqtalker.errors import UserError

if TYPE_CHECKING:
    from flowvqtalker.io.image import ImageArray

__all__ = ["DEFAULT_VIDEO", "PRESETS", "RATES", "SIZES", "Preset", "VideoFormat"]

#: Frames per second that can be written, and sides of the crop in pixels.
RATES, SIZES = (12.5, 25.0, 30.0), (256, CROP)


class Preset(NamedTuple):
    """What a preset stands for."""

    fps: float
    size: int
    x264: str
    """x264's own preset: how much time the encoder takes for a smaller file of the same quality."""


#: ``fast`` draws half of the frames; it is for machines that ``quality`` keeps waiting.
PRESETS = {"quality": Preset(FPS, CROP, "superfast"), "fast": Preset(12.5, 256, "ultrafast")}


@dataclass(frozen=True, kw_only=True)
class VideoFormat:
    """How a video is written. The motion is made at 25 frames per second whatever the rate is.

    Raises:
        UserError: if a value is not one of :data:`RATES`, :data:`SIZES` or :data:`PRESETS`.
    """

    preset: str = "quality"
    """quality (512x512 at 25 fps) or fast (256x256 at 12.5 fps, for weak machines)."""
    fps: float | None = None
    """Frames per second: 12.5, 25 or 30. Default: the preset's."""
    size: int | None = None
    """Side of the crop in pixels: 256 or 512. Default: the preset's."""

    def __post_init__(self) -> None:
        for name, allowed in (("preset", tuple(PRESETS)), ("fps", (None, *RATES)), ("size", (None, *SIZES))):
            if (value := getattr(self, name)) not in allowed:
                choices = ", ".join(f"{choice:g}" if isinstance(choice, float) else str(choice) for choice in allowed)
                raise UserError(f"{name} {value} cannot be written; choose one of {choices.removeprefix('None, ')}")

    @property
    def rate(self) -> Fraction:
        """Frames per second."""
        return Fraction(self.fps or PRESETS[self.preset].fps)

    @property
    def x264(self) -> str:
        """x264's preset."""
        return PRESETS[self.preset].x264

    def frames(self, count: int) -> int:
        """Frames that cover ``count`` frames of motion."""
        return -(-count * self.rate // FPS)

    def resized(self, frames: Iterable[ImageArray]) -> Iterator[ImageArray]:
        """Crops (512, 512, 3) at the size of the video."""
        size = self.size or PRESETS[self.preset].size
        if size == CROP:
            yield from frames
            return
        import cv2
        import numpy as np

        for frame in frames:
            yield np.asarray(cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA), np.uint8)


DEFAULT_VIDEO = VideoFormat()
