"""The API without rendering: uploads, requests, refusals, owners, limits."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from starlette.websockets import WebSocketDisconnect

from flowvqtalker.serve.access import COOKIE

from ..conftest import babble, write_wav


@pytest.fixture
def files(portrait_file, speech):
    return {"portrait": portrait_file.read_bytes(), "speech": speech.read_bytes()}


def order(client, files, headers=None, **data):
    """Send a job."""
    return client.post("/v1/videos", files=files, data={"consent": "true", **data}, headers=headers)


def test_uploads_are_used_by_several_videos(make_client, files):
    client = make_client()
    answer = client.post("/v1/portraits", files={"portrait": files["portrait"]}, data={"consent": "true"})
    portrait = answer.json()
    assert answer.status_code == 201 and answer.headers["location"] == f"/v1/portraits/{portrait['id']}"
    assert (portrait["width"], portrait["height"]) == (512, 512)
    (face,) = portrait["faces"]
    left, top, right, bottom = face["box"]
    assert face["usable"] and 150 < left < right < 300 and 50 < top < bottom < 200
    assert client.get(f"/v1/portraits/{portrait['id']}").json() == portrait
    for query, size in (("", (512, 512)), ("?size=128", (128, 128)), ("?face=0", (512, 512))):
        image = client.get(f"/v1/portraits/{portrait['id']}/image{query}")
        assert Image.open(io.BytesIO(image.content)).size == size
    assert client.get(f"/v1/portraits/{portrait['id']}/image?face=1").json()["code"] == "out_of_range"
    speech = client.post("/v1/speech", files={"speech": files["speech"]}).json()
    assert speech["seconds"] == 1.0
    assert client.get(f"/v1/speech/{speech['id']}/content").content == files["speech"]
    said = client.post("/v1/speech", json={"text": "Good morning", "voice": "en-us"}).json()
    assert 0.3 < said["seconds"] < 5 and client.delete(f"/v1/speech/{said['id']}").status_code == 204
    assert client.post("/v1/speech", json={"text": "Hello", "voice": "xx"}).json()["code"] == "invalid"
    ids = {"portrait_id": portrait["id"], "speech_id": speech["id"], "consent": True}
    track = [{"time": 0, "emotion": "happy"}, {"time": 0.5, "emotion": "sad", "intensity": 0.5}]
    answer = client.post("/v1/videos", json={**ids, "emotion_track": track, "transition": 0.2, "seed": 7})
    video = answer.json()
    assert answer.status_code == 202 and answer.headers["location"] == f"/v1/videos/{video['id']}"
    assert (video["status"], video["frames"], video["seconds"], video["progress"]) == ("queued", 25, "1", 0)
    assert video["options"] == {"seed": 7, "num_samples": 1, "transition": 0.2, "face": 0}
    second = client.post("/v1/videos", data={**ids, "consent": "true", "num_samples": 3, "emotion": "sad"}).json()
    assert [sample["seed"] for sample in second["samples"]] == [0, 1, 2] and second["queue_position"] == 1
    assert second["frames"] == 75
    fast = client.post("/v1/videos", json={**ids, "preset": "fast"}).json()
    assert fast["frames"] == 13 and client.delete(f"/v1/videos/{fast['id']}").status_code == 204
    listed = client.get("/v1/videos?limit=1").json()
    assert [one["id"] for one in listed["data"]] == [second["id"]] and listed["has_more"]
    listed = client.get(f"/v1/videos?after={second['id']}").json()
    assert [one["id"] for one in listed["data"]] == [video["id"]] and not listed["has_more"]
    assert client.delete(f"/v1/speech/{speech['id']}").json()["code"] == "in_use"
    assert client.post(f"/v1/videos/{second['id']}/cancel").json()["status"] == "cancelled"
    assert client.post(f"/v1/videos/{second['id']}/cancel").json()["code"] == "finished"
    for one in (video, second):
        assert client.get(f"/v1/videos/{one['id']}/content").json()["code"] == "not_ready"
        assert client.delete(f"/v1/videos/{one['id']}").status_code == 204
        assert client.get(f"/v1/videos/{one['id']}").json()["code"] == "not_found"
    assert client.delete(f"/v1/speech/{speech['id']}").status_code == 204
    assert client.delete(f"/v1/portraits/{portrait['id']}").status_code == 204
    folder = client.app.state.server.store.folder
    assert [*folder.glob("assets/*"), *folder.glob("videos/*")] == []


@pytest.mark.parametrize(
    "data, code, field",
    [
        ({"consent": ""}, "consent_required", "consent"),
        ({"emotion": "cheerful"}, "unknown_emotion", "emotion"),
        ({"intensity": "3"}, "out_of_range", "intensity"),
        ({"intensity": "much"}, "invalid", "intensity"),
        ({"seed": "-1"}, "invalid", "seed"),
        ({"emotion": "happy,happy"}, "invalid", "emotion"),
        ({"fps": "24"}, "invalid", "fps"),
        ({"num_samples": "9"}, "out_of_range", "num_samples"),
        ({"face": "1"}, "out_of_range", "face"),
        ({"transition": "100"}, "out_of_range", "transition"),
        ({"emotion_track": "0,cheerful"}, "unknown_emotion", "emotion_track"),
        ({"emotion_track": '[{"time": 0}]'}, "invalid", "emotion_track"),
        ({"valence": "0.5", "emotion": "sad"}, "invalid", "valence"),
        ({"emotion_track": "[{"}, "invalid", "emotion_track"),
        ({"emotion_track": "0,happy", "emotion": "sad"}, "invalid", "emotion_track"),
        ({"weights": "/etc"}, "invalid", "weights"),
        ({"pose_from": "/etc/passwd"}, "invalid", "pose_from"),
        ({"name": "x" * 201}, "out_of_range", "name"),
        ({"portrait_url": "http://169.254.169.254/"}, None, None),  # the file wins; nothing is fetched
    ],
)
def test_options_are_checked_by_name(make_client, files, data, code, field):
    client = make_client()
    answer = order(client, files, **data)
    if code is None:
        assert answer.status_code == 202
        return
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["code"], problem.get("field")) == (code, field)
    assert problem["status"] == answer.status_code and problem["detail"].endswith(".")
    folder = client.app.state.server.store.folder
    assert list(folder.glob("assets/*")) == []


def test_inputs_are_checked_without_showing_paths(make_client, files, tmp_path):
    client = make_client(max_pixels=1 << 20, max_seconds=2.0, max_upload=1 << 20)
    wide = io.BytesIO()
    Image.new("L", (2000, 2000)).save(wide, "PNG")
    plain = io.BytesIO()
    Image.new("RGB", (300, 300)).save(plain, "PNG")
    silent = write_wav(tmp_path / "silent.wav", np.zeros(16_000)).read_bytes()
    long = write_wav(tmp_path / "long.wav", babble(3.0)).read_bytes()
    short = write_wav(tmp_path / "short.wav", babble(0.1)).read_bytes()
    cases = [
        ({"portrait": b"no image"}, "not_an_image", "portrait"),
        ({"portrait": plain.getvalue()}, "no_face", "portrait"),
        ({"portrait": wide.getvalue()}, "too_large", "portrait"),
        ({"portrait": b"x" * (1 << 20)}, "too_large", None),
        ({"portrait": b""}, "missing", "portrait"),
        ({"speech": b"no sound"}, "not_audio", "speech"),
        ({"speech": silent}, "audio_silent", "speech"),
        ({"speech": long}, "too_long", "speech"),
        ({"speech": short}, "audio_too_short", "speech"),
        ({"pose_from": b"no clip"}, "invalid", "pose_from"),
        ({"pose_from": ("../../x.npz", b"PK")}, "invalid", "pose_from"),
        ({"pose_from": ("x.csv", b"a,b")}, "invalid", "pose_from"),
        ({"emotion_track": b"\xff\xfe\x00"}, "invalid", "emotion_track"),
        ({"other": b"x"}, "invalid", "other"),
    ]
    for changed, code, field in cases:
        problem = order(client, files | changed).json()
        assert (problem["code"], problem.get("field")) == (code, field), problem
        assert str(tmp_path) not in json.dumps(problem)
    folder = client.app.state.server.store.folder
    assert list(folder.glob("assets/*")) == [] and not list(tmp_path.rglob("*x.npz"))


def test_several_faces_must_be_chosen_from(make_client, files, astronaut):
    client = make_client()
    both = io.BytesIO()
    Image.fromarray(np.concatenate([astronaut, astronaut[:, ::-1]], axis=1)).save(both, "PNG")
    problem = order(client, files | {"portrait": both.getvalue()}).json()
    assert problem["code"] == "several_faces" and len(problem["faces"]) == 2
    assert order(client, files | {"portrait": both.getvalue()}, face="1").json()["face"] == 1


def test_the_same_key_makes_one_video(make_client, files):
    client = make_client()
    key = {"Idempotency-Key": "k1"}
    first, second = (order(client, files, key, seed="1").json() for _ in range(2))
    assert first["id"] == second["id"]
    assert order(client, files, key, seed="2").json()["code"] == "idempotency_conflict"
    assert order(client, files, seed="1").json()["id"] != first["id"]
    client.delete(f"/v1/videos/{first['id']}")
    assert order(client, files, key, seed="1").json()["id"] != first["id"]


def test_a_full_queue_asks_to_wait(make_client, files):
    client = make_client(max_queue=3, max_client=2)
    assert [order(client, files).status_code for _ in range(2)] == [202, 202]
    answer = order(client, files)
    assert answer.status_code == 429 and answer.json()["code"] == "busy"
    assert int(answer.headers["retry-after"]) == answer.json()["retry_after"] >= 1
    assert client.post("/v1/session").status_code == 204  # another client
    assert [order(client, files).status_code for _ in range(2)] == [202, 429]


def test_clients_do_not_see_each_other(make_client, files):
    tokens = ("a" * 16, "b" * 16)
    client = make_client(tokens=tokens)
    assert client.get("/health").json()["token_required"]
    answer = client.get("/v1/emotions")
    assert (answer.status_code, answer.json()["code"]) == (401, "token_required")
    wrong = {"Authorization": "Bearer wrong"}
    assert client.post("/v1/session", headers=wrong).json()["code"] == "token_wrong"
    a, b = ({"Authorization": f"Bearer {token}"} for token in tokens)
    video = order(client, files, a).json()
    for path in ("", "/events", "/content", "/preview"):
        assert client.get(f"/v1/videos/{video['id']}{path}", headers=b).status_code == 404
    assert client.get(f"/v1/portraits/{video['portrait_id']}", headers=b).status_code == 404
    assert client.delete(f"/v1/videos/{video['id']}", headers=b).status_code == 404
    ids = {key: video[key] for key in ("portrait_id", "speech_id")}
    assert client.post("/v1/videos", json={**ids, "consent": True}, headers=b).json()["code"] == "not_found"
    assert client.get("/v1/videos", headers=b).json()["data"] == []
    # Two browsers with the same token are two clients.
    for _ in range(2):
        client.cookies.clear()
        answer = client.post("/v1/session", headers=a)
        assert (
            "httponly" in answer.headers["set-cookie"].lower()
            and "samesite=strict" in answer.headers["set-cookie"].lower()
        )
        assert client.get("/v1/videos").json()["data"] == []
        order(client, files)
        assert len(client.get("/v1/videos").json()["data"]) == 1
    assert "set-cookie" not in client.post("/v1/session").headers
    client.cookies.set(COOKIE, "made-up")
    client.cookies.clear()
    assert client.get("/v1/videos").status_code == 401


def test_other_sites_and_names_are_refused(make_client):
    client = make_client(hosts=("127.0.0.1", "localhost"))
    assert client.get("/v1/emotions", headers={"Host": "evil.example"}).json()["code"] == "wrong_host"
    assert client.get("/v1/emotions", headers={"Origin": "http://evil.example"}).json()["code"] == "wrong_origin"
    answer = client.get("/v1/emotions", headers={"Origin": "http://127.0.0.1:8000"})
    assert [one["id"] for one in answer.json()["data"]][4] == "happy"
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_information(make_client, files):
    client = make_client()
    options = {one["name"]: one for one in client.get("/v1/options").json()["data"]}
    assert options["intensity"] | {"help": ""} == {
        "name": "intensity", "type": "number", "default": 1.0, "min": 0.0, "max": 2.0, "help": "",
    }  # fmt: skip
    assert options["full"]["type"] == "boolean" and options["pose_from"]["type"] == "file"
    assert "weights" not in options and all(one["help"] for one in options.values())
    report = client.post("/v1/verify", files={"file": files["portrait"]}).json()
    assert report["marked"] is False and "path" not in report
    client.get("/v1/videos/video_x")
    text = client.get("/metrics").text
    assert 'flowvqtalker_request_seconds_count{method="GET",route="/v1/videos/{video}",status="404"} 1.0' in text
    assert 'flowvqtalker_queue{status="queued"} 0.0' in text
    assert client.get("/nowhere").json()["code"] == "not_found"
    assert client.put("/v1/videos").json()["code"] == "method_not_allowed"
    assert (
        client.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}).json()["code"]
        == "invalid"
    )
    page = client.get("/docs").text
    assert "http://" not in page and "https://" not in page


def test_live_sessions_are_refused_with_a_reason(make_client, files):
    client = make_client(max_live=0)
    portrait = client.post("/v1/portraits", files={"portrait": files["portrait"]}, data={"consent": "true"}).json()[
        "id"
    ]
    start = {"type": "start", "portrait_id": portrait, "consent": True}
    cases = [
        ({"type": "start"}, "consent_required"),
        (start | {"portrait_id": "portrait_x"}, "not_found"),
        (start | {"face": 3}, "out_of_range"),
        (start | {"emotion": "cheerful"}, "unknown_emotion"),
        (start | {"sample_rate": 1}, "out_of_range"),
        ([], "invalid"),
        (start, "busy"),
    ]
    for message, code in cases:
        with client.websocket_connect("/v1/live") as socket:
            socket.send_json(message)
            assert socket.receive_json()["code"] == code
    with (
        pytest.raises(WebSocketDisconnect),
        client.websocket_connect("/v1/live", headers={"Origin": "http://x.example"}),
    ):
        pass
