"""Files that clients send: saved under names of our own, examined, recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from flowvqtalker.serve.examine import Examiner, examine_clip, examine_portrait, examine_speech
from flowvqtalker.serve.fetch import fetch
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.settings import Settings
from flowvqtalker.serve.store import ORIGINAL, Row, Store, new_id

__all__ = ["Given", "Library", "read_request", "save"]

_EXAMINED = {"portrait": examine_portrait, "speech": examine_speech}


@dataclass
class Given:
    """What a request holds.

    Attributes:
        values: fields of text (of a form), or of any kind (of JSON).
        files: field -> file.
    """

    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, UploadFile] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over everything, to tell whether two requests are the same. Reads the files."""
        content: dict[str, Any] = dict(self.values)
        for name, upload in self.files.items():
            digest = hashlib.sha256()
            while block := upload.file.read(1 << 20):
                digest.update(block)
            content[f"file {name}"] = digest.hexdigest()
            upload.file.seek(0)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def flag(self, name: str) -> bool:
        """Take a yes or no out of the values."""
        return str(self.values.pop(name, "")).strip().lower() in ("true", "1", "yes", "on")

    def text(self, name: str) -> str | None:
        """Take a text out of the values; None if it is missing or empty."""
        value = self.values.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise Problem("invalid", f"{name} must be text.", name)
        return value or None


async def read_request(request: Request) -> Given:
    """The fields and files of a form, or of a JSON object.

    Raises:
        Problem: if it is neither.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            values = json.loads(await request.body())
        except ValueError as error:
            raise Problem("invalid", f"The request is broken JSON ({error}).") from error
        if not isinstance(values, dict):
            raise Problem("invalid", "The request must be a JSON object.")
        return Given(values)
    if kind not in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Problem("invalid", "Send multipart/form-data or application/json.")
    try:
        form: FormData = await request.form(max_files=8, max_fields=100, max_part_size=1 << 20)
    except MultiPartException as error:
        raise Problem("invalid", f"The form cannot be read: {error.message}.") from error
    given = Given()
    for name, value in form.multi_items():
        if name in given.values or name in given.files:
            raise Problem("invalid", f"The field {name!r} stands there twice.", name)
        if isinstance(value, UploadFile):
            if value.size:  # a page sends an empty file for an empty field
                given.files[name] = value
        else:
            given.values[name] = value
    return given


class Library:
    """Uploads of clients.

    Arguments:
        store: records and files.
        examiner: looks into the files.
        settings: limits.
    """

    def __init__(self, store: Store, examiner: Examiner, settings: Settings) -> None:
        self._store, self._examiner, self._settings = store, examiner, settings

    async def add(self, owner: str, kind: str, source: BinaryIO, *, consent: bool = False, inline: bool = False) -> Row:
        """Keep a portrait or speech.

        Arguments:
            owner: whose it is.
            kind: ``portrait`` or ``speech``.
            source: the file.
            consent: whether the client confirmed the right to use it.
            inline: whether it came with a job, and goes with it.

        Raises:
            Problem: if it cannot be used; then nothing is kept.
        """
        asset = new_id(kind)
        folder = self._store.asset_folder(asset)
        try:
            await run_in_threadpool(save, source, folder / ORIGINAL)
            info = await self._examiner(_EXAMINED[kind], folder, self._settings)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self._record(asset, owner, kind, info, consent, inline)

    async def add_clip(self, owner: str, column: str, upload: UploadFile) -> Row:
        """Keep a clip or motion file of a job, to take an emotion or head motion from."""
        asset = new_id("clip")
        folder = self._store.asset_folder(asset)
        # A stored motion is told by the suffix; no other part of the client's name is used.
        suffix = Path(upload.filename or "").suffix.lower() if column == "pose_from" else ""
        suffix = suffix if suffix in (".npz", ".csv") else ""
        path = folder / f"{ORIGINAL}{suffix}"
        try:
            await run_in_threadpool(save, upload.file, path)
            await self._examiner(examine_clip, path, column, self._settings)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return self._record(asset, owner, column, {}, False, True)

    def track_path(self) -> tuple[str, Path]:
        """Identifier and file of a new emotion track; record it with :meth:`keep_track` once it is written."""
        asset = new_id("track")
        folder = self._store.asset_folder(asset)
        folder.mkdir(mode=0o700)
        return asset, folder / f"{ORIGINAL}.csv"

    def keep_track(self, asset: str, owner: str) -> Row:
        """Record an emotion track."""
        return self._record(asset, owner, "emotion_track", {}, False, True)

    def drop(self, asset: str) -> None:
        """Delete an upload whose job was refused."""
        self._store.remove_asset(asset)

    async def find(self, owner: str, kind: str, given: Mapping[str, Any]) -> Row:
        """The upload that a request names: ``portrait_id``, or ``portrait_url`` where that is allowed.

        Raises:
            Problem: if it names none, or none of this client's.
        """
        if url := given.get("url"):
            with await fetch(str(url), kind, self._settings) as source:
                return await self.add(owner, kind, source, consent=True, inline=True)
        asset = given.get("id")
        if not asset:
            raise Problem("missing", f"Give a {kind}: the file as {kind}, or {kind}_id.", kind)
        row = self._store.asset(owner, str(asset), kind)
        if row is None:
            raise Problem("not_found", f"There is no {kind} {asset!r}; upload it again.", kind)
        return row

    def _record(self, asset: str, owner: str, kind: str, info: Row, consent: bool, inline: bool) -> Row:
        now = time.time()
        row = {
            "id": asset, "owner": owner, "kind": kind, "info": info, "consent": now if consent else None,
            "inline": int(inline), "created": now, "used": now,
        }  # fmt: skip
        self._store.insert("assets", **row)
        return row


def save(source: BinaryIO, path: Path) -> None:
    """Write an upload to a file, whose folder is made."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with open(path, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
