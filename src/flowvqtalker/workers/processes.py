"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from flowvqtalker.workers.pool import MakeWorker, WorkerDied

__all__ = ["Child", "Processes", "cores", "prepare_process", "share_threads"]


def cores() -> int:
    """Processor cores that this process may use: fewer than the machine has inside a SLURM job or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(workers: int, available: int) -> list[int]:
    """Threads of each worker, so that together they use every core once; at least one each."""
    return [max(1, available // workers + (number < available % workers)) for number in range(workers)]


class Child:
    """A process of this machine at the other end of a pipe. It ends with this one, even if this one is killed.

    Arguments:
        body: called there as ``body(connection, threads, *arguments)``; it may return once the pipe is closed.
        threads: for arithmetic.
        arguments: picklable.
        name: of the process.
    """

    def __init__(self, body: Callable[..., None], threads: int, *arguments: Any, name: str | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(body, theirs, threads, *arguments), name=name, daemon=True)
        self.process.start()
        theirs.close()  # so that reading ends when the process does

    def send(self, message: Any) -> None:
        """Send a message; if the process died, :meth:`receive` tells."""
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def receive(self) -> Any:
        """The next message.

        Raises:
            WorkerDied: if the process ended.
        """
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
        code = self.process.exitcode or 0
        raise WorkerDied(f"was killed by signal {-code}" if code < 0 else f"ended with code {code}")

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self.process.terminate()
        self.process.join()
        self.connection.close()


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

    def start(self, number: int) -> Child:
        """A new process."""
        child = Child(_serve, self._threads[number], number)
        child.send(self._make)
        return child

    def wait(self, busy: Sequence[Child]) -> Iterable[Child]:
        """Processes with a result, and those that died."""
        ready = wait([process.connection for process in busy])
        return [process for process in busy if process.connection in ready]


def _run(body: Callable[..., None], connection: Connection, threads: int, *arguments: Any) -> None:
    prepare_process(threads)
    with contextlib.suppress(EOFError, ConnectionError):
        body(connection, threads, *arguments)


def _serve(connection: Connection, threads: int, number: int) -> None:
    """Body of a process: receives what makes the function, then tasks, and sends their results."""
    work = connection.recv()(threads, number)  # imports torch, which reads the number of threads once
    while True:
        connection.send(work(connection.recv()))


def prepare_process(threads: int) -> None:
    """Let this new process leave signals to its parent and end with it, and set its threads for arithmetic.

    It is called before torch is imported, which reads the number of threads once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)


def _end_with_parent() -> None:
    """End this process with its parent, even if that was killed: else it would work beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
