"""Jobs on a real server: rendered, watched, fetched, killed and resumed."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from flowvqtalker.cli import main
from flowvqtalker.io.video import probe

from ..conftest import babble, write_wav


def order(client: httpx.Client, portrait: bytes, speech: bytes, **data) -> dict:
    answer = client.post("/v1/videos", files={"portrait": portrait, "speech": speech}, data={"consent": "true", **data})
    assert answer.status_code == 202, answer.text
    return answer.json()


def finish(client: httpx.Client, video: str, seconds: float = 300) -> dict:
    """Wait for the end of a job."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = client.get(f"/v1/videos/{video}").json()
        if state["status"] not in ("queued", "in_progress"):
            return state
        time.sleep(0.1)
    raise AssertionError(f"the job has not ended: {state}")


def events(client: httpx.Client, video: str) -> list[tuple[str, dict]]:
    """All events of a job."""
    with client.stream("GET", f"/v1/videos/{video}/events") as stream:
        lines = [line for line in stream.iter_lines() if line and not line.startswith(":")]
    names, data = lines[::2], lines[1::2]
    return [(n.removeprefix("event: "), json.loads(d.removeprefix("data: "))) for n, d in zip(names, data, strict=True)]


@pytest.fixture(scope="module")
def portrait(portrait_file) -> bytes:
    return portrait_file.read_bytes()


@pytest.mark.slow
def test_a_job_from_upload_to_deletion(real_server, portrait, tmp_path):
    client = real_server.client
    speech = write_wav(tmp_path / "s.wav", babble(0.4)).read_bytes()
    video = order(client, portrait, speech, emotion="happy", num_samples=2, name="<b>take</b>")
    seen = events(client, video["id"])
    name, state = seen[-1]
    assert name == "completed" and {name for name, _ in seen[:-1]} == {"progress"}
    progress = [state["progress"] for _, state in seen]
    assert progress == sorted(progress) and progress[-1] == 100
    assert {"rendering", "done"} <= {state["stage"] for _, state in seen}
    assert (state["size"], state["frame"], state["name"], state["error"]) == ("512x512", 20, "<b>take</b>", None)
    assert all(sample["ready"] for sample in state["samples"])
    path = tmp_path / "video.mp4"
    contents = []
    for sample in (1, 2):
        answer = client.get(f"/v1/videos/{video['id']}/content?sample={sample}")
        contents.append(answer.content)
    assert contents[0] != contents[1] and answer.headers["content-type"] == "video/mp4"
    path.write_bytes(contents[0])
    info = probe(path)
    assert (info.width, info.height, info.fps, info.sound) == (512, 512, 25.0, True) and abs(info.seconds - 0.4) < 0.1
    part = client.get(f"/v1/videos/{video['id']}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == contents[0][10:20]
    rows = client.get(f"/v1/videos/{video['id']}/content?format=csv&fps=50&download=true")
    assert len(rows.text.splitlines()) == 21 and "attachment" in rows.headers["content-disposition"]
    assert client.get(f"/v1/videos/{video['id']}/content?format=glb&sample=2").content[:4] == b"glTF"
    assert client.get(f"/v1/videos/{video['id']}/content?format=csv&fps=0").json()["code"] == "out_of_range"
    preview = Image.open(io.BytesIO(client.get(f"/v1/videos/{video['id']}/preview").content))
    assert max(preview.size) == 256
    report = client.post("/v1/verify", files={"file": contents[0]}).json()
    assert report["marked"] and report["watermark"]["identifier"] == state["mark_id"]
    assert client.delete(f"/v1/videos/{video['id']}/samples/2").status_code == 204
    assert client.get(f"/v1/videos/{video['id']}/content?sample=2").json()["code"] == "not_found"
    assert client.delete(f"/v1/videos/{video['id']}").status_code == 204
    assert client.get(f"/v1/portraits/{video['portrait_id']}").status_code == 404


@pytest.mark.slow
def test_a_running_job_is_cancelled_by_closing_its_events(real_server, portrait, tmp_path):
    client = real_server.client
    long = write_wav(tmp_path / "long.wav", babble(20.0)).read_bytes()
    video = order(client, portrait, long)
    with client.stream("GET", f"/v1/videos/{video['id']}/events?cancel_on_disconnect=true") as stream:
        for line in stream.iter_lines():
            if '"rendering"' in line:
                break
    assert finish(client, video["id"])["status"] == "cancelled"
    assert (
        finish(client, order(client, portrait, write_wav(tmp_path / "s.wav", babble(0.2)).read_bytes())["id"])["status"]
        == "completed"
    )  # the worker is free


def rendering(client: httpx.Client, video: str, begun: bool = True) -> None:
    """Wait for the first frames of a job, or until it has none again."""
    while bool((state := client.get(f"/v1/videos/{video}").json())["frame"]) != begun:
        assert state["status"] in ("queued", "in_progress"), state
        time.sleep(0.02)


def worker_of(server: int) -> int:
    """The process that renders: the child with a lower priority."""
    children = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and parent(path) == server]
    (found,) = [
        child for child in children if os.getpriority(os.PRIO_PROCESS, child) > os.getpriority(os.PRIO_PROCESS, server)
    ]
    return found


def parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@pytest.mark.slow
def test_a_job_survives_a_kill_of_its_worker_and_of_the_server(real_server, portrait, tmp_path):
    speech = write_wav(tmp_path / "s.wav", babble(0.8)).read_bytes()  # long enough to be killed in
    folder = Path(real_server.command[real_server.command.index("--data") + 1])
    others = {path.name for path in folder.glob("videos/*")}  # of the tests before
    video, waiting = (order(real_server.client, portrait, speech, num_samples=2)["id"] for _ in range(2))
    rendering(real_server.client, video)
    os.kill(worker_of(real_server.process.pid), signal.SIGKILL)
    rendering(real_server.client, video, begun=False)
    rendering(real_server.client, video)
    real_server.client.delete(f"/v1/videos/{waiting}")
    real_server.kill()
    real_server.start()
    state = finish(real_server.client, video)
    assert state["status"] == "completed" and all(sample["ready"] for sample in state["samples"])
    assert not list(folder.glob("videos/*/unnamed*"))
    assert {path.name for path in folder.glob("videos/*")} - others == {video}
    real_server.client.delete(f"/v1/videos/{video}")


@pytest.mark.slow
def test_clients_at_the_same_time_get_their_own_videos(real_server, portrait, tmp_path):
    """Each sends speech of its own length, and gets a video of that length."""

    def one(number: int) -> tuple[int, int]:
        speech = write_wav(tmp_path / f"{number}.wav", babble(0.2 + number * 0.04, seed=number)).read_bytes()
        with httpx.Client(base_url=real_server.url, timeout=300) as client:
            client.post("/v1/session")
            video = order(client, portrait, speech, seed=number)
            assert finish(client, video["id"])["status"] == "completed"
            assert len(client.get("/v1/videos").json()["data"]) == 1
            rows = client.get(f"/v1/videos/{video['id']}/content?format=csv").text.splitlines()
            return 5 + number, len(rows) - 1

    with ThreadPoolExecutor(4) as pool:
        for expected, found in pool.map(one, range(4)):
            assert expected == found


def test_a_second_server_cannot_have_the_same_data(real_server, capsys):
    assert main(real_server.command[3:]) == 2
    assert "is used by another server" in capsys.readouterr().err
