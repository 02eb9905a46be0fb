"""The command ``batch``."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from flowvqtalker.batch.job import Job, Outcome, finished, weights_hashes
from flowvqtalker.batch.runner import make_runner
from flowvqtalker.batch.table import Problems, check_jobs, product, read_table
from flowvqtalker.errors import UserError
from flowvqtalker.io.remote import is_remote, location, write_file
from flowvqtalker.motion.options import FILES
from flowvqtalker.options import AnimateArguments
from flowvqtalker.workers import Backend, Processes, WorkerDied, parse_shard, run_tasks

__all__ = ["Batch"]

logger = logging.getLogger(__name__)

_Patterns = Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")]


@dataclass(frozen=True, kw_only=True)
class Batch(AnimateArguments):
    """Animate many portraits: each row of a table is a video, or each portrait with each speech and emotion.

    The other options are those of `animate`; they hold for every job that does not set its own. A second run makes only
    what is missing or has changed. Exit code 1 if a job failed; OUT/errors.csv says why.
    """

    jobs: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="JOBS")] = None
    """Table of jobs: .csv with a header, or .jsonl with an object on each line; the columns are the options of
    `animate`, and portrait and speech may be patterns such as faces/*.jpg."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder of the videos, or a URL such as s3://bucket/videos."""
    portraits: _Patterns = ()
    """Without a table: images or patterns; each is animated with each speech and emotion."""
    speech: _Patterns = ()
    """Without a table: recordings or patterns."""
    emotions: Annotated[str | None, tyro.conf.arg(metavar="NAMES")] = None
    """Without a table: emotions with commas between, for instance happy,sad,happy:0.7+surprised:0.3."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of processes; the cores are shared out among them. Default: 1; with --ray, one for each GPU or node."""
    ray: Annotated[str | None, tyro.conf.arg(metavar="ADDRESS")] = None
    """Run on a Ray cluster: auto (the one that runs here), its address, or local (start one for this command)."""
    shard: Annotated[str | None, tyro.conf.arg(metavar="I/N")] = None
    """Make only the I-th of N parts of the jobs, for instance 1/8 to 8/8 on eight machines."""
    dry_run: bool = False
    """Check every input (faces, sound, weights) and write nothing."""

    def run(self) -> None:
        """Make the videos and print one line."""
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers must be a number from 1, got {self.workers}")
        part, parts = parse_shard(self.shard)
        self._check_defaults()
        output = location(self.output)
        jobs, problems = self._jobs(output)
        jobs = check_jobs(jobs, problems)
        problems.stop()
        jobs = jobs[part - 1 :: parts]
        tasks = [(job, _fingerprint(job)) for job in jobs]
        waiting = [(job, mark) for job, mark in tasks if not finished(job, mark)]
        done = len(jobs) - len(waiting)
        if self.dry_run:
            _check_inputs([job for job, _ in waiting])
            print(f"{_count(len(jobs), 'job')}: {done} done, {len(waiting)} to do, every input can be used")
            return
        try:
            if not is_remote(output):  # there are no folders in an object store
                output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {output} cannot be a folder ({error.strerror}); choose another") from error
        errors = output / ("errors.csv" if parts == 1 else f"errors-{part}-of-{parts}.csv")
        with _Report(len(jobs), done, errors) as report:
            run_jobs(waiting, self.workers, self.ray, report)
        failed = len(report.failed)
        print(f"{output}: {len(waiting) - failed} made, {done} done before, {failed} failed")
        if failed:
            print(f"flowvqtalker: {_count(failed, 'job')} failed; {errors} says why", file=sys.stderr)
            raise SystemExit(1)

    def _check_defaults(self) -> None:
        """Check the options for all jobs once, by name."""
        from flowvqtalker.io.media import existing_file
        from flowvqtalker.loading import choose_device, choose_dtype

        self.motion_options()
        self.marks().credential(Path("out.mp4"))
        for name in FILES:
            if (path := getattr(self, name)) is not None:
                existing_file(path, "input")
        choose_device(self.device)
        choose_dtype(self.dtype)
        weights_hashes(self.weights)

    def _jobs(self, output: Path) -> tuple[list[Job], Problems]:
        many = self.portraits or self.speech or self.emotions is not None
        if self.jobs is not None:
            if many:
                raise UserError("a table of jobs goes without --portraits, --speech and --emotions; give one form")
            return read_table(location(self.jobs), output, self)
        if not (self.portraits and self.speech):
            raise UserError("give a table of jobs (.csv or .jsonl), or --portraits and --speech")
        return product(self.portraits, self.speech, self.emotions, output, self)


def run_jobs(
    jobs: list[tuple[Job, str]], workers: int | None, ray: str | None, report: Callable[[Job, Outcome], None]
) -> None:
    """Run jobs with their fingerprints; ``report`` is called in this process after each."""
    if not jobs:
        return

    with contextlib.ExitStack() as stack:
        if ray is None:
            backend: Backend = Processes(min(workers or 1, len(jobs)), make_runner)
        else:
            from flowvqtalker.workers.cluster import RayActors

            backend = stack.enter_context(RayActors(ray, workers, make_runner))
        done = run_tasks(
            jobs,
            backend,
            group=lambda task: (task[0].portrait, task[0].face),
            # The worker may have died between the last frame and its answer.
            recover=lambda task: Outcome() if finished(*task) else None,
        )
        for (job, _), result in done:
            if isinstance(result, WorkerDied):
                result = Outcome(error=f"{result}, perhaps out of memory; try fewer --workers")
            report(job, result)


class _Report:
    """Progress bar with the time that is left, and the table of what failed."""

    def __init__(self, total: int, done: int, errors: Path) -> None:
        from tqdm import tqdm

        self.errors, self.failed = errors, list[tuple[Job, str]]()
        errors.unlink(missing_ok=True)
        interval = 0.1 if sys.stderr.isatty() else 30.0  # seconds
        # The mean over all jobs foretells best: how long one takes depends on its speech.
        self.bar = tqdm(
            total=total, initial=done, desc="batch", unit="job", mininterval=interval, dynamic_ncols=True, smoothing=0
        )

    def __enter__(self) -> _Report:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def __call__(self, job: Job, outcome: Outcome) -> None:
        """One more job ended."""
        self.bar.update()
        for warning in outcome.warnings:
            logger.warning("%s: %s", job.output, warning)
        if outcome.error:
            logger.warning("%s: %s", job.output, outcome.error)
            self.failed.append((job, outcome.error))
            table = io.StringIO(newline="")
            rows = csv.writer(table)
            rows.writerow(("output", "portrait", "speech", "source", "error"))
            rows.writerows((job.output, job.portrait, job.speech, job.source, error) for job, error in self.failed)
            write_file(self.errors, table.getvalue())


def _check_inputs(jobs: list[Job]) -> None:
    """Open every input of the jobs, each file once."""
    from tqdm import tqdm

    from flowvqtalker.batch.runner import Runner

    runner, problems = Runner(), Problems("dry run")
    seen: set[Any] = set()
    for job in tqdm(jobs, desc="check", unit="job", disable=None, leave=False, dynamic_ncols=True):
        for column, error in runner.check(job, seen):
            problems.add(f"{job.source}, column {column}", error)
    problems.stop()


def _fingerprint(job: Job) -> str:
    try:
        return job.fingerprint()
    except UserError:  # the job's own run reports it
        return ""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
