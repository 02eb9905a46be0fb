"""CPBD: cumulative probability of blur detection (Narvekar and Karam 2011), higher is sharper; vectorised.

The definition is that of the public Python port of the authors' program (``cpbd`` 1.0.7), which published tables use:

1. Canny (σ = 1, thresholds 0.1 and 0.2 on grey levels 0..255) finds blocks of 64x64 pixels that hold edges: more than
   0.002 of the block. Rows and columns beyond the last whole block do not count.
2. Edge pixels: horizontal Sobel s / 8, kept where its square exceeds 2 √mean(squares), thinned to maxima along the row
   or along the column, without the outermost pixels, where the gradient's angle is nearest to 0 or 180 degrees.
3. Width of an edge: how far grey levels keep rising (or falling) to both sides of it, at most 101 pixels each.
4. The width that is just noticeable is 5 in blocks of contrast (maximum - minimum) up to 50, else 3. The probability
   to see blur is 1 - exp(-(w / w_jnb)^3.6); CPBD is the share of edges where it is below 0.635 (100 P rounds to 63).

The just noticeable width is in pixels, so the score depends on the resolution. Therefore it is reported at the size of
the frames and at a common size, the shorter side 256 (area-averaged; smaller frames are enlarged).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.analysis import Array, FrameExtractor, Settings

__all__ = ["Sharpness", "cpbd", "cpbd_at", "edge_widths"]

_BLOCK = 64
_EDGES = 8  # of 4096 pixels: 0.002 of a block, rounded down
_FARTHEST = 100
_LOW, _HIGH = 0.1, 0.2  # Canny's thresholds
_MARGIN = 0.01  # more than float32 loses on gradients of 8-bit pictures (at most 1443)

Pixels = npt.NDArray[np.uint8]


def cpbd(image: Pixels) -> float:
    """CPBD of one picture.

    Arguments:
        image: (H, W) grey or (H, W, 3) RGB, uint8, at least 64 pixels a side.

    Returns:
        in [0, 1]; 0 if there is no edge, as in the reference.

    Raises:
        UserError: if the picture has another shape or type, or is smaller.
    """
    grey = _grey(image)
    rows, columns = (n // _BLOCK * _BLOCK for n in grey.shape)
    widths = edge_widths(grey)
    blocks = grey[:rows, :columns].reshape(rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    contrast = blocks.max((1, 3)).astype(np.int32) - blocks.min((1, 3))
    # For each width (2 to 202) and each just noticeable width: is the blur seen in less than 63.5 % of cases?
    y, x = np.nonzero(widths[:rows, :columns])
    block = (y // _BLOCK, x // _BLOCK)
    counted = _edge_blocks(grey)[block]
    sharp = np.where(contrast[block] <= 50, _SHARP[5][widths[y, x]], _SHARP[3][widths[y, x]])
    return float(sharp[counted].mean()) if counted.any() else 0.0


def _unseen(noticeable: int) -> npt.NDArray[np.bool_]:
    widths = np.arange(2 * _FARTHEST + 3)
    return np.asarray(np.round(100 * (1 - np.exp(-((widths / noticeable) ** 3.6)))) <= 63)


_SHARP = {5: _unseen(5), 3: _unseen(3)}


def cpbd_at(image: Pixels, size: int = 256) -> float:
    """CPBD after the shorter side is brought to ``size`` pixels."""
    grey = _grey(image)
    scale = size / min(grey.shape)
    if scale != 1:
        wide, high = round(grey.shape[1] * scale), round(grey.shape[0] * scale)
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        grey = np.asarray(cv2.resize(grey, (wide, high), interpolation=how), np.uint8)
    return cpbd(grey)


def _grey(image: Pixels) -> Pixels:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise UserError(f"CPBD needs a picture of shape (H, W) or (H, W, 3) and uint8, got {image.shape} {image.dtype}")
    if min(image.shape[:2]) < _BLOCK:
        raise UserError(f"CPBD needs at least 64x64 pixels, got {image.shape[1]}x{image.shape[0]}")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8) if image.ndim == 3 else image


def edge_widths(grey: Pixels) -> npt.NDArray[np.int32]:
    """Width of the edge at each pixel of a grey picture (H, W), 0 where there is none (Marziliano et al. 2002)."""
    edges = _edges(grey)
    # Central differences, the outermost pixels do not count. tan(22.5 degrees): the angle rounds to 0 or 180.
    level = grey.astype(np.int16)
    right = level[1:-1, 2:] - level[1:-1, :-2]
    down = np.abs(level[2:, 1:-1] - level[:-2, 1:-1])
    # Without any horizontal difference the reference takes the angle for 0, whatever the vertical one.
    flat = right == 0
    across = flat | (down < (math.sqrt(2) - 1) * np.abs(right).astype(np.float32))
    y, x = np.nonzero(edges[1:-1, 1:-1] & across)
    rising = right[y, x] >= 0
    y, x = y + 1, x + 1
    step = level[:, 1:] - level[:, :-1]  # (H, W-1): from pixel x to x + 1
    side = np.empty((2, len(y)), np.int32)
    for up in (True, False):
        chosen = rising == up
        rows, at = y[chosen], x[chosen]
        # A row of steps that do not go on, with one at both ends: the walk stops at the picture's border.
        stops = np.ones((len(grey), step.shape[1] + 2), bool)
        np.less_equal(step, 0, out=stops[:, 1:-1]) if up else np.greater_equal(step, 0, out=stops[:, 1:-1])
        # Steps in the direction of the slope that end at pixel x - 1, and that begin at pixel x + 1.
        side[0, chosen] = at - 1 - _last(stops)[rows, at - 1]
        side[1, chosen] = _next(stops)[rows, at + 2] - (at + 2)
    widths = np.zeros(grey.shape, np.int32)
    widths[y, x] = (np.minimum(side, _FARTHEST) + 1).sum(0)
    return widths


def _last(stops: npt.NDArray[np.bool_]) -> npt.NDArray[np.int16]:
    """Column of the last stop at or before each column."""
    column = np.arange(stops.shape[1], dtype=np.int16)
    return np.asarray(np.maximum.accumulate(np.where(stops, column, np.int16(0)), axis=1))


def _next(stops: npt.NDArray[np.bool_]) -> npt.NDArray[np.int16]:
    """Column of the next stop at or after each column."""
    return np.asarray(stops.shape[1] - 1 - _last(stops[:, ::-1])[:, ::-1])


def _edges(grey: Pixels) -> npt.NDArray[np.bool_]:
    """Thinned edges (H, W) by the horizontal Sobel filter; squares below 2^21 are exact in float32."""
    sobel = cv2.Sobel(grey, cv2.CV_32F, 1, 0, ksize=3, borderType=cv2.BORDER_REFLECT)
    strength = np.square(sobel)
    threshold = 64 * 2 * math.sqrt(float(strength.mean(dtype=np.float64)) / 64)
    strength[strength <= threshold] = 0
    padded = cv2.copyMakeBorder(strength, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    along_row = (strength > padded[1:-1, :-2]) & (strength > padded[1:-1, 2:])
    along_column = (strength > padded[:-2, 1:-1]) & (strength > padded[2:, 1:-1])
    return np.asarray(along_row | along_column)


def _edge_blocks(grey: Pixels) -> npt.NDArray[np.bool_]:
    """Which blocks (rows, columns) hold more than 8 pixels of Canny's edges.

    Canny itself is slow and seldom needed: strict maxima of the gradient among their eight neighbours, above
    the high threshold, are edges whatever the direction; pixels below the low threshold are none. Only if that leaves
    a block open, scikit-image decides.
    """
    picture = grey.astype(np.float32)
    smooth = _smooth(picture) / _smooth(np.ones_like(picture))
    gx = cv2.Sobel(smooth, cv2.CV_32F, 1, 0, ksize=3, borderType=cv2.BORDER_REFLECT)
    gy = cv2.Sobel(smooth, cv2.CV_32F, 0, 1, ksize=3, borderType=cv2.BORDER_REFLECT)
    magnitude = cv2.magnitude(gx, gy)
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], np.uint8)
    sure = magnitude > np.maximum(cv2.dilate(magnitude, ring), _HIGH) + _MARGIN
    possible = magnitude > _LOW - _MARGIN
    for mask in (sure, possible):  # Canny leaves out the outermost pixels
        mask[[0, -1]] = False
        mask[:, [0, -1]] = False
    yes = _count(sure) > _EDGES
    if not (yes | (_count(possible) <= _EDGES)).all():
        yes = _count(_canny(grey)) > _EDGES
    return yes


def _smooth(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Gaussian of σ = 1, nine pixels wide, nothing outside the picture."""
    tap = cv2.getGaussianKernel(9, 1.0, cv2.CV_32F)
    return np.asarray(cv2.sepFilter2D(picture, cv2.CV_32F, tap, tap, borderType=cv2.BORDER_CONSTANT), np.float32)


