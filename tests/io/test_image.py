"""Images in every form: modes, bit depths, orientation, colour profiles, damage."""

from __future__ import annotations

import base64
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from flowvqtalker.errors import UserError
from flowvqtalker.io.image import image_size, read_image


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


def colour(path) -> np.ndarray:
    """A pixel of a file as integers that can be subtracted."""
    return read_image(path)[4, 4].astype(int)


def profile_of(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of a colour space of devices, with these tags."""
    tags = {b"desc": b"desc" + bytes(4) + (5).to_bytes(4, "big") + b"test\0" + bytes(79), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        table += tag + (start + len(body)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        body += content + bytes(-len(content) % 4)
    head = bytearray(128)
    head[0:4] = (start + len(body)).to_bytes(4, "big")
    head[8:12] = bytes((2, 0x40, 0, 0))
    head[12:24], head[36:40] = (
        (b"prtr" if space == b"CMYK" else b"mntr") + space + (b"Lab " if space == b"CMYK" else b"XYZ "),
        b"acsp",
    )
    head[68:80] = b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    return bytes(head) + len(tags).to_bytes(4, "big") + table + body


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big")
    white = b"XYZ " + bytes(4) + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    return profile_of(b"GRAY", {b"wtpt": white, b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A press whose lightness is that of the paper less 60 for full black, and without any colour."""
    identity = bytes(range(256))
    nodes = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = b"".join(bytes((round(255 * (1 - 0.6 * k)), 128, 128)) for *_, k in nodes)
    matrix = b"".join((65536 if row == column else 0).to_bytes(4, "big") for row in range(3) for column in range(3))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + identity * 4 + table + identity * 3
    return profile_of(b"CMYK", {b"A2B0": lut})


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_profiles_of_grey_images_are_applied(tmp_path, mode):
    """Grey 128 of gamma 1 is sRGB 188; the transparency of half of the image must survive the conversion."""
    picture = Image.new(mode, (8, 8), 128 if mode == "L" else (128, 255))
    if mode == "LA":
        picture.paste((128, 0), (0, 0, 8, 4))
    picture.save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    image = read_image(tmp_path / "a.png")
    assert image[6, 4] == pytest.approx((188, 188, 188), abs=2)
    assert np.all(image[1] == (188 if mode == "L" else 255)) or mode == "L"


def test_sixteen_bits_and_palettes_keep_their_profile(tmp_path):
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "a.png", icc_profile=grey_profile(1.0))
    assert colour(tmp_path / "a.png") == pytest.approx((188, 188, 188), abs=2)
    Image.new("RGB", (8, 8), (200, 120, 100)).quantize(4).save(tmp_path / "p.png", icc_profile=display_p3())
    assert colour(tmp_path / "p.png") == pytest.approx((213, 116, 95), abs=3)
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png", icc_profile=display_p3())  # grey with a profile of colour
    assert colour(tmp_path / "l.png") == pytest.approx((77, 77, 77), abs=2)


def test_cmyk_goes_through_its_own_profile(tmp_path):
    """L* = 70 of a press whose black is L* = 40, with black point compensation; without the profile it would be 127."""
    Image.new("CMYK", (8, 8), (0, 0, 0, 128)).save(tmp_path / "a.jpg", quality=100, icc_profile=cmyk_profile())
    assert colour(tmp_path / "a.jpg") == pytest.approx((156, 156, 156), abs=3)


def png_with(path, chunk: bytes, content: bytes, colour=(200, 120, 100)) -> None:
    """A PNG with one chunk more, before its pixels."""
    Image.new("RGB", (8, 8), colour).save(path)
    data = path.read_bytes()
    body = chunk + content
    added = len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    path.write_bytes(data[:33] + added + data[33:])


def test_colours_by_numbers_in_png(tmp_path):
    png_with(tmp_path / "p3.png", b"cICP", bytes((12, 13, 0, 1)))
    assert colour(tmp_path / "p3.png") == pytest.approx((213, 115, 94), abs=1)
    png_with(tmp_path / "linear.png", b"gAMA", (100_000).to_bytes(4, "big"), (55, 55, 55))
    assert colour(tmp_path / "linear.png") == pytest.approx((128, 128, 128), abs=1)
    png_with(tmp_path / "usual.png", b"gAMA", (45_455).to_bytes(4, "big"))
    assert tuple(read_image(tmp_path / "usual.png")[4, 4]) == (200, 120, 100)


def test_adobe_rgb_by_exif(tmp_path):
    """Cameras write Adobe RGB without a profile: 'uncalibrated' and the interoperability index R03."""
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: 0xFFFF, 0xA005: {1: "R03"}})
    Image.new("RGB", (16, 16), (200, 120, 100)).save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    assert colour(tmp_path / "a.jpg") == pytest.approx((224, 121, 100), abs=2)


def test_colours_by_numbers_in_avif(tmp_path):
    Image.new("RGB", (16, 16), (200, 120, 100)).save(tmp_path / "a.avif", quality=100, subsampling="4:4:4")
    data = (tmp_path / "a.avif").read_bytes()
    place = data.index(b"colrnclx") + 8
    (tmp_path / "b.avif").write_bytes(data[:place] + (12).to_bytes(2, "big") + data[place + 2 :])
    assert colour(tmp_path / "a.avif") == pytest.approx((200, 120, 100), abs=2)
    assert colour(tmp_path / "b.avif") == pytest.approx((213, 115, 94), abs=3)


@pytest.mark.parametrize("orientation", [2, 4, 5, 7])
def test_mirrored_orientations_are_applied(tmp_path, orientation):
    upright = gradient()
    stored = {
        2: upright[:, ::-1],
        4: upright[::-1],
        5: np.swapaxes(upright, 0, 1),
        7: np.rot90(upright, 2).swapaxes(0, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)
    assert image_size(tmp_path / "a.png") == (64, 48)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x0c\0\0", b"junk"]
)
def test_odd_exif_costs_neither_the_picture_nor_a_warning(tmp_path, exif, recwarn):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", quality=100, exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (48, 64, 3)
    assert not recwarn.list


def test_of_several_pictures_the_first_is_taken(tmp_path):
    first, second = Image.fromarray(gradient()), Image.new("RGB", (64, 48))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    assert image_size(tmp_path / "a.tif") == (64, 48)
    assert np.array_equal(read_image(tmp_path / "a.tif"), gradient())
    first.save(tmp_path / "a.mpo", save_all=True, append_images=[second], quality=95)
    assert image_size(tmp_path / "a.mpo") == (64, 48)
    assert np.abs(read_image(tmp_path / "a.mpo").astype(int) - gradient()).mean() < 4


#: 64x64: a blue band of 16 rows above red (200, 120, 100); by pillow-heif.
HEIC = (
    "0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<00042ZDn*}000000000XXk=`10000000000aA{+700000000000000000000B57=IV*mgE07O6"
    "l0RRC200001dH?|c00000007AV001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F#rGn01j|zbZr0t000010002iX>f9I0002DX>en20001Z"
    "Xm(>m0RwOV0058x000009`FGC{rLC*01pFT0096PKmiN^|NjGU00093kN^M!000939=ZZRVE_RDD?$MQ18@KU0|1Z!00RI30{|YNAb|yz>PacCZ"
    "UPz%2mk;B0LTCU0{{p>VgLaE2SfqEa<C#m0000JV{dG7ZewhC0096E00w{n000zeb8uw<00000002M$002M$000nhX?SS>000032nYxO000+haBX"
    "1#00000000310R({p0|Wp70MTt^VRQfh0L3T)uL<De1zt@D|NO&d*Zv15|K(b!QYSC;bW4Bcs0#j_J<nX0G%CfXs_O6t8r0wYlL)~VqSehebyf+d"
    "v1^cSnHd2_LcPuMW+#!8!NL!OXiT&4j8)3-3$`IVmuw@s<+@n>{o<LU9v-b0zZNG*P4X!96kv9EW-FZug`psX^roqS@*WDHwqLsdt??Gij2F{ZAq"
    "*#6bJ{FA=yg;eGR@R?d<M19`FI0s-hd|iaKl<{FYZ@`(XZtGH~BB%jxpc"
)


def test_heic_is_read(tmp_path):
    pytest.importorskip("pi_heif")
    (tmp_path / "a.heic").write_bytes(base64.b85decode(HEIC))
    image = read_image(tmp_path / "a.heic").astype(int)
    assert image[48, 32] == pytest.approx((200, 120, 100), abs=6)
    assert image[4, 32] == pytest.approx((40, 60, 200), abs=6)


def test_heic_without_its_plugin_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    monkeypatch.setattr("PIL.Image.ID", [name for name in Image.ID if name != "HEIF"])
    (tmp_path / "a.heic").write_bytes(base64.b85decode(HEIC))
    with pytest.raises(UserError, match=r"flowvqtalker\[heic\]"):
        read_image(tmp_path / "a.heic")
