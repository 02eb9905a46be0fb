"""The server of a user study: what it shows, what it stores, and everything that it refuses."""

from __future__ import annotations

import copy
import json
import socket
import sqlite3
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study.answers import collect, read_file
from flowvqtalker_eval.study.commands import Export
from flowvqtalker_eval.study.key import Key
from flowvqtalker_eval.study.page import page_source
from flowvqtalker_eval.study.server import create_app, serve

from .study_help import make_key

with warnings.catch_warnings():  # newer versions of Starlette prefer another HTTP client, and work with this one
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient


@pytest.fixture
def folder(tmp_path):
    """A study whose clips are no videos."""
    key = make_key()
    (tmp_path / "page" / "clips").mkdir(parents=True)
    (tmp_path / "page" / "index.html").write_text(page_source(key, 3, 1, ""), encoding="utf-8")
    for clip in key.clips:
        (tmp_path / "page" / "clips" / f"{clip.id}.mp4").write_bytes(bytes(range(256)) * 4)
    key.save(tmp_path / "key.json")
    return tmp_path


@pytest.fixture
def client(folder):
    with TestClient(create_app(folder)) as client:
        yield client


def submission(key: Key, rater: str = "P1", count: int | None = None) -> dict:
    """What the page sends."""
    answers = [
        {
            "clip": name, "position": place, "lip_sync": 3, "quality": 4, "emotion": "happy", "problem": False,
            "seconds": 12.5, "plays": 1, "revision": 0, "answered": "2025-01-01T10:00:00.000Z",
        }
        for place, name in enumerate(list(key.by_id)[:count], 1)
    ]  # fmt: skip
    return {
        "format": "flowvqtalker-study-answers/1", "study": key.study, "rater": rater, "session": "abcdefghjkmnpqrs",
        "row": 0, "started": "2025-01-01T09:00:00.000Z", "finished": "2025-01-01T11:00:00.000Z",
        "comment": 'ok, "fine"', "window": [1280, 800], "answers": answers,
    }  # fmt: skip


def rows(folder) -> int:
    with sqlite3.connect(folder / "answers.sqlite") as connection:
        return sum(len(json.loads(row[0])["answers"]) for row in connection.execute("SELECT content FROM submissions"))


def test_page_and_clips(client, folder):
    page = client.get("/")
    assert page.status_code == 200
    assert "How well do the lips fit the speech?" in page.text
    assert page.headers["cache-control"] == "no-store"
    assert page.headers["x-content-type-options"] == "nosniff"
    clip = Key.load(folder).clips[0].id
    whole = client.get(f"/clips/{clip}.mp4")
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    part = client.get(f"/clips/{clip}.mp4", headers={"Range": "bytes=300-309"})
    assert part.status_code == 206
    assert part.content == whole.content[300:310]
    assert part.headers["content-range"] == "bytes 300-309/1024"
    assert client.get("/api/study").json() == {"study": Key.load(folder).study}


@pytest.mark.parametrize(
    "path",
    ["/key.json", "/../key.json", "/%2e%2e/key.json", "/..%2fkey.json", "/clips/../../key.json", "/answers.sqlite",
     "/clips", "/clips/", "/docs", "/openapi.json", "/api/answers"],
)  # fmt: skip
def test_nothing_else_is_shown(client, path):
    reply = client.get(path)
    assert reply.status_code in (404, 405)
    assert "method" not in reply.text.lower() or reply.json() == {"detail": "Method Not Allowed"}


def test_answers_arrive(client, folder):
    key = Key.load(folder)
    reply = client.post("/api/answers", json=submission(key))
    assert reply.json() == {"stored": len(key.by_id)}
    answers, problems = collect([folder], key)
    assert problems == []
    assert {one.clip for one in answers} == set(key.by_id)
    assert {(one.rater, one.lip_sync, one.quality, one.emotion) for one in answers} == {("P1", 3, 4, "happy")}
    with sqlite3.connect(folder / "answers.sqlite") as connection:
        ((content,),) = connection.execute("SELECT content FROM submissions").fetchall()
    about = json.loads(content)
    assert (about["comment"], about["window"], about["row"]) == ('ok, "fine"', [1280, 800], 0)


def test_sending_twice_changes_nothing(client, folder):
    given = submission(Key.load(folder))
    for _ in range(2):
        assert client.post("/api/answers", json=given).json() == {"stored": len(given["answers"])}
    assert rows(folder) == len(given["answers"])


def test_later_changes_count_and_earlier_ones_do_not(client, folder):
    key = Key.load(folder)
    given = submission(key, count=2)
    client.post("/api/answers", json=given)
    changed = copy.deepcopy(given)
    changed["answers"][0].update(quality=1, revision=1)
    assert client.post("/api/answers", json=changed).status_code == 200
    assert client.post("/api/answers", json=given).status_code == 200  # late
    answers, _ = collect([folder], key)
    assert sorted(one.quality for one in answers) == [1, 4]
    more = submission(key, count=3)
    assert client.post("/api/answers", json=more).json() == {"stored": 3}