def _count(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
    rows, columns = (n // _BLOCK for n in mask.shape)
    whole = mask[: rows * _BLOCK, : columns * _BLOCK].reshape(rows, _BLOCK, columns, _BLOCK)
    return np.asarray(np.count_nonzero(whole, axis=(1, 3)))


def _canny(grey: Pixels) -> npt.NDArray[np.bool_]:
    try:
        from skimage.feature import canny
    except ImportError as error:
        raise MissingDependency("CPBD needs scikit-image; run `pip install 'flowvqtalker[eval]'`") from error
    return np.asarray(canny(grey.astype(np.float64), sigma=1.0, low_threshold=_LOW, high_threshold=_HIGH))


class Sharpness(FrameExtractor):
    """CPBD of each frame. Arrays: ``cpbd`` (T,) at the size of the frames, ``cpbd256`` (T,) at 256 pixels."""

    name = "cpbd"
    needs: tuple[str, ...] = ()
    gives = ("cpbd", "cpbd256")

    def settings(self) -> Settings:
        """The definition; the size of the frames stands in the analysis."""
        return {"definition": "cpbd 1.0.7", "common size": 256}

    def __call__(self, frames: Pixels, known: dict[str, Array]) -> dict[str, Array]:
        """Frames (n, H, W, 3) to two scores each."""
        native = np.array([cpbd(frame) for frame in frames], np.float32)
        same = min(frames.shape[1:3]) == 256
        return {"cpbd": native, "cpbd256": native if same else np.array([cpbd_at(f) for f in frames], np.float32)}
