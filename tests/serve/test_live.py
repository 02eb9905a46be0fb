"""Live sessions over a WebSocket and over WebRTC, with the engine in a thread of this process."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import multiprocessing
import struct
import threading
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from aiortc import AudioStreamTrack, RTCPeerConnection, RTCSessionDescription
from PIL import Image

from flowvqtalker.live import LiveTalker
from flowvqtalker.pipeline import Talker
from flowvqtalker.serve.live import LiveSession, Stage
from flowvqtalker.serve.live_worker import keep_sessions

from ..conftest import babble


@pytest.fixture
def client(make_client, tiny_weights, monkeypatch):
    """A client of a server whose sessions are kept by a thread."""

    def start(stage):
        ours, theirs = multiprocessing.Pipe()
        talker = Talker.from_pretrained(tiny_weights, device="cpu", dtype="float32", components=LiveTalker.COMPONENTS)
        threading.Thread(target=keep_sessions, args=(theirs, talker), daemon=True).start()
        return SimpleNamespace(is_alive=lambda: True, terminate=ours.close), ours

    monkeypatch.setattr(Stage, "_start", start)
    return make_client()


@pytest.fixture
def start(client, portrait_file):
    files = {"portrait": portrait_file.read_bytes()}
    made = client.post("/v1/portraits", files=files, data={"consent": "true"}).json()
    return {"type": "start", "portrait_id": made["id"], "consent": True, "sample_rate": 16_000, "emotion": "happy"}


def hear(socket, until) -> dict[str, list]:
    """Messages by kind, until there are enough."""
    found = {"text": [], "image": [], "sound": []}
    while not until(found):
        message = socket.receive()
        assert message["type"] == "websocket.send", message
        if message.get("text"):
            found["text"].append(json.loads(message["text"]))
        else:
            kind, pts = struct.unpack("<Bd", message["bytes"][:9])
            found["image" if kind == 1 else "sound"].append((pts, message["bytes"][9:]))
    return found


def test_a_session_speaks_and_another_waits(client, start):
    with client.websocket_connect("/v1/live") as socket:
        socket.send_json(start)
        started = hear(socket, lambda found: found["text"])["text"][0]
        assert started == {"type": "started", "width": 512, "height": 512, "fps": 25.0, "sample_rate": 16_000}
        with client.websocket_connect("/v1/live") as other:
            other.send_json(start)
            assert hear(other, lambda found: found["text"])["text"][0]["code"] == "busy"
        pcm = (babble(1.0) * 32767).astype("<i2").tobytes()
        for place in range(0, len(pcm), 1998):
            socket.send_bytes(pcm[place : place + 1998])
        for command in ({"type": "end_of_utterance"}, {"type": "emotion", "emotion": "cheerful"}, {"type": "dance"}):
            socket.send_json(command)

        def told(found) -> bool:
            errors = [message for message in found["text"] if message["type"] == "error"]
            speaks = any(np.frombuffer(sound, "<i2").any() for _, sound in found["sound"])
            return found["image"] and len(found["sound"]) > 40 and len(errors) >= 2 and speaks

        heard = hear(socket, told)
        codes = [message["code"] for message in heard["text"] if message["type"] == "error"]
        assert sorted(codes) == ["invalid", "unknown_emotion"]
        times = [pts for pts, _ in heard["sound"]]
        assert all(abs(b - a - 0.04) < 1e-6 for a, b in itertools.pairwise(times))
        assert {len(sound) for _, sound in heard["sound"]} == {2 * 640}
        assert any(np.frombuffer(sound, "<i2").any() for _, sound in heard["sound"])
        assert Image.open(io.BytesIO(heard["image"][0][1])).size == (512, 512)
        socket.send_json({"type": "stop"})
    with client.websocket_connect("/v1/live") as socket:  # the engine stays for the next
        socket.send_json(start)
        assert hear(socket, lambda found: found["text"])["text"][0]["type"] == "started"


def test_a_message_is_not_lost_with_a_caller_that_gives_up():
    """The thread that waited for a cancelled caller must not swallow what comes next."""
    ours, theirs = multiprocessing.Pipe()

    async def read() -> object:
        session = LiveSession(ours, None)
        waiting = asyncio.create_task(session.receive())
        await asyncio.sleep(0.1)
        waiting.cancel()
        theirs.send(("closed",))
        return await session.receive(5)

    assert asyncio.run(read()) == ("closed",)


def test_a_session_over_webrtc(client, start):
    """A microphone track goes in; pictures and sound come out."""

    class Microphone(AudioStreamTrack):
        async def recv(self):
            frame = await super().recv()  # silence, in real time
            frame.planes[0].update((babble(0.02, 8000) * 32767).astype("<i2").tobytes())
            return frame

    async def call() -> tuple[tuple[int, int], int]:
        peer, seen = RTCPeerConnection(), asyncio.Queue()
        peer.addTrack(Microphone())
        peer.addTransceiver("video", direction="recvonly")
        peer.on("track", seen.put_nowait)
        await peer.setLocalDescription(await peer.createOffer())
        body = {**start, "sdp": peer.localDescription.sdp, "type": "offer"}
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
            answer = (await http.post("/v1/live/offer", json=body)).json()
        await peer.setRemoteDescription(RTCSessionDescription(answer["sdp"], answer["type"]))
        tracks = {track.kind: track for track in (await seen.get(), await seen.get())}
        sound, image = [await asyncio.wait_for(tracks[kind].recv(), 120) for kind in ("audio", "video")]
        server = client.app.state.server
        (ours,) = server.calls
        await peer.close()
        await ours.end()
        assert server.stage.free_places == server.settings.max_live
        return (image.width, image.height), sound.sample_rate

    assert asyncio.run(call()) == ((512, 512), 48_000)
    assert client.post("/v1/live/offer", json={"type": "offer"}).json()["code"] == "missing"
