"""A visible label in the corner of every frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from flowvqtalker.io.image import ImageArray

__all__ = ["LABEL", "labelled"]

#: What the label says.
LABEL = "AI-generated"


def labelled(frames: Iterable[ImageArray], text: str = LABEL) -> Iterator[ImageArray]:
    """Frames with a label at the lower left: white letters on a dark box, a twentieth of the shorter side high.

    Arguments:
        frames: (H, W, 3) uint8 RGB, all of one size; they stay as they are.
    """
    light: np.ndarray | None = None
    for frame in frames:
        if light is None:
            light = _stencil(text, *frame.shape[:2])
            rows, columns = slice(frame.shape[0] - light.shape[0], None), slice(0, light.shape[1])
        marked = frame.copy()
        marked[rows, columns] = (frame[rows, columns] * (0.4 * (1 - light)) + 255 * light).astype(np.uint8)
        yield marked


def _stencil(text: str, height: int, width: int) -> np.ndarray:
    """How white each pixel of the box is, (h, w, 1) in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(8.0, min(height, width) / 20)
    font = ImageFont.load_default(size)
    _, _, right, bottom = font.getbbox(text)
    margin = size / 3
    box = Image.new("L", (min(width, int(right + 2 * margin)), min(height, int(bottom + 2 * margin))))
    ImageDraw.Draw(box).text((margin, margin), text, fill=255, font=font)
    return (np.asarray(box, np.float32) / 255)[..., None]
