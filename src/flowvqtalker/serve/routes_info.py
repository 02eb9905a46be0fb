"""Routes about the server itself, sessions, and the check of a file's marks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from flowvqtalker import __version__
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.motion.options import LIMITS
from flowvqtalker.serve.access import COOKIE, cookie_options, open_session
from flowvqtalker.serve.examine import list_options, verify_file
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.server import TTS, WEBRTC, Owner, TheServer, server_of
from flowvqtalker.serve.store import TEMPORARY
from flowvqtalker.serve.uploads import read_request, save

__all__ = ["router"]

router = APIRouter(tags=["Server"])


@router.post("/v1/session", status_code=204)
def start_session(request: Request, response: Response) -> None:
    """Give a browser its cookie, for a token if the server needs one."""
    server = server_of(request)
    value = open_session(request, server.store, server.settings)
    if value is not None:
        response.set_cookie(COOKIE, value, **cookie_options(request, server.settings.keep))


@router.get("/v1/emotions")
def get_emotions(owner: Owner) -> dict[str, Any]:
    """The emotions, and the range of their intensity."""
    data = [{"id": name, "name": name} for name in EMOTIONS]
    return {"object": "list", "data": data, "intensity": {"min": 0.0, "max": LIMITS["intensity"], "default": 1.0}}


@router.get("/v1/options")
async def get_options(server: TheServer, owner: Owner) -> dict[str, Any]:
    """Every option of a video, with its type, limits and help."""
    return {"object": "list", "data": await server.examiner(list_options)}


@router.post("/v1/verify")
async def verify(request: Request, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Tell whether an image or video carries our marks."""
    given = await read_request(request)
    if "file" not in given.files:
        raise Problem("missing", "Send a file as the field file.", "file")
    with tempfile.TemporaryDirectory(dir=server.store.folder, prefix=TEMPORARY) as folder:
        path = Path(folder) / "file"
        await run_in_threadpool(save, given.files["file"].file, path)
        return await server.examiner(verify_file, path, server.settings)


@router.get("/health")
def health(server: TheServer) -> dict[str, Any]:
    """Whether the server works, and what it allows."""
    settings, workers = server.settings, server.pool.workers
    return {
        "status": "ok",
        "version": __version__,
        "token_required": bool(settings.tokens),
        "features": {
            "live": settings.max_live > 0,
            "webrtc": WEBRTC and settings.max_live > 0,
            "tts": TTS,
            "urls": bool(settings.url_hosts),
        },
        "workers": {
            "total": len(workers),
            "ready": sum(worker.ready for worker in workers),
            "busy": sum(worker.video is not None for worker in workers),
        },
        "queue": server.meter.queue(),
        "limits": {
            "max_upload_bytes": settings.max_upload,
            "max_pixels": settings.max_pixels,
            "max_seconds": settings.max_seconds,
            "max_samples": settings.max_samples,
            "max_queue": settings.max_queue,
            "keep_seconds": settings.keep,
        },
    }


@router.get("/metrics", response_class=Response)
def metrics(server: TheServer, owner: Owner) -> Response:
    """Counters for Prometheus."""
    return Response(server.meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
