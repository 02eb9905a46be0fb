"""Data sets as their authors ship them: small trees with the same names, also in archives; and what is left out."""

from __future__ import annotations

import csv
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from flowvqtalker import EMOTIONS
from flowvqtalker.data import prepare as module
from flowvqtalker.data.extract import PrepareConfig
from flowvqtalker.data.layouts import catalogue, unpack
from flowvqtalker.data.prepare import prepare
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.data.sources import Box, Source, read_frames
from flowvqtalker.errors import UserError

from ..conftest import babble, write_wav
from .test_prepare import LENIENT, SIDE, FakeTracker, fake_fit, openings, write_video


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def labels(sources: list[Source]) -> list[tuple[str, str | None, str]]:
    return [(s.name, s.identity, EMOTIONS[s.emotion] if s.emotion >= 0 else "") for s in sources]


def test_mead(tmp_path: Path) -> None:
    names = ["video/front/angry/level_1/001.mp4", "video/left_30/angry/level_1/001.mp4", "audio/angry/level_1/001.m4a"]
    root = touch(tmp_path / "MEAD", *(f"M003/{name}" for name in names), "W009/video/front/neutral/level_1/012.mp4")
    found = catalogue(root)
    assert labels(found.sources) == [
        ("M003/front/angry/level_1/001.mp4", "MEAD_M003", "angry"),
        ("W009/front/neutral/level_1/012.mp4", "MEAD_W009", "neutral"),
    ]
    assert [s.sound for s in found.sources] == [root / "M003/audio/angry/level_1/001.m4a", None]
    assert found.left_out == {"M003/left_30/angry/level_1/001.mp4": "another view"}
    assert len(catalogue(root, "mead", ("front", "left_30")).sources) == 3


@pytest.mark.parametrize("kind", ["video.tar", "whole.zip"])
def test_archives_of_mead_are_unpacked_once(tmp_path: Path, kind: str) -> None:
    tree = touch(tmp_path / "tree", "video/front/sad/level_2/003.mp4", "video/top/sad/level_2/003.mp4")
    touch(tree, "audio/sad/level_2/003.m4a", "notes.doc")
    data = tmp_path / "MEAD"
    (data / "M003").mkdir(parents=True)
    if kind == "video.tar":
        for part in ("video", "audio"):
            with tarfile.open(data / "M003" / f"{part}.tar", "w") as bundle:
                bundle.add(tree / part, part)
    else:
        with zipfile.ZipFile(data / "M003.zip", "w") as packed:
            for path in tree.rglob("*.*"):
                packed.write(path, path.relative_to(tree))
    for _ in range(2):
        unpack(data, tmp_path / "parts")
        for path in (tmp_path / "parts").rglob("003.mp4"):
            path.write_bytes(path.read_bytes() + b".")
    assert [path.read_bytes() for path in (tmp_path / "parts").rglob("*.mp4")] == [b".."]  # the top view stays packed
    assert not list((tmp_path / "parts").rglob("*.doc"))
    (source,) = catalogue(data, unpacked=tmp_path / "parts").sources
    assert (source.name, source.identity) == ("M003/front/sad/level_2/003.mp4", "MEAD_M003")
    assert source.sound is not None and source.sound.name == "003.m4a"


def test_a_broken_archive_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "M003.tar").write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"M003\.tar cannot be read"):
        unpack(tmp_path, tmp_path / "parts")
    assert not (tmp_path / "parts" / "M003").exists()


def hdtf(root: Path) -> Path:
    touch(root, "videos/RD_Radio1.mp4", "videos/AmyKlobuchar1.mp4")
    lists = root / "HDTF_dataset"
    lists.mkdir()
    (lists / "RD_annotion_time.txt").write_text("Radio1.mp4 00:05-00:50\nRadio2.mp4 00:05-00:10\n")
    (lists / "RD_crop_wh.txt").write_text("Radio1_0.mp4 466 535 10 535\n")
    (lists / "RD_resolution.txt").write_text("Radio1.mp4 720\nRadio2.mp4 720\n")
    (lists / "WDA_annotion_time.txt").write_text("AmyKlobuchar1.mp4 00:35-00:45 03:25-broken\n")
    return root


