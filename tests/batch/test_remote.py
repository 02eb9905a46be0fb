"""Jobs whose files lie in an object store, on Ray: a real S3 server (moto) on this machine."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from flowvqtalker.cli import main
from flowvqtalker.errors import UserError
from flowvqtalker.io.remote import glob_remote, is_remote, local_copy, location, uploaded, write_file
from flowvqtalker.io.video import probe

from ..conftest import babble, write_wav

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server():
    """Address of an S3 server."""
    running = moto.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """An empty bucket, as the path of its URL. The variables are those that users set."""
    import s3fs

    settings = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if system.exists("clips"):
        system.rm("clips", recursive=True)
    system.mkdir("clips")
    return location("s3://clips")


def test_paths_of_urls(tmp_path):
    assert location("faces/a.jpg").as_posix() == "faces/a.jpg"
    assert location(f"file://{tmp_path}/with%20space.jpg") == tmp_path / "with space.jpg"
    url = location("memory://bucket/a.jpg")
    assert is_remote(url) and not is_remote(tmp_path)
    assert (url.name, url.stem, str(url.with_name("b.mp4"))) == ("a.jpg", "a", "memory://bucket/b.mp4")
    with pytest.raises(UserError, match="nowhere://a cannot be used"):
        location("nowhere://a")


def test_a_file_is_uploaded_when_it_is_whole(bucket, tmp_path):
    target = bucket / "out" / "a.txt"
    with pytest.raises(ZeroDivisionError), uploaded(target) as file:
        file.write_text(str(1 / 0))
    assert not target.exists()
    write_file(target, "whole")
    with local_copy(target) as file:
        assert (file.name, file.read_text()) == ("a.txt", "whole")
    assert not file.exists()
    write_file(bucket / "out" / "b.txt", "b")
    assert [str(path) for path in glob_remote(bucket / "out" / "*.txt")] == [
        "s3://clips/out/a.txt",
        "s3://clips/out/b.txt",
    ]
    with pytest.raises(UserError, match=r"none\.txt cannot be reached"), local_copy(bucket / "none.txt"):
        pass
    with local_copy(tmp_path) as same:
        assert same == tmp_path


@pytest.mark.slow
def test_a_batch_from_and_to_an_object_store_on_ray(bucket, tmp_path, portrait_file, tiny_weights, capsys):
    pytest.importorskip("ray")
    for number in range(2):
        file = write_wav(tmp_path / f"s{number}.wav", babble(0.2, seed=number))
        (bucket / "talks" / file.name).write_bytes(file.read_bytes())
    silence = write_wav(tmp_path / "silence.wav", np.zeros(8000))
    (bucket / "talks" / silence.name).write_bytes(silence.read_bytes())
    (bucket / "a.png").write_bytes(portrait_file.read_bytes())
    (bucket / "jobs.csv").write_text(
        "portrait,speech,output\na.png,talks/s*.wav,\n"
        f"s3://clips/a.png,file://{tmp_path}/s0.wav,own/name.mp4\n",
    )  # fmt: skip
    line = ["batch", "s3://clips/jobs.csv", "-o", "s3://clips/out", "--weights", str(tiny_weights), "--device", "cpu"]
    line += ["--no-mark"]
    assert main([*line, "--ray", "local", "--workers", "1"]) == 1
    assert "s3://clips/out: 3 made, 0 done before, 1 failed" in capsys.readouterr().out
    (failed,) = csv.DictReader(io.StringIO((bucket / "out" / "errors.csv").read_text()))
    assert failed["speech"] == "s3://clips/talks/silence.wav" and "silent throughout" in failed["error"]
    videos = [bucket / "out" / name for name in ("a_s0_neutral_0.mp4", "a_s1_neutral_0.mp4", "own/name.mp4")]
    assert videos[0].read_bytes() == videos[2].read_bytes()
    with local_copy(videos[1]) as video:
        assert probe(video).kind == "video"
    record = json.loads(videos[0].with_name("a_s0_neutral_0.mp4.json").read_text())
    assert (record["frames"], record["job"]["speech"]) == (5, "s3://clips/talks/s0.wav")

    assert main([*line, "--dry-run"]) == 2  # what is done is known
    problem = capsys.readouterr().err
    assert "dry run: 1 problem" in problem and "silence.wav" in problem
