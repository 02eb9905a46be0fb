"""How tasks reach workers, and what happens when workers die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flowvqtalker.workers import Processes, WorkerDied, run_tasks, share_threads
from flowvqtalker.workers.cluster import actor_shape
from flowvqtalker.workers.pool import TaskQueue

from . import work


def test_threads_add_up_to_the_cores():
    assert share_threads(1, 8) == [8]
    assert share_threads(3, 8) == [3, 3, 2]
    assert share_threads(4, 2) == [1, 1, 1, 1]


def test_actors_fill_the_nodes():
    assert actor_shape(2, [4, 4], 0) == (4, 0)
    assert actor_shape(3, [4, 4], 0) == (2, 0)  # 8 / 3 is 2.7, but two of three find room with 3
    assert actor_shape(9, [4, 4], 0) == (1, 0)
    assert actor_shape(2, [16, 2], 4) == (8, 1)
    assert actor_shape(4, [16], 2) == (4, 0.5)


def test_tasks_of_a_group_share_a_worker():
    queue = TaskQueue(enumerate("aabbac"), lambda task: task[1])
    taken = [(worker, queue.take(worker)[0]) for worker in (0, 1, 1, 0, 0, 1)]
    assert taken == [(0, 0), (1, 2), (1, 3), (0, 1), (0, 4), (1, 5)]
    assert not queue
    helped = TaskQueue(enumerate("aa"), lambda task: task[1])
    assert [helped.take(worker)[0] for worker in (0, 1)] == [0, 1]
    helped.put_back((1, "a"))
    assert helped.take(0) == (1, "a") and not helped


def test_a_worker_that_dies_is_replaced(tmp_path: Path):
    tasks = [work.Task(str(tmp_path), number, deaths=number if number < 3 else 0) for number in range(6)]
    done = list(run_tasks(tasks, Processes(2, work.make)))
    found = dict(done)
    assert len(done) == len(found)
    died = found.pop(tasks[2])
    assert isinstance(died, WorkerDied) and str(died) == f"its worker was killed by signal {signal.SIGKILL}, 2 times"
    assert found == {task: task.number for task in tasks if task.number != 2}
    assert [work.begun(task) for task in tasks] == [1, 2, 2, 1, 1, 1]


def test_what_a_dying_worker_finished_counts(tmp_path: Path):
    task = work.Task(str(tmp_path), 1, deaths=1)
    done = list(run_tasks([task], Processes(1, work.make), recover=lambda task: "done"))
    assert done == [(task, "done")] and work.begun(task) == 1


def test_an_interrupt_ends_the_workers(tmp_path: Path):
    tasks = [work.Task(str(tmp_path), number, seconds=0 if number == 0 else 600) for number in range(3)]
    with pytest.raises(KeyboardInterrupt):
        work.interrupt(run_tasks(tasks, Processes(2, work.make)))
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
