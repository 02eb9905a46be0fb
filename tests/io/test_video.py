"""Steady frame rates, and a writer that leaves a whole file or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flowvqtalker.data.sources import read_frames
from flowvqtalker.errors import UserError
from flowvqtalker.io import audio
from flowvqtalker.io.video import MediaInfo, VideoWriter, probe, read_video

from ..conftest import babble, write_wav


def write_video(path: Path, times: list[float], size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frame k is grey level 20 k + 20, shown at times[k] (seconds)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "10", "bf": "0"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for index, time in enumerate(times):
            grey = np.full((size[1], size[0], 3), 20 * index + 20, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = round(time * 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_probe_tells_images_from_videos(tmp_path, speech):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    assert probe(tmp_path / "a.png") == MediaInfo("image", 64, 48)
    found = probe(write_video(tmp_path / "a.mp4", [0, 0.04, 0.08]))
    assert (found.kind, found.width, found.height, found.sound) == ("video", 64, 48, False)
    with pytest.raises(UserError, match="neither an image nor a video"):
        probe(speech)


def levels(frames: list[np.ndarray]) -> list[int]:
    return [round((float(frame.mean()) - 20) / 20) for frame in frames]


def test_twenty_five_fps_passes_through(tmp_path):
    frames = list(read_video(write_video(tmp_path / "a.mp4", [k / 25 for k in range(10)])))
    assert levels(frames) == list(range(10))
    assert frames[0].shape == (48, 64, 3)


def test_fifty_fps_loses_every_other_frame(tmp_path):
    frames = list(read_video(write_video(tmp_path / "a.mp4", [k / 50 for k in range(11)])))
    assert len(frames) in (5, 6)
    assert np.all(np.diff(levels(frames)) == 2)


def test_ten_fps_repeats_frames(tmp_path):
    frames = list(read_video(write_video(tmp_path / "a.mp4", [k / 10 for k in range(5)])))
    assert len(frames) == pytest.approx(12, abs=1)
    assert sorted(set(levels(frames))) == list(range(5))
    assert max(levels(frames).count(k) for k in range(4)) == 3


def test_gaps_in_variable_frame_rates_are_filled(tmp_path):
    frames = list(read_video(write_video(tmp_path / "a.mp4", [0, 0.04, 0.4, 0.44])))
    assert levels(frames)[:12] == [0] + [1] * 9 + [2, 3]


def test_rate_can_be_chosen(tmp_path):
    frames = list(read_video(write_video(tmp_path / "a.mp4", [k / 25 for k in range(10)]), fps=12.5))
    assert len(frames) == 5


def test_video_that_is_none_is_refused(tmp_path, speech):
    with pytest.raises(UserError, match="no video track"):
        next(read_video(speech))
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as video"):
        next(read_video(tmp_path / "a.mp4"))


def moving(count: int, height: int = 64, width: int = 64):
    for index in range(count):
        frame = np.full((height, width, 3), (200, 30, 60), np.uint8)
        frame[:, index % width] = 255
        yield frame


@pytest.mark.parametrize("seconds", [0.1, 1.0, 2.31])
def test_video_is_as_long_as_the_speech(tmp_path, seconds):
    source = write_wav(tmp_path / "speech.wav", babble(seconds))
    count = -(-round(seconds * 16_000) // 640)
    with VideoWriter(tmp_path / "out.mp4", source) as writer:
        for frame in moving(count):
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (sound.codec_context.name, video.average_rate) == ("aac", 25)
        assert float(video.duration * video.time_base) == pytest.approx(seconds, abs=0.04)
        assert float(sound.duration * sound.time_base) == pytest.approx(seconds, abs=0.03)
    assert len(list(read_video(tmp_path / "out.mp4"))) == count
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "speech.wav"]


def test_index_comes_first(tmp_path, speech):
    with VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for frame in moving(25):
            writer.write(frame)
    content = (tmp_path / "out.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


def test_colours_survive(tmp_path):
    with VideoWriter(tmp_path / "out.mp4") as writer:
        for frame in moving(5):
            writer.write(frame)
    frame = list(read_video(tmp_path / "out.mp4"))[2]
    assert np.abs(frame[32, 32:].mean(0) - (200, 30, 60)).max() < 4


def test_sound_survives_in_time(tmp_path):
    wave = np.zeros(32_000)
    wave[16_000:17_600] = 0.5 * np.sin(2 * np.pi * 500 * np.arange(1_600) / 16_000)
    with VideoWriter(tmp_path / "out.mp4", write_wav(tmp_path / "speech.wav", wave)) as writer:
        for frame in moving(50):
            writer.write(frame)
    loud = np.flatnonzero(np.abs(audio.load(tmp_path / "out.mp4")) > 0.25)
    assert loud[0] / 16_000 == pytest.approx(1.0, abs=0.03)
    assert loud[-1] / 16_000 == pytest.approx(1.1, abs=0.03)


def test_sound_ends_with_the_picture(tmp_path, speech):
    with VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for frame in moving(10):
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        sound = container.streams.audio[0]
        assert float(sound.duration * sound.time_base) == pytest.approx(0.4, abs=0.1)


def test_odd_sizes_keep_every_pixel(tmp_path):
    with VideoWriter(tmp_path / "out.mp4") as writer:
        for frame in moving(3, 51, 33):
            writer.write(frame)
    assert next(read_video(tmp_path / "out.mp4")).shape == (52, 34, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("broken"), GeneratorExit])
def test_nothing_is_left_after_an_interruption(tmp_path, speech, error):
    def interrupted():
        with VideoWriter(tmp_path / "out.mp4", speech) as writer:
            for index, frame in enumerate(moving(25)):
                writer.write(frame)
                if index == 7:
                    raise error

    with pytest.raises(error if isinstance(error, type) else UserError):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["speech.wav"]


def test_an_older_file_survives_a_failure(tmp_path, speech):
    (tmp_path / "out.mp4").write_bytes(b"older")
    with pytest.raises(UserError, match="no frame"), VideoWriter(tmp_path / "out.mp4", speech):
        pass
    assert (tmp_path / "out.mp4").read_bytes() == b"older"
    with VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for frame in moving(3):
            writer.write(frame)
    assert probe(tmp_path / "out.mp4").kind == "video"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/out.mp4", "no folder"),
        ("file/out.mp4", "no folder"),
        ("out.gif", "must end in one of .mp4"),
        ("folder.mp4", "is a folder"),
    ],
)
def test_unwritable_outputs_are_refused_at_once(tmp_path, name, message):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(UserError, match=message):
        VideoWriter(tmp_path / name)


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    """FFmpeg's own error, here that of a device that takes nothing, becomes one line."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr("flowvqtalker.io.atomic._unnamed", lambda folder: os.open("/dev/full", os.O_RDWR))

    def fill():
        with VideoWriter(tmp_path / "out.mkv") as writer:
            for frame in moving(200, 256, 256):
                writer.write(np.random.default_rng(0).integers(0, 255, frame.shape, np.uint8))

    with pytest.raises(UserError, match="cannot be written"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="this system has no unnamed files")
