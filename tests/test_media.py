"""Pictures in every form, steady frame rates, and a writer that leaves a whole file or none."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from flowvqtalker.errors import UserError
from flowvqtalker.io import media

from .conftest import babble, write_wav


def gradient(height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose corners differ: red grows to the right, green downwards."""
    picture = np.full((height, width, 3), 40, np.uint8)
    picture[..., 0] = np.linspace(0, 255, width)
    picture[..., 1] = np.linspace(0, 255, height)[:, None]
    return picture


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


# ---------------------------------------------------------------------------------------------------- pictures


def test_plain_picture_is_read_unchanged(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    picture = media.read_image(tmp_path / "a.png")
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, gradient())
    assert picture.flags.writeable


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tif" if mode == "CMYK" else "png"
    Image.fromarray(gradient()).convert(mode).save(tmp_path / f"a.{suffix}")
    picture = media.read_image(tmp_path / f"a.{suffix}")
    assert picture.shape == (48, 64, 3)
    if mode in ("L", "LA"):
        np.testing.assert_array_equal(picture[..., 0], np.asarray(Image.fromarray(gradient()).convert("L")))
    if mode in ("RGBA", "CMYK"):
        assert np.abs(picture.astype(int) - gradient()).max() <= 2


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.dstack([gradient(), np.full((48, 64), 255, np.uint8)])
    rgba[:24, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    picture = media.read_image(tmp_path / "a.png")
    assert np.all(picture[:24] == 255)
    assert np.array_equal(picture[24:], gradient()[24:])


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    picture = media.read_image(tmp_path / "a.png")
    assert picture.min() == 0
    assert picture.max() == 255
    assert np.abs(picture[..., 0] - deep / 257).max() <= 0.51


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_the_camera_is_applied(tmp_path, orientation):
    upright = gradient()
    stored = np.rot90(upright, {1: 0, 3: 2, 6: 1, 8: 3}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.jpg", quality=95, exif=exif)
    picture = media.read_image(tmp_path / "a.jpg")
    assert picture.shape == upright.shape
    assert np.abs(picture.astype(int) - upright).mean() < 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "not a picture"), (b"hello, this is text", "not a picture"), ("cut", "damaged")],
)
def test_files_that_are_no_picture_are_refused(tmp_path, content, message):
    path = tmp_path / "a.png"
    if content == "cut":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        content = path.read_bytes()[:3000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        media.read_image(path)


def test_probe_tells_pictures_from_videos(tmp_path, speech):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    assert media.probe(tmp_path / "a.png") == media.MediaInfo("picture", 64, 48)
    found = media.probe(write_video(tmp_path / "a.mp4", [0, 0.04, 0.08]))
    assert (found.kind, found.width, found.height, found.sound) == ("video", 64, 48, False)
    with pytest.raises(UserError, match="neither a picture nor a video"):
        media.probe(speech)


# ------------------------------------------------------------------------------------------------------- video


def levels(frames: list[np.ndarray]) -> list[int]:
    return [round((float(frame.mean()) - 20) / 20) for frame in frames]


def test_twenty_five_fps_passes_through(tmp_path):
    frames = list(media.read_video(write_video(tmp_path / "a.mp4", [k / 25 for k in range(10)])))
    assert levels(frames) == list(range(10))
    assert frames[0].shape == (48, 64, 3)


def test_fifty_fps_loses_every_other_frame(tmp_path):
    frames = list(media.read_video(write_video(tmp_path / "a.mp4", [k / 50 for k in range(11)])))
    assert len(frames) in (5, 6)
    assert np.all(np.diff(levels(frames)) == 2)


def test_ten_fps_repeats_frames(tmp_path):
    frames = list(media.read_video(write_video(tmp_path / "a.mp4", [k / 10 for k in range(5)])))
    assert len(frames) == pytest.approx(12, abs=1)
    assert sorted(set(levels(frames))) == list(range(5))
    assert max(levels(frames).count(k) for k in range(4)) == 3


def test_gaps_in_variable_frame_rates_are_filled(tmp_path):
    frames = list(media.read_video(write_video(tmp_path / "a.mp4", [0, 0.04, 0.4, 0.44])))
    assert levels(frames)[:12] == [0] + [1] * 9 + [2, 3]


def test_rate_can_be_chosen(tmp_path):
    frames = list(media.read_video(write_video(tmp_path / "a.mp4", [k / 25 for k in range(10)]), fps=12.5))
    assert len(frames) == 5


def test_video_that_is_none_is_refused(tmp_path, speech):
    with pytest.raises(UserError, match="no video track"):
        next(media.read_video(speech))
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as video"):
        next(media.read_video(tmp_path / "a.mp4"))


# ------------------------------------------------------------------------------------------------------ writer


def moving(count: int, height: int = 64, width: int = 64):
    for index in range(count):
        frame = np.full((height, width, 3), (200, 30, 60), np.uint8)
        frame[:, index % width] = 255
        yield frame


@pytest.mark.parametrize("seconds", [0.1, 1.0, 2.31])
def test_video_is_as_long_as_the_speech(tmp_path, seconds):
    source = write_wav(tmp_path / "speech.wav", babble(seconds))
    count = -(-round(seconds * 16_000) // 640)
    with media.VideoWriter(tmp_path / "out.mp4", source) as writer:
        for frame in moving(count):
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (sound.codec_context.name, video.average_rate) == ("aac", 25)
        assert float(video.duration * video.time_base) == pytest.approx(seconds, abs=0.04)
        assert float(sound.duration * sound.time_base) == pytest.approx(seconds, abs=0.03)
    assert len(list(media.read_video(tmp_path / "out.mp4"))) == count
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "speech.wav"]


def test_index_comes_first(tmp_path, speech):
    with media.VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for frame in moving(25):
            writer.write(frame)
    content = (tmp_path / "out.mp4").read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")


def test_colours_survive(tmp_path):
    with media.VideoWriter(tmp_path / "out.mp4") as writer:
        for frame in moving(5):
            writer.write(frame)
    frame = list(media.read_video(tmp_path / "out.mp4"))[2]
    assert np.abs(frame[32, 32:].mean(0) - (200, 30, 60)).max() < 4


def test_sound_survives_in_time(tmp_path):
    from flowvqtalker.io import audio as decode

    wave = np.zeros(32_000)
    wave[16_000:17_600] = 0.5 * np.sin(2 * np.pi * 500 * np.arange(1_600) / 16_000)
    with media.VideoWriter(tmp_path / "out.mp4", write_wav(tmp_path / "speech.wav", wave)) as writer:
        for frame in moving(50):
            writer.write(frame)
    loud = np.flatnonzero(np.abs(decode.load(tmp_path / "out.mp4")) > 0.25)
    assert loud[0] / 16_000 == pytest.approx(1.0, abs=0.03)
    assert loud[-1] / 16_000 == pytest.approx(1.1, abs=0.03)


def test_sound_ends_with_the_picture(tmp_path, speech):
    with media.VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for frame in moving(10):
            writer.write(frame)
    with av.open(str(tmp_path / "out.mp4")) as container:
        sound = container.streams.audio[0]
        assert float(sound.duration * sound.time_base) == pytest.approx(0.4, abs=0.1)


def test_odd_sizes_keep_every_pixel(tmp_path):
    with media.VideoWriter(tmp_path / "out.mp4") as writer:
        for frame in moving(3, 51, 33):
            writer.write(frame)
    assert next(media.read_video(tmp_path / "out.mp4")).shape == (52, 34, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, GeneratorExit])
