"""The benchmark runner: animates every item of a split, resumes where it was stopped, then prints Table 1."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.splits import Item, load_split

if TYPE_CHECKING:
    from flowvqtalker_eval.tables.methods import Animator, Output

__all__ = ["Run", "Task", "make_all", "plan"]

logger = logging.getLogger(__name__)

_NAMES = ("animate", "reenact", "copy", "warp", "codebook")
_ABANDONED = 3600.0  # seconds after which a half-written file is taken for what a killed process left


@dataclass(frozen=True)
class Task:
    """What is still to be made of one item."""

    item: Item
    outputs: tuple[Output, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Animate every item of a split and print Table 1.

    Every method's videos are OUT/METHOD/NAME.mp4 (512x512, 25 fps) beside the real ones, OUT/real/NAME.mp4, cut to the
    portrait's crop and to the same frames. What is there already is kept, so an interrupted run goes on with the same
    command. Items that fail are listed in OUT/errors.csv.
    """

    split: Annotated[str, tyro.conf.arg(metavar="SPLIT")]
    """mead-test, hdtf-test, shared-val, or a table (.csv) with a column clip."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the clips of the split are."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="OUT")]
    """Folder to write."""
    method: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ("animate",)
    """One or more of animate (portrait and speech), reenact (the clip's own tracked motion), copy (the portrait
    repeated), warp (the warped portrait alone), codebook (each real frame through the codebook)."""
    seeds: int = 1
    """How many takes of animate; with more than one the table shows their diversity."""
    limit: int | None = None
    """Only the first so many items."""
    seconds: float | None = None
    """At most so much of each clip."""
    jobs: int = 1
    """Processes. With several GPUs each takes the next one."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: str = "auto"
    """auto (the fastest on the device), float32 or bfloat16."""
    table: bool = True
    """Print Table 1 at the end (and write OUT/table1.md, .csv and .json)."""
    protocol: Annotated[str, tyro.conf.arg(metavar="eat|native")] = "eat"
    """Of the table, see `flowvqtalker evaluate table1`."""

    def run(self) -> None:
        """Make what is missing, then the table."""
        self._check()
        items = load_split(self.split, self.data)[: self.limit]
        tasks = plan(items, self.output, self.method, self.seeds)
        _same_settings(self.output, self._settings())
        _write_items(self.output / "items.csv", items)
        _clean(self.output)
        wanted = sum(len(task.outputs) for task in plan(items, None, self.method, self.seeds))
        left = sum(len(task.outputs) for task in tasks)
        logger.info("%d clips, %d videos to make, %d are there", len(items), left, wanted - left)
        failed = make_all(tasks, self._animator(), self.output / "errors.csv", self.jobs)
        if failed:
            logger.warning("%d videos could not be made; %s says why", failed, self.output / "errors.csv")
        if self.table:
            print(self._table(items).rstrip())

    def _check(self) -> None:
        unknown = [name for name in self.method if name not in _NAMES]
        if unknown or not self.method:
            raise UserError(f"unknown method {', '.join(unknown) or '(none)'}; choose from {', '.join(_NAMES)}")
        for name in ("seeds", "jobs", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}")
        if self.seconds is not None and self.seconds <= 0:
            raise UserError(f"--seconds must be positive, got {self.seconds:g}")
        if self.protocol not in ("eat", "native"):
            raise UserError(f"unknown protocol {self.protocol!r}; choose eat or native")

    def _settings(self) -> dict[str, Any]:
        """What the videos depend on; a folder holds videos of one choice alone."""
        from flowvqtalker import __version__
        from flowvqtalker.weights import manifest

        hashes = {name: entry.sha256[:16] for name, entry in sorted(manifest(self.weights).items())}
        needed = ("face_model", "codebook", "vqig", "expflow", "poseflow")
        kept = {name: digest for name, digest in hashes.items() if name.partition(".")[0] in needed}
        return {"version": __version__, "weights": kept, "seconds": self.seconds}

    def _animator(self) -> _Options:
        return _Options(self.output, self.weights, self.device, self.dtype, self.seconds, max(1, self.jobs))

    def _table(self, items: Sequence[Item]) -> str:
        """Table 1 over the clips that every method made, printed and written."""
        from flowvqtalker_eval.report import markdown, write
        from flowvqtalker_eval.tables.pairs import Method, Pair, common
        from flowvqtalker_eval.tables.table1 import Options, measure

        methods = []
        for name in self.method:
            pairs = []
            for task in plan(items, None, (name,), self.seeds):
                for output in task.outputs:
                    path, real = self.output / output.path, self.output / "real" / f"{task.item.name}.mp4"
                    if path.is_file() and real.is_file():
                        seed = output.seed if self.seeds > 1 and name == "animate" else None
                        portrait = self.output / "portraits" / f"{task.item.name}.png"
                        pairs.append(Pair(task.item.name, path, real, task.item.emotion, portrait, seed))
            if pairs:
                methods.append(Method(name, tuple(pairs)))
            else:
                logger.warning("%s made no video and is left out of the table", name)
        if not methods:
            raise UserError(f"no video was made; {self.output / 'errors.csv'} says why")
        shared = common(methods)
        made = {pair.name for method in methods for pair in method.pairs}
        kept = {pair.name for pair in shared[0].pairs}
        notes = [f"split {self.split}: {len(items)} clips, {len(kept)} of them made by every method"]
        if made - kept:
            notes.append(f"left out, since not every method made them: {', '.join(sorted(made - kept))}")
        options = Options(
            protocol=self.protocol,
            cache=self.output / "analysis",
            jobs=self.jobs,
            device=self.device,
            weights=self.weights,
        )
        table = measure(shared, options, title=f"Table 1, {self.split}", notes=notes)
        write(table, self.output / "table1")
        return markdown(table)


