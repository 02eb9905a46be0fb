"""Marks in files: content credentials, the label, ``verify`` and its exit codes, and what cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowvqtalker.cli import main
from flowvqtalker.errors import UserError
from flowvqtalker.io.video import VideoWriter, read_video
from flowvqtalker.provenance import Marks, credentials, marks, verify, write_marked
from flowvqtalker.provenance.label import labelled

from ..conftest import babble, write_wav


@pytest.fixture(scope="module")
def frames(astronaut: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(np.roll(astronaut, k, 1)) for k in range(6)]


def plain(path: Path, frames: list[np.ndarray]) -> Path:
    with VideoWriter(path) as writer:
        for frame in frames:
            writer.write(frame)
    return path


@pytest.fixture(scope="module")
def video(frames: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video with the default marks."""
    folder = tmp_path_factory.mktemp("video")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        write_marked(frames, folder / "out.mp4", None, len(frames))
    return folder / "out.mp4"


def test_default_marks(frames, tmp_path, user_config):
    result = write_marked(frames, tmp_path / "out.mp4", None, len(frames))
    assert result.frames == len(frames)
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    report = verify(tmp_path / "out.mp4")
    assert report.marked and report.watermark["found"] and report.watermark["identifier"] == 0
    assert report.credentials is not None and report.credentials["generated"]
    assert report.credentials["state"] == "Valid" and report.credentials["generator"].startswith("flowvqtalker ")
    key = user_config / "flowvqtalker" / "signing.pem"
    if os.name == "posix":
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    write_marked(frames, tmp_path / "again.mov", None, len(frames), marks=Marks(mark_id=77))
    assert key.read_bytes() == before
    assert verify(tmp_path / "again.mov").watermark["identifier"] == 77


def test_sound_stays(frames, tmp_path):
    sound = write_wav(tmp_path / "a.wav", babble(0.24))
    write_marked(frames, tmp_path / "out.mp4", sound, len(frames))
    import av

    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio and sum(1 for _ in container.decode(video=0)) == len(frames)