def test_nothing_is_left_after_an_interruption(tmp_path, speech, error):
    def interrupted():
        with media.VideoWriter(tmp_path / "out.mp4", speech) as writer:
            for index, frame in enumerate(moving(25)):
                writer.write(frame)
                if index == 7:
                    raise error

    with pytest.raises(error):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["speech.wav"]


def test_an_older_file_survives_a_failure(tmp_path, speech):
    (tmp_path / "out.mp4").write_bytes(b"older")
    with pytest.raises(UserError, match="no frame"), media.VideoWriter(tmp_path / "out.mp4", speech):
        pass
    assert (tmp_path / "out.mp4").read_bytes() == b"older"
    with media.VideoWriter(tmp_path / "out.mp4", speech) as writer:
        for frame in moving(3):
            writer.write(frame)
    assert media.probe(tmp_path / "out.mp4").kind == "video"


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
        media.VideoWriter(tmp_path / name)


def test_a_full_disk_is_a_clear_error(tmp_path, monkeypatch):
    """FFmpeg's own error, here that of a device that takes nothing, becomes one line."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    writer = media.VideoWriter(tmp_path / "out.mkv")
    (tmp_path / "link").symlink_to("/dev/full")
    monkeypatch.setattr(writer, "_temporary", tmp_path / "link")

    def fill():
        with writer:
            for frame in moving(200, 256, 256):
                writer.write(np.random.default_rng(0).integers(0, 255, frame.shape, np.uint8))

    with pytest.raises(UserError, match="cannot be written"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_size_are_a_programming_error(tmp_path):
    def change():
        with media.VideoWriter(tmp_path / "out.mp4") as writer:
            writer.write(np.zeros((64, 64, 3), np.uint8))
            writer.write(np.zeros((32, 64, 3), np.uint8))

    with pytest.raises(ValueError, match="64x64"):
        change()
