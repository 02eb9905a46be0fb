"""Body of a process that renders jobs, with models that are loaded once."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

from flowvqtalker.serve.tasks import Link, Task

__all__ = ["work"]


def work(connection: Connection, threads: int, number: int, settings: tuple[Path | None, str, str]) -> None:
    """Load the models, then render what comes.

    It receives :class:`Task` and ``"cancel"``; it sends ``("ready",)``, ``("progress", stage, done, frames)``,
    ``("size", text, frames)`` and, at the end of a task, ``("done", error code or None, message, warnings)``.

    Arguments:
        connection: to the server.
        threads: for arithmetic.
        number: of this worker.
        settings: weights, device and dtype, as of every job.
    """
    os.nice(2)  # answers come before frames
    from flowvqtalker.serve.render import JobRunner  # brings torch, which the server itself does without

    runner = JobRunner(threads, number)
    runner.load(*settings)
    connection.send(("ready",))
    while True:
        task = connection.recv()
        if isinstance(task, Task):  # else a cancel that came after the end
            connection.send(("done", *runner.render(task, Link(connection))))