def test_changed_file_is_not_valid(video, tmp_path):
    path = tmp_path / "out.mp4"
    data = bytearray(video.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = credentials.read_credentials(path)
    assert found is not None and found["state"] == "Invalid"


def test_credentials_alone_are_a_mark_and_invalid_ones_are_not(frames, tmp_path):
    path = plain(tmp_path / "out.mp4", frames)
    credentials.sign(path, path, credentials.load_credential())
    report = verify(path)
    assert report.marked and not report.watermark["found"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not verify(path).marked


def test_matroska_has_the_watermark_alone(frames, tmp_path):
    write_marked(frames, tmp_path / "out.mkv", None, len(frames))
    report = verify(tmp_path / "out.mkv")
    assert report.marked and report.credentials is None


def test_without_the_extra_the_watermark_remains(frames, tmp_path, monkeypatch):
    for module in (marks, credentials):
        monkeypatch.setattr(module, "available", lambda: False)
    write_marked(frames, tmp_path / "out.mp4", None, len(frames))
    report = verify(tmp_path / "out.mp4")
    assert report.marked and report.credentials is None and "flowvqtalker[provenance]" in str(report.note)
    with pytest.raises(UserError, match=r"flowvqtalker\[provenance\]"):
        Marks(timestamp_url="https://example.org").credential(tmp_path / "out.mp4")


def test_video_that_cannot_be_signed_is_kept(frames, tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise credentials.SigningError("no time stamp")

    monkeypatch.setattr(marks, "sign", fail)
    write_marked(frames, tmp_path / "out.mp4", None, len(frames))
    assert "no content credentials (no time stamp)" in caplog.text
    assert verify(tmp_path / "out.mp4").marked


def test_unreachable_time_stamp_authority(frames, tmp_path, caplog):
    asked = Marks(timestamp_url="http://127.0.0.1:9/")
    write_marked(frames, tmp_path / "out.mp4", None, len(frames), marks=asked)
    assert "no content credentials" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_full_disk_while_signing_leaves_nothing(frames, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(marks, "sign", fail)
    with pytest.raises(UserError, match="No space left"):
        write_marked(frames, tmp_path / "out.mp4", None, len(frames))
    assert not list(tmp_path.iterdir())


def test_read_only_home_signs_with_a_passing_key(frames, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    write_marked(frames, tmp_path / "out.mp4", None, len(frames))
    assert verify(tmp_path / "out.mp4").credentials is not None


def test_a_user_without_a_home_signs_with_a_passing_key(monkeypatch):
    """As in a container with a number for a user: platformdirs then knows no folder."""

    def unknown(*_: object, **__: object) -> str:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr("platformdirs.user_config_dir", unknown)
    assert "BEGIN CERTIFICATE" in credentials.load_credential().chain


def test_own_certificate(frames, tmp_path, user_config):
    credentials.load_credential()
    pem = (user_config / "flowvqtalker" / "signing.pem").rename(tmp_path / "mine.pem")
    write_marked(frames, tmp_path / "out.mp4", None, len(frames), marks=Marks(sign_cert=pem, sign_key=pem))
    assert verify(tmp_path / "out.mp4").credentials is not None
    assert not (user_config / "flowvqtalker" / "signing.pem").exists()
    (tmp_path / "other.pem").write_bytes(credentials._make())
    with pytest.raises(UserError, match="does not belong"):
        credentials.load_credential(pem, tmp_path / "other.pem")
    (tmp_path / "text.pem").write_text("no key")
    with pytest.raises(UserError, match="PEM"):
        credentials.load_credential(pem, tmp_path / "text.pem")
    with pytest.raises(UserError, match="cannot be read"):
        credentials.load_credential(pem, tmp_path / "missing.pem")


def test_no_mark(frames, tmp_path):
    write_marked(frames, tmp_path / "out.mp4", None, len(frames), marks=Marks(mark=False))
    report = verify(tmp_path / "out.mp4")
    assert not report.marked and report.credentials is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sign_cert": Path("a.pem")}, "belong together"),
        ({"mark": False, "mark_id": 3}, "excludes"),
        ({"mark_id": 2**48}, "mark_id"),
        ({"timestamp_url": "example.org"}, "http"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        Marks(**options)


@pytest.mark.parametrize("size", [(512, 512), (24, 31), (1080, 720)])
def test_label(size):
    grey = np.full((*size, 3), 128, np.uint8)
    (shown,) = labelled([grey])
    changed = (shown != 128).any(-1)
    assert (grey == 128).all() and changed[-1, 0] and shown.max() > 200
    assert size == (24, 31) or not changed[: size[0] // 2].any()


def test_label_with_watermark(frames, tmp_path):
    write_marked(frames, tmp_path / "out.mp4", None, len(frames), marks=Marks(label=True))
    corner = next(read_video(tmp_path / "out.mp4"))[-30:, :120]
    assert corner.max() > 230 and verify(tmp_path / "out.mp4").marked


def test_verify_command(frames, video, tmp_path, capsys):
    shutil.copyfile(video, tmp_path / "marked.mp4")
    plain(tmp_path / "plain.mp4", frames)
    Image.fromarray(frames[0]).save(tmp_path / "plain.png")
    (tmp_path / "text.mp4").write_text("not a video")
    assert main(["verify", str(tmp_path / "marked.mp4")]) == 0
    assert "marked.mp4: marked\nwatermark: yes" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "plain.mp4"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["marked"] is False
    assert main(["verify", str(tmp_path / "plain.png")]) == 1
    for name in ("text.mp4", "missing.mp4", "."):
        assert main(["verify", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 3


@pytest.mark.parametrize("size", [(1, 1), (3, 400)])
def test_verify_takes_any_size(tmp_path, size):
    Image.new("L", size).save(tmp_path / "a.png")
    assert main(["verify", str(tmp_path / "a.png")]) == 1


def test_verify_takes_names_that_look_like_protocols_and_refuses_cut_files(video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(video, "12:30.mp4")
    assert main(["verify", "12:30.mp4"]) == 0
    data = Path("12:30.mp4").read_bytes()
    Path("cut.mp4").write_bytes(data[: len(data) // 3])
    assert main(["verify", "cut.mp4"]) == 2


def test_a_frame_of_a_marked_video_is_marked(video, tmp_path):
    Image.fromarray(next(read_video(video))).save(tmp_path / "frame.png")
    assert main(["verify", str(tmp_path / "frame.png")]) == 0


def test_animate_and_render_mark(portrait_file, tiny_weights, tmp_path):
    speech = write_wav(tmp_path / "speech.wav", babble(0.2))
    usual = ["--weights", str(tiny_weights), "--device", "cpu"]
    assert (
        main(["animate", str(portrait_file), str(speech), "-o", str(tmp_path / "a.mp4"), "--mark-id", "5", *usual]) == 0
    )
    assert verify(tmp_path / "a.mp4").watermark["identifier"] == 5
    assert main(["motion", str(speech), "-o", str(tmp_path / "m.npz"), "--weights", str(tiny_weights)]) == 0
    line = ["render", str(portrait_file), str(tmp_path / "m.npz"), *usual]
    assert main([*line, "-o", str(tmp_path / "b.mp4")]) == 0
    assert verify(tmp_path / "b.mp4").marked
    assert main([*line, "-o", str(tmp_path / "c.mp4"), "--no-mark"]) == 0
    assert not verify(tmp_path / "c.mp4").marked
    assert main([*line, "-o", str(tmp_path / "d.mp4"), "--sign-cert", str(speech)]) == 2
    assert not (tmp_path / "d.mp4").exists()
