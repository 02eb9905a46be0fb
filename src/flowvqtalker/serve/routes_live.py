"""The live route: speech goes in, frames and sound come out, over one WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from typing import Any

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketState

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.motion.options import check_limits
from flowvqtalker.serve.access import current_owner
from flowvqtalker.serve.examine import check_request
from flowvqtalker.serve.live import LiveFrame, LiveSession
from flowvqtalker.serve.live_worker import Opening
from flowvqtalker.serve.orders import choose_face, no_consent
from flowvqtalker.serve.problems import Problem, from_user_error
from flowvqtalker.serve.server import Server, server_of
from flowvqtalker.serve.store import ORIGINAL

__all__ = ["router"]

router = APIRouter()

_START_SECONDS = 10.0
_OPTIONS = (
    "emotion",
    "valence",
    "arousal",
    "intensity",
    "seed",
    "temperature",
    "articulation",
    "blink_rate",
    "pose_scale",
    "fixed_pose",
)
# Kinds of binary messages: a byte, then pts as float64 (little endian), then the content.
_IMAGE, _SOUND = 1, 2


@router.websocket("/v1/live")
async def live(socket: WebSocket) -> None:
    """See docs/serve.md for the messages."""
    server = server_of(socket)
    await socket.accept()
    session = None
    try:
        owner = current_owner(socket, server.store, server.settings)
        start = json.loads(await asyncio.wait_for(socket.receive_text(), _START_SECONDS))
        opening, rate = await read_start(server, owner, start)
        session = await server.stage.enter()
        await session.open(opening)
        answer = {"type": "started", "width": 512, "height": 512, "fps": opening.fps, "sample_rate": opening.audio_rate}
        await socket.send_json(answer)
        both = _both(_listen(socket, server, owner, session, rate), _show(socket, session))
        await asyncio.wait_for(both, server.settings.max_seconds)
    except Problem as problem:
        await _tell(socket, problem)
    except (ValueError, TypeError, KeyError):
        await _tell(socket, Problem("invalid", "A live session begins with one JSON object of type start."))
    except (WebSocketDisconnect, asyncio.TimeoutError):
        pass
    finally:
        if session is not None:
            await asyncio.shield(server.stage.leave(session))
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            if socket.application_state != WebSocketState.DISCONNECTED:
                await socket.close()


async def read_start(server: Server, owner: str, start: Any, jpeg: bool = True) -> tuple[Opening, int]:
    """The opening of a session, and the rate of the speech that comes.

    Raises:
        Problem: if an entry cannot be used.
        ValueError, TypeError: if it is no start at all.
    """
    if not isinstance(start, dict) or start.get("type") != "start":
        raise ValueError("no start")
    if start.get("consent") is not True:
        raise no_consent()
    row = server.asset(owner, "portrait", str(start.get("portrait_id")))
    face = choose_face(row, start.get("face"))
    given = {name: start[name] for name in _OPTIONS if start.get(name) is not None}
    options = await server.examiner(check_request, given, [], None, server.store.folder, 1)
    rate = int(start.get("sample_rate", 24_000))
    if not 8000 <= rate <= 192_000:
        raise Problem("out_of_range", "sample_rate must be from 8000 to 192000.", "sample_rate")
    out = rate if rate % FPS == 0 and rate <= 48_000 else 24_000
    path = server.store.asset_folder(row["id"]) / ORIGINAL
    server.store.touch([row["id"]])
    return Opening(path, face, options, out, float(start.get("fps", FPS)), jpeg), rate


async def _both(listening: Any, showing: Any) -> None:
    """Until one of them ends."""
    tasks = [asyncio.ensure_future(listening), asyncio.ensure_future(showing)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(socket: WebSocket, server: Server, owner: str, session: LiveSession, rate: int) -> None:
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("bytes"):
            content = message["bytes"]
            session.command("push", content[: len(content) // 2 * 2], rate)
            continue
        try:
            command = json.loads(message.get("text") or "")
            if command["type"] == "stop":
                return
            obey(server, owner, session, command)
        except Problem as problem:
            await _tell(socket, problem)
        except (ValueError, TypeError, KeyError):
            await _tell(socket, Problem("invalid", "A command is a JSON object with a known type."))


def obey(server: Server, owner: str, session: LiveSession, command: dict[str, Any]) -> None:
    """Carry out a command of the client.

    Raises:
        Problem: if it cannot be.
    """
    kind = command["type"]
    if kind in ("end_of_utterance", "interrupt"):
        session.command(kind)
    elif kind == "listen":
        session.command("listen", bool(command.get("listening", True)))
    elif kind == "emotion":
        try:
            intensity, fade = float(command.get("intensity", 1.0)), float(command.get("fade", 0.5))
            check_limits(intensity=intensity)
        except UserError as error:
            raise from_user_error(error, "intensity") from error
        session.command("set_emotion", str(command["emotion"]), intensity, fade)
    elif kind == "portrait":
        row = server.asset(owner, "portrait", str(command["portrait_id"]))
        face = choose_face(row, command.get("face"))
        session.command("set_portrait", server.store.asset_folder(row["id"]) / ORIGINAL, face)
    else:
        raise Problem("invalid", f"There is no command {kind!r}.")


async def _show(socket: WebSocket, session: LiveSession) -> None:
    state, fps = "", None
    while (found := await session.next()) is not None:
        if isinstance(found, Problem):
            await _tell(socket, found)
            continue
        frame: LiveFrame = found
        if frame.state != state:
            state = frame.state
            await socket.send_json({"type": "state", "state": state})
        if fps is not None and frame.fps != fps:
            await socket.send_json({"type": "fps", "fps": frame.fps})
        fps = frame.fps
        await socket.send_bytes(struct.pack("<Bd", _SOUND, frame.pts) + frame.sound)
        if frame.image is not None:
            await socket.send_bytes(struct.pack("<Bd", _IMAGE, frame.pts) + frame.image)


async def _tell(socket: WebSocket, problem: Problem) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await socket.send_json({"type": "error", "code": problem.code, "detail": problem.detail})
