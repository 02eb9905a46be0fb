"""The 512x512 crop that every model sees: placed by landmarks, sampled without aliasing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import CROP
from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import EYES, MOUTH_CORNERS, VERTICES
from flowvqtalker.io.image import ImageArray

__all__ = ["Crop", "crop_box"]

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Crop:
    """A similarity transform (rotation, uniform scale, shift) between an image and its crop.

    Attributes:
        matrix: (2, 3) float64, input pixels -> crop pixels. Coordinates are continuous: the centre of the first pixel
            is at 0.5, as in MediaPipe's landmarks.
    """

    matrix: npt.NDArray[np.float64]

    @property
    def scale(self) -> float:
        """Crop pixels per input pixel."""
        return float(np.hypot(self.matrix[0, 0], self.matrix[1, 0]))

    @property
    def inverse(self) -> npt.NDArray[np.float64]:
        """(2, 3): crop pixels -> input pixels."""
        linear = np.linalg.inv(self.matrix[:, :2])
        return np.concatenate([linear, -linear @ self.matrix[:, 2:]], axis=1)

    def points(self, points: Floats) -> Floats:
        """Points (..., 2 or 3) of the input in the crop; z, in pixels as well, is scaled."""
        return _move(self.matrix, points)

    def points_back(self, points: Floats) -> Floats:
        """Points (..., 2 or 3) of the crop in the input."""
        return _move(self.inverse, points)

    def apply(self, image: ImageArray) -> ImageArray:
        """The crop (512, 512, 3) uint8 of an image (H, W, 3) uint8.

        Large images are averaged down first to avoid aliasing. Outside of the image its reflection continues, blurred
        more with the distance, as in FFHQ.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"an image must have shape (H, W, 3) and type uint8, got {image.shape} {image.dtype}")
        result = _sample(image, self.matrix, (CROP, CROP), cv2.BORDER_REFLECT_101)
        height, width = image.shape[:2]
        back = self.inverse.astype(np.float32)
        centres = np.arange(CROP, dtype=np.float32) + 0.5
        x, y = (row[0] * centres + (row[1] * centres + row[2])[:, None] for row in back)
        outside = np.maximum(np.maximum(-x, x - width), np.maximum(-y, y - height)) * np.float32(self.scale)
        if outside.max() <= 0:
            return result
        # Blurring at a quarter of the size is as smooth and ten times as fast.
        low = cv2.resize(result, (CROP // 4, CROP // 4), interpolation=cv2.INTER_AREA)
        for sigma, reach in ((6.0, 24.0), (24.0, 96.0)):
            blurred = cv2.GaussianBlur(low, (0, 0), sigma / 4, borderType=cv2.BORDER_REFLECT_101)
            blurred = cv2.resize(blurred, (CROP, CROP), interpolation=cv2.INTER_LINEAR)
            share = np.clip(outside / np.float32(reach), 0, 1)
            result = cv2.blendLinear(blurred, result, share, 1 - share)
        return np.asarray(result, np.uint8)


def _sample(
    image: npt.NDArray[Any], matrix: npt.NDArray[np.float64], size: tuple[int, int], border: int
) -> npt.NDArray[Any]:
    """Resample an image by an affine map from input to output pixels (continuous coordinates).

    Arguments:
        image: (H, W, 3).
        matrix: (2, 3).
        size: width and height of the output.
        border: OpenCV's border mode.
    """
    matrix = matrix.copy()
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    height, width = image.shape[:2]
    if scale < 1:
        # Average down to the output's resolution, but only the visible part with a margin.
        linear = np.linalg.inv(matrix[:, :2])
        corners = (np.array([[0, 0], [0, size[1]], [size[0], 0], size], dtype=float) - matrix[:, 2]) @ linear.T
        margin = 8 / scale
        left, top = np.clip(np.floor(corners.min(0) - margin).astype(int), 0, [width - 1, height - 1])
        right, bottom = np.clip(np.ceil(corners.max(0) + margin).astype(int), [left + 1, top + 1], [width, height])
        image = image[top:bottom, left:right]
        small = tuple(max(1, round(extent * scale)) for extent in (right - left, bottom - top))
        matrix[:, 2] += matrix[:, :2] @ [left, top]
        matrix[:, :2] *= [(right - left) / small[0], (bottom - top) / small[1]]
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
    # OpenCV's origin is the centre of the first pixel.
    matrix[:, 2] += matrix[:, :2] @ [0.5, 0.5] - 0.5
    # For enlarging, cubic rings less than Lanczos (eight taps) and takes a quarter of the time.
    kernel = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_LANCZOS4
    return np.asarray(cv2.warpAffine(image, matrix, size, flags=kernel, borderMode=border))


def _move(matrix: npt.NDArray[np.float64], points: Floats) -> Floats:
    kind = points.dtype
    moved = points[..., :2] @ matrix[:, :2].T.astype(kind) + matrix[:, 2].astype(kind)
    if points.shape[-1] == 2:
        return moved
    scale = kind.type(np.hypot(matrix[0, 0], matrix[1, 0]))
    return np.concatenate([moved, points[..., 2:] * scale], axis=-1)


def crop_box(landmarks: Floats) -> Crop:
    """FFHQ's crop of a face (Karras et al. 2019, appendix A): an upright square defined by eyes and mouth.

    The horizontal axis is the line between the eyes plus the perpendicular of the line from eyes to mouth; half the
    side is the larger of 2.0 eye distances and 1.8 eye-mouth distances; the centre lies a tenth of the eye-mouth line
    below the eyes.

    Arguments:
        landmarks: (478, 2 or 3) of an image or (T, 478, 2 or 3) of a clip, in pixels. A clip gets one fixed crop from
            medians over its frames; frames with NaN are ignored.

    Raises:
        UserError: if no frame has landmarks.
    """
    if landmarks.ndim not in (2, 3) or landmarks.shape[-2] != VERTICES or landmarks.shape[-1] not in (2, 3):
        raise UserError(f"landmarks of shape (478, 3) or (T, 478, 3) are needed, got {landmarks.shape}")
    clip = landmarks.reshape(-1, VERTICES, landmarks.shape[-1])[..., :2].astype(np.float64)
    clip = clip[np.isfinite(clip).all((1, 2))]
    if not len(clip):
        raise UserError("no face found in any frame; give an image or clip in which a face is clearly visible")
    near, far = (np.median(clip[:, EYES[i]].mean(1), axis=0) for i in range(2))
    mouth = np.median(clip[:, MOUTH_CORNERS].mean(1), axis=0)
    across, down = far - near, mouth - (near + far) / 2
    axis = across + np.array([down[1], -down[0]])
    side = 2 * max(2.0 * float(np.hypot(*across)), 1.8 * float(np.hypot(*down)))
    length = float(np.hypot(*axis))
    if length < 1e-6 or side < 1e-6:
        raise UserError("eyes and mouth coincide in the landmarks; the face is too small or the landmarks are broken")
    cosine, sine = axis / length * (CROP / side)
    linear = np.array([[cosine, sine], [-sine, cosine]])
    centre = (near + far) / 2 + 0.1 * down
    shift = np.full(2, CROP / 2) - linear @ centre
    return Crop(np.concatenate([linear, shift[:, None]], axis=1))
