"""Workers that are actors of a Ray cluster.

Ray Core rather than Ray Data: a video takes seconds to minutes, so the cost of scheduling does not count. Jobs of one
portrait should meet on one worker, a job that kills its workers should end as an error of its own, and results should
come one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.workers.pool import MakeWorker, WorkerDied

__all__ = ["RayActors", "actor_shape"]

logger = logging.getLogger(__name__)

# A local instance holds tasks and results of a kilobyte; Ray's default would reserve a third of the memory.
_LOCAL = {"include_dashboard": False, "object_store_memory": 80_000_000}


class RayActors:
    """Actors of a Ray cluster. A context manager: leaving it ends the connection, and with it the actors.

    Arguments:
        address: ``local`` starts a cluster on this machine, ``auto`` finds the running one, else its address.
        workers: number of actors; None is one for each GPU, or for each node with CPUs where there is none.
        make: makes the function that does the tasks, once in each actor.

    Raises:
        UserError: if there is no such cluster.
        MissingDependency: if Ray is not installed.
    """

    tries = 4  # more than for local processes: nodes are taken away, which is no fault of the task

    def __init__(self, address: str, workers: int | None, make: MakeWorker) -> None:
        try:
            import ray
        except ImportError as error:
            raise MissingDependency("--ray needs Ray; run `pip install 'flowvqtalker[ray]'`") from error
        self._ray: Any = ray
        local = address == "local"
        try:
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.WARNING, **(_LOCAL if local else {})
            )  # fmt: skip
        except Exception as error:  # of many kinds
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"no Ray cluster at {address!r} ({reason}); start one with `ray start --head`, or give local"
            ) from error
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        processors = [int(node["CPU"]) for node in nodes if node.get("CPU")]
        gpus = int(sum(node.get("GPU", 0) for node in nodes))
        self.workers = workers or gpus or max(1, len(processors))
        self._threads, share = actor_shape(self.workers, processors, gpus)
        logger.info(
            "Ray: %d nodes, %d actors of %d CPUs and %g GPUs", len(processors), self.workers, self._threads, share
        )
        self._actor = ray.remote(num_cpus=self._threads, num_gpus=share, max_restarts=0)(_Actor)
        self._make = make

    def __enter__(self) -> RayActors:
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def start(self, number: int) -> _Remote:
        """A new actor; Ray begins it where there is room."""
        return _Remote(self._ray, self._actor.remote(self._make, self._threads, number))

    def wait(self, busy: Sequence[_Remote]) -> Iterable[_Remote]:
        """The first actor with a result, or that died."""
        ready, _ = self._ray.wait([actor.result for actor in busy], num_returns=1)
        return [actor for actor in busy if actor.result in ready]


def actor_shape(workers: int, processors: Sequence[int], gpus: int) -> tuple[int, float]:
    """CPUs and GPUs of each actor, so that all find room at once and use as much as they can.

    Arguments:
        workers: number of actors.
        processors: CPUs of each node.
        gpus: number in the cluster. Where there are fewer than actors, actors share them.

    Returns:
        CPUs, at least 1, and GPUs, a fraction where they are shared.
    """
    sizes = range(max(processors, default=1), 1, -1)
    return next((size for size in sizes if sum(n // size for n in processors) >= workers), 1), min(1.0, gpus / workers)


class _Actor:
    """Runs in a process of the cluster."""

    def __init__(self, make: MakeWorker, threads: int, number: int) -> None:
        self._work = make(threads, number)

    def run(self, task: Any) -> Any:
        return self._work(task)


class _Remote:
    """The driver's side of an actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.result: Any = None

    def send(self, task: Any) -> None:
        self.result = self._actor.run.remote(task)

    def receive(self) -> Any:
        try:
            return self._ray.get(self.result)
        except self._ray.exceptions.RayActorError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = next((line for line in lines if line.startswith("The actor died")), lines[-1])
            raise WorkerDied(f"died ({reason})") from error

    def stop(self) -> None:
        self._ray.kill(self._actor)
