"""A thin form of D-ID's API, so that its clients work with another base URL.

``driver_expressions`` become an emotion track; the rest of what D-ID offers and we do not is refused, not ignored.
"""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from flowvqtalker.constants import EMOTIONS, FPS
from flowvqtalker.serve.orders import order_video
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.server import Owner, Server, TheServer
from flowvqtalker.serve.store import Row
from flowvqtalker.serve.uploads import Given, read_request

__all__ = ["router"]

router = APIRouter(tags=["D-ID"])

#: D-ID's expressions that have another name here; ours are understood, too.
EXPRESSIONS = {"surprise": "surprised", "serious": "neutral"}
_STATUS = {
    "queued": "created",
    "in_progress": "started",
    "completed": "done",
    "failed": "error",
    "cancelled": "rejected",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Expression(_Strict):
    """From a frame on: an expression."""

    start_frame: int = Field(ge=0)
    expression: str
    intensity: float = Field(1.0, ge=0, le=1)


class DriverExpressions(_Strict):
    """Expressions over time."""

    expressions: list[Expression] = Field(min_length=1)
    transition_frames: int | None = Field(None, ge=0, le=1500)


class Config(_Strict):
    """Options of a talk."""

    stitch: bool = False
    result_format: Literal["mp4"] = "mp4"
    driver_expressions: DriverExpressions | None = None


class Script(_Strict):
    """What is said; text needs a voice, which this server does not have."""

    type: Literal["audio"]
    audio_url: str


class Talk(_Strict):
    """A talk to make. URLs are those that ``POST /images`` and ``POST /audios`` gave, or of hosts that are allowed."""

    source_url: str
    script: Script
    config: Config = Config()
    name: str | None = None
    user_data: str | None = Field(None, max_length=1000)


@router.post("/images", status_code=201)
async def add_image(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Upload an image; sending it confirms the right to use it, as with D-ID."""
    return await _add(request, server, owner, "image", "portrait")


@router.post("/audios", status_code=201)
async def add_audio(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Upload speech."""
    return await _add(request, server, owner, "audio", "speech")


async def _add(request: Request, server: Server, owner: str, field: str, kind: str) -> dict[str, Any]:
    given = await read_request(request)
    if field not in given.files:
        raise Problem("missing", f"Send a file as the field {field}.", field)
    row = await server.library.add(owner, kind, given.files[field].file, consent=kind == "portrait")
    return {"id": row["id"], "url": str(request.base_url) + f"{field}s/{row['id']}"}


@router.post("/talks", status_code=201)
async def create_talk(talk: Talk, request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Animate an image with speech."""
    values: dict[str, Any] = {"consent": True, "full": talk.config.stitch, "name": talk.name}
    for kind, url in (("portrait", talk.source_url), ("speech", talk.script.audio_url)):
        asset = urlsplit(url).path.rpartition("/")[2]
        ours = asset.startswith(f"{kind}_") and server.store.asset(owner, asset, kind)
        values |= {f"{kind}_id": asset} if ours else {f"{kind}_url": url}
    driven = talk.config.driver_expressions
    if driven is not None:
        values["emotion_track"] = [
            {"time": one.start_frame / FPS, "emotion": _emotion(one.expression), "intensity": one.intensity}
            for one in driven.expressions
        ]
        if driven.transition_frames is not None:
            values["transition"] = driven.transition_frames / FPS
    row = await order_video(server, owner, Given(values), {"user_data": talk.user_data})
    return describe_talk(server, row, request)


def _emotion(expression: str) -> str:
    name = EXPRESSIONS.get(expression, expression)
    if name not in EMOTIONS:
        allowed = [*EXPRESSIONS, *EMOTIONS]
        raise Problem("unknown_emotion", f"Unknown expression {expression!r}.", "expression", allowed=allowed)
    return name


@router.get("/talks/{talk}")
def get_talk(talk: str, request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """State of a talk; ``result_url`` once it is done."""
    return describe_talk(server, server.video(owner, _video(talk)), request)


@router.delete("/talks/{talk}")
def delete_talk(talk: str, request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Cancel a talk, and delete its files."""
    row = server.video(owner, _video(talk))
    server.pool.cancel(row["id"])
    described = describe_talk(server, server.video(owner, row["id"]), request)
    server.store.remove_video(row["id"])
    return described


def _video(talk: str) -> str:
    return "video_" + talk.removeprefix("tlk_")


def describe_talk(server: Server, row: Row, request: Request) -> dict[str, Any]:
    """A job as D-ID's clients know it."""
    video = server.describe_video(row)
    talk: dict[str, Any] = {
        "id": "tlk_" + row["id"].removeprefix("video_"),
        "object": "talk",
        "status": _STATUS[video["status"]],
        "created_at": video["created_at"],
        "name": video["name"],
        "user_data": row["request"].get("user_data"),
        "metadata": {"num_frames": video["frames"], "processing_fps": video["fps"], "num_faces": 1},
    }
    if video["status"] == "completed":
        talk["result_url"] = str(request.base_url) + f"v1/videos/{row['id']}/content"
        talk["duration"] = float(video["seconds"])
    if video["error"]:
        talk["error"] = {"kind": video["error"]["code"], "description": video["error"]["message"]}
    return talk
