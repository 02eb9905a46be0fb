"""Serves a study's page and keeps the answers in SQLite.

``GET /`` is the page, ``GET /clips/...`` its videos (with ranges, which players need to seek), ``GET /api/study`` tells
the page that answers can be sent, ``POST /api/answers`` takes a participant's answers. Only the page's folder is
served; the key and the answers lie outside of it. Addresses of visitors are not stored or logged.
"""

from __future__ import annotations

import logging
import socket
import sqlite3
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.study.answers import ANSWERS_FORMAT, DATABASE_FILE, RATER_PATTERN
from flowvqtalker_eval.study.key import CHOICES, PAGE_FOLDER, Key

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.staticfiles import StaticFiles
    from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
    from starlette.concurrency import run_in_threadpool
except ImportError as error:
    raise MissingDependency(
        f"serving a study needs FastAPI and uvicorn ({error}); run `pip install 'flowvqtalker[study]'`"
    ) from error

__all__ = ["GivenAnswer", "Submission", "create_app", "serve", "store"]

logger = logging.getLogger(__name__)

_LARGEST_BODY = 4 << 20  # bytes; ten thousand answers

_SCHEMA = """
CREATE TABLE IF NOT EXISTS raters (
    rater TEXT PRIMARY KEY, study TEXT NOT NULL, session TEXT NOT NULL, plan_row INTEGER NOT NULL,
    started TEXT NOT NULL, finished TEXT, received TEXT NOT NULL, comment TEXT NOT NULL, window_size TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    rater TEXT NOT NULL REFERENCES raters, clip TEXT NOT NULL, position INTEGER NOT NULL,
    lip_sync INTEGER CHECK (lip_sync BETWEEN 1 AND 5), quality INTEGER CHECK (quality BETWEEN 1 AND 5), emotion TEXT,
    seconds REAL NOT NULL, plays INTEGER NOT NULL, revision INTEGER NOT NULL, problem INTEGER NOT NULL,
    answered TEXT NOT NULL, PRIMARY KEY (rater, clip)
);
"""

Rating = Annotated[int, Field(ge=1, le=5)]
Count = Annotated[int, Field(ge=0, le=1_000_000)]


class GivenAnswer(BaseModel):
    """Answers to one clip, as the page sends them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    clip: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    position: Annotated[int, Field(ge=1, le=1_000_000)]
    lip_sync: Rating | None
    quality: Rating | None
    emotion: Literal[CHOICES] | None  # type: ignore[valid-type]
    problem: bool
    seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
    plays: Count
    revision: Count
    answered: AwareDatetime

    @model_validator(mode="after")
    def _whole(self) -> GivenAnswer:
        if self.problem != (self.quality is None) or self.problem != (self.emotion is None):
            raise ValueError("a clip has all its answers, or none if it did not play")
        return self


class Submission(BaseModel):
    """All answers of a participant, as the page sends them."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: str
    study: str
    rater: Annotated[str, Field(pattern=RATER_PATTERN)]
    session: Annotated[str, Field(pattern=r"^[a-z]{16}$")]
    row: Count
    started: AwareDatetime
    finished: AwareDatetime | None
    comment: Annotated[str, Field(max_length=2000)]
    window: Annotated[list[Annotated[int, Field(ge=0, le=100_000)]], Field(min_length=2, max_length=2)]
    answers: Annotated[list[GivenAnswer], Field(min_length=1, max_length=10_000)]


def create_app(folder: Path) -> FastAPI:
    """The web application of a study.

    Arguments:
        folder: that :func:`flowvqtalker_eval.study.page.build` made.

    Raises:
        UserError: if it holds no study.
    """
    key = Key.load(folder)
    page = folder / PAGE_FOLDER
    if not (page / "index.html").is_file():
        raise UserError(f"{folder} holds no page; build the study again with `flowvqtalker evaluate study build`")
    database = folder / DATABASE_FILE
    with _connect(database) as connection:
        connection.executescript(_SCHEMA)
    # Without its documentation pages, which would load scripts from elsewhere.
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
            given = Submission.model_validate_json(bytes(body))
        except ValidationError as error:
            raise HTTPException(422, _reasons(error)) from error
        _check(given, key)
        return {"stored": await run_in_threadpool(store, given, database)}

    app.mount("/", StaticFiles(directory=page, html=True), name="page")
    return app


