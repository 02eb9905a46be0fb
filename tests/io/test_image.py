"""Images in every form: modes, bit depths, orientation, colour profiles, damage."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageCms

from flowvqtalker.errors import UserError
from flowvqtalker.io.image import read_image


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose corners differ: red grows to the right, green downwards."""
    picture = np.full((height, width, 3), 40, np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture


def test_plain_image_is_read_unchanged(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert np.array_equal(image, gradient())
    assert image.flags.writeable


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(gradient()).convert(mode).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == (48, 64, 3)
    if mode in ("L", "LA"):
        np.testing.assert_array_equal(image[..., 0], np.asarray(Image.fromarray(gradient()).convert("L")))
    if mode in ("RGBA", "CMYK"):
        assert np.abs(image.astype(int) - gradient()).max() <= 2


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.dstack([gradient(), np.full((48, 64), 255, np.uint8)])
    rgba[:24, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert np.all(image[:24] == 255)
    assert np.array_equal(image[24:], gradient()[24:])


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.min() == 0
    assert image.max() == 255
    assert np.abs(image[..., 0] - deep / 257).max() <= 0.51


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_the_camera_is_applied(tmp_path, orientation):
    upright = gradient()
    stored = np.rot90(upright, {1: 0, 3: 2, 6: 1, 8: 3}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=95, exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == upright.shape
    assert np.abs(image.astype(int) - upright).mean() < 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "not an image"), (b"hello, this is text", "not an image"), ("cut", "damaged")],
)
def test_files_that_are_no_image_are_refused(tmp_path, content, message):
    path = tmp_path / "a.png"
    if content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:3000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_image(path)


def display_p3() -> bytes:
    """A matrix profile with the primaries of Display P3 (D50-adapted, as in Apple's) and a gamma of 2.2."""

    def number(value: float) -> bytes:
        return round(value * 65536).to_bytes(4, "big", signed=True)

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(map(number, values))

    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(2.2 * 256).to_bytes(2, "big") + bytes(2)
    name = b"desc" + bytes(4) + (11).to_bytes(4, "big") + b"Display P3\0" + bytes(79 + 2)
    tags = {
        b"desc": name, b"cprt": b"text" + bytes(4) + b"none\0\0\0\0", b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.51512, 0.24120, -0.00105), b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.15710, 0.06657, 0.78407), b"rTRC": curve, b"gTRC": curve, b"bTRC": curve,
    }  # fmt: skip
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + (start + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content + bytes(-len(content) % 4)
    head = bytearray(128)
    head[0:4] = (start + len(body)).to_bytes(4, "big")
    head[8:12] = bytes((2, 0x40, 0, 0))
    head[12:24], head[36:40] = b"mntrRGB XYZ ", b"acsp"
    head[68:80] = number(0.9642) + number(1.0) + number(0.8249)
    return bytes(head) + len(tags).to_bytes(4, "big") + table + body


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_display_p3_becomes_srgb(tmp_path, mode):
    """A red of P3 is outside of sRGB; a soft one must come out more saturated in sRGB's numbers than it is stored."""
    Image.new(mode, (8, 8), (200, 120, 100)).save(tmp_path / "a.png", icc_profile=display_p3())
    red, green, blue = read_image(tmp_path / "a.png")[4, 4].astype(int)
    assert red == pytest.approx(213, abs=3)
    assert green == pytest.approx(116, abs=3)
    assert blue == pytest.approx(95, abs=3)


def test_srgb_and_broken_profiles_change_nothing(tmp_path, caplog):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("a.png", srgb), ("b.png", b"no profile at all")):
        Image.fromarray(gradient()).save(tmp_path / name, icc_profile=profile)
        assert np.array_equal(read_image(tmp_path / name), gradient())
    assert "colour profile cannot be used" in caplog.text
