"""Read images: whatever Pillow opens -> upright 8-bit RGB in sRGB colours."""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker.io.colour import ADOBE_RGB, is_srgb, to_srgb
from flowvqtalker.io.media import error_text, existing_file

__all__ = ["ImageArray", "animation_length", "image_size", "read_animation", "read_image"]

logger = logging.getLogger(__name__)

#: An RGB image, (H, W, 3) uint8.
ImageArray = npt.NDArray[np.uint8]

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
# Formats whose further pictures are those of an animation; elsewhere they are pages, layers or previews.
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
_ORIENTATION, _COLOUR_SPACE, _INTEROPERABILITY = 0x0112, 0xA001, 0xA005
_EXIF_IFD = 0x8769
# Pillow's transposition (Image.Transpose) of each EXIF orientation from 2 on.
_TRANSPOSED = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
_FRAME_MS = 100  # of a frame that states no duration, as browsers show it


def image_size(path: Path) -> tuple[int, int] | None:
    """Width and height of an image as displayed; None for an animation or another kind of file."""
    with suppress(UserError), _opened(path) as image:
        if not _is_animated(image):
            width, height = image.size
            return (height, width) if _orientation(image) >= 5 else (width, height)
    return None


def animation_length(path: Path) -> tuple[int, float] | None:
    """Number of frames and seconds of an animated image; None for another kind of file."""
    with suppress(UserError), _opened(path) as image:
        if _is_animated(image):
            lengths = []
            for number in range(image.n_frames):
                image.seek(number)
                lengths.append(_milliseconds(image))
            return len(lengths), sum(lengths) / 1000
    return None


def read_image(path: str | Path) -> ImageArray:
    """Read an image as (H, W, 3) uint8 RGB.

    Orientation (EXIF) and colours (ICC profile, CICP, gamma, Adobe RGB by EXIF) are applied, transparency is laid on
    white, 16-bit and float images become 8-bit. Of several pictures in a file the first is taken. The limit is 178
    million pixels.

    Raises:
        UserError: if the file does not exist, is no image, or is damaged.
    """
    path = existing_file(path, "image")
    with _opened(path) as image:
        return _pixels(image, path)


