"""Counters of the server for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from flowvqtalker.serve.store import Store

__all__ = ["Meter"]


class Meter:
    """Counts requests, jobs and frames.

    Arguments:
        store: asked for the length of the queue.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "flowvqtalker_request_seconds",
            "Time to the first byte of the answer.",
            ["method", "route", "status"],
            registry=self._registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10),
        )
        self._jobs = Counter("flowvqtalker_jobs", "Jobs that ended.", ["status"], registry=self._registry)
        self._frames = Counter("flowvqtalker_frames", "Frames rendered.", registry=self._registry)
        self._queue = Gauge("flowvqtalker_queue", "Jobs that have not ended.", ["status"], registry=self._registry)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; the route is the pattern, not the path with its identifiers."""
        self._requests.labels(method, route, status).observe(seconds)

    def event(self, name: str, number: float) -> None:
        """Count frames, or a job that ended."""
        if name == "frames":
            self._frames.inc(number)
        else:
            self._jobs.labels(name).inc(number)

    def queue(self) -> dict[str, int]:
        """Number of jobs that wait and that run."""
        rows = self._store.all("SELECT status, COUNT(*) AS n FROM videos GROUP BY status")
        found = {row["status"]: row["n"] for row in rows}
        return {status: found.get(status, 0) for status in ("queued", "in_progress")}

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        for status, number in self.queue().items():
            self._queue.labels(status).set(number)
        return generate_latest(self._registry)
