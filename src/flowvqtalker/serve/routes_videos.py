"""Routes of videos: jobs, their progress, their results."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from flowvqtalker.constants import FPS
from flowvqtalker.serve.examine import export
from flowvqtalker.serve.orders import order_video
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.routes_assets import form_body
from flowvqtalker.serve.server import Owner, Server, TheServer
from flowvqtalker.serve.store import ACTIVE, Row
from flowvqtalker.serve.tasks import motion_path, preview_path, sample_path
from flowvqtalker.serve.uploads import read_request

__all__ = ["router"]

router = APIRouter(prefix="/v1/videos", tags=["Videos"])

_TYPES = {"mp4": "video/mp4", "csv": "text/csv", "glb": "model/gltf-binary"}
_EVENT_SECONDS, _HEARTBEAT_SECONDS = 0.2, 10.0


_FORM = form_body(
    portrait="file",
    portrait_id="instead of the file",
    speech="file",
    speech_id="instead of the file",
    consent="true: you have the right to use the portrait",
    emotion="happy, sad, ... or a mixture",
    emotion_track="csv text, or a JSON list of {time, emotion, intensity}",
    emotion_reference="file",
    pose_from="file",
    transition="seconds of a change of emotion in a track",
    name="label, given back as it was",
)


@router.post("", status_code=202, openapi_extra=_FORM)
async def create_video(request: Request, server: TheServer, owner: Owner, response: Response) -> dict[str, Any]:
    """Animate a portrait with speech: a form with files, or JSON with identifiers; /v1/options lists the options."""
    given = await read_request(request)
    key = request.headers.get("idempotency-key")
    if key is None:
        row = await order_video(server, owner, given)
    else:
        digest = await run_in_threadpool(given.digest)
        async with server.once(owner, key):  # the same request at the same time waits for the first
            earlier = server.store.one("SELECT digest, video FROM keys WHERE owner = ? AND key = ?", owner, key)
            if earlier is None:
                row = await order_video(server, owner, given)
                server.store.insert("keys", owner=owner, key=key, digest=digest, video=row["id"])
            elif earlier["digest"] != digest:
                raise Problem("idempotency_conflict", "This Idempotency-Key was used for another request.")
            else:
                row = server.video(owner, earlier["video"])
    response.headers["Location"] = f"/v1/videos/{row['id']}"
    return await run_in_threadpool(server.describe_video, row)


@router.get("")
def list_videos(
    server: TheServer, owner: Owner, limit: Annotated[int, Query(ge=1, le=100)] = 20, after: str | None = None
) -> dict[str, Any]:
    """The client's own videos, newest first; ``after`` is the last identifier of the page before."""
    before = server.video(owner, after)["created"] if after else time.time() + 1
    query = "SELECT * FROM videos WHERE owner = ? AND created < ? ORDER BY created DESC LIMIT ?"
    rows = server.store.all(query, owner, before, limit + 1)
    data = [server.describe_video(row) for row in rows[:limit]]
    return {"object": "list", "data": data, "has_more": len(rows) > limit}


