"""Live sessions over WebRTC: the browser's microphone comes in, a video and a sound track go out (extra ``webrtc``)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from fractions import Fraction
from typing import Any

import av
import numpy as np
from aiortc import MediaStreamTrack, RTCConfiguration, RTCDataChannel, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from fastapi import APIRouter, Request

from flowvqtalker.constants import CROP
from flowvqtalker.serve.live import LiveFrame, LiveSession
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.routes_live import obey, read_start
from flowvqtalker.serve.server import Owner, Server, TheServer
from flowvqtalker.serve.store import new_id
from flowvqtalker.serve.uploads import read_request

__all__ = ["router"]

logger = logging.getLogger(__name__)
router = APIRouter(tags=["Live"])

_RATE = 48_000  # of Opus
_CONNECT_SECONDS = 30.0
_WAITING = 10  # frames that wait for the network; older ones are dropped


class _Track(MediaStreamTrack):
    """A track that is fed frame by frame."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self._frames: asyncio.Queue[Any] = asyncio.Queue(_WAITING)

    def feed(self, frame: Any) -> None:
        """Send a frame; the oldest goes if too many wait."""
        if self._frames.full():
            self._frames.get_nowait()
        self._frames.put_nowait(frame)

    async def recv(self) -> Any:
        """The next frame, for aiortc."""
        frame = await self._frames.get()
        if frame is None:
            self.stop()
            raise MediaStreamError
        return frame


@router.post("/v1/live/offer")
async def offer(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Answer a WebRTC offer ``{sdp, type, portrait_id, consent, emotion, ...}``.

    The offer holds a sound track to send and a video and a sound track to receive. Commands, the same as on the
    WebSocket, come as text on a data channel.
    """
    values = (await read_request(request)).values
    sdp = values.pop("sdp", None)
    if not isinstance(sdp, str) or values.get("type") != "offer":
        raise Problem("missing", "Send the offer as sdp, with type offer.", "sdp")
    opening, _ = await read_start(server, owner, {**values, "type": "start", "sample_rate": _RATE}, jpeg=False)
    session = await server.stage.enter()
    call = _Call(server, owner, session)
    try:
        await session.open(opening)
        answer = await call.answer(sdp)
    except BaseException as error:
        await asyncio.shield(call.end())
        if isinstance(error, ValueError):
            raise Problem("invalid", f"The offer cannot be used ({error}).", "sdp") from error
        raise
    server.calls.add(call)
    call.start()
    return {"sdp": answer.sdp, "type": answer.type, "session_id": new_id("live")}


class _Call:
    """A connection to a browser and the session behind it."""

    def __init__(self, server: Server, owner: str, session: LiveSession) -> None:
        self._server, self._owner, self._session = server, owner, session
        # Without servers of others: on this machine and in its network addresses are enough.
        self._peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._video, self._sound = _Track("video"), _Track("audio")
        self._connected, self._ended = asyncio.Event(), False
        self._tasks: list[asyncio.Task[None]] = []

    async def answer(self, sdp: str) -> RTCSessionDescription:
        """The answer to an offer."""
        peer = self._peer

        @peer.on("track")
        def track(track: MediaStreamTrack) -> None:
            if track.kind == "audio":
                self._tasks.append(asyncio.ensure_future(self._listen(track)))

        @peer.on("datachannel")
        def channel(channel: RTCDataChannel) -> None:
            @channel.on("message")
            def message(text: Any) -> None:
                try:
                    obey(self._server, self._owner, self._session, json.loads(text))
                except Problem as problem:
                    channel.send(json.dumps({"type": "error", "code": problem.code, "detail": problem.detail}))
                except (ValueError, TypeError, KeyError):
                    channel.send(json.dumps({"type": "error", "code": "invalid", "detail": "Unknown command."}))

        @peer.on("connectionstatechange")
        def changed() -> None:
            if peer.connectionState == "connected":
                self._connected.set()
            elif peer.connectionState in ("failed", "closed"):
                self._stop()

        await peer.setRemoteDescription(RTCSessionDescription(sdp, "offer"))
        for ours in (self._video, self._sound):
            peer.addTrack(ours)
        await peer.setLocalDescription(await peer.createAnswer())
        return peer.localDescription

    def start(self) -> None:
        """Show the session until it ends."""
        self._tasks.append(asyncio.ensure_future(self._show()))

    async def _listen(self, track: MediaStreamTrack) -> None:
        resampler = av.AudioResampler(format="s16", layout="mono", rate=_RATE)
        with contextlib.suppress(MediaStreamError):
            while True:
                for frame in resampler.resample(await track.recv()):
                    self._session.command("push", frame.to_ndarray().tobytes(), _RATE)

    async def _show(self) -> None:
        try:
            await asyncio.wait_for(self._connected.wait(), _CONNECT_SECONDS)
            while (found := await self._session.next()) is not None:
                if isinstance(found, LiveFrame):
                    self._feed(found)
        except (Problem, asyncio.TimeoutError) as error:
            logger.warning("a WebRTC session ended: %s", type(error).__name__)
        finally:
            self._server.calls.discard(self)
            await asyncio.shield(self.end())

    def _feed(self, frame: LiveFrame) -> None:
        samples = np.frombuffer(frame.sound, "<i2")[None]
        sound = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = _RATE, round(frame.pts * _RATE), Fraction(1, _RATE)
        self._sound.feed(sound)
        if frame.image is not None:
            pixels = np.frombuffer(frame.image, np.uint8).reshape(CROP, CROP, 3)
            image = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            image.pts, image.time_base = round(frame.pts * 90_000), Fraction(1, 90_000)
            self._video.feed(image)

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def end(self) -> None:
        """Hang up, and give the session back."""
        if self._ended:
            return
        self._ended = True
        self._stop()
        await self._peer.close()
        await self._server.stage.leave(self._session)