def store(given: Submission, database: Path) -> int:
    """Store a participant's answers in one transaction; sending the same again changes nothing.

    A participant may send again what was changed since, from the same browser session. Another session with the same
    code is another person, and refused.

    Returns:
        number of the participant's answers in the database.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with _connect(database) as connection:
        connection.execute("BEGIN IMMEDIATE")
        former = connection.execute("SELECT session FROM raters WHERE rater = ?", (given.rater,)).fetchone()
        if former is not None and former[0] != given.session:
            raise HTTPException(
                409, f"somebody else has sent answers as {given.rater}: download yours, and ask for another code"
            )
        connection.execute(
            "INSERT INTO raters VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rater) DO UPDATE SET "
            "finished = excluded.finished, comment = excluded.comment",
            (
                *(given.rater, given.study, given.session, given.row, given.started.isoformat()),
                *(given.finished and given.finished.isoformat(), now, given.comment),
                "x".join(map(str, given.window)),
            ),
        )
        # An older state that arrives late changes nothing.
        connection.executemany(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (rater, clip) DO UPDATE SET "
            "lip_sync = excluded.lip_sync, quality = excluded.quality, emotion = excluded.emotion, "
            "seconds = excluded.seconds, plays = excluded.plays, revision = excluded.revision, "
            "problem = excluded.problem, answered = excluded.answered WHERE excluded.revision > answers.revision",
            [
                (
                    *(given.rater, one.clip, one.position, one.lip_sync, one.quality, one.emotion, one.seconds),
                    *(one.plays, one.revision, int(one.problem), one.answered.isoformat()),
                )
                for one in given.answers
            ],
        )
        count = connection.execute("SELECT count(*) FROM answers WHERE rater = ?", (given.rater,)).fetchone()[0]
    return int(count)


def serve(folder: Path, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] | None = None) -> None:
    """Serve a study until interrupted.

    Arguments:
        folder: of the study.
        host: address to listen on; 127.0.0.1 is this machine alone.
        port: to listen on; 0 takes a free one.
        ready: called with the page's address before the first request is taken.

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


@contextmanager
def _connect(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection; what was not committed when the block fails is undone."""
    connection = sqlite3.connect(database, timeout=30, isolation_level=None)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        yield connection
        if connection.in_transaction:
            connection.execute("COMMIT")
    finally:
        connection.close()


def _check(given: Submission, key: Key) -> None:
    """What a submission's own shape does not tell: that it belongs to this study."""
    if given.format != ANSWERS_FORMAT:
        raise HTTPException(422, f"answers of format {given.format!r} are not known, only {ANSWERS_FORMAT!r}")
    if given.study != key.study:
        raise HTTPException(422, f"these answers belong to study {given.study}, this is {key.study}")
    if given.row >= len(key.plan):
        raise HTTPException(422, f"row {given.row} is not in the study's plan")
    unknown = [one.clip for one in given.answers if one.clip not in key.by_id]
    if unknown:
        raise HTTPException(422, f"the study has no clip {unknown[0]}")
    twice = [name for name, count in Counter(one.clip for one in given.answers).items() if count > 1]
    if twice:
        raise HTTPException(422, f"clip {twice[0]} was answered twice")
    for one in given.answers:
        if (one.lip_sync is None) != (one.problem or not key.speech):
            raise HTTPException(422, f"lip_sync of clip {one.clip} is {one.lip_sync}")


def _reasons(error: ValidationError) -> str:
    found: list[Any] = error.errors(include_url=False, include_input=False, include_context=False)
    first = ".".join(map(str, found[0]["loc"]))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return f"{first or 'the answers'}: {found[0]['msg']}{more}"