@router.get("/{video}")
def get_video(video: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """State and progress of a video."""
    return server.describe_video(server.video(owner, video))


@router.get("/{video}/events", response_class=StreamingResponse)
def watch_video(video: str, server: TheServer, owner: Owner, cancel_on_disconnect: bool = False) -> Response:
    """Server-sent events: ``progress`` whenever something changes, then ``completed``, ``failed`` or ``cancelled``."""
    server.video(owner, video)
    stream = _events(server, owner, video, cancel_on_disconnect)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _events(server: Server, owner: str, video: str, cancel: bool) -> AsyncIterator[str]:
    seen, last, ended = "", time.monotonic(), False
    changes = -1
    try:
        while True:
            queued = '"queued"' in seen  # its place changes with the other jobs
            if server.pool.changes[video] != changes or (queued and time.monotonic() - last > 1):
                changes = server.pool.changes[video]
                text, ended = await run_in_threadpool(_event, server, owner, video)
                if text != seen:
                    seen, last = text, time.monotonic()
                    yield text
                if ended:
                    return
            elif time.monotonic() - last > _HEARTBEAT_SECONDS:
                last = time.monotonic()
                yield ": still here\n\n"
            await asyncio.sleep(_EVENT_SECONDS)
    finally:
        if cancel and not ended:
            server.pool.cancel(video)


def _event(server: Server, owner: str, video: str) -> tuple[str, bool]:
    """Text of an event, and whether it is the last."""
    row = server.store.video(owner, video)
    if row is None:  # deleted meanwhile
        return 'event: cancelled\ndata: {"status": "cancelled"}\n\n', True
    ended = row["status"] not in ACTIVE
    name = row["status"] if ended else "progress"
    return f"event: {name}\ndata: {json.dumps(server.describe_video(row))}\n\n", ended


@router.get("/{video}/content", response_class=FileResponse)
async def get_content(
    video: str,
    server: TheServer,
    owner: Owner,
    sample: int = 1,
    format: Literal["mp4", "csv", "glb"] = "mp4",
    fps: Annotated[float, Query(ge=1, le=240)] = FPS,
    download: bool = False,
) -> Response:
    """The video (with ranges), or its motion as ARKit csv or animated glTF."""
    path = await run_in_threadpool(_sample, server, owner, video, sample)
    if format != "mp4":
        motion = motion_path(path.parent, sample)
        path = path.with_name(f"sample-{sample}-{fps:g}.{format}")
        if not path.exists():
            await server.examiner(export, motion, path, fps, server.settings.weights)
    return FileResponse(
        path,
        media_type=_TYPES[format],
        filename=f"{video}-{sample}.{format}",
        content_disposition_type="attachment" if download else "inline",
        headers={"Cache-Control": "private, max-age=3600"},
    )


def _sample(server: Server, owner: str, video: str, number: int) -> Path:
    """File of a sample that is there."""
    row = server.video(owner, video)
    if not 1 <= number <= row["samples"]:
        raise Problem("out_of_range", f"The video has {row['samples']} samples, counted from 1.", "sample")
    if number in row["discarded"]:
        raise Problem("not_found", f"Sample {number} was deleted.")
    if not server.has_sample(video, number):
        raise Problem("not_ready", f"Sample {number} is not ready.", status_of_video=row["status"])
    return sample_path(server.store.video_folder(video), number)


@router.get("/{video}/preview", response_class=FileResponse)
def get_preview(video: str, server: TheServer, owner: Owner) -> Response:
    """The newest frame as a small JPEG, also while the video is rendered."""
    server.video(owner, video)
    path = preview_path(server.store.video_folder(video))
    if not path.exists():
        raise Problem("not_ready", "There is no frame yet.")
    # As bytes: a file that is replaced while it is sent no longer has the length that was announced.
    return Response(path.read_bytes(), media_type="image/jpeg")


@router.post("/{video}/cancel")
def cancel_video(video: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Cancel a video that waits or is rendered."""
    server.video(owner, video)
    if not server.pool.cancel(video):
        raise Problem("finished", "The video has ended; delete it instead.")
    return server.describe_video(server.video(owner, video))


@router.delete("/{video}", status_code=204)
def delete_video(video: str, server: TheServer, owner: Owner) -> None:
    """Cancel a video if it has not ended, and delete all its files."""
    server.video(owner, video)
    server.pool.cancel(video)
    server.store.remove_video(video)


@router.delete("/{video}/samples/{sample}", status_code=204)
def delete_sample(video: str, sample: int, server: TheServer, owner: Owner) -> None:
    """Delete one of several samples."""
    path = _sample(server, owner, video, sample)
    row: Row = server.video(owner, video)
    discarded = json.dumps(sorted({*row["discarded"], sample}))
    server.store.run("UPDATE videos SET discarded = ? WHERE id = ?", discarded, video)
    for found in (path, motion_path(path.parent, sample), *path.parent.glob(f"sample-{sample}-*")):
        found.unlink(missing_ok=True)
