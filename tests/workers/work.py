"""Toy tasks that the tests give to workers, which import this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Task:
    """Kills its own process so many times before it returns its number."""

    folder: str
    number: int
    deaths: int = 0
    seconds: float = 0.0


def begun(task: Task) -> int:
    """How many times a task was begun."""
    return len(list(Path(task.folder).glob(f"{task.number}-*.pid")))


def run(task: Task) -> int:
    file = Path(task.folder, f"{task.number}-{time.time_ns()}.pid")
    written = file.with_suffix(".part")
    written.write_text(str(os.getpid()))
    written.rename(file)  # whole or not at all: a worker may be stopped in between
    if begun(task) <= task.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(task.seconds)
    Path(task.folder, f"{task.number}-{time.time_ns()}.done").touch()
    return task.number


def interrupt(results: Iterator[object]) -> None:
    """Ctrl-C after the first result."""
    for _ in results:
        raise KeyboardInterrupt


def make(threads: int, number: int) -> Callable[[Task], int]:
    """The function of a worker."""
    return run