def test_hdtf(tmp_path: Path) -> None:
    found = catalogue(hdtf(tmp_path))
    assert labels(found.sources) == [
        *((f"RD_Radio1_000_{k:02d}.mp4", "Radio1", "neutral") for k in range(3)),
        ("WDA_AmyKlobuchar1_000_00.mp4", "AmyKlobuchar", "neutral"),
    ]
    assert [s.span for s in found.sources] == [(5, 20), (20, 35), (35, 50), (35, 45)]
    assert [s.box for s in found.sources] == [Box(466, 10, 535, 535, 720)] * 3 + [None]
    assert set(found.left_out) == {"RD_Radio2_000", "WDA_AmyKlobuchar1_001"}
    cut = catalogue(touch(tmp_path / "cut", "WRA_MikeJohanns0_003.mp4"))
    assert labels(cut.sources) == [("WRA_MikeJohanns0_003.mp4", "MikeJohanns", "neutral")]


def test_other_layouts(tmp_path: Path) -> None:
    names = ["01-01-06-01-02-01-12", "02-01-06-01-02-01-12", "01-02-03-01-02-01-12", "01-01-02-01-02-01-01"]
    found = catalogue(touch(tmp_path / "ravdess", *(f"Actor_12/{name}.mp4" for name in names)))
    assert labels(found.sources) == [
        ("01-01-02-01-02-01-01.mp4", "ravdess_01", ""), ("01-01-06-01-02-01-12.mp4", "ravdess_12", "fear"),
    ]  # fmt: skip
    assert found.left_out["01-02-03-01-02-01-12.mp4"] == "song"
    crema = catalogue(touch(tmp_path / "crema", "VideoFlash/1001_DFA_ANG_XX.flv", "VideoFlash/1076_MTI_NEU_X.flv"))
    assert labels(crema.sources) == [
        ("1001_DFA_ANG_XX.mp4", "crema_1001", "angry"), ("1076_MTI_NEU_X.mp4", "crema_1076", "neutral"),
    ]  # fmt: skip
    faces = catalogue(touch(tmp_path / "ffhq", "images1024x1024/00000/00000.png", "images1024x1024/00000/00001.png"))
    assert [s.identity for s in faces.sources] == ["ffhq_00000", "ffhq_00001"] and faces.sources[0].is_image
    clips = catalogue(touch(tmp_path / "celebv", "M2Ohb0FAaJU_1.mp4", "M2Ohb0FAaJU_12_0.mp4", "-fUFv0FAaJU_1.jpg"))
    assert [s.identity for s in clips.sources] == ["celebv_-fUFv0FAaJU", *["celebv_M2Ohb0FAaJU"] * 2]
    with pytest.raises(UserError, match="unknown layout 'vox'; choose from auto, tables, mead"):
        catalogue(tmp_path / "ffhq", "vox")
    with pytest.raises(UserError, match="of the layout mead"):
        catalogue(tmp_path / "ffhq", "mead")


def test_a_span_and_a_crop_of_a_video(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mkv", 25, np.ones(100))
    plain = {number: image for number, image in read_frames(tmp_path / "v.mkv")}
    source = Source("v", tmp_path / "v.mkv", "x", "x", -1, True, False, span=(1.2, 3.2), box=Box(0, 0, 160, 80, 320))
    timing = source.timing()
    assert (timing.ticks, timing.size) == (50, (40, 80))
    np.testing.assert_allclose(timing.times, np.arange(50) / 25, atol=1e-6)
    frames = dict(source.frames())
    assert list(frames) == list(range(50))
    for number in (0, 49):
        np.testing.assert_array_equal(frames[number], plain[number + 30][:40, :80])
    assert list(dict(source.frames({7}))) == [7]
    wave = source.audio(timing)
    whole = Source("v", tmp_path / "v.mkv", "x", "x", -1, True, False)
    np.testing.assert_array_equal(wave, whole.audio(whole.timing())[30 * SAMPLES : 80 * SAMPLES])


def mead(root: Path) -> dict[int, np.ndarray]:
    """A tree of MEAD's names with toy clips, one of them in an archive; returns the lips by length."""
    lips = {}
    for number in range(4):
        folder = root / "M003" / "video" / "front" / EMOTIONS[number] / "level_1"
        folder.mkdir(parents=True)
        lips[50 + number] = openings(50 + number, number)
        write_video(folder / "001.mkv", 25, lips[50 + number], sound=False)
        sound = root / "M003" / "audio" / EMOTIONS[number] / "level_1"
        sound.mkdir(parents=True)
        write_wav(sound / "001.wav", babble(2.0, seed=number))
    with tarfile.open(root / "W009.tar", "w") as bundle:
        bundle.add(root / "M003", "W009")
    shutil.rmtree(root / "M003" / "video" / "front" / EMOTIONS[3])
    return lips


def test_prepare_of_an_archive_with_separate_sound(tmp_path: Path) -> None:
    lips = mead(tmp_path / "data")
    config = PrepareConfig(tmp_path / "data", tmp_path / "out", tmp_path / "none", **LENIENT)
    report = prepare(config, make_tracker=FakeTracker(lips), fit=fake_fit)
    shard = Shard(tmp_path / "out")
    assert (report.clips, report.dropped) == (7, {})
    assert [str(name) for name in shard.identity] == ["MEAD_M003"] * 3 + ["MEAD_W009"] * 4
    assert list(shard.emotion) == [0, 1, 2, 0, 1, 2, 3]
    assert shard.sound.all() and shard.speech.all()
    assert np.abs(shard.wave(0)).max() > 0.05


def clip(path: Path, corners: list[int], background: np.ndarray | None = None) -> None:
    """A clip whose lower right corner tells the toy tracker what to see."""
    write_video(path, 25, np.ones(len(corners)), sound=False)
    frames = [image for _, image in read_frames(path)]
    path.unlink()
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width = video.height = SIDE
        video.pix_fmt = "bgr0"
        for frame, corner in zip(frames, corners, strict=True):
            pixels = frame if background is None else background.copy()
            pixels[-8:, -8:] = corner
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())


