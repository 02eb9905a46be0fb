"""What protects the server and its clients: fair turns, retention, slow uploads, foreign addresses; and D-ID's form."""

from __future__ import annotations

import asyncio
import csv
import time

import httpx
import pytest

from flowvqtalker.cli import main
from flowvqtalker.errors import UserError
from flowvqtalker.serve import access, fetch
from flowvqtalker.serve.access import Guard
from flowvqtalker.serve.measure import Meter
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.settings import Settings, parse_duration
from flowvqtalker.serve.store import Store, new_id


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "data")
    yield store
    store.close()


def add(store: Store, owner: str, status: str = "queued", **more) -> str:
    video = new_id("video")
    store.video_folder(video).mkdir()
    row = {
        "id": video, "owner": owner, "status": status, "request": {}, "assets": {}, "frames": 25, "seconds": 1.0,
        "samples": 1, "consent": 1.0, "created": time.time(),
    }  # fmt: skip
    store.insert("videos", **row | more)
    return video


def test_clients_take_turns(store):
    from flowvqtalker.serve.pool import Pool

    pool = Pool(store, Settings(data=store.folder), lambda event, number: None)
    first = [add(store, "a") for _ in range(3)]
    second, third = add(store, "b"), add(store, "c", "in_progress")
    last = add(store, "c")
    assert [row["id"] for row in pool.waiting()] == [first[0], second, first[1], last, first[2]]
    pool._served["a"] = 1  # a had a turn: b comes first
    assert pool.waiting()[0]["id"] == second
    assert pool.cancel(second) and not pool.cancel(second)
    assert store.one("SELECT status FROM videos WHERE id = ?", third)["status"] == "in_progress"


def test_old_jobs_and_unused_uploads_are_deleted(store):
    old, now = time.time() - 100, time.time()
    asset = {"owner": "a", "kind": "portrait", "info": {}, "inline": 0, "created": old}
    for name, used in (("unused", old), ("used", old), ("new", now)):
        store.insert("assets", id=name, used=used, **asset)
        store.asset_folder(name).mkdir()
    gone = add(store, "a", "completed", ended=old)
    kept = [add(store, "a", "completed", ended=now), add(store, "a", assets={"portrait": "used"})]
    assert store.expire(50) == 2
    assert {row["id"] for row in store.all("SELECT id FROM assets")} == {"used", "new"}
    assert {path.name for path in (store.folder / "assets").iterdir()} == {"used", "new"}
    assert {path.name for path in (store.folder / "videos").iterdir()} == set(kept) and gone not in kept


def test_a_restart_finds_jobs_again_and_removes_what_has_no_record(tmp_path):
    store = Store(tmp_path)
    running, cancelled = add(store, "a", "in_progress"), add(store, "a", "cancelled")
    (tmp_path / "assets" / "half").mkdir()
    (tmp_path / "request-x").mkdir()
    with pytest.raises(UserError, match="is used by another server"):
        Store(tmp_path)
    store.close()
    store = Store(tmp_path)
    assert {row["id"]: row["status"] for row in store.all("SELECT * FROM videos")} == {
        running: "queued", cancelled: "cancelled",
    }  # fmt: skip
    assert not list(tmp_path.glob("assets/*")) and not list(tmp_path.glob("request-*"))
    store.close()
    (tmp_path / "jobs.sqlite3").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="is damaged"):
        Store(tmp_path)


def receive_slowly(pieces: list[bytes], pause: float):
    async def receive():
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    return receive


@pytest.mark.parametrize("pause, grace, idle", [(0.05, 10.0, 0.01), (0.01, -1.0, 10.0)])
def test_slow_uploads_end(store, monkeypatch, pause, grace, idle):
    monkeypatch.setattr(access, "_IDLE_SECONDS", idle)
    monkeypatch.setattr(access, "_GRACE", grace)
    sent = []

    async def app(scope, receive, send):
        try:
            while (await receive())["more_body"]:
                pass
        except Problem as problem:
            sent.append(problem.code)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"h")]}
    guard = Guard(app, Settings(data=store.folder), Meter(store))
    asyncio.run(guard(scope, receive_slowly([b"x"] * 4, pause), None))
    assert sent == ["slow_upload"]


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/x", "http://127.0.0.1/x", "http://[::1]/x", "http://169.254.169.254/latest", "http://10.0.0.1/",
        "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://2130706433/", "file:///etc/passwd", "ftp://example.org/x",
        "http://user:word@example.org/", "http://", "http://[", "gopher://example.org", "http://100.64.0.1/",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_refused(url, tmp_path):
    with pytest.raises(Problem) as caught:
        asyncio.run(fetch.fetch(url, "portrait", Settings(data=tmp_path, url_hosts=("*",))))
    assert caught.value.code == "url_not_allowed"


