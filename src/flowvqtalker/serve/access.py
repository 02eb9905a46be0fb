"""Who asks, and what may be asked: tokens, sessions, hosts, origins, and the size and speed of request bodies."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowvqtalker.serve.measure import Meter
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.settings import Settings
from flowvqtalker.serve.store import Store

__all__ = ["COOKIE", "Guard", "cookie_options", "current_owner", "given_token", "open_session"]

#: Name of the cookie of a session.
COOKIE = "flowvqtalker_session"

_LARGEST_JSON = 1 << 20  # bytes
_IDLE_SECONDS = 20.0  # between two pieces of a body
_SLOWEST, _GRACE = 16 << 10, 30.0  # bytes per second over a whole body, after so many seconds
# Pages of ours load nothing from elsewhere.
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self' ws: wss:; "
    "worker-src 'self' blob:; style-src 'self'; script-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def given_token(headers: Headers, settings: Settings) -> str | None:
    """The valid token of a request: ``Bearer TOKEN``, or ``Basic`` with the token as the password or as it is.

    Returns:
        None if there is none.

    Raises:
        Problem: if it is wrong.
    """
    if not settings.tokens:  # clients made for other services always send one
        return None
    scheme, _, given = headers.get("authorization", "").partition(" ")
    candidates = [given.strip()]
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(given, validate=True).decode()
            candidates += [decoded, *decoded.split(":", 1)]
        except (binascii.Error, UnicodeDecodeError):
            pass
    elif scheme.lower() != "bearer":
        return None
    for token in settings.tokens:
        if any(hmac.compare_digest(token.encode(), one.encode()) for one in candidates):
            return token
    raise Problem("token_wrong", "This token is not one of the server's.")


def open_session(connection: HTTPConnection, store: Store, settings: Settings) -> str | None:
    """The value of a new cookie for a client that may use the server; None if it has a valid one.

    Raises:
        Problem: if a token is needed.
    """
    token = given_token(connection.headers, settings)
    if token is None and _session_owner(connection, store, settings) is not None:
        return None
    if token is None and settings.tokens:
        raise Problem("token_required", "The server needs a token; give the one that it was started with.")
    value = secrets.token_urlsafe(32)
    store.insert("sessions", id=_digest(value), token=_digest(token or ""), used=time.time())
    return value


def _session_owner(connection: HTTPConnection, store: Store, settings: Settings) -> str | None:
    value = connection.cookies.get(COOKIE)
    row = store.one("SELECT token, used FROM sessions WHERE id = ?", _digest(value)) if value else None
    if value is None or row is None or row["token"] not in {_digest(token) for token in settings.tokens or ("",)}:
        return None
    if time.time() - row["used"] > 3600:
        store.run("UPDATE sessions SET used = ? WHERE id = ?", time.time(), _digest(value))
    return f"session:{_digest(value)}"


def current_owner(connection: HTTPConnection, store: Store, settings: Settings) -> str:
    """Whose files a request may see: those of its token, else of its session, else of everybody on this machine.

    Raises:
        Problem: if a token is needed.
    """
    token = given_token(connection.headers, settings)
    if token is not None:
        return f"token:{_digest(token)}"
    owner = _session_owner(connection, store, settings)
    if owner is None and settings.tokens:
        raise Problem("token_required", "The server needs a token; send the header Authorization: Bearer TOKEN.")
    return owner or "local"


class Guard:
    """ASGI middleware: refuses foreign hosts and origins, bounds bodies, and adds headers for safety.

    Foreign hosts and origins matter on loopback, too: any page that the user visits can send requests there.
    """

    def __init__(self, app: ASGIApp, settings: Settings, meter: Meter) -> None:
        self.app, self.settings, self.meter = app, settings, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._refusal(headers)
        if problem is not None:
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": problem.code})
            else:
                await problem.response()(scope, receive, send)
            return
        if scope["type"] == "http":
            receive = self._bounded(receive, headers)

        began = time.monotonic()

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                policy = _POLICY
                if scope["path"] == "/docs":  # FastAPI writes its script into the page
                    policy = policy.replace("script-src", "script-src 'unsafe-inline'").replace(
                        "style-src", "style-src 'unsafe-inline'"
                    )
                added.setdefault("Content-Security-Policy", policy)
                added.setdefault("Cache-Control", "no-store")
                added["X-Content-Type-Options"] = "nosniff"
                added["Referrer-Policy"] = "no-referrer"
                route = getattr(scope.get("route"), "path", "other")
                self.meter.request(scope["method"], route, message["status"], time.monotonic() - began)
            await send(message)

        await self.app(scope, receive, guarded)

    def _refusal(self, headers: Headers) -> Problem | None:
        host = headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if self.settings.hosts and name not in self.settings.hosts:
            return Problem("wrong_host", f"This server is addressed as {', '.join(self.settings.hosts)}.")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return Problem("wrong_origin", "Requests from other sites are refused.")
        return None

    def _bounded(self, receive: Receive, headers: Headers) -> Receive:
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        most = self.settings.max_upload if form else _LARGEST_JSON
        started: list[float] = []
        received = 0

        async def bounded() -> Message:
            nonlocal received
            if received < 0:  # the body is complete: what comes is the end of the connection
                return await receive()
            began = started[0] if started else time.monotonic()
            started[:] = [began]
            try:
                message = await asyncio.wait_for(receive(), _IDLE_SECONDS)
            except asyncio.TimeoutError:
                raise _slow() from None
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                stated = headers.get("content-length", "")
                size = max(received, int(stated) if stated.isdigit() else 0)
                if size > most:
                    text = f"The request is larger than {most} bytes; give smaller files."
                    raise Problem("too_large", text, allowed=most)
                if time.monotonic() - began > _GRACE + received / _SLOWEST:
                    raise _slow()
                if not message.get("more_body", False):
                    received = -1
            return message

        return bounded


def _slow() -> Problem:
    return Problem("slow_upload", "The upload is too slow; try again on a faster connection.")


def cookie_options(connection: HTTPConnection, keep: float) -> dict[str, Any]:
    """Options of the cookie of a session."""
    secure = connection.url.scheme in ("https", "wss")
    return {"max_age": int(keep) + 30 * 86_400, "httponly": True, "samesite": "strict", "secure": secure}