def test_what_is_dropped_and_why(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    sharp = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    clip(data / "good.mkv", [0] * 30, sharp)
    clip(data / "two.mkv", [255] * 30, sharp)
    clip(data / "cut.mkv", [0] * 15 + [128] * 15, sharp)
    clip(data / "blurred.mkv", [90] * 30)
    clip(data / "short.mkv", [0] * 5, sharp)
    clip(data / "black.mkv", [0] * 30, np.zeros_like(sharp))
    (data / "broken.mkv").write_bytes(b"no video")
    cv2.imwrite(str(data / "still.png"), sharp)
    config = PrepareConfig(data, tmp_path / "out", tmp_path / "none")
    tracker = FakeTracker({})
    report = prepare(config, make_tracker=tracker, fit=fake_fit)
    reasons = {name.partition(".")[0]: reason for name, (reason, _) in report.dropped.items()}
    assert reasons == {
        "two": "two_faces", "cut": "cut", "blurred": "blurred", "short": "too_short", "black": "no_face",
        "broken": "error",
    }  # fmt: skip
    with open(tmp_path / "out" / "dropped.csv", newline="") as file:
        assert {row["file"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)} == report.dropped
    # A verdict is remembered, an error is tried again; other settings ask anew.
    calls = tracker.calls
    assert prepare(config, make_tracker=tracker, fit=fake_fit).dropped == report.dropped
    assert tracker.calls == calls + 1
    lenient = PrepareConfig(data, tmp_path / "out", tmp_path / "none", min_sharpness=0.0, max_other_face=1.0)
    assert set(prepare(lenient, make_tracker=tracker, fit=fake_fit).dropped) == {
        "cut.mkv", "short.mkv", "black.mkv", "broken.mkv",
    }  # fmt: skip


def toy_worker(config: PrepareConfig, threads: int, number: int) -> Any:
    """The worker of :func:`prepare` with the toy tracker, for processes."""
    import functools

    from flowvqtalker.data.extract import Tools

    lips = {50 + number: openings(50 + number, number) for number in range(4)}
    return functools.partial(module._work, tools=Tools(config, FakeTracker(lips), fake_fit))


@pytest.mark.slow
def test_workers_and_parts_do_not_change_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lips = mead(tmp_path / "data")
    (tmp_path / "model").write_bytes(b"")

    def shard(name: str, **settings: Any) -> dict[str, bytes]:
        config = PrepareConfig(tmp_path / "data", tmp_path / name / "out", tmp_path / "model", **LENIENT, **settings)
        if "workers" in settings:
            assert prepare(config).dropped == {}
        else:
            prepare(config, make_tracker=FakeTracker(lips), fit=fake_fit)
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name).glob("out/*"))}

    for part, count in (("2/2", 3), ("1/2", 7)):
        assert shard("parts", part=part) == {}
        assert len(list((tmp_path / "parts" / "out.parts").glob("*.fit.npz"))) == count
    monkeypatch.setattr(module, "make_worker", toy_worker)
    assert shard("parts") == shard("two", workers=2)
