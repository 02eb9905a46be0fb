"""Spread tasks over workers, which may die: processes of this machine, or actors of a Ray cluster."""

from flowvqtalker.workers.pool import Backend, WorkerDied, parse_shard, run_tasks
from flowvqtalker.workers.processes import Processes, cores, end_with_parent, share_threads

__all__ = [
    "Backend",
    "Processes",
    "WorkerDied",
    "cores",
    "end_with_parent",
    "parse_shard",
    "run_tasks",
    "share_threads",
]