def test_allowed_hosts_are_fetched_from_the_address_that_was_checked(monkeypatch, tmp_path):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((str(request.url), request.headers["host"], request.extensions["sni_hostname"]))
        content = {"/ok": b"x" * 10, "/large": b"x" * 101}.get(request.url.path)
        return (
            httpx.Response(302, headers={"location": "http://127.0.0.1/"})
            if content is None
            else httpx.Response(200, content=content)
        )

    client = httpx.AsyncClient
    monkeypatch.setattr(httpx, "AsyncClient", lambda **kw: client(transport=httpx.MockTransport(answer), **kw))
    monkeypatch.setattr(fetch, "public_address", lambda host, port: "93.184.216.34")
    settings = Settings(data=tmp_path, url_hosts=("*.example.org",), max_upload=100)

    def get(url: str) -> bytes:
        with asyncio.run(fetch.fetch(url, "portrait", settings)) as file:
            return file.read()

    assert get("https://a.example.org:8443/ok") == b"x" * 10
    assert asked == [("https://93.184.216.34:8443/ok", "a.example.org:8443", "a.example.org")]
    for url, code in (
        ("https://a.example.org/large", "too_large"),
        ("https://a.example.org/moved", "invalid"),
        ("https://example.org.evil.com/ok", "url_not_allowed"),
    ):
        with pytest.raises(Problem) as caught:
            get(url)
        assert caught.value.code == code


def test_clients_of_d_id_are_served(make_client, portrait_file, speech):
    client = make_client()
    image = client.post("/images", files={"image": portrait_file.read_bytes()}).json()
    audio = client.post("/audios", files={"audio": speech.read_bytes()}).json()
    driven = {
        "expressions": [
            {"start_frame": 0, "expression": "surprise", "intensity": 0.5},
            {"start_frame": 10, "expression": "serious"},
        ],
        "transition_frames": 5,
    }
    talk = {
        "source_url": image["url"], "script": {"type": "audio", "audio_url": audio["url"]},
        "config": {"stitch": True, "driver_expressions": driven}, "name": "n", "user_data": "u",
    }  # fmt: skip
    answer = client.post("/talks", json=talk)
    made = answer.json()
    assert answer.status_code == 201 and made["id"].startswith("tlk_")
    assert (made["object"], made["status"], made["user_data"]) == ("talk", "created", "u")
    video = client.get("/v1/videos/video_" + made["id"].removeprefix("tlk_")).json()
    assert video["options"] == {"full": True, "num_samples": 1, "transition": 0.2, "face": 0}
    (track,) = client.app.state.server.store.folder.glob("assets/track_*/original.csv")
    assert list(csv.reader(track.open())) == [
        ["time", "emotion", "intensity"], ["0.0", "surprised", "0.5"], ["0.4", "neutral", "1.0"],
    ]  # fmt: skip
    refused = [
        (talk | {"webhook": "http://x"}, "invalid"),
        (talk | {"source_url": "http://example.org/a.jpg"}, "url_not_allowed"),
        (talk | {"script": {"type": "text", "input": "hello"}}, "invalid"),
        (talk | {"config": {"driver_expressions": {"expressions": [{"start_frame": 0, "expression": "x"}]}}},
         "unknown_emotion"),
    ]  # fmt: skip
    for body, code in refused:
        assert client.post("/talks", json=body).json()["code"] == code
    assert client.delete(f"/talks/{made['id']}").json()["status"] == "rejected"
    assert client.get(f"/talks/{made['id']}").status_code == 404


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached by others; give a --token"),
        (["--token", "short"], "a token has 5 characters, 16 are needed"),
        (["--keep", "soon"], "duration 'soon': write a number and s, m, h or d"),
        (["--workers", "0"], "workers must be a number from 1, got 0"),
        (["--weights", "none"], "weights folder none does not exist"),
    ],
)
def test_bad_options_are_user_errors(options, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *options]) == 2
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_durations():
    assert [parse_duration(text) for text in ("90s", "1.5m", "24h", "7d")] == [90, 90, 86_400, 604_800]
