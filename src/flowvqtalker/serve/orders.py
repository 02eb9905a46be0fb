"""From a request to a job: its inputs examined, its options checked, its place in the queue taken."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from flowvqtalker.io.format import VideoFormat
from flowvqtalker.motion.options import FILES
from flowvqtalker.serve.examine import check_request
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.server import Server
from flowvqtalker.serve.store import Row, new_id
from flowvqtalker.serve.uploads import Given

__all__ = ["choose_face", "no_consent", "order_video"]

_CLIPS = tuple(name for name in FILES if name != "emotion_track")
_FORMAT = tuple(f.name for f in fields(VideoFormat))
_LONGEST_NAME, _LONGEST_TRACK = 200, 1 << 20
_LONGEST_TRANSITION = 60.0  # seconds


def no_consent() -> Problem:
    """The answer to a request without consent."""
    text = "Confirm that you have the right to use this portrait (consent=true)."
    return Problem("consent_required", text, "consent")


def choose_face(portrait: Row, face: int | None) -> int:
    """Number of the face to animate.

    Arguments:
        portrait: record of the upload.
        face: as given; None takes the only usable one.

    Raises:
        Problem: if there is none, or there are several.
    """
    faces = portrait["info"]["faces"]
    usable = [one for one in faces if one["usable"]]
    if face is not None and face >= len(faces):
        raise Problem("out_of_range", f"The portrait has {len(faces)} faces, counted from 0.", "face")
    if face is None and len(usable) > 1:
        text = f"The portrait shows {len(usable)} faces; choose one of them (face, counted from 0, largest first)."
        raise Problem("several_faces", text, "face", faces=faces)
    chosen = faces[face] if face is not None else (usable or faces)[0]
    if chosen["problem"]:
        raise Problem(chosen["problem"]["code"], chosen["problem"]["detail"], "portrait")
    return int(chosen["index"])


async def order_video(server: Server, owner: str, given: Given, more: dict[str, Any] | None = None) -> Row:
    """Put a job into the queue.

    Arguments:
        server: the server.
        owner: whose job it is.
        given: what the request holds.
        more: further entries of the record's ``request``.

    Returns:
        its record.

    Raises:
        Problem: if an input cannot be used or the queue is full; then nothing is kept.
    """
    limits = server.settings
    full = await run_in_threadpool(server.store.is_full, owner, limits.max_queue, limits.max_client)
    if full:
        raise _busy(server)
    if not given.flag("consent"):
        raise no_consent()
    name = given.text("name")
    if name is not None and len(name) > _LONGEST_NAME:
        raise Problem("out_of_range", f"A name has at most {_LONGEST_NAME} characters.", "name")
    transition = _transition(given.values.pop("transition", None))
    track = await _track(given)
    named = {
        kind: {"id": given.text(f"{kind}_id"), "url": given.text(f"{kind}_url")} for kind in ("portrait", "speech")
    }
    unknown = set(given.files) - {"portrait", "speech", *_CLIPS}
    if unknown:
        raise Problem("invalid", f"There is no file field {min(unknown)!r}.", min(unknown))
    made: list[str] = []  # uploads of this request, which go if it is refused
    try:
        asset, path = server.library.track_path()
        made.append(asset)
        clips = [name for name in _CLIPS if name in given.files]
        options = await server.examiner(check_request, given.values, clips, track, path, limits.max_samples)
        assets = {}
        if track is not None:
            assets["emotion_track"] = server.library.keep_track(asset, owner)["id"]
        for kind in ("portrait", "speech"):
            if kind in given.files:
                row = await server.library.add(owner, kind, given.files[kind].file, consent=True, inline=True)
            else:
                row = await server.library.find(owner, kind, named[kind])
            if row["inline"] and row["id"] != named[kind]["id"]:
                made.append(row["id"])
            assets[kind] = row["id"]
            if kind == "portrait":
                options["face"] = choose_face(row, options.get("face"))
            else:
                seconds, frames = row["info"]["seconds"], row["info"]["frames"]
        for column in _CLIPS:
            if column in given.files:
                assets[column] = (await server.library.add_clip(owner, column, given.files[column]))["id"]
                made.append(assets[column])
        if track is None:
            server.library.drop(asset)
        if transition is not None:
            options["transition"] = transition
        samples = options.setdefault("num_samples", 1)
        frames = VideoFormat(**{name: options[name] for name in _FORMAT if name in options}).frames(frames)
        now = time.time()
        video = new_id("video")
        record = {
            "id": video, "owner": owner, "status": "queued", "assets": assets, "seconds": seconds,
            "request": {"options": options, "name": name, "mark_id": int(video[-12:], 16), **(more or {})},
            "frames": frames * samples, "samples": samples, "consent": now, "created": now,
        }  # fmt: skip
        if not await run_in_threadpool(server.store.add_video, record, limits.max_queue, limits.max_client):
            raise _busy(server)
    except BaseException:
        for asset in made:
            server.library.drop(asset)
        raise
    server.pool.wake()
    found = server.store.video(owner, video)
    assert found is not None
    return found


def _busy(server: Server) -> Problem:
    wait = server.retry_after()
    return Problem("busy", f"Too many jobs wait; try again in {wait} seconds.", retry_after=wait)


def _transition(value: Any) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise Problem("invalid", "transition must be a number of seconds.", "transition") from None
    if not 0 <= seconds <= _LONGEST_TRANSITION:
        raise Problem("out_of_range", f"transition must be from 0 to {_LONGEST_TRANSITION:g} seconds.", "transition")
    return seconds


async def _track(given: Given) -> str | list[Any] | None:
    """The emotion track of a request, as text or a list."""
    upload: UploadFile | None = given.files.pop("emotion_track", None)
    if upload is None:
        value = given.values.pop("emotion_track", None)
        if value is not None and not isinstance(value, str | list):
            raise Problem("invalid", "The emotion track is csv text or a list of objects.", "emotion_track")
        return value or None
    content = await upload.read(_LONGEST_TRACK + 1)
    if len(content) > _LONGEST_TRACK:
        raise Problem("too_large", "The emotion track is too large.", "emotion_track", allowed=_LONGEST_TRACK)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Problem("invalid", "The emotion track is not UTF-8 text.", "emotion_track") from None