def test_a_killed_process_leaves_nothing(tmp_path):
    code = (
        "import sys, time, numpy as np\n"
        "from flowvqtalker.io.video import VideoWriter\n"
        "with VideoWriter(sys.argv[1]) as writer:\n"
        "    for _ in range(50): writer.write(np.zeros((64, 64, 3), np.uint8))\n"
        "    print('written', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.mp4")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


def test_colons_in_names_are_no_protocols(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_wav(tmp_path / "12:30.wav", babble(0.4))
    assert audio.scan("12:30.wav").frames == 10
    with VideoWriter("take-12:30.mp4", "12:30.wav") as writer:
        for frame in moving(10):
            writer.write(frame)
    assert probe("take-12:30.mp4").sound
    assert len(list(read_video("take-12:30.mp4"))) == 10


def test_frames_of_another_size_are_a_programming_error(tmp_path):
    def change():
        with VideoWriter(tmp_path / "out.mp4") as writer:
            writer.write(np.zeros((64, 64, 3), np.uint8))
            writer.write(np.zeros((32, 64, 3), np.uint8))

    with pytest.raises(ValueError, match="64x64"):
        change()


def corner_clip(path: Path, size: tuple[int, int] = (64, 48), **context: object) -> Path:
    """A clip whose upper left quarter is white, the rest black."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "10"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        picture = np.zeros((size[1], size[0], 3), np.uint8)
        picture[: size[1] // 2, : size[0] // 2] = 255
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def white_corner(image: np.ndarray) -> str:
    """Which quarter of an image is white."""
    height, width = image.shape[0] // 2, image.shape[1] // 2
    halves = {"upper": slice(0, height), "lower": slice(height, None)}
    sides = {"left": slice(0, width), "right": slice(width, None)}
    means = {f"{v} {h}": image[rows, columns].mean() for v, rows in halves.items() for h, columns in sides.items()}
    return max(means, key=lambda name: means[name])


#: The matrix (a, b, c, d) that brings (x, y) to (a x + c y, b x + d y), y downwards, and where it takes the corner.
DISPLAYED = {
    "as stored": ((1, 0, 0, 1), "upper left"),
    "clockwise": ((0, 1, -1, 0), "upper right"),
    "upside down": ((-1, 0, 0, -1), "lower right"),
    "counter-clockwise": ((0, -1, 1, 0), "lower left"),
    "mirrored": ((-1, 0, 0, 1), "upper right"),
    "mirrored upside down": ((1, 0, 0, -1), "lower left"),
    "transposed": ((0, 1, 1, 0), "upper left"),
    "mirrored and turned": ((0, -1, -1, 0), "lower right"),
}


@pytest.mark.parametrize("name", DISPLAYED)
def test_orientations_of_clips_are_applied(tmp_path, name):
    """As phones write them: a matrix in the header of the track."""
    (a, b, c, d), corner = DISPLAYED[name]
    path = corner_clip(tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # behind version, times, identity, length, layer and volume
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
    frame = next(read_video(path))
    assert frame.shape == ((64, 48, 3) if a == 0 else (48, 64, 3))
    assert white_corner(frame) == corner
    info = probe(path)
    assert (info.height, info.width) == frame.shape[:2]


@pytest.mark.parametrize(("ratio", "shape"), [(Fraction(4, 3), (48, 85, 3)), (Fraction(1, 2), (96, 64, 3))])
def test_pixels_become_square(tmp_path, ratio, shape):
    path = corner_clip(tmp_path / "a.mp4", sample_aspect_ratio=ratio)
    assert next(read_video(path)).shape == shape
    assert (probe(path).height, probe(path).width) == shape[:2]


def coloured_clip(path: Path, colour: tuple[int, int, int], matrix: int, full: bool, size=(64, 48), **tags) -> Path:
    """A clip of one colour, converted with a matrix and range; the tags are what the file says of it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        picture = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), colour, np.uint8), format="rgb24")
        frame = picture.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=2 if full else 1)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 9])
