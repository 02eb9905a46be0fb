"""Read images: whatever Pillow opens -> upright 8-bit RGB in sRGB colours."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["ImageArray", "existing_file", "image_size", "read_image"]

logger = logging.getLogger(__name__)

#: An RGB image, (H, W, 3) uint8.
ImageArray = npt.NDArray[np.uint8]

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")


def existing_file(path: str | Path, what: str) -> Path:
    """The path, if it is a file.

    Raises:
        UserError: otherwise.
    """
    path = Path(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is a pipe or a device" if path.exists() else "does not exist"
        raise UserError(f"{what} {path} {problem}; check the name")
    return path


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of a single image as stored; None for an animation or another kind of file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _large_images(), Image.open(path) as image:
            # Phones store previews behind the photo (MPO); it is still one image.
            return image.size if getattr(image, "n_frames", 1) == 1 or image.format == "MPO" else None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def read_image(path: str | Path) -> ImageArray:
    """Read an image as (H, W, 3) uint8 RGB.

    Orientation (EXIF) and colour profile (ICC) are applied, transparency is laid on white, 16-bit and float images
    become 8-bit. Of an animation the first frame is taken. The limit is 178 million pixels.

    Raises:
        UserError: if the file does not exist, is no image, or is damaged.
    """
    path = existing_file(path, "image")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with _large_images(), Image.open(path) as opened:
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "I;16", "I;16B", "I;16L"):
                deep = np.asarray(image).astype(np.float64) / 257.0
                image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
            elif image.mode == "F":
                deep = np.nan_to_num(np.asarray(image)) * (255 if np.nanmax(np.asarray(image)) <= 1 else 1)
                image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
            transparent = image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info
            if transparent:
                image = image.convert("RGBA")
            image = _to_srgb(image, opened.info.get("icc_profile"), path)
            if transparent:
                image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
            return np.asarray(image.convert("RGB")).copy()
    except UnidentifiedImageError as error:
        what = "a HEIC image, which cannot be read" if _is_heic(path) else "not an image that can be read"
        raise UserError(f"{path} is {what}; give a JPEG, PNG or WebP file", code="not_an_image") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has too many pixels; scale it down, 512 to 4096 pixels a side are plenty", code="too_large"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} is a damaged image ({error}); give a complete JPEG, PNG or WebP file", code="not_an_image"
        ) from error


def _to_srgb(image: Any, profile: bytes | None, path: Path) -> Any:
    """Colours of an embedded ICC profile (phones write Display P3) as sRGB; without a usable profile, unchanged."""
    if not profile or image.mode not in ("RGB", "RGBA", "L", "CMYK"):
        return image
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).strip().startswith("sRGB"):
            return image  # a conversion would only add rounding
        target = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=target)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        logger.warning("%s: its colour profile cannot be used (%s); colours may be slightly off", path, error)
        return image


@contextmanager
def _large_images() -> Iterator[None]:
    """Pillow warns from 89 million pixels on and refuses twice as many; the warning is of no use to the user."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _is_heic(path: Path) -> bool:
    """Whether the file's own header says HEIF, which Pillow reads only with a plugin."""
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS
