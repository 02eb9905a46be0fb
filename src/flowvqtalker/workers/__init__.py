"""Spread tasks over workers, which may die: processes of this machine, or actors of a Ray cluster."""

from flowvqtalker.workers.pool import Backend, WorkerDied, parse_shard, run_tasks
from flowvqtalker.workers.processes import Child, Processes, cores, prepare_process, share_threads

__all__ = [
    "Backend",
    "Child",
    "Processes",
    "WorkerDied",
    "cores",
    "parse_shard",
    "prepare_process",
    "run_tasks",
    "share_threads",
]