def read_animation(path: str | Path) -> Iterator[tuple[float, float, ImageArray]]:
    """Frames of an animated image: when each is shown and for how long, in seconds, and its pixels."""
    path = existing_file(path, "image")
    time = 0.0
    with _opened(path) as image:
        for number in range(image.n_frames):
            image.seek(number)
            length = _milliseconds(image) / 1000
            yield time, length, _pixels(image, path)
            time += length


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an image with Pillow.

    Its warnings (of odd EXIF tags, of many pixels) are of no use to the user. HEIC needs a plugin.

    Raises:
        UserError: if it is no image, or turns out damaged within the block.
    """
    from PIL import Image, UnidentifiedImageError

    heic, remedy = _is_heic(path), "give a JPEG, PNG or WebP file"
    if heic:
        try:
            import pi_heif

            pi_heif.register_heif_opener()
        except ImportError:
            remedy = f"run `pip install 'flowvqtalker[heic]'`, or {remedy}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except UnidentifiedImageError as error:
        what = "a HEIC image, which cannot be read" if heic else "not an image that can be read"
        raise UserError(f"{path} is {what}; {remedy}", code="not_an_image") from error
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{path} has too many pixels; scale it down, 512 to 4096 pixels a side are plenty", code="too_large"
        ) from error
    except UserError:
        raise
    except Exception as error:  # Pillow and its plugins raise errors of many kinds
        reason = error_text(error)
        raise UserError(
            f"{path} is a damaged image ({reason}); give a complete JPEG, PNG or WebP file", code="not_an_image"
        ) from error


def _is_animated(image: Any) -> bool:
    return image.format in _ANIMATED and getattr(image, "n_frames", 1) > 1


def _milliseconds(image: Any) -> float:
    """How long the current frame is shown; some formats know only once it is decoded."""
    image.load()
    return float(image.info.get("duration") or _FRAME_MS)


def _pixels(opened: Any, path: Path) -> ImageArray:
    """The current picture of an open image, upright, in sRGB, on white."""
    from PIL import Image

    opened.load()
    turn = _orientation(opened)
    image = opened.transpose(Image.Transpose(_TRANSPOSED[turn])) if turn > 1 else opened
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.float64) / 257.0
        image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        deep = np.nan_to_num(np.asarray(image)) * (255 if np.nanmax(np.asarray(image)) <= 1 else 1)
        image = Image.fromarray(np.clip(np.rint(deep), 0, 255).astype(np.uint8))
    alpha = None
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        alpha = image.convert("RGBA").getchannel("A")
    image = _to_srgb(image, opened, path)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, (255, 255, 255)), alpha)
    return np.asarray(image).copy()


def _exif(image: Any) -> Any:
    """EXIF tags; empty if they are damaged, which spoils no pixel."""
    from PIL import Image

    try:
        return image.getexif()
    except (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, OSError, struct.error):
        return Image.Exif()


def _orientation(image: Any) -> int:
    value = _exif(image).get(_ORIENTATION, 1)
    return value if value in _TRANSPOSED else 1


def _to_srgb(image: Any, opened: Any, path: Path) -> Any:
    """The picture as sRGB, mode RGB, without its transparency."""
    from PIL import Image, ImageCms

    profile = opened.info.get("icc_profile")
    if profile and (converted := _by_profile(image, profile, path)) is not None:
        return converted
    if image.mode == "LAB":
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    plain = image.convert("RGB")
    primaries, transfer = _described(opened, path)
    if isinstance(primaries, int) and isinstance(transfer, int) and is_srgb(primaries, transfer):
        return plain
    return Image.fromarray(to_srgb(np.asarray(plain), primaries, transfer))


def _by_profile(image: Any, profile: bytes, path: Path) -> Any | None:
    """Colours of an embedded ICC profile (phones write Display P3) as sRGB; None if it cannot be used."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        if ImageCms.getProfileDescription(source).strip().startswith("sRGB"):
            return image.convert("RGB")  # a conversion would only add rounding
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[space]
        image = image if image.mode == mode else image.convert(mode)
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, LookupError) as error:
        reason = error_text(error)
        logger.warning("%s: its colour profile cannot be used (%s); colours may be slightly off", path, reason)
        return None


def _described(opened: Any, path: Path) -> tuple[int | tuple[float, ...], int | float]:
    """Primaries and transfer of an image without a profile, as :func:`to_srgb` takes them."""
    with path.open("rb") as file:
        head = file.read(65536)
    # CICP: a chunk of PNG before the pixels; a box of AVIF's (and HEIC's) header, in two bytes each.
    for mark, size in ((b"cICP", 1), (b"colrnclx", 2)):
        place = head.find(mark) + len(mark)
        if place >= len(mark) and opened.format in ("PNG", "AVIF", "HEIF"):
            first, second = (int.from_bytes(head[place + k * size : place + (k + 1) * size], "big") for k in (0, 1))
            return first, second
    gamma = opened.info.get("gamma")
    if gamma and "srgb" not in opened.info and abs(gamma * 2.2 - 1) > 0.05:
        chromaticity = opened.info.get("chromaticity")  # of white, then red, green and blue
        return tuple(chromaticity[2:]) if chromaticity else 1, 1 / float(gamma)
    exif = _exif(opened)
    space = exif.get_ifd(_EXIF_IFD).get(_COLOUR_SPACE)
    if space == 2 or (space == 0xFFFF and exif.get_ifd(_INTEROPERABILITY).get(1) == "R03"):
        return ADOBE_RGB, 563 / 256
    return 1, 13


def _is_heic(path: Path) -> bool:
    """Whether the file's own header says HEIF, which Pillow reads only with a plugin."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS
