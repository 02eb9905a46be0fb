"""Portraits as they come: tilted, small, cut off, several, turned away, in every kind of file."""

from __future__ import annotations

import logging
import math
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import crop_box
from flowvqtalker.face.detect import MAX_RESIDUAL, detect_faces
from flowvqtalker.face.portrait import load_portrait, track
from flowvqtalker.face.tracker import Face, FaceTracker
from flowvqtalker.io.image import read_image
from flowvqtalker.io.video import VideoWriter
from flowvqtalker.loading import load_face_model


@pytest.fixture(scope="module")
def model():
    return load_face_model(None)


@pytest.fixture(scope="module")
def tracker():
    with FaceTracker(max_faces=10) as tracker:
        yield tracker


@pytest.fixture(scope="module")
def upright(tracker, model, astronaut):
    (found,) = detect_faces(tracker, model, astronaut)
    return found


def turned(picture: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """The picture turned within a square that holds all of it, and the matrix."""
    height, width = picture.shape[:2]
    side = int(np.hypot(height, width))
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    matrix[:, 2] += (side - width) / 2, (side - height) / 2
    return cv2.warpAffine(picture, matrix, (side, side), borderValue=(120, 120, 120)), matrix


def apart(face: Face, points: np.ndarray) -> float:
    """Mean distance of landmarks, in distances between the outer eye corners."""
    eyes = np.linalg.norm(points[33] - points[263])
    return float(np.linalg.norm(face.landmarks[:, :2] - points, axis=1).mean() / eyes)


@pytest.mark.parametrize("degrees", [15, 45, 90, 120, 180, 210, 300])
def test_a_face_is_found_at_any_angle(tracker, model, astronaut, upright, degrees):
    picture, matrix = turned(astronaut, degrees)
    points = upright.face.landmarks[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    (found,) = detect_faces(tracker, model, picture)
    assert apart(found.face, points) < 0.03
    assert found.residual < MAX_RESIDUAL
    # The crop comes out upright.
    linear = crop_box(found.face.landmarks).matrix[:, :2] @ matrix[:, :2]
    assert abs(math.degrees(math.atan2(linear[1, 0], linear[0, 0]))) < 5


@pytest.fixture(scope="module")
def clips(model, astronaut, tmp_path_factory):
    """Motion of one clip turned by quarters; its first frame shows no face."""
    found = []
    for turns in range(4):
        path = tmp_path_factory.mktemp("clips") / "a.mp4"
        with VideoWriter(path, crf=5) as writer:
            for number in range(12):
                frame = np.full_like(astronaut, 90) if number == 0 else astronaut
                writer.write(np.ascontiguousarray(np.rot90(frame, -turns)))
        found.append(track(model, path, smooth=False))
    return found


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_clip_may_lie_on_its_side(clips, turns):
    """A phone's clip without its orientation: the motion as upright, the landmarks where they are in its own pixels."""
    upright, turned = clips[0], clips[turns]
    assert np.isnan(turned.landmarks[0]).all()
    assert np.linalg.norm(turned.expression[5] - upright.expression[5]) < 0.2 * np.linalg.norm(upright.expression[5])
    assert np.abs(turned.pose[5, :3] - upright.pose[5, :3]).max() < 0.05  # radians
    x, y = upright.landmarks[5, 1, :2]
    nose = {1: (512 - y, x), 2: (512 - x, 512 - y), 3: (y, 512 - x)}[turns]
    assert np.abs(turned.landmarks[5, 1, :2] - nose).max() < 3


def test_upside_down_was_read_wrongly_before(tracker, astronaut, upright):
    """Why the other orientations are tried: the tracker alone gives a face, but not this one."""
    picture, matrix = turned(astronaut, 180)
    points = upright.face.landmarks[:, :2] @ matrix[:, :2].T + matrix[:, 2]
    seen = tracker.detect(picture)
    assert not seen or apart(seen[0], points) > 0.3


@pytest.mark.parametrize("width", [96, 128, 400])
def test_sizes(tracker, model, astronaut, upright, width):
    factor = width / (upright.face.box[2] - upright.face.box[0])
    picture = np.asarray(cv2.resize(astronaut, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
    (found,) = detect_faces(tracker, model, picture)
    assert apart(found.face, upright.face.landmarks[:, :2] * factor) < 0.04


def test_a_small_face_in_a_large_picture(tracker, model, astronaut, upright):
    """Too large to be searched at full size, and the face a fifteenth of its width."""
    picture = np.full((1500, 2600, 3), 110, np.uint8)
    picture[900:1412, 2000:2512] = astronaut
    (found,) = detect_faces(tracker, model, picture)
    assert apart(found.face, upright.face.landmarks[:, :2] + [2000, 900]) < 0.04


def test_ten_thousand_pixels(tracker, model, astronaut, upright):
    picture = np.asarray(cv2.resize(astronaut, (10_000, 10_000), interpolation=cv2.INTER_LINEAR))
    (found,) = detect_faces(tracker, model, picture)
    assert apart(found.face, upright.face.landmarks[:, :2] * (10_000 / 512)) < 0.04


def test_two_faces_are_two(tracker, model, astronaut):
    head = astronaut[:260, 90:350]
    picture = np.full((300, 640, 3), 110, np.uint8)
    picture[20:280, 30:290] = head
    picture[40:248, 370:578] = cv2.resize(head, (208, 208), interpolation=cv2.INTER_AREA)
    large, small = detect_faces(tracker, model, picture)
    assert large.face.landmarks[:, 0].mean() < 320 < small.face.landmarks[:, 0].mean()
    assert max(large.residual, small.residual) < MAX_RESIDUAL


def test_nothing_is_found_in_noise(tracker, model):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    assert detect_faces(tracker, model, noise) == []


# ---------------------------------------------------------------------------------- what is refused, what is said


def said(caplog, model, picture) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_portrait(model, picture)
    lines = [record.getMessage() for record in caplog.records]
    assert all("\n" not in line for line in lines)
    return " | ".join(lines)


def test_a_good_portrait_needs_no_word(model, astronaut, caplog):
    assert said(caplog, model, astronaut) == ""


def test_small_faces_are_said_and_tiny_ones_refused(model, astronaut, upright, caplog):
    width = upright.face.box[2] - upright.face.box[0]

    def scaled(to: float) -> np.ndarray:
        return np.asarray(cv2.resize(astronaut, None, fx=to / width, fy=to / width, interpolation=cv2.INTER_AREA))

    assert "pixels wide; from 80 on" in said(caplog, model, scaled(72))
    with pytest.raises(UserError, match=r"is [45]\d pixels wide, 64 are needed"):
        load_portrait(model, scaled(52))


def test_a_face_that_the_border_cuts(model, astronaut, upright, caplog):
    left, top, right, bottom = (round(value) for value in upright.face.box)
    assert "cuts off" in said(caplog, model, np.ascontiguousarray(astronaut[:, left + (right - left) // 6 :]))
    half = np.ascontiguousarray(astronaut[: top + round(0.62 * (bottom - top))])  # without a mouth
    with pytest.raises(UserError, match=r"cuts off \d+ % of the face; give|no face found"):
        load_portrait(model, half)


@pytest.mark.parametrize(("yaw", "pitch", "line"), [(38, 0, "turned by 3|turned by 4"), (0, -38, "looks up by")])
def test_turned_heads_are_said(model, astronaut, upright, caplog, monkeypatch, yaw, pitch, line):
    """The real landmarks, turned in space."""
    points = upright.face.landmarks - upright.face.landmarks.mean(0)
    a, b = math.radians(yaw), math.radians(pitch)
    around = np.array([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    nod = np.array([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    moved = Face((points @ around.T @ nod.T).astype(np.float32) * 1.5 + 256, upright.face.blendshapes)
    monkeypatch.setattr(FaceTracker, "detect", lambda self, image: [moved] if image.shape[0] != 512 else [])
    # The crop (512 pixels) shows nothing, so the first look stands.
    picture = np.asarray(cv2.resize(astronaut, (514, 514)))
    assert any(part in said(caplog, model, picture) for part in line.split("|"))


def test_a_wide_open_mouth_is_said(model, astronaut, upright, caplog, monkeypatch):
    landmarks = upright.face.landmarks.copy()
    landmarks[14] = landmarks[13] + [0, 0.5 * np.linalg.norm(landmarks[33] - landmarks[263]), 0]
    moved = Face(landmarks, upright.face.blendshapes)
    monkeypatch.setattr(FaceTracker, "detect", lambda self, image: [moved] if image.shape[0] != 512 else [])
    picture = np.asarray(cv2.resize(astronaut, (514, 514)))
    assert "the mouth in the image is wide open" in said(caplog, model, picture)


# ------------------------------------------------------------------------------------------------- kinds of files


def test_every_kind_of_file_shows_the_same_face(tracker, model, astronaut, upright, tmp_path):
    image = Image.fromarray(astronaut)
    deep = astronaut.astype(np.uint16) * 257
    exif = Image.Exif()
    exif[274] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.quantize(128).save(tmp_path / "palette.png")
    image.quantize(128).save(tmp_path / "clear.gif", transparency=3)
    image.convert("L").save(tmp_path / "grey.png")
    image.convert("LA").save(tmp_path / "grey-alpha.png")
    image.convert("RGBA").save(tmp_path / "alpha.webp")
    Image.fromarray(deep[..., 1]).save(tmp_path / "grey16.png")
    cv2.imwrite(str(tmp_path / "rgb16.png"), deep[..., ::-1])
    cv2.imwrite(str(tmp_path / "rgb16.tif"), deep[..., ::-1])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10
    for file in files:
        picture = read_image(file)
        assert (picture.shape, picture.dtype) == ((512, 512, 3), np.uint8), file.name
        (found,) = detect_faces(tracker, model, picture)
        assert apart(found.face, upright.face.landmarks[:, :2]) < 0.03, file.name


def test_pictures_of_a_hundred_million_pixels_are_read_without_a_word(tmp_path):
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "large.png").shape == (9_500, 10_000, 3)


def test_heic_is_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    with pytest.raises(UserError, match=r"IMG_1\.HEIC is a HEIC image, which cannot be read; give a JPEG"):
        read_image(tmp_path / "IMG_1.HEIC")
