"""Body of a process that renders jobs, with models that are loaded once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from multiprocessing.connection import Connection
from pathlib import Path

from flowvqtalker.serve.tasks import Link, Task
from flowvqtalker.workers import end_with_parent

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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.nice(2)  # answers come before frames
    from flowvqtalker.serve.render import JobRunner  # after the variables, which torch reads once

    runner = JobRunner(threads, number)
    runner.load(*settings)
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(("ready",))
        while True:
            task = connection.recv()
            if isinstance(task, Task):  # else a cancel that came after the end
                connection.send(("done", *runner.render(task, Link(connection))))
