"""Live sessions: processes that keep them, and the server's end of their pipes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from starlette.concurrency import run_in_threadpool

from flowvqtalker.serve.live_worker import Opening, live_work
from flowvqtalker.serve.problems import STATUS, Problem
from flowvqtalker.serve.settings import Settings
from flowvqtalker.workers import Child, cores

__all__ = ["LiveFrame", "LiveSession", "Stage"]

logger = logging.getLogger(__name__)

_LOADING_SECONDS = 120.0
_POLL_SECONDS = 0.5
_PATIENCE = 15  # fifths of a second


@dataclass(frozen=True)
class LiveFrame:
    """40 ms of a session.

    Attributes:
        pts: seconds from its start.
        state: idle, listening or talking.
        image: JPEG or raw RGB; None where the last one stays.
        sound: int16 mono.
        fps: images per second now.
    """

    pts: float
    state: str
    image: bytes | None
    sound: bytes
    fps: float


class LiveSession:
    """The server's end of a session.

    Arguments:
        connection: to the process that keeps it.
        process: that process.
    """

    def __init__(self, connection: Connection, process: Any) -> None:
        self.connection, self.process = connection, process
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.closed = False

    async def open(self, opening: Opening) -> None:
        """Begin.

        Raises:
            Problem: if the portrait or an option cannot be used.
        """
        await run_in_threadpool(self.connection.send, opening)
        message = await self.receive(_LOADING_SECONDS)
        if message[0] == "error":
            await self.receive(_LOADING_SECONDS)  # closed
            self.closed = True
            raise _problem(*message[1:])

    def command(self, name: str, *arguments: Any) -> None:
        """Call a method of :class:`~flowvqtalker.live.LiveTalker` there."""
        with self._lock, contextlib.suppress(OSError):
            if not self.closed:
                self.connection.send((name, arguments))

    async def next(self) -> LiveFrame | Problem | None:
        """The next frame, or what went wrong with a command; None at the end."""
        message = await self.receive()
        if message[0] == "closed":
            self.closed = True
            return None
        return _problem(*message[1:]) if message[0] == "error" else LiveFrame(*message[1:])

    async def close(self) -> None:
        """End; what the session still sends is dropped."""
        if self.closed:
            return
        with self._lock, contextlib.suppress(OSError):
            self.connection.send(None)
        with contextlib.suppress(Problem):
            while await self.next() is not None:
                pass
        self.closed = True

    async def receive(self, seconds: float = 10.0) -> Any:
        """The next message of the process.

        Raises:
            Problem: if there is none in time, or the process ended.
        """

        def fetch() -> None:
            # A caller that is cancelled leaves its thread behind, so two may read at once, and what the first one gets
            # belongs to the next caller.
            with self._reading:
                if self._inbox.empty() and self.connection.poll(_POLL_SECONDS):
                    self._inbox.put(self.connection.recv())

        for _ in range(round(seconds / _POLL_SECONDS)):
            try:
                await run_in_threadpool(fetch)
            except (EOFError, OSError) as error:
                raise Problem("live_unavailable", "The live session ended; start it again.") from error
            with contextlib.suppress(queue.Empty):
                return self._inbox.get_nowait()
        raise Problem("live_unavailable", "The live session does not answer; start it again.")


def _problem(code: str, message: str) -> Problem:
    return Problem(code if code in STATUS else "invalid", message)


class Stage:
    """Processes for live sessions, started when the first session comes and kept for the next.

    Arguments:
        settings: of the server; ``max_live`` is the number of sessions at the same time.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._free: list[LiveSession] = []
        self._used = 0

    async def enter(self) -> LiveSession:
        """A session that can be opened.

        Raises:
            Problem: if all are taken, or the models cannot be loaded.
        """
        for _ in range(_PATIENCE):  # a client that comes back finds its former session still closing
            if self._used < self._settings.max_live or not self._settings.max_live:
                break
            await asyncio.sleep(0.2)
        if self._used >= self._settings.max_live:
            raise Problem("busy", "The live stage is taken; try again later.", retry_after=30)
        self._used += 1
        try:
            while self._free:
                session = self._free.pop()
                if session.process.is_alive():
                    session.closed = False
                    return session
            process, connection = await run_in_threadpool(self._start)
            session = LiveSession(connection, process)
            await session.receive(_LOADING_SECONDS)  # ready
            return session
        except BaseException:
            self._used -= 1
            raise

    @property
    def free_places(self) -> int:
        """Number of sessions that may still begin."""
        return self._settings.max_live - self._used

    def _start(self) -> tuple[Any, Connection]:
        chosen = self._settings
        child = Child(live_work, cores(), chosen.weights, chosen.device, chosen.dtype, name="live")
        return child.process, child.connection

    async def leave(self, session: LiveSession) -> None:
        """Give a session back."""
        try:
            await session.close()
        finally:
            self._used -= 1
            if session.closed and session.process.is_alive():
                self._free.append(session)
            else:
                session.process.terminate()

    def close(self) -> None:
        """End the processes that wait; the others end with the server."""
        for session in self._free:
            session.process.terminate()
