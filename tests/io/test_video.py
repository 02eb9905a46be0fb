"""Steady frame rates, and a writer that leaves a whole file or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, GeneratorExit])
def test_nothing_is_left_after_an_interruption(tmp_path, speech, error):
    def interrupted():
        with VideoWriter(tmp_path / "out.mp4", speech) as writer:
            for index, frame in enumerate(moving(25)):
                writer.write(frame)
                if index == 7:
                    raise error

    with pytest.raises(error):
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
