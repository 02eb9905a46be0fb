"""Run one job, with models that stay loaded: the function that every driver calls."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowvqtalker.batch.job import Job, Outcome, record_path, write_record
from flowvqtalker.errors import UserError
from flowvqtalker.io.remote import local_copy, uploaded

if TYPE_CHECKING:  # torch loads when the first job comes
    from torch import Tensor

    from flowvqtalker.face.portrait import Portrait
    from flowvqtalker.io.coefficients import Coefficients
    from flowvqtalker.pipeline import Talker

__all__ = ["Runner", "collected_warnings", "make_runner", "spread"]


T = TypeVar("T")


class Runner:
    """Runs jobs one after the other. Load it once per process: the models stay, and so do prepared portraits,
    references and head motion that the next jobs may share.

    Arguments:
        threads: threads for arithmetic; None leaves the process as it is.
        number: of this runner among those that share the machine; several GPUs are shared out by it.
    """

    def __init__(self, threads: int | None = None, number: int = 0) -> None:
        self.number = number
        # One set of models at a time: a table whose jobs need several is a rare thing, memory is not.
        self._talker = functools.lru_cache(maxsize=1)(self._load)
        self._portrait = functools.lru_cache(maxsize=4)(self._prepare)
        self._reference = functools.lru_cache(maxsize=16)(self._fit_reference)
        self._head_motion = functools.lru_cache(maxsize=16)(self._track)
        if threads is not None:
            import cv2
            import torch

            torch.set_num_threads(threads)
            cv2.setNumThreads(threads)

    def run(self, job: Job, fingerprint: str | None = None) -> Outcome:
        """Make the video of a job and the record beside it.

        The record is written before the video appears, and what another job left under the name is removed before
        that. So a video with a record is always the one that the record describes, whenever the process is killed.

        Arguments:
            fingerprint: what :meth:`Job.fingerprint` gave, where that is known.

        Returns:
            the outcome; errors are in it, none is raised.
        """
        from flowvqtalker.io.audio import scan

        started = time.monotonic()
        with collected_warnings() as warnings:
            try:
                mark = fingerprint or job.fingerprint()
                talker, portrait, options = self._ready(job)
                job.output.unlink(missing_ok=True)
                write_record(job, mark)
                with local_copy(job.speech) as file, uploaded(job.output) as output:
                    speech = scan(file, job.audio_track)
                    result = talker.animate(
                        portrait, speech, output, options, full=job.full, marks=job.marks(), video=job.video()
                    )
            except Exception as error:  # one job must not end the others
                with contextlib.suppress(Exception):
                    if not job.output.exists():
                        record_path(job.output).unlink(missing_ok=True)
                text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                return Outcome(seconds=time.monotonic() - started, error=" ".join(text.split()))
        outcome = Outcome(result.frames, time.monotonic() - started, warnings=tuple(warnings))
        # The video is complete and its record valid: a full disk costs only the times in it.
        with contextlib.suppress(UserError):
            write_record(job, mark, outcome)
        return outcome

    def check(self, job: Job, seen: set[Any]) -> Iterator[tuple[str, UserError]]:
        """Open every input of a job as :meth:`run` would, without a video.

        Arguments:
            seen: what was checked for other jobs, which is not checked again; grows.

        Yields:
            the column and the problem of each input that cannot be used.
        """
        from flowvqtalker.io.audio import scan
        from flowvqtalker.motion.emotion import EmotionTrack

        models = _models(job)
        checks: dict[str, Callable[[Path], object]] = {
            "portrait": lambda path: self._portrait(path, job.face, *models),
            "speech": lambda path: _open(scan)(path, job.audio_track),
            "emotion_reference": lambda path: self._reference(path, *models),
            "reference_neutral": lambda path: self._reference(path, *models),
            "emotion_track": _open(EmotionTrack.load),
            "pose_from": lambda path: self._head_motion(path, *models),
        }
        try:
            self._talker(*models)
        except UserError as error:  # without models nothing else can be checked
            if models not in seen:
                yield "weights", error
            seen.add(models)
            return
        for column, path in job.inputs.items():
            key = column, path, {"portrait": job.face, "speech": job.audio_track}.get(column), models
            if key not in seen:
                seen.add(key)
                try:
                    checks[column](path)
                except UserError as error:
                    yield column, error

    def _ready(self, job: Job) -> tuple[Talker, Portrait, Any]:
        """The models, the portrait, and the options with their clips tracked."""
        from flowvqtalker.motion.emotion import EmotionTrack

        options = job.motion_options()
        models = _models(job)
        talker = self._talker(*models)
        faces = {name: getattr(job, name) for name in ("emotion_reference", "reference_neutral")}
        read: Any = {name: self._reference(path, *models) for name, path in faces.items() if path is not None}
        if job.emotion_track is not None:
            read["emotion_track"] = _open(EmotionTrack.load)(job.emotion_track)
        options = replace(options, **read)
        if job.pose_from is not None:
            options = replace(options, pose_from=self._head_motion(job.pose_from, *models))
        return talker, self._portrait(job.portrait, job.face, *models), options

    def _load(self, weights: Path | None, device: str, dtype: str, exact: bool) -> Talker:
        from flowvqtalker.pipeline import Talker

        return Talker.from_pretrained(weights, device=spread(device, self.number), dtype=dtype, exact=exact)

    def _prepare(self, path: Path, face: int | None, *models: Any) -> Portrait:
        return _open(self._talker(*models).portrait)(path, face)

    def _fit_reference(self, path: Path, *models: Any) -> Tensor:
        return _open(self._talker(*models).reference)(path)

    def _track(self, path: Path, *models: Any) -> Coefficients:
        from flowvqtalker.face.export import READABLE, load_motion

        talker = self._talker(*models)
        read = functools.partial(load_motion, model=talker.face_model)
        return _open(read if path.suffix.lower() in READABLE else talker.track)(path)


def make_runner(threads: int, number: int) -> Callable[[tuple[Job, str]], Outcome]:
    """The function of a worker: takes a job and its fingerprint."""
    runner = Runner(threads, number)
    return lambda task: runner.run(*task)


def _open(read: Callable[..., T]) -> Callable[..., T]:
    """``read(path, ...)`` that takes URLs as well."""

    def opened(path: Path, *rest: Any) -> T:
        with local_copy(path) as file:
            return read(file, *rest)

    return opened


def spread(device: str, number: int) -> str:
    """The device of a runner: with several GPUs, each runner takes the next one."""
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{number % count}" if device in ("auto", "cuda") and count > 1 else device


def _models(job: Job) -> tuple[Path | None, str, str, bool]:
    return job.weights, job.device, job.dtype, job.exact


@contextlib.contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect what the package warns of, which would be lost in a process without a terminal."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    collector = Collector(logging.WARNING)
    logger = logging.getLogger("flowvqtalker")
    logger.addHandler(collector)
    try:
        yield found
    finally:
        logger.removeHandler(collector)
