"""Run jobs in processes of this machine. A process that dies costs its own job one of two tries."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from flowvqtalker.batch.job import Job, Outcome, finished

__all__ = ["cores", "end_with_parent", "run_jobs", "share_threads"]

_TRIES = 2


def cores() -> int:
    """Processor cores that this process may use: fewer than the machine has inside a SLURM job or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_threads(workers: int, available: int) -> list[int]:
    """Threads of each worker, so that together they use every core once; at least one each."""
    return [max(1, available // workers + (number < available % workers)) for number in range(workers)]


@dataclass
class _Queue:
    """Jobs that wait, in order. Jobs with one portrait go to one worker, which prepares it once, as long as the others
    find something else to do."""

    jobs: list[tuple[Job, str]]
    held: dict[int, Any] = field(default_factory=dict)  # worker -> portrait of its last job

    def take(self, worker: int) -> tuple[Job, str]:
        """The next job for a worker."""
        others = {key for number, key in self.held.items() if number != worker}
        keys = [_portrait(job) for job, _ in self.jobs]
        mine = [place for place, key in enumerate(keys) if key == self.held.get(worker)]
        free = [place for place, key in enumerate(keys) if key not in others]
        # Where every portrait is taken, help with the one that has most to do.
        busiest = Counter(keys).most_common(1)[0][0]
        place = (mine or free or [keys.index(busiest)])[0]
        self.held[worker] = keys[place]
        return self.jobs.pop(place)


def _portrait(job: Job) -> Any:
    return job.portrait, job.face


def run_jobs(jobs: Sequence[tuple[Job, str]], workers: int, report: Callable[[Job, Outcome], None]) -> None:
    """Run all jobs.

    Arguments:
        jobs: with their fingerprints.
        workers: number of processes.
        report: called in this process after each job.
    """
    context = multiprocessing.get_context("spawn")
    threads = share_threads(workers, cores())
    queue = _Queue(list(jobs))
    tries: Counter[Job] = Counter()
    busy: dict[Connection, tuple[Any, int, tuple[Job, str]]] = {}

    def start(number: int) -> tuple[Connection, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, threads[number], number), daemon=True)
        process.start()
        theirs.close()  # so that reading ends when the process does
        return ours, process

    def give(connection: Connection, process: Any, number: int) -> None:
        task = queue.take(number)
        busy[connection] = process, number, task
        tries[task[0]] += 1
        with contextlib.suppress(BrokenPipeError):  # if the process died, reading tells
            connection.send(task)

    try:
        for number in range(min(workers, len(jobs))):
            give(*start(number), number)
        while busy:
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                process, number, task = busy.pop(connection)
                outcome: Outcome | None = None
                with contextlib.suppress(EOFError, OSError):
                    outcome = connection.recv()
                if outcome is None:  # the process died
                    process.join()
                    connection.close()
                    if finished(*task):  # between the last frame and its answer
                        outcome = Outcome()
                    elif tries[task[0]] == _TRIES:
                        outcome = Outcome(error=_death(process.exitcode))
                    else:
                        queue.jobs.insert(0, task)
                    if queue.jobs:
                        connection, process = start(number)
                if outcome is not None:
                    report(task[0], outcome)
                if queue.jobs:
                    give(connection, process, number)
                else:
                    process.terminate()
                    process.join()
    finally:  # after an interrupt, do not wait for the jobs in progress
        for process, _, _ in busy.values():
            process.terminate()
            process.join()


def _death(code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {how} {_TRIES} times, perhaps out of memory; try fewer --workers"


def _serve(connection: Connection, threads: int, number: int) -> None:
    """Body of a worker process: receives jobs, sends their outcomes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its workers itself
    threading.Thread(target=end_with_parent, daemon=True).start()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    from flowvqtalker.batch.runner import Runner  # after the variables, which torch reads once

    runner = Runner(threads, number)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job, fingerprint = connection.recv()
            connection.send(runner.run(job, fingerprint))


def end_with_parent() -> None:
    """End this process with the command, even if that was killed: else it would render beside the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