def plan(items: Sequence[Item], folder: Path | None, methods: Sequence[str], seeds: int = 1) -> list[Task]:
    """What is to be made of each item; what is in the folder already is left out, items without anything left as well.

    An item without speech cannot be animated from it, so ``animate`` skips it.

    Arguments:
        items: of the split.
        folder: of the run; None plans everything, with paths relative to the folder.
        methods: by name.
        seeds: takes of ``animate``; with several the seed is part of the file's name.
    """
    from flowvqtalker_eval.tables.methods import Output

    tasks = []
    for item in items:
        outputs = []
        for method in methods:
            if method == "animate" and not item.voiced:
                continue
            for seed in range(seeds if method == "animate" else 1):
                mark = f"#seed{seed}" if method == "animate" and seeds > 1 else ""
                path = (folder or Path()) / method / f"{item.name}{mark}.mp4"
                if folder is None or not path.exists():
                    outputs.append(Output(method, seed, path))
        if outputs:
            tasks.append(Task(item, tuple(outputs)))
    return tasks


@dataclass(frozen=True)
class _Options:
    """What a process needs to make videos."""

    folder: Path
    weights: Path | None
    device: str
    dtype: str
    seconds: float | None
    jobs: int

    def animator(self, number: int = 0) -> Animator:
        """For the process with a number; several share the cores, and take the GPUs in turn."""
        import torch

        from flowvqtalker.loading import choose_device
        from flowvqtalker_eval.tables.methods import Animator

        device = choose_device(self.device)
        name = str(device)
        if device.type == "cuda" and device.index is None and self.jobs > 1:
            name = f"cuda:{number % torch.cuda.device_count()}"
        if self.jobs > 1:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.jobs))
        return Animator(self.folder, self.weights, name, self.dtype, self.seconds)


Failures = list[tuple[str, str, int, str]]  # item, method, seed, reason