def test_code_of_somebody_else_is_refused(client, folder):
    key = Key.load(folder)
    client.post("/api/answers", json=submission(key, count=2))
    other = {**submission(key), "session": "z" * 16}
    reply = client.post("/api/answers", json=other)
    assert reply.status_code == 409
    assert "somebody else has sent answers as P1" in reply.json()["detail"]
    assert rows(folder) == 2


def test_many_at_once(client, folder):
    key = Key.load(folder)
    given = [submission(key, f"P{number}") for number in range(12)] * 2
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda one: client.post("/api/answers", json=one).status_code, given))
    assert set(codes) == {200}
    assert rows(folder) == 12 * len(key.by_id)


def first(**changes):
    def change(given):
        given["answers"][-1].update(changes)

    return change


REFUSED = {
    "unknown clip": (first(clip="ffffffffffff"), "no clip ffffffffffff"),
    "name of no clip": (first(clip="../key"), "answers.6.clip"),
    "practice clip": (first(clip=f"{10**7:012x}"), "has no clip"),
    "rating too high": (first(quality=6), "answers.6.quality: Input should be less than or equal to 5"),
    "rating too low": (first(lip_sync=0), "answers.6.lip_sync"),
    "rating of text": (first(quality="4"), "answers.6.quality"),
    "half a rating": (first(quality=3.5), "answers.6.quality"),
    "no rating": (first(quality=None), "all its answers, or none"),
    "no lips": (first(lip_sync=None), "lip_sync of clip"),
    "ratings of what does not play": (first(problem=True), "all its answers, or none"),
    "unknown emotion": (first(emotion="natural"), "answers.6.emotion"),
    "negative time": (first(seconds=-1), "answers.6.seconds"),
    "no date": (first(answered="yesterday"), "answers.6.answered"),
    "more than asked": (first(extra=1), "answers.6.extra"),
    "a clip twice": (lambda given: given["answers"].append(given["answers"][0]), "answered twice"),
    "no answers": (lambda given: given.update(answers=[]), "answers: List should have at least 1"),
    "other study": (lambda given: given.update(study="x"), "belong to study x"),
    "other format": (lambda given: given.update(format="x"), "format: Input should be"),
    "code with a space": (lambda given: given.update(rater="P 1"), "rater"),
    "code of several lines": (lambda given: given.update(rater="P1\n"), "rater"),
    "no session": (lambda given: given.pop("session"), "session: Field required"),
    "row outside of the plan": (lambda given: given.update(row=8), "row 8"),
    "a novel": (lambda given: given.update(comment="x" * 2001), "comment"),
}


@pytest.mark.parametrize("change,part", REFUSED.values(), ids=REFUSED)
def test_refused(client, folder, change, part):
    given = submission(Key.load(folder))
    change(given)
    reply = client.post("/api/answers", json=given)
    assert reply.status_code == 422
    assert part in reply.json()["detail"]
    assert rows(folder) == 0


def test_bodies_that_are_no_answers(client, folder):
    json_type = {"Content-Type": "application/json"}
    assert client.post("/api/answers", content=b"{", headers=json_type).status_code == 422
    assert client.post("/api/answers", content=b"x" * (5 << 20), headers=json_type).status_code == 413
    assert client.post("/api/answers", data={"a": "b"}).status_code == 415
    assert rows(folder) == 0


def test_a_failure_leaves_the_former_answers(client, folder, monkeypatch):
    key = Key.load(folder)
    client.post("/api/answers", json=submission(key, count=2))
    monkeypatch.setattr("flowvqtalker_eval.study.server.json.dumps", lambda content: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        client.post("/api/answers", json=submission(key))
    monkeypatch.undo()
    assert rows(folder) == 2
    assert client.post("/api/answers", json=submission(key)).status_code == 200  # the database is not locked


def test_clips_that_do_not_play(client, folder):
    key = Key.load(folder)
    given = submission(key)
    given["answers"][0].update(lip_sync=None, quality=None, emotion=None, problem=True)
    assert client.post("/api/answers", json=given).status_code == 200
    answers, problems = collect([folder], key)
    assert [one.problem for one in answers].count(True) == 1
    assert problems == []


def test_export(client, folder, tmp_path, capsys):
    key = Key.load(folder)
    with pytest.raises(UserError, match="holds no answers"):
        Export(study=folder, output=tmp_path / "a.json").run()
    client.post("/api/answers", json=submission(key, "P1"))
    client.post("/api/answers", json=submission(key, "P2", 3))
    for name in ("a.json", "a.csv"):
        Export(study=folder, output=tmp_path / name).run()
        assert f"{name}: {len(key.by_id) + 3} answers of 2 participants" in capsys.readouterr().out
        assert read_file(tmp_path / name) == read_file(folder)
    with pytest.raises(UserError, match=r"must end in one of \.json, \.csv"):
        Export(study=folder, output=tmp_path / "a.txt").run()


def test_what_cannot_be_served(folder, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another with --port"):
            serve(folder, port=taken.getsockname()[1])
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1 port 70000"):
        serve(folder, port=70000)
    with pytest.raises(UserError, match="does not exist"):
        create_app(tmp_path / "none")
    (folder / "page" / "index.html").unlink()
    with pytest.raises(UserError, match="holds no page"):
        create_app(folder)
