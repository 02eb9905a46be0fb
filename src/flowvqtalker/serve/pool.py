"""The queue and its workers: fair among clients; a worker that dies costs its job one of two tries."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from multiprocessing.connection import wait
from typing import Any

from flowvqtalker.batch.job import Job
from flowvqtalker.options import AnimateArguments
from flowvqtalker.serve.settings import Settings
from flowvqtalker.serve.store import ACTIVE, ORIGINAL, Row, Store
from flowvqtalker.serve.tasks import Task, sample_path
from flowvqtalker.serve.worker import work
from flowvqtalker.workers import Child, WorkerDied, cores, share_threads

__all__ = ["Pool", "Progress"]

logger = logging.getLogger(__name__)

_TRIES = 2
_SWEEP_SECONDS = 60.0
_OPTIONS = {f.name for f in fields(AnimateArguments)}


@dataclass
class Progress:
    """How far a job is.

    Attributes:
        stage: queued, preparing, rendering, finishing or done.
        done, frames: frames of all samples, so far and in the end.
        fps: frames rendered per second; None before the first.
    """

    stage: str = "queued"
    done: int = 0
    frames: int = 0
    fps: float | None = None
    began: tuple[float, int] | None = None  # time and frames when rendering began

    def advance(self, stage: str, done: int, frames: int) -> None:
        """Take a report of the worker."""
        now = time.monotonic()
        self.stage, self.done, self.frames = stage, done, frames
        if stage == "preparing":
            return
        if self.began is None:
            self.began = now, done
        elif done > self.began[1] and now > self.began[0]:
            self.fps = (done - self.began[1]) / (now - self.began[0])

    @property
    def eta(self) -> float | None:
        """Seconds that are left; None if that cannot be said."""
        return (self.frames - self.done) / self.fps if self.fps else None


class _Worker(Child):
    def __init__(self, number: int, threads: int, settings: Settings) -> None:
        chosen = settings.weights, settings.device, settings.dtype
        super().__init__(work, threads, number, chosen, name=f"render-{number}")
        self.number, self.ready = number, False
        self.video: str | None = None


class Pool:
    """Runs the jobs of a store in processes, from a thread of its own.

    Arguments:
        store: where the jobs wait.
        settings: see :class:`~flowvqtalker.serve.settings.Settings`.
        counted: called with an event and a number for the metrics.
    """

    def __init__(self, store: Store, settings: Settings, counted: Callable[[str, float], None]) -> None:
        self._store, self._settings, self._counted = store, settings, counted
        self._threads = share_threads(settings.workers, cores())
        self._ours, self._theirs = multiprocessing.Pipe()  # wakes the thread
        self._lock = threading.Lock()
        self._cancelled: set[str] = set()
        self._served: Counter[str] = Counter()  # owner -> when a job of his was last begun
        self._turn = itertools.count(1)
        self._stopping = False
        self.progress: dict[str, Progress] = {}
        self.changes: Counter[str] = Counter()  # job -> number of changes, which event streams watch
        self.workers: list[_Worker] = []
        self._thread = threading.Thread(target=self._run, name="pool", daemon=True)

    def start(self) -> None:
        """Start the workers."""
        self.workers = [self._start(number) for number in range(self._settings.workers)]
        self._thread.start()

    def close(self) -> None:
        """End the workers; jobs in progress begin again with the next server."""
        self._stopping = True
        self.wake()
        if self._thread.ident:
            self._thread.join(10)
        for worker in self.workers:
            worker.stop()

    def wake(self) -> None:
        """Look at the queue now."""
        with self._lock:
            self._theirs.send(None)

    def cancel(self, video: str) -> bool:
        """Cancel a job that waits or runs; returns whether it did."""
        changed = self._store.run(
            "UPDATE videos SET status = 'cancelled', ended = ? WHERE id = ? AND status IN (?, ?)",
            time.time(), video, *ACTIVE,
        )  # fmt: skip
        if changed:
            self._counted("cancelled", 1)
            self._changed(video)
            self._cancelled.add(video)
            self.wake()
        return bool(changed)

    def running(self, video: str) -> bool:
        """Whether a worker has the job."""
        return any(worker.video == video for worker in self.workers)

    def _start(self, number: int) -> _Worker:
        return _Worker(number, self._threads[number], self._settings)

    def _run(self) -> None:
        swept = time.monotonic()
        while not self._stopping:
            try:
                for ready in wait([self._ours, *(worker.connection for worker in self.workers)], 1.0):
                    self._hear(ready)
                self._send_cancels()
                self._assign()
                if time.monotonic() - swept > _SWEEP_SECONDS:
                    swept = time.monotonic()
                    self._sweep()
            except Exception:  # the queue must go on
                logger.exception("the queue made an error")
                time.sleep(1)

    def _hear(self, ready: Any) -> None:
        if ready is self._ours:
            self._ours.recv()
            return
        worker = next(worker for worker in self.workers if worker.connection is ready)
        try:
            message = worker.receive()
        except WorkerDied as error:
            logger.warning("worker %d %s", worker.number, error)
            self._died(worker)
            return
        kind, video = message[0], worker.video
        if kind == "ready":
            worker.ready = True
        elif video is None:
            logger.error("worker %d reports %s without a job", worker.number, kind)
        elif kind == "progress":
            progress = self.progress[video]
            before = progress.done
            progress.advance(*message[1:])
            self._counted("frames", max(0, progress.done - before))
            self._changed(video)
        elif kind == "size":
            self._store.run("UPDATE videos SET size = ?, frames = ? WHERE id = ?", *message[1:], video)
            self._changed(video)
        else:
            worker.video = None
            self._finish(video, *message[1:])

    def _finish(self, video: str, code: str | None, message: str, warnings: list[str]) -> None:
        self._cancelled.discard(video)
        self.progress.pop(video, None)
        status = "completed" if code is None else "failed"
        if status == "failed" and code == "internal":
            logger.error("job %s failed: %s", video, message)
            message = "The server made an error; its log says more."
        error = json.dumps({"code": code, "message": message}) if status == "failed" else None
        changed = self._store.run(
            "UPDATE videos SET status = ?, error = ?, warnings = ?, ended = ? WHERE id = ? AND status = 'in_progress'",
            status, error, json.dumps(warnings), time.time(), video,
        )  # fmt: skip
        self._counted(status, changed)
        self._changed(video)

    def _died(self, worker: _Worker) -> None:
        """Start another worker in place of one that died; its job waits again, once."""
        worker.stop()
        self.workers[self.workers.index(worker)] = self._start(worker.number)
        video = worker.video
        if video is None:
            time.sleep(1)  # it cannot even load the models: do not spin
            return
        row = self._store.one("SELECT tries FROM videos WHERE id = ? AND status = 'in_progress'", video)
        if row is not None and row["tries"] < _TRIES:
            self._store.run("UPDATE videos SET status = 'queued' WHERE id = ?", video)
            self.progress.pop(video, None)
            self._changed(video)
        elif row is not None:
            self._finish(video, "internal", f"its process ended {_TRIES} times, perhaps out of memory", [])

    def _send_cancels(self) -> None:
        for video in list(self._cancelled):
            for worker in self.workers:
                if worker.video == video:
                    self._cancelled.discard(video)
                    worker.send("cancel")
            if not self.running(video):
                self._cancelled.discard(video)

    def _assign(self) -> None:
        """Give waiting jobs to free workers."""
        for worker in self.workers:
            if worker.ready and worker.video is None:
                row = self._next()
                if row is None:
                    return
                changed = self._store.run(
                    "UPDATE videos SET status = 'in_progress', started = coalesce(started, ?), tries = tries + 1 "
                    "WHERE id = ? AND status = 'queued'",
                    time.time(), row["id"],
                )  # fmt: skip
                if changed:
                    worker.video = row["id"]
                    self._served[row["owner"]] = next(self._turn)
                    self.progress[row["id"]] = Progress("preparing", 0, row["frames"])
                    self._changed(row["id"])
                    worker.send(self._task(row))

    def _next(self) -> Row | None:
        """The job to begin now."""
        return next(iter(self.waiting()), None)

    def waiting(self) -> list[Row]:
        """Jobs that wait: first those of the clients with fewest running, then of who waited longest for a turn."""
        rows = self._store.all("SELECT * FROM videos WHERE status = 'queued' ORDER BY created, rowid")
        running = self._store.all("SELECT owner FROM videos WHERE status = 'in_progress'")
        ahead = Counter(row["owner"] for row in running)
        order = []
        for place, row in enumerate(rows):
            order.append((ahead[row["owner"]], self._served[row["owner"]], place, row))
            ahead[row["owner"]] += 1
        return [row for *_, row in sorted(order, key=lambda entry: entry[:3])]

    def _task(self, row: Row) -> Task:
        store, request = self._store, row["request"]
        folder = store.video_folder(row["id"])
        folder.mkdir(parents=True, exist_ok=True)
        paths: dict[str, Any] = {}
        for column, asset in row["assets"].items():
            (paths[column],) = (store.asset_folder(asset)).glob(f"{ORIGINAL}*")
        options = {name: value for name, value in request["options"].items() if name in _OPTIONS}
        settings = self._settings
        job = Job(
            **options, **paths, output=sample_path(folder, 1), weights=settings.weights, device=settings.device,
            dtype=settings.dtype, mark_id=request["mark_id"],
        )  # fmt: skip
        names = {str(path): f"the {column.replace('_', ' ')}" for column, path in paths.items()}
        names[str(folder)] = "the results"
        return Task(row["id"], job, folder, request["options"].get("transition"), names)

    def _changed(self, video: str) -> None:
        self.changes[video] += 1

    def _sweep(self) -> None:
        """Delete what is too old, and forget the counters of jobs that are gone."""
        if removed := self._store.expire(self._settings.keep):
            logger.info("%d old jobs and uploads were removed", removed)
        known = {row["id"] for row in self._store.all("SELECT id FROM videos")}
        for video in [video for video in self.changes if video not in known]:
            del self.changes[video]
        owners = {row["owner"] for row in self._store.all("SELECT DISTINCT owner FROM videos")}
        for owner in [owner for owner in self._served if owner not in owners]:
            del self._served[owner]
