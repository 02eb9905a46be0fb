"""What the routes share: the store, the queue, uploads, limits and counters of one server."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import Depends
from starlette.requests import HTTPConnection

from flowvqtalker.serve.access import current_owner
from flowvqtalker.serve.examine import Examiner
from flowvqtalker.serve.live import Stage
from flowvqtalker.serve.measure import Meter
from flowvqtalker.serve.pool import Pool, Progress
from flowvqtalker.serve.problems import Problem
from flowvqtalker.serve.settings import Settings
from flowvqtalker.serve.store import Row, Store
from flowvqtalker.serve.tasks import motion_path, sample_path
from flowvqtalker.serve.uploads import Library

__all__ = ["TTS", "WEBRTC", "Owner", "Server", "TheServer", "server_of"]

#: Whether text can be spoken.
TTS = importlib.util.find_spec("espeakng_loader") is not None
#: Whether aiortc is installed.
WEBRTC = importlib.util.find_spec("aiortc") is not None


class Server:
    """A running server without its routes.

    Arguments:
        settings: see :class:`~flowvqtalker.serve.settings.Settings`.

    Raises:
        UserError: if the data folder cannot be used.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.data)
        self.examiner = Examiner()
        self.library = Library(self.store, self.examiner, settings)
        self.meter = Meter(self.store)
        self.pool = Pool(self.store, settings, self.meter.event)
        self.stage = Stage(settings)
        self.calls: set[Any] = set()  # of WebRTC, which live longer than a request
        self._once: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def start(self) -> None:
        """Start the workers."""
        self.pool.start()
        self.examiner.warm(self.settings.weights)

    def close(self) -> None:
        """End the workers and let go of the data."""
        self.pool.close()
        self.stage.close()
        self.examiner.close()
        self.store.close()

    def video(self, owner: str, video: str) -> Row:
        """A job of a client.

        Raises:
            Problem: if there is none.
        """
        row = self.store.video(owner, video)
        if row is None:
            raise Problem("not_found", f"There is no video {video!r}.")
        return row

    def asset(self, owner: str, kind: str, asset: str) -> Row:
        """An upload of a client.

        Raises:
            Problem: if there is none.
        """
        row = self.store.asset(owner, asset, kind)
        if row is None:
            raise Problem("not_found", f"There is no {kind} {asset!r}.")
        return row

    def describe_asset(self, row: Row) -> Row:
        """An upload as clients see it."""
        kept = {name: value for name, value in row["info"].items() if name != "frames"}
        times = {"created_at": int(row["created"]), "expires_at": int(row["used"] + self.settings.keep)}
        return {"id": row["id"], "object": row["kind"], **kept, **times}

    def has_sample(self, video: str, number: int) -> bool:
        """Whether a sample is there, with its motion."""
        folder = self.store.video_folder(video)
        return sample_path(folder, number).exists() and motion_path(folder, number).exists()

    def describe_video(self, row: Row, place: int | None = None) -> Row:
        """A job as clients see it.

        Arguments:
            row: its record.
            place: in the queue, where that is known; None looks it up.
        """
        request, status = row["request"], row["status"]
        progress = self.pool.progress.get(row["id"]) or Progress(frames=row["frames"])
        done = status == "completed"
        if status == "queued" and place is None:
            waiting = [other["id"] for other in self.pool.waiting()]
            place = waiting.index(row["id"]) if row["id"] in waiting else None
        share = 1.0 if done else progress.done / max(1, row["frames"])
        seed = request["options"].get("seed", 0)
        samples: list[Row] = []
        for number in range(1, row["samples"] + 1):
            discarded = number in row["discarded"]
            ready = not discarded and self.has_sample(row["id"], number)
            samples.append({"index": number, "seed": seed + number - 1, "ready": ready, "deleted": discarded})
        return {
            "id": row["id"],
            "object": "video",
            "model": "flowvqtalker",
            "status": status,
            "progress": int(100 * share) if status != "in_progress" else min(99, int(100 * share)),
            "stage": "done" if row["ended"] else progress.stage,
            "frame": row["frames"] if done else progress.done,
            "frames": row["frames"],
            "fps": None if progress.fps is None else round(progress.fps, 2),
            "eta": None if progress.eta is None else round(progress.eta, 1),
            "queue_position": place,
            "seconds": f"{row['seconds']:g}",
            "size": row["size"],
            "num_samples": row["samples"],
            "samples": samples,
            "name": request["name"],
            "options": request["options"],
            "mark_id": request["mark_id"],
            "portrait_id": row["assets"]["portrait"],
            "speech_id": row["assets"]["speech"],
            "face": request["options"].get("face"),
            "consent_at": int(row["consent"]),
            "created_at": int(row["created"]),
            "started_at": _whole(row["started"]),
            "completed_at": _whole(row["ended"]),
            "expires_at": _whole(row["ended"] and row["ended"] + self.settings.keep),
            "warnings": row["warnings"],
            "error": row["error"],
        }

    def once(self, owner: str, key: str) -> asyncio.Lock:
        """A lock for requests with the same idempotency key."""
        return self._once.setdefault(f"{owner} {key}", asyncio.Lock())

    def retry_after(self) -> int:
        """Seconds after which a place in the queue may be free, from how fast frames were rendered so far."""
        rows = self.store.all("SELECT id, frames FROM videos WHERE status = 'in_progress'")
        left = [(self.pool.progress.get(row["id"]) or Progress(frames=row["frames"])).eta or 30.0 for row in rows]
        return max(1, round(min(left, default=5.0)))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def server_of(connection: HTTPConnection) -> Server:
    """The server of a request."""
    server: Server = connection.app.state.server
    return server


def _owner(connection: HTTPConnection) -> str:
    server = server_of(connection)
    return current_owner(connection, server.store, server.settings)


#: Parameters of routes: the server, and whose files the request may see.
TheServer = Annotated[Server, Depends(server_of)]
Owner = Annotated[str, Depends(_owner)]
