"""Routes of portraits and speech: uploaded once, used often."""

from __future__ import annotations

import io
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response
from starlette.concurrency import run_in_threadpool

from flowvqtalker.serve.examine import say
from flowvqtalker.serve.orders import no_consent
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.server import Owner, Server, TheServer
from flowvqtalker.serve.store import ACTIVE, ORIGINAL
from flowvqtalker.serve.uploads import read_request

__all__ = ["router"]

router = APIRouter(prefix="/v1", tags=["Portraits and speech"])

_LINKS = {"portrait": "portraits", "speech": "speech"}


def form_body(**fields: str) -> dict[str, Any]:
    """Description of a form for OpenAPI: field -> ``file``, or what it means."""
    properties: dict[str, Any] = {}
    for name, text in fields.items():
        kind: dict[str, Any] = {"type": "string"}
        properties[name] = kind | ({"format": "binary"} if text == "file" else {"description": text})
    content = {"multipart/form-data": {"schema": {"type": "object", "properties": properties}}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/portraits", status_code=201, openapi_extra=form_body(portrait="file", consent="true"))
async def add_portrait(request: Request, server: TheServer, owner: Owner, response: Response) -> dict[str, Any]:
    """Upload an image; the answer names its faces, largest first."""
    return await _add(request, server, owner, response, "portrait")


@router.post("/speech", status_code=201, openapi_extra=form_body(speech="file"))
async def add_speech(request: Request, server: TheServer, owner: Owner, response: Response) -> dict[str, Any]:
    """Upload speech, any audio or video file with sound; or JSON with text and voice, with the extra tts."""
    return await _add(request, server, owner, response, "speech")


async def _add(request: Request, server: Server, owner: str, response: Response, kind: str) -> dict[str, Any]:
    given = await read_request(request)
    consent = given.flag("consent")
    if kind == "portrait" and not consent:
        raise no_consent()
    source = given.files[kind].file if kind in given.files else None
    if kind == "speech" and source is None and (text := given.text("text")):
        source = io.BytesIO(await server.examiner(say, text, given.text("voice") or "en-us"))
    if source is None:
        raise Problem("missing", f"Send a file as the field {kind}.", kind)
    row = await server.library.add(owner, kind, source, consent=consent)
    response.headers["Location"] = f"/v1/{_LINKS[kind]}/{row['id']}"
    return server.describe_asset(row)


@router.get("/portraits/{portrait}")
def get_portrait(portrait: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """An uploaded portrait."""
    return server.describe_asset(server.asset(owner, "portrait", portrait))


@router.get("/speech/{speech}")
def get_speech(speech: str, server: TheServer, owner: Owner) -> dict[str, Any]:
    """Uploaded speech."""
    return server.describe_asset(server.asset(owner, "speech", speech))


@router.get("/portraits/{portrait}/image", response_class=FileResponse)
def get_image(portrait: str, server: TheServer, owner: Owner, face: int | None = None, size: int = 1024) -> Response:
    """The upright image as JPEG with the longer side at most ``size``, or the 512x512 crop of a face."""
    from PIL import Image

    row = server.asset(owner, "portrait", portrait)
    if face is not None and not 0 <= face < len(row["info"]["faces"]):
        raise Problem("out_of_range", f"The portrait has {len(row['info']['faces'])} faces, counted from 0.", "face")
    path = server.store.asset_folder(portrait) / ("view.jpg" if face is None else f"face-{face}.jpg")
    kept = {"Cache-Control": "private, max-age=3600"}
    if size >= 1024:
        return FileResponse(path, media_type="image/jpeg", headers=kept)
    content = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((max(16, size), max(16, size)))
        image.save(content, "JPEG", quality=85)
    return Response(content.getvalue(), media_type="image/jpeg", headers=kept)


@router.get("/speech/{speech}/content", response_class=FileResponse)
def get_sound(speech: str, server: TheServer, owner: Owner) -> Response:
    """The speech as it was uploaded."""
    server.asset(owner, "speech", speech)
    # Never as a type that a browser would run: the client chose the content.
    path = server.store.asset_folder(speech) / ORIGINAL
    return FileResponse(path, media_type="application/octet-stream", content_disposition_type="inline")


@router.delete("/portraits/{portrait}", status_code=204)
async def delete_portrait(portrait: str, server: TheServer, owner: Owner) -> None:
    """Delete a portrait and its files."""
    await run_in_threadpool(_delete, server, owner, "portrait", portrait)


@router.delete("/speech/{speech}", status_code=204)
async def delete_speech(speech: str, server: TheServer, owner: Owner) -> None:
    """Delete speech."""
    await run_in_threadpool(_delete, server, owner, "speech", speech)


def _delete(server: Server, owner: str, kind: str, asset: str) -> None:
    server.asset(owner, kind, asset)
    if server.store.users(asset, ACTIVE):
        raise Problem("in_use", f"A job needs this {kind}; cancel the job or wait for its end.")
    server.store.remove_asset(asset)
