"""Give tasks to workers as they become free. A worker that dies is replaced, and its task tried again."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from flowvqtalker.errors import UserError

__all__ = ["Backend", "MakeWorker", "TaskQueue", "Worker", "WorkerDied", "parse_shard", "run_tasks"]

T = TypeVar("T", bound=Hashable)

#: ``(threads, number) -> (task -> result)``: called once in each worker. It must be importable there.
MakeWorker = Callable[[int, int], Callable[[Any], Any]]


class WorkerDied(Exception):
    """A worker ended before it answered; the message says how."""


class Worker(Protocol):
    """Works on one task at a time."""

    def send(self, task: Any) -> None:
        """Begin a task."""

    def receive(self) -> Any:
        """Its result, which is there once :meth:`Backend.wait` returned the worker.

        Raises:
            WorkerDied: if there will be none.
        """

    def stop(self) -> None:
        """End the worker, whatever it is doing."""


class Backend(Protocol):
    """Where workers run.

    Attributes:
        workers: number of workers.
        tries: how often a task begins at most if its workers die.
    """

    workers: int
    tries: int

    def start(self, number: int) -> Any:
        """A new worker in a place from 0 to ``workers - 1``."""

    def wait(self, busy: Sequence[Any]) -> Iterable[Any]:
        """Those of the workers that have a result or have died; waits for the first."""


class TaskQueue:
    """Tasks that wait, in order.

    Tasks of one group go to one worker, which keeps what they share, as long as the others find something else to do.
    """

    def __init__(self, tasks: Iterable[Any], group: Callable[[Any], Hashable]) -> None:
        self._group = group
        self._groups: dict[Hashable, deque[Any]] = {}
        self._held: dict[int, Hashable] = {}  # worker -> group of its last task
        for task in tasks:
            self._groups.setdefault(group(task), deque()).append(task)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def put_back(self, task: Any) -> None:
        """Return a task that was not done; it comes before the others of its group."""
        self._groups.setdefault(self._group(task), deque()).appendleft(task)

    def take(self, worker: int) -> Any:
        """The next task for a worker."""
        key = self._held.get(worker)
        if key not in self._groups:
            others = {held for number, held in self._held.items() if number != worker}
            key = next((key for key in self._groups if key not in others), None)
            if key is None:  # every group is taken: help with the one that has most to do
                key = max(self._groups, key=lambda key: len(self._groups[key]))
        self._held[worker] = key
        task = self._groups[key].popleft()
        if not self._groups[key]:
            del self._groups[key]
        return task


def run_tasks(
    tasks: Iterable[T],
    backend: Backend,
    *,
    group: Callable[[T], Hashable] = hash,
    recover: Callable[[T], Any] = lambda task: None,
) -> Iterator[tuple[T, Any]]:
    """Run all tasks; each comes with its result when it is done.

    The result is a :class:`WorkerDied` if the task's workers died in every try. Closing the iterator ends the workers.

    Arguments:
        tasks: what the workers are called with; distinct.
        backend: where they run.
        group: tasks with an equal value (not None) share something, see :class:`TaskQueue`.
        recover: the result of a task whose worker died after it had finished the work; None if it had not.
    """
    queue = TaskQueue(tasks, group)
    tries: Counter[T] = Counter()
    busy: dict[Worker, tuple[int, T]] = {}

    def give(worker: Worker, number: int) -> None:
        task = queue.take(number)
        busy[worker] = number, task
        tries[task] += 1
        worker.send(task)

    try:
        for number in range(backend.workers):
            if queue:
                give(backend.start(number), number)
        while busy:
            for worker in backend.wait(list(busy)):
                number, task = busy[worker]
                dead = False
                try:
                    result = worker.receive()
                except WorkerDied as error:
                    dead, result = True, recover(task)
                    if result is None and tries[task] < backend.tries:
                        queue.put_back(task)
                    elif result is None:
                        result = WorkerDied(f"its worker {error}, {tries[task]} times")
                del busy[worker]
                if dead or not queue:
                    worker.stop()
                if queue:
                    give(backend.start(number) if dead else worker, number)
                if result is not None:
                    yield task, result
    finally:  # after an interrupt, do not wait for the tasks in progress
        for worker in busy:
            worker.stop()


def parse_shard(given: str | None) -> tuple[int, int]:
    """The part ``I/N`` as two numbers; 1 and 1 for None.

    Raises:
        UserError: if it is none.
    """
    if given is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"shard {given!r}: write I/N with I from 1 to N, for instance 1/8")
    return int(found[1]), int(found[2])
