"""Errors of the API: problem JSON (RFC 9457) with stable codes."""

from __future__ import annotations

import errno
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from flowvqtalker.errors import UserError

__all__ = ["STATUS", "Problem", "from_user_error", "install"]

logger = logging.getLogger(__name__)

#: Code -> HTTP status.
STATUS = {
    "no_face": 422,
    "several_faces": 422,
    "face_too_small": 422,
    "face_turned": 422,
    "face_cut_off": 422,
    "not_an_image": 415,
    "not_audio": 415,
    "audio_silent": 422,
    "audio_too_short": 422,
    "too_long": 413,
    "too_large": 413,
    "unknown_emotion": 422,
    "out_of_range": 422,
    "invalid": 422,
    "missing": 422,
    "consent_required": 422,
    "url_not_allowed": 422,
    "not_found": 404,
    "method_not_allowed": 405,
    "not_ready": 409,
    "in_use": 409,
    "idempotency_conflict": 409,
    "finished": 409,
    "slow_upload": 408,
    "busy": 429,
    "token_required": 401,
    "token_wrong": 401,
    "wrong_origin": 403,
    "wrong_host": 400,
    "no_space": 507,
    "internal": 500,
    "live_unavailable": 503,
}


class Problem(HTTPException):
    """A refused request.

    Arguments:
        code: one of :data:`STATUS`.
        detail: a sentence for the user.
        field: field of the form that it belongs to.
        more: further members of the problem JSON, for instance ``allowed``.
    """

    def __init__(self, code: str, detail: str, field: str | None = None, **more: Any) -> None:
        headers = {}
        if code == "busy":
            headers["Retry-After"] = str(more.get("retry_after", 10))
        if STATUS[code] == 401:
            headers["WWW-Authenticate"] = "Bearer"
        super().__init__(STATUS[code], detail, headers)
        self.code, self.field, self.more = code, field, more

    def __reduce__(self) -> Any:  # raised in the process that examines uploads, too
        return type(self), (self.code, self.detail, self.field), {"more": self.more}

    def json(self) -> dict[str, Any]:
        """The members of the problem JSON."""
        named = {} if self.field is None else {"field": self.field}
        title = self.code.replace("_", " ").capitalize()
        head = {"type": f"urn:flowvqtalker:{self.code}", "title": title, "status": self.status_code}
        return head | {"code": self.code, "detail": self.detail} | named | self.more

    def response(self) -> JSONResponse:
        """The answer to the request."""
        return JSONResponse(self.json(), self.status_code, self.headers, "application/problem+json")


def from_user_error(error: UserError, field: str | None = None, **names: str) -> Problem:
    """The problem for an error of the library.

    Arguments:
        field: field of the form.
        names: path on the server -> what the caller knows it by; paths are not shown to callers.
    """
    text = str(error)
    for path, name in names.items():
        text = text.replace(path, name)
    code = error.code if error.code in STATUS else "invalid"
    if code == "unknown_emotion":
        from flowvqtalker.constants import EMOTIONS

        return Problem(code, _sentence(text), field, allowed=list(EMOTIONS))
    return Problem(code, _sentence(text), field)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def install(app: FastAPI) -> None:
    """Answer every error of an app with problem JSON."""

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, Problem):
            return error.response()
        codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
        code = codes.get(error.status_code, "invalid")
        return Problem(code, _sentence(str(error.detail))).response()

    async def validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        field = str(first["loc"][-1])
        limits = ("greater_than_equal", "less_than_equal", "greater_than", "less_than")
        code = "missing" if first["type"] == "missing" else "out_of_range" if first["type"] in limits else "invalid"
        return Problem(code, f"{field}: {first['msg']}.", field).response()

    async def user(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, UserError)
        return from_user_error(error).response()

    async def system(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, OSError)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Problem("no_space", "The server's disk is full; try again later.").response()
        return await other(request, error)

    async def other(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return Problem("internal", "The server made an error; its log says more.").response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(UserError, user)
    app.add_exception_handler(OSError, system)
    app.add_exception_handler(Exception, other)
