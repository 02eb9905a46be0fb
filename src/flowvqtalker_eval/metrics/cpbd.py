"""CPBD: cumulative probability of blur detection (Narvekar and Karam 2011), higher is sharper.

The definition is that of the public Python port of the authors' program (``cpbd`` 1.0.7), which published tables use
and which no longer installs; here it is vectorised:

1. Canny (σ = 1, thresholds 0.1 and 0.2 on grey levels 0..255) finds blocks of 64x64 pixels with edges: more than 0.002
   of the block. Rows and columns beyond the last whole block do not count.
2. Edge pixels: horizontal Sobel s / 8, kept where its square exceeds 2 √mean(squares), thinned to maxima along the row
   or along the column, without the outermost pixels, where the gradient's angle is nearest to 0 or 180 degrees.
3. Width of an edge: how far grey levels keep rising (or falling) on both sides of it, at most 101 pixels each.
4. The just noticeable width is 5 in blocks of contrast (maximum - minimum) up to 50, else 3. Blur is seen with
   probability 1 - exp(-(w / w_jnb)^3.6); CPBD is the share of edges where this is below 0.635 (100 P rounds to 63).

The just noticeable width is in pixels, so the score depends on the resolution. It is therefore reported at the size of
the frames and with the shorter side at 256 pixels (area-averaged; smaller frames are enlarged).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Frames, Settings

__all__ = ["Sharpness", "cpbd", "cpbd_at", "edge_widths"]

_BLOCK = 64
_EDGES = 0.002 * _BLOCK**2
_FARTHEST = 100
_LOW, _HIGH = 0.1, 0.2  # Canny's thresholds
_MARGIN = 0.01  # exceeds the error of float32 on gradients of 8-bit images (at most 1443)

Bools = npt.NDArray[np.bool_]


def cpbd(image: Frames) -> float:
    """CPBD of one image in [0, 1]; 0 if it has no edge, as in the reference.

    Arguments:
        image: (H, W) grey or (H, W, 3) RGB, uint8, at least 64 pixels a side.

    Raises:
        UserError: if the image has another shape or type, or is smaller.
    """
    grey = _grey(image)
    levels = _blocks(grey)
    contrast = levels.max((1, 3)).astype(np.int32) - levels.min((1, 3))
    widths = _blocks(edge_widths(grey))
    row, _, column, _ = where = np.nonzero(widths * _with_edges(grey)[:, None, :, None])
    noticeable = np.where(contrast[row, column] <= 50, 5, 3)
    seen = np.round(100 * (1 - np.exp(-((widths[where] / noticeable) ** 3.6))))
    return float((seen <= 63).mean()) if len(seen) else 0.0


def cpbd_at(image: Frames, size: int = 256) -> float:
    """CPBD after the shorter side is brought to ``size`` pixels."""
    grey = _grey(image)
    scale = size / min(grey.shape)
    if scale != 1:
        wide, high = round(grey.shape[1] * scale), round(grey.shape[0] * scale)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        grey = np.asarray(cv2.resize(grey, (wide, high), interpolation=how), np.uint8)
    return cpbd(grey)


def _grey(image: Frames) -> Frames:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise UserError(f"CPBD needs an image of shape (H, W) or (H, W, 3) and uint8, got {image.shape} {image.dtype}")
    if min(image.shape[:2]) < _BLOCK:
        raise UserError(f"CPBD needs at least 64x64 pixels, got {image.shape[1]}x{image.shape[0]}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8) if image.ndim == 3 else image


def _blocks(values: Array) -> Array:
    """(rows, 64, columns, 64) of values (H, W)."""
    rows, columns = (n // _BLOCK for n in values.shape)
    return values[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns, _BLOCK)


def _with_edges(grey: Frames) -> Bools:
    """Which blocks (rows, columns) hold enough of Canny's edges.

    Canny takes 24 ms and is seldom needed. Strict maxima of the gradient above the high threshold are edges in any
    direction; pixels below the low threshold are none. Only if that leaves a block undecided, scikit-image decides.
    """
    tap, level = cv2.getGaussianKernel(9, 1.0, cv2.CV_32F), grey.astype(np.float32)
    weight = cv2.sepFilter2D(np.ones_like(level), cv2.CV_32F, tap, tap, borderType=cv2.BORDER_CONSTANT)
    smooth = cv2.sepFilter2D(level, cv2.CV_32F, tap, tap, borderType=cv2.BORDER_CONSTANT) / weight
    gradient = cv2.magnitude(
        *(cv2.Sobel(smooth, cv2.CV_32F, x, 1 - x, ksize=3, borderType=cv2.BORDER_REFLECT) for x in (1, 0))
    )
    around = cv2.dilate(gradient, np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8))
    inside = np.pad(np.ones((grey.shape[0] - 2, grey.shape[1] - 2), bool), 1)  # Canny leaves out the outermost pixels
    sure = _count(inside & (gradient > np.maximum(around, _HIGH) + _MARGIN))
    possible = _count(inside & (gradient > _LOW - _MARGIN))
    if ((sure > _EDGES) | (possible <= _EDGES)).all():
        return np.asarray(sure > _EDGES)
    try:
        from skimage.feature import canny
    except ImportError as error:
        raise MissingDependency("CPBD needs scikit-image; run `pip install 'flowvqtalker[eval]'`") from error
    return np.asarray(
        _count(canny(grey.astype(np.float64), sigma=1.0, low_threshold=_LOW, high_threshold=_HIGH)) > _EDGES
    )


def _count(mask: Bools) -> npt.NDArray[np.intp]:
    return np.asarray(np.count_nonzero(_blocks(mask), axis=(1, 3)))


def edge_widths(grey: Frames) -> npt.NDArray[np.int32]:
    """Width of the edge at each pixel of a grey image (H, W), 0 where there is none (Marziliano et al. 2002)."""
    level = grey.astype(np.int16)
    # Central differences. The angle rounds to 0 or 180 degrees below tan(22.5 degrees); without any horizontal
    # difference the reference takes it for 0, whatever the vertical one.
    right = level[1:-1, 2:] - level[1:-1, :-2]
    down = np.abs(level[2:, 1:-1] - level[:-2, 1:-1])
    across = (right == 0) | (down < (math.sqrt(2) - 1) * np.abs(right).astype(np.float32))
    y, x = np.nonzero(_edges(grey)[1:-1, 1:-1] & across)
    rising = right[y, x] >= 0
    y, x = y + 1, x + 1
    step = level[:, 1:] - level[:, :-1]  # (H, W-1): from pixel x to x + 1
    side = np.empty((2, len(y)), np.int32)
    for up in (True, False):
        chosen = rising == up
        rows, at = y[chosen], x[chosen]
        # Steps at which the slope ends, with one at both ends: the walk stops at the image's border.
        stops = np.pad(step <= 0 if up else step >= 0, ((0, 0), (1, 1)), constant_values=True)
        # Steps along the slope that end at pixel x - 1, and that begin at pixel x + 1.
        side[0, chosen] = at - 1 - _last(stops)[rows, at - 1]
        following = stops.shape[1] - 1 - _last(stops[:, ::-1])[:, ::-1]
        side[1, chosen] = following[rows, at + 2] - (at + 2)
    widths = np.zeros(grey.shape, np.int32)
    widths[y, x] = (np.minimum(side, _FARTHEST) + 1).sum(0)
    return widths


def _last(stops: Bools) -> npt.NDArray[np.int16]:
    """Column of the last stop at or before each column."""
    column = np.arange(stops.shape[1], dtype=np.int16)
    return np.asarray(np.maximum.accumulate(np.where(stops, column, np.int16(0)), axis=1))


def _edges(grey: Frames) -> Bools:
    """Thinned edges (H, W) by the horizontal Sobel filter; squares below 2^21 are exact in float32."""
    sobel = cv2.Sobel(grey, cv2.CV_32F, 1, 0, ksize=3, borderType=cv2.BORDER_REFLECT)
    strength = np.square(sobel)
    threshold = 64 * 2 * math.sqrt(float(strength.mean(dtype=np.float64)) / 64)
    strength[strength <= threshold] = 0
    padded = np.pad(strength, 1)
    along_row = (strength > padded[1:-1, :-2]) & (strength > padded[1:-1, 2:])
    along_column = (strength > padded[:-2, 1:-1]) & (strength > padded[2:, 1:-1])
    return np.asarray(along_row | along_column)


class Sharpness(FrameExtractor):
    """CPBD of each frame. Arrays: ``cpbd`` (T,) at the size of the frames, ``cpbd256`` (T,) at 256 pixels."""

    name = "cpbd"
    gives = ("cpbd", "cpbd256")

    def settings(self) -> Settings:
        return {"definition": "cpbd 1.0.7", "common size": 256}

    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        native = np.array([cpbd(frame) for frame in frames], np.float32)
        same = min(frames.shape[1:3]) == 256
        return {"cpbd": native, "cpbd256": native if same else np.array([cpbd_at(f) for f in frames], np.float32)}
