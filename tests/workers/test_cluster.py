"""Workers on a real Ray cluster of two nodes on this machine: processes and a node are killed in the middle."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowvqtalker.errors import UserError
from flowvqtalker.workers import WorkerDied, run_tasks

from . import work

ray = pytest.importorskip("ray")
from flowvqtalker.workers.cluster import RayActors  # noqa: E402

pytestmark = pytest.mark.slow

# Dead nodes are noticed after about two seconds instead of half a minute.
_FAST = {"health_check_period_ms": 500, "health_check_failure_threshold": 3, "health_check_initial_delay_ms": 0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """The driver's node, without CPUs, and one with two."""
    from ray.cluster_utils import Cluster

    # Actors import this folder's toy tasks.
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False, "_system_config": _FAST}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(num_cpus=2, object_store_memory=80_000_000)
    yield found
    found.shutdown()


def test_every_task_ends_once_whatever_dies(cluster, tmp_path: Path):
    lost = cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    # Task 3 may lose its own try, one by the kill and one by the node, and is still done in the fourth.
    tasks = [work.Task(str(tmp_path), k, deaths=9 if k == 0 else k == 3, seconds=0.2) for k in range(12)]
    found: dict[work.Task, object] = {}
    with RayActors(cluster.address, 4, work.make) as backend:
        for task, result in run_tasks(tasks, backend, recover=lambda task: task.number if done(task) else None):
            assert task not in found
            found[task] = result
            if len(found) == 5:  # in the middle: a worker process, then a whole node
                running = [int(file.read_text()) for file in tmp_path.glob("*.pid")]
                alive = [pid for pid in running if Path(f"/proc/{pid}/stat").exists()]
                os.kill(alive[-1], signal.SIGKILL)
                cluster.remove_node(lost, allow_graceful=False)
    died = found.pop(tasks[0])
    assert isinstance(died, WorkerDied) and "4 times" in str(died)
    assert found == {task: task.number for task in tasks[1:]}
    assert [len(list(tmp_path.glob(f"{task.number}-*.done"))) for task in tasks[1:]] == [1] * 11
    # A try does not begin if the worker was killed while it waited.
    assert 3 <= work.begun(tasks[0]) <= 4 and work.begun(tasks[3]) >= 2


def done(task: work.Task) -> bool:
    return any(Path(task.folder).glob(f"{task.number}-*.done"))


def test_the_shape_follows_the_cluster_and_actors_end_with_the_command(cluster, tmp_path: Path):
    with RayActors(cluster.address, None, work.make) as backend:
        assert backend.workers == 1  # nodes with CPUs
        tasks = [work.Task(str(tmp_path), number, seconds=0 if number == 0 else 600) for number in range(2)]
        with pytest.raises(KeyboardInterrupt):
            work.interrupt(run_tasks(tasks, backend))
    (file,) = tmp_path.glob("0-*.pid")
    deadline = time.monotonic() + 60
    while Path(f"/proc/{file.read_text()}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{file.read_text()}").exists()


def test_a_missing_cluster_is_a_user_error(monkeypatch):
    def refuse(**options):
        raise ConnectionError("Could not find any running Ray instance.\nMore lines follow.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        UserError, match=r"no Ray cluster at 'auto' \(Could not find any running Ray instance\.\); start"
    ):
        RayActors("auto", None, work.make)
