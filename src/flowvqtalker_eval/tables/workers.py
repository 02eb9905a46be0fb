"""Make the videos of a benchmark run, in this process or in several."""

from __future__ import annotations

import contextlib
import csv
import logging
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from flowvqtalker_eval.tables.plan import Failures, Task

if TYPE_CHECKING:  # brings torch and the networks, which a new process should load once it has a task
    from flowvqtalker_eval.tables.methods import Animator

__all__ = ["make_all"]

logger = logging.getLogger(__name__)


class _Report:
    """Progress bar, and the table of what failed."""

    def __init__(self, total: int, errors: Path) -> None:
        self.errors, self.failed = errors, 0
        interval = 0.1 if sys.stderr.isatty() else 60.0  # seconds
        self.bar = tqdm(total=total, desc="evaluate run", unit="clip", mininterval=interval, dynamic_ncols=True)

    def __call__(self, failures: Failures) -> None:
        """One more task is done."""
        self.failed += len(failures)
        self.bar.update()
        if failures:
            new = not self.errors.exists()
            with open(self.errors, "a", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                rows.writerows([("name", "method", "seed", "error"), *failures] if new else failures)
        for name, method, _, reason in failures:
            logger.warning("%s (%s): %s", name, method, reason)


def make_all(tasks: Sequence[Task], animator: Callable[[int], Animator], errors: Path, jobs: int = 1) -> int:
    """Make all outputs.

    Arguments:
        tasks: from :func:`plan`.
        animator: makes the animator of each process by its number; picklable if there are several processes.
        errors: csv file of what failed; it exists only if something did.
        jobs: number of processes; 1 works in the current one.

    Returns:
        how many outputs failed.
    """
    errors.unlink(missing_ok=True)
    if not tasks:
        return 0
    report = _Report(len(tasks), errors)
    try:
        if jobs == 1:
            own = animator(0)
            for task in tasks:
                report(_make(own, task))
        else:
            _in_processes(tasks, animator, min(jobs, len(tasks)), report)
    finally:
        report.bar.close()
    return report.failed


def _make(animator: Animator, task: Task) -> Failures:
    found = animator.make(task.item, task.outputs)
    if None in found:  # nothing could be made of the item
        return task.failures(found[None])
    return [(task.item.name, o.method, o.seed, reason) for o, reason in found.items() if o is not None]


def _serve(connection: Connection, animator: Callable[[int], Animator], number: int) -> None:
    """Body of a worker process: receives tasks, sends their failures."""
    own = animator(number)
    while True:
        connection.send(_make(own, connection.recv()))


def _in_processes(
    tasks: Sequence[Task], animator: Callable[[int], Animator], jobs: int, report: Callable[[Failures], None]
) -> None:
    """Work in several processes. A process that dies, for instance out of memory, costs its own task only."""
    animator(0)  # reports bad options here, instead of in every process
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(tasks))
    busy: dict[Any, tuple[Any, int, Task]] = {}

    def start(number: int) -> tuple[Any, Any]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, animator, number), daemon=True)
        process.start()
        theirs.close()  # so that reading ends when the process does
        return ours, process

    def give(connection: Any, process: Any, number: int) -> None:
        busy[connection] = process, number, waiting.pop()
        with contextlib.suppress(BrokenPipeError):  # if the process died, reading tells
            connection.send(busy[connection][2])

    try:
        for number in range(jobs):
            give(*start(number), number)
        while busy:
            ready: list[Any] = wait(list(busy))
            for connection in ready:
                process, number, task = busy.pop(connection)
                try:
                    report(connection.recv())
                except EOFError:
                    process.join()
                    report(task.failures("its process died, perhaps out of memory; try fewer --jobs"))
                    if waiting:
                        connection, process = start(number)
                if waiting:
                    give(connection, process, number)
                else:
                    process.terminate()
    finally:  # after an interrupt, do not wait for the clips in progress
        for process, _, _ in busy.values():
            process.terminate()