def test_matrix_and_range_are_those_of_the_clip(tmp_path, matrix, full):
    path = coloured_clip(
        tmp_path / "a.mp4", (200, 120, 60), matrix, full, colorspace=matrix, color_range=2 if full else 1
    )
    assert next(read_video(path))[24, 32].astype(int) == pytest.approx((200, 120, 60), abs=4)


def test_fields_of_interlaced_clips_are_taken_apart(tmp_path):
    """A bar on a ground of a stated matrix and range, which moves by four pixels from field to field."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "4", "x264-params": "bff=1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = 1, 2
        for t in range(6):
            picture = np.full((64, 96, 3), (200, 120, 60), np.uint8)
            for late in (0, 1):  # the lower field comes first
                picture[1 - late :: 2, 8 * t + 4 * late :][:, :20] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv444p", dst_colorspace=1, dst_color_range=2)))
        container.mux(stream.encode(None))
    for frames in (list(read_video(tmp_path / "a.mkv")), [image for _, image in read_frames(tmp_path / "a.mkv")]):
        assert len(frames) == 6
        for t, frame in enumerate(frames):
            assert frame[32, 80].astype(int) == pytest.approx((200, 120, 60), abs=4)
            bar = frame[8:-8, :, 2] > 150
            assert (bar == bar[0]).all() and np.flatnonzero(bar[0])[0] == pytest.approx(8 * t, abs=1)


@pytest.mark.parametrize(("size", "matrix"), [((64, 48), 5), ((1280, 720), 1)])
def test_unstated_matrices_are_those_that_players_take(tmp_path, size, matrix):
    path = coloured_clip(tmp_path / "a.mp4", (200, 120, 60), matrix, False, size)
    assert next(read_video(path))[24, 32].astype(int) == pytest.approx((200, 120, 60), abs=4)


def test_wide_and_hdr_clips_become_srgb(tmp_path):
    wide = {"colorspace": 9, "color_range": 1, "color_primaries": 9}
    path = coloured_clip(tmp_path / "a.mp4", (200, 120, 100), 9, False, **wide, color_trc=14)
    assert next(read_video(path))[24, 32].astype(int) == pytest.approx((236, 104, 95), abs=4)
    for name, transfer, white in (("pq", 16, 148), ("hlg", 18, 191)):
        path = coloured_clip(tmp_path / f"{name}.mp4", (white,) * 3, 9, False, **wide, color_trc=transfer)
        assert next(read_video(path))[24, 32].astype(int) == pytest.approx((245,) * 3, abs=7)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "avif"])
def test_animated_images_are_clips(tmp_path, suffix):
    """Their durations count, transparency lies on white, and each format is read by the same library."""
    pictures = [Image.new("RGB", (32, 24), (60 * k, 30, 30)) for k in range(4)]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], duration=[80, 200, 80, 120])
    frames = list(read_video(tmp_path / f"a.{suffix}"))
    found = [round((float(frame[..., 0].mean())) / 60) for frame in frames]
    assert found == [0] * 2 + [1] * 5 + [2] * 2 + [3] * 3
    info = probe(tmp_path / f"a.{suffix}")
    assert (info.kind, info.width, info.height, info.sound) == ("video", 32, 24, False)
    assert info.seconds == pytest.approx(0.48)


def test_covers_and_pages_are_no_animation(tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "a.tif", save_all=True, append_images=[Image.new("RGB", (32, 24))])
    assert probe(tmp_path / "a.tif").kind == "image"
