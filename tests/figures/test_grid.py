"""The grid of images with enlarged details: layout, choice of frames, boxes, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import LIPS
from flowvqtalker.io.video import VideoWriter
from flowvqtalker_eval.figures.grid import Grid, choose_frames, face_boxes, make, parse_box, read_frames
from flowvqtalker_eval.tables.pairs import named_paths

pytest.importorskip("matplotlib")


def _plain(colour: tuple[int, int, int], size: tuple[int, int] = (60, 60)) -> np.ndarray:
    return np.full((*size, 3), colour, np.uint8)


def _pixels(figure) -> np.ndarray:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _video(path: Path, frames: int, size: int = 64) -> Path:
    """Frame t is grey of brightness 8 t."""
    with VideoWriter(path) as writer:
        for t in range(frames):
            writer.write(_plain((8 * t,) * 3, (size, size)))
    return path


def test_every_image_is_in_its_place_to_the_pixel() -> None:
    rows = {"a": [_plain((255, 0, 0)), _plain((0, 255, 0))], "b": [_plain((0, 0, 255)), _plain((9, 90, 200))]}
    image = _pixels(make(rows, cell=0.5, labels=False))
    assert image.shape == (204, 204, 3)  # twice 0.5 inches and a gap of 0.02 at 200 dpi
    for r, name in enumerate(rows):
        for c, given in enumerate(rows[name]):
            part = image[104 * r : 104 * r + 100, 104 * c : 104 * c + 100]
            assert (part[2:-2, 2:-2] == given[0, 0]).all()
    assert (image[101:103] == 255).all()


def test_labels_and_headings_make_room() -> None:
    image = _pixels(make({"method": [_plain((0, 0, 0))]}, columns=["0.20 s"], cell=0.5))
    assert image.shape == (140, 144, 3)
    assert (image[45:-5, 49:-5] == 0).all()
    assert (image[:40, 44:] < 128).any() and (image[40:, :44] < 128).any()  # there is text


def test_details_are_marked_and_enlarged_into_the_corners() -> None:
    given = _plain((0, 0, 0), (100, 100))
    given[20:30, 20:40] = 255, 0, 0
    given[50:60, 70:80] = 0, 0, 255
    image = _pixels(make({"a": [given]}, zoom={"a": [[(20, 20, 20, 10), (70, 50, 10, 10)]]}, cell=1.0, labels=False))
    assert image.shape == (200, 200, 3)
    red = (image == (255, 0, 0)).all(2)
    blue = (image == (0, 0, 255)).all(2)
    assert red[165:195, 125:195].mean() > 0.9  # lower right, 84 x 42 pixels
    assert blue[125:195, 8:78].mean() > 0.9  # lower left, 84 x 84 pixels
    assert not red[165:195, 100:114].any()


def test_images_of_other_shapes_keep_theirs() -> None:
    image = _pixels(make({"a": [_plain((0, 0, 0))], "b": [_plain((0, 0, 0), (60, 30))]}, cell=0.5, labels=False))
    assert (image[:100, 2:98] == 0).all()
    assert (image[104:204, :23] == 255).all() and (image[106:202, 27:73] == 0).all()


def test_bad_grids_are_refused() -> None:
    image = _plain((0, 0, 0))
    with pytest.raises(UserError, match="at least one row"):
        make({})
    with pytest.raises(UserError, match="at least one row"):
        make({"a": []})
    with pytest.raises(UserError, match="a 1, b 2"):
        make({"a": [image], "b": [image, image]})
    with pytest.raises(UserError, match="2 headings for 1 columns"):
        make({"a": [image]}, columns=["x", "y"])
    for box in ((50, 10, 20, 20), (-1, 0, 9, 9), (0, 0, 1, 9)):
        with pytest.raises(UserError, match=r"does not lie within an image of 60x60 pixels"):
            make({"a": [image]}, zoom={"a": [[box]]})


def test_frames_are_chosen_evenly_or_as_given() -> None:
    assert choose_frames(100, 5) == [10, 30, 50, 70, 90]
    assert choose_frames(3, 3) == [0, 1, 2]
    assert choose_frames(10, frames=(9, 2)) == [9, 2]
    assert choose_frames(30, times=(0.0, 1.0)) == [0, 25]
    with pytest.raises(UserError, match=r"--count 4: the shortest video has 3 frames"):
        choose_frames(3, 4)
    with pytest.raises(UserError, match=r"frame 30, -1 is beyond .* 30 frames \(1.20 s\); choose 0 to 29"):
        choose_frames(30, frames=(3, 30, -1))
    with pytest.raises(UserError, match="choose one of them"):
        choose_frames(30, frames=(1,), times=(0.1,))


def test_arguments_are_checked(tmp_path: Path) -> None:
    assert parse_box("1,2,30,40.5") == (1, 2, 30, 40.5)
    for text in ("1,2,3", "mouht", "1,2,0,5", "-1,2,5,5"):
        with pytest.raises(UserError, match="give X,Y,W,H"):
            parse_box(text)
    (tmp_path / "a").touch()
    assert named_paths([f"x={tmp_path / 'a'}"], "--method") == {"x": tmp_path / "a"}
    with pytest.raises(UserError, match="NAME=PATH"):
        named_paths(["a.mp4"], "--method")
    with pytest.raises(UserError, match="given twice"):
        named_paths([f"x={tmp_path / 'a'}"] * 2, "--method")
    with pytest.raises(UserError, match="does not exist"):
        named_paths(["x=nowhere.mp4"], "--method")


class _Tracker:
    """Finds a face of a known place in every image that is not black."""

    def __init__(self, offset: float = 0.0) -> None:
        self.points = np.zeros((478, 3), np.float32)
        self.points[33, :2], self.points[263, :2] = (30, 40), (70, 40)
        self.points[10, :2], self.points[152, :2] = (50, 20), (50, 90)
        self.points[list(LIPS), :2] = 50, 70 + offset

    def detect(self, image: np.ndarray) -> list:
        return [SimpleNamespace(landmarks=self.points)] if image.any() else []


def test_the_mouth_is_boxed_and_the_box_stays_in_the_image() -> None:
    there, none = _plain((1, 1, 1), (100, 100)), _plain((0, 0, 0), (100, 100))
    boxes = face_boxes([there, none], "mouth", _Tracker())
    assert boxes == [(33, 58, 34, 24), None]  # 0.85 and 0.6 of a face of 40
    assert face_boxes([there], "mouth", _Tracker(offset=28)) == [(33, 76, 34, 24)]


def test_the_command_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long, short = _video(tmp_path / "long.mp4", 12), _video(tmp_path / "short.mp4", 10, 32)
    for got, wanted in zip(read_frames(long, [7, 2]), (56, 16), strict=True):
        assert np.abs(got.astype(int) - wanted).max() <= 3
    grid = Grid(
        method=(f"ours={short}",),
        real=long,
        output=tmp_path / "out.pdf",
        count=2,
        zoom=("8,8,16,16",),
    )
    grid.run()
    assert capsys.readouterr().out.split() == [f"{tmp_path / 'out.png'},", str(tmp_path / "out.pdf")]
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out.pdf").read_bytes()[:4] == b"%PDF"
    assert not list(tmp_path.glob("*.part*"))


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    video = _video(tmp_path / "v.mp4", 5)
    output = tmp_path / "out.png"
    method = (f"ours={video}",)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match="no video was given"):
        Grid(output=output).run()
    with pytest.raises(UserError, match=r"empty\.mp4"):
        Grid(method=(f"ours={tmp_path / 'empty.mp4'}",), output=output).run()
    with pytest.raises(UserError, match="does not lie within an image of 64x64"):
        Grid(method=method, output=output, count=2, zoom=("60,0,10,10",)).run()
    with pytest.raises(UserError, match="at most 4"):
        Grid(method=method, output=output, zoom=("0,0,9,9",) * 5).run()
    with pytest.raises(UserError, match="shortest video has 5 frames"):
        Grid(method=method, output=output, count=6).run()
    with pytest.raises(UserError, match=r"must end in one of \.png, \.pdf"):
        Grid(method=method, output=tmp_path / "out.jpg").run()
    with pytest.raises(UserError, match="the same row"):
        Grid(method=(f"Ground truth={video}",), real=video, output=output).run()
    with pytest.raises(UserError, match=r"choose 0\.2 to 10 inches"):
        Grid(method=method, output=output, cell=0).run()


def test_no_face_asks_for_a_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import flowvqtalker_eval.figures.grid as module

    monkeypatch.setattr(module, "face_boxes", lambda images, region: [None] * len(images))
    video = _video(tmp_path / "v.mp4", 5)
    with pytest.raises(UserError, match="no face was found in the frames of ours; give --zoom"):
        Grid(method=(f"ours={video}",), output=tmp_path / "out.png", count=2).run()
    found = [(0.0, 0.0, 8.0, 8.0), None, None, (1.0, 0.0, 8.0, 8.0)]
    monkeypatch.setattr(module, "face_boxes", lambda images, region: found)
    followed = module._followed({"a": [_plain((1, 1, 1))] * 4}, "mouth")
    assert followed["a"] == [found[0], found[0], found[3], found[3]]
