"""Serves a study's page and keeps the answers in SQLite.

``GET /`` is the page, ``GET /clips/...`` its videos (with ranges, which players need to seek), ``GET /api/study`` tells
the page that answers can be sent, ``POST /api/answers`` takes a participant's answers. Only the page's folder is
served; the key and the answers lie outside of it. Visitors' addresses are neither stored nor logged.
"""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import AwareDatetime, Field, ValidationError, ValidationInfo, model_validator

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.study.answers import DATABASE_FILE, ClipAnswer, Rater, Session
from flowvqtalker_eval.study.key import PAGE_FOLDER, Frozen, Key, reasons

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.staticfiles import StaticFiles
    from starlette.concurrency import run_in_threadpool
except ImportError as error:
    raise MissingDependency(
        f"serving a study needs FastAPI and uvicorn ({error}); run `pip install 'flowvqtalker[eval]'`"
    ) from error

__all__ = ["Submission", "create_app", "serve", "store"]

_LARGEST_BODY = 4 << 20  # bytes; ten thousand answers

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS submissions (rater TEXT PRIMARY KEY, received TEXT NOT NULL, content TEXT NOT NULL)"
)


class Submission(Frozen):
    """All answers of a participant, as the page sends them; validated with the study's key as context."""

    format: Literal["flowvqtalker-study-answers/1"]
    study: str
    rater: Rater
    session: Session
    row: Annotated[int, Field(ge=0)]
    started: AwareDatetime
    finished: AwareDatetime | None
    comment: Annotated[str, Field(max_length=2000)]
    window: tuple[Annotated[int, Field(ge=0, le=100_000)], Annotated[int, Field(ge=0, le=100_000)]]
    answers: Annotated[list[ClipAnswer], Field(min_length=1, max_length=10_000)]

    @model_validator(mode="after")
    def _belongs(self, info: ValidationInfo) -> Submission:
        key = cast(Key, info.context)
        if self.study != key.study:
            raise ValueError(f"these answers belong to study {self.study}, this is {key.study}")
        if self.row >= len(key.plan):
            raise ValueError(f"row {self.row} is not in the study's plan")
        for misfit in filter(None, (one.misfit(key) for one in self.answers)):
            raise ValueError(misfit)
        if len({one.clip for one in self.answers}) < len(self.answers):
            raise ValueError("a clip was answered twice")
        return self


def create_app(folder: Path) -> FastAPI:
    """The web application of a study.

    Arguments:
        folder: that :func:`flowvqtalker_eval.study.page.build` made.

    Raises:
        UserError: if it holds no study.
    """
    key = Key.load(folder)
    page, database = folder / PAGE_FOLDER, folder / DATABASE_FILE
    if not (page / "index.html").is_file():
        raise UserError(f"{folder} holds no page; build the study again with `flowvqtalker evaluate study build`")
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        connection.execute(_SCHEMA)
    # The documentation pages are off, because they would load scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        if not request.url.path.startswith("/clips/"):
            response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/api/study")
    async def study() -> dict[str, str]:
        return {"study": key.study}

    @app.post("/api/answers")
    async def answers(request: Request) -> dict[str, int]:
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "answers are sent as application/json")
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > _LARGEST_BODY:
                raise HTTPException(413, "these are more answers than a study has")
        try:
            given = Submission.model_validate_json(bytes(body), strict=True, context=key)
        except ValidationError as error:
            raise HTTPException(422, reasons(error)) from error
        return {"stored": await run_in_threadpool(store, given, database)}

    app.mount("/", StaticFiles(directory=page, html=True), name="page")
    return app


def store(given: Submission, database: Path) -> int:
    """Store a submission in one transaction. Sending it again, or an older state of it, changes nothing.

    Returns:
        how many answers of the participant are stored now.

    Raises:
        HTTPException: 409 if another session has sent answers under the same code: that is another person.
    """
    content = given.model_dump(mode="json")
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute("SELECT content FROM submissions WHERE rater = ?", (given.rater,)).fetchone()
        former = json.loads(row[0]) if row is not None else content
        if former["session"] != given.session:
            raise HTTPException(
                409, f"somebody else has sent answers as {given.rater}: download yours, and ask for another code"
            )
        answers = {one["clip"]: one for one in former["answers"]}
        for one in content["answers"]:
            if one["clip"] not in answers or one["revision"] > answers[one["clip"]]["revision"]:
                answers[one["clip"]] = one
        text = json.dumps({**content, "answers": sorted(answers.values(), key=lambda one: one["position"])})
        received = datetime.now(timezone.utc).isoformat(timespec="seconds")
        connection.execute("INSERT OR REPLACE INTO submissions VALUES (?, ?, ?)", (given.rater, received, text))
        connection.execute("COMMIT")
    return len(answers)


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] | None = None) -> None:
    """Serve a study until interrupted.

    Arguments:
        folder: of the study.
        host: address to listen on; 127.0.0.1 is this machine alone.
        port: to listen on; 0 picks a free one.
        ready: called with the page's address before the first request is served.

    Raises:
        UserError: if the address cannot be used or the folder holds no study.
    """
    app = create_app(folder)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot listen on {host} port {port} ({reason}); choose another with --port") from error
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        if ready is not None:
            ready(f"http://{shown}:{listener.getsockname()[1]}/")
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])
