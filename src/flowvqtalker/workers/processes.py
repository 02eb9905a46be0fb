"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from flowvqtalker.workers.pool import MakeWorker, WorkerDied

__all__ = ["Processes", "cores", "end_with_parent", "share_threads"]


def cores() -> int:
    """Processor cores that this process may use: fewer than the machine has inside a SLURM job or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(workers: int, available: int) -> list[int]:
    """Threads of each worker, so that together they use every core once; at least one each."""
    return [max(1, available // workers + (number < available % workers)) for number in range(workers)]


class Processes:
    """Processes that share this machine's cores.

    Arguments:
        workers: number of processes.
        make: makes the function that does the tasks, once in each process.
    """

    tries = 2

    def __init__(self, workers: int, make: MakeWorker) -> None:
        self.workers = workers
        self._make = make
        self._threads = share_threads(workers, cores())

    def start(self, number: int) -> _Process:
        """A new process."""
        return _Process(self._make, self._threads[number], number)

    def wait(self, busy: Sequence[_Process]) -> Iterable[_Process]:
        """Processes with a result, and those that died."""
        ready = wait([process.connection for process in busy])
        return [process for process in busy if process.connection in ready]


class _Process:
    def __init__(self, make: MakeWorker, threads: int, number: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, number), daemon=True)
        self._process.start()
        theirs.close()  # so that reading ends when the process does
        self.send(make)

    def send(self, task: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # if the process died, reading tells
            self.connection.send(task)

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
        code = self._process.exitcode or 0
        raise WorkerDied(f"was killed by signal {-code}" if code < 0 else f"ended with code {code}")

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, threads: int, number: int) -> None:
    """Body of a process: receives what makes the function, then tasks, and sends their results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its processes itself
    threading.Thread(target=end_with_parent, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        work = connection.recv()(threads, number)  # imports torch, which reads the variables once
        while True:
            connection.send(work(connection.recv()))


def end_with_parent() -> None:
    """End this process with the command, even if that was killed: else it would work beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
