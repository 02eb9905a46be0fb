"""What the server and its workers say to each other: a job, its progress, and where its results lie."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from flowvqtalker.batch.job import Job

__all__ = ["Cancelled", "Link", "Task", "motion_path", "preview_path", "sample_path"]

_REPORT_SECONDS = 0.2  # between two reports


class Cancelled(Exception):
    """The job was cancelled."""


@dataclass(frozen=True)
class Task:
    """A job for a worker.

    Attributes:
        video: identifier of the job.
        job: inputs and options; its output is not used.
        folder: of the results.
        transition: seconds of a change of emotion in a track; None is the default.
        names: path of an input -> what the client calls it.
    """

    video: str
    job: Job
    folder: Path
    transition: float | None = None
    names: dict[str, str] = field(default_factory=dict)


def sample_path(folder: Path, number: int) -> Path:
    """Video of a sample, numbered from 1."""
    return folder / f"sample-{number}.mp4"


def motion_path(folder: Path, number: int) -> Path:
    """Motion of a sample; it is there before the video."""
    return folder / f"sample-{number}.npz"


def preview_path(folder: Path) -> Path:
    """JPEG of the newest frame."""
    return folder / "preview.jpg"


class Link:
    """What a job says to the server, and hears from it."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self._next = connection, 0.0

    def report(self, stage: str, done: int, frames: int) -> None:
        """Tell the progress, at most a few times a second.

        Raises:
            Cancelled: if the server said so.
        """
        if self.connection.poll():
            self.connection.recv()
            raise Cancelled
        now = time.monotonic()
        if now >= self._next or done == 0 or done == frames:
            self._next = now + _REPORT_SECONDS
            self.connection.send(("progress", stage, done, frames))

    def size(self, text: str, frames: int) -> None:
        """Tell the size of the video, and its frames: the track may be another than the one that was measured."""
        self.connection.send(("size", text, frames))
