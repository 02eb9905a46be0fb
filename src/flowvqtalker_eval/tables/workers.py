"""Work in one process or in several, each set up once; and make the videos of a benchmark run so."""

from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from flowvqtalker.workers import Processes, WorkerDied, run_tasks
from flowvqtalker_eval.tables.plan import Failures, Task

if TYPE_CHECKING:  # brings torch and the networks, which a new process should load once it has a task
    from flowvqtalker_eval.tables.methods import Animator

__all__ = ["DIED", "in_processes", "make_all"]

logger = logging.getLogger(__name__)

#: Why a task has no result.
DIED = "its process died, perhaps out of memory; try fewer --jobs"

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


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
    if jobs > 1:
        animator(0)  # reports bad options here, instead of in every process
    failed = 0
    for number, found in in_processes(tasks, partial(_maker, animator), jobs, "evaluate run"):
        failures = tasks[number].failures(DIED) if found is None else found
        failed += len(failures)
        if failures:
            new = not errors.exists()
            with open(errors, "a", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                rows.writerows([("name", "method", "seed", "error"), *failures] if new else failures)
        for name, method, _, reason in failures:
            logger.warning("%s (%s): %s", name, method, reason)
    return failed


def _maker(animator: Callable[[int], Animator], number: int) -> Callable[[Task], Failures]:
    own = animator(number)

    def make(task: Task) -> Failures:
        found = own.make(task.item, task.outputs)
        if None in found:  # nothing could be made of the item
            return task.failures(found[None])
        return [(task.item.name, o.method, o.seed, reason) for o, reason in found.items() if o is not None]

    return make


def in_processes(
    tasks: Sequence[_Task], start: Callable[[int], Callable[[_Task], _Result]], jobs: int, title: str
) -> Iterator[tuple[int, _Result | None]]:
    """Number and result of each task as it is done; None if its process died, which costs its own task only.

    Arguments:
        tasks: picklable if there are several processes.
        start: sets up a process by its number and returns what does a task there; picklable as well.
        jobs: number of processes; 1 works in the current one.
        title: of the progress bar.

    Raises:
        Exception: the first that a task raises.
    """
    if not tasks:
        return
    interval = 0.1 if sys.stderr.isatty() else 60.0  # seconds
    if jobs == 1 or len(tasks) == 1:
        do = _guarded(tasks, start, 1, 0)
        done: Iterator[tuple[int, Any]] = ((number, do(number)) for number in range(len(tasks)))
    else:
        done = run_tasks(range(len(tasks)), Processes(min(jobs, len(tasks)), partial(_guarded, tasks, start)))
    for number, found in tqdm(
        done, desc=title, total=len(tasks), unit="clip", mininterval=interval, dynamic_ncols=True
    ):  # fmt: skip
        error, result = (None, None) if isinstance(found, WorkerDied) else found
        if error is not None:
            raise error
        yield number, result


def _guarded(
    tasks: Sequence[Any], start: Callable[[int], Callable[[Any], Any]], threads: int, number: int
) -> Callable[[int], tuple[Exception | None, Any]]:
    """What gives error and result of the task of a number."""
    work = start(number)

    def do(task: int) -> tuple[Exception | None, Any]:
        try:
            return None, work(tasks[task])
        except Exception as error:
            return error, None

    return do