class _Report:
    """Progress with the time that is left, and the table of what failed."""

    def __init__(self, total: int, errors: Path) -> None:
        from tqdm import tqdm

        self.total, self.errors, self.done, self.failed = total, errors, 0, 0
        self.started = time.monotonic()
        self.bar = tqdm(total=total, desc="evaluate run", unit="clip", disable=None, dynamic_ncols=True)

    def __call__(self, failures: Failures) -> None:
        """One more task is done."""
        self.done += 1
        self.failed += len(failures)
        self.bar.update()
        if failures:
            new = not self.errors.exists()
            with open(self.errors, "a", newline="", encoding="utf-8") as stream:
                rows = csv.writer(stream)
                rows.writerows([("name", "method", "seed", "error"), *failures] if new else failures)
        for name, method, _, reason in failures:
            logger.warning("%s (%s): %s", name, method, reason)
        if self.bar.disable and self.done % max(1, self.total // 20) == 0:  # no terminal: twenty lines in all
            left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
            logger.info("%d of %d clips done, about %.0f s left", self.done, self.total, left)


def make_all(tasks: Sequence[Task], options: _Options, errors: Path, jobs: int = 1) -> int:
    """Make all outputs.

    Arguments:
        tasks: from :func:`plan`.
        options: for the processes.
        errors: table of what failed; it is there only if something did.
        jobs: processes; 1 works in this one.

    Returns:
        how many outputs failed.
    """
    errors.unlink(missing_ok=True)
    if not tasks:
        return 0
    report = _Report(len(tasks), errors)
    try:
        if jobs == 1:
            animator = options.animator()
            for task in tasks:
                report(_make(animator, task))
        else:
            _in_processes(tasks, options, min(jobs, len(tasks)), report)
    finally:
        report.bar.close()
    return report.failed


def _make(animator: Animator, task: Task) -> Failures:
    found = animator.make(task.item, task.outputs)
    if None in found:  # nothing could be made of the item
        return _lost(task, found[None])
    return [(task.item.name, o.method, o.seed, reason) for o, reason in found.items() if o is not None]


def _lost(task: Task, reason: str) -> Failures:
    return [(task.item.name, output.method, output.seed, reason) for output in task.outputs]


# ------------------------------------------------------------------------------------------------------------ processes

_animator: Animator | None = None  # of this process


def _start(options: _Options, numbers: Any) -> None:
    """Set up a process of the pool."""
    global _animator
    _animator = options.animator(numbers.get())


def _work(task: Task) -> Failures:
    assert _animator is not None  # _start has run
    return _make(_animator, task)


def _in_processes(tasks: Sequence[Task], options: _Options, jobs: int, report: Callable[[Failures], None]) -> None:
    """Several processes at once. If one dies (out of memory), the tasks that may have been its own are tried again one
    by one, each in a process of its own, and the others go on together."""
    options.animator()  # what the user gave wrong is an error here, not the end of every process
    waiting = list(tasks)
    while waiting:
        lost = _pool(waiting, options, jobs, report)
        # Tasks start in order, so the culprit is among the first ones that did not come back.
        for task in lost[: jobs + 1]:
            if _pool([task], options, 1, report):
                report(_lost(task, "its process died; perhaps the memory was not enough (fewer --jobs)"))
        waiting = lost[jobs + 1 :]


def _pool(tasks: Sequence[Task], options: _Options, jobs: int, report: Callable[[Failures], None]) -> list[Task]:
    """Work on tasks in a pool; returns those that were lost with a process that died."""
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    pool = ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(options, numbers))
    lost = set()
    try:
        futures = {pool.submit(_work, task): i for i, task in enumerate(tasks)}
        for future in as_completed(futures):
            try:
                report(future.result())
            except BrokenProcessPool:
                lost.add(futures[future])
        pool.shutdown()
    except BaseException:  # interrupted, or an error in a process's start: do not wait for the clips at work
        for process in (getattr(pool, "_processes", None) or {}).values():
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return [tasks[i] for i in sorted(lost)]


# ----------------------------------------------------------------------------------------------------------- the folder


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note what the videos are made with; a folder of videos made with something else is refused."""
    from flowvqtalker.io.coefficients import write_whole

    file = folder / "run.json"
    if file.is_file():
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file} is damaged; remove it if the videos there are wanted") from error
        different = [name for name in settings if former.get(name) != settings[name]]
        if different:
            raise UserError(
                f"{folder} holds videos made with other settings ({', '.join(different)}); choose another with -o"
            )
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be made ({error.strerror}); choose another with -o") from error
    text = json.dumps(settings, indent=1)
    write_whole(file, lambda path: _text(path, text))


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_items(path: Path, items: Sequence[Item]) -> None:
    """Names and labels, as `evaluate table1 --labels` reads them."""
    from flowvqtalker.io.coefficients import write_whole

    def write(place: Path) -> None:
        with open(place, "w", newline="", encoding="utf-8") as stream:
            rows = csv.writer(stream)
            rows.writerow(["name", "emotion", "voiced", "clip"])
            rows.writerows([i.name, i.emotion or "", "yes" if i.voiced else "no", i.clip] for i in items)

    write_whole(path, write)


def _clean(folder: Path) -> None:
    """Remove half-written files that killed processes left."""
    for path in folder.glob("*/.*.part"):
        if time.time() - path.stat().st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
