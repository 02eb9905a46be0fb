"""Table 1: generated videos against real ones, methods side by side."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import tyro

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.analysis import Analysis, Extractor, Settings, analyse, cached
from flowvqtalker_eval.report import Row, Table, markdown, write
from flowvqtalker_eval.tables.measures import all_measures
from flowvqtalker_eval.tables.measures.base import ClipPair, Measure, Options, SetScore, pair_frames
from flowvqtalker_eval.tables.pairs import Method, Pair, common, listed, read_labels, read_method
from flowvqtalker_eval.tables.workers import DIED, in_processes

__all__ = ["Options", "Table1", "available", "measure"]

logger = logging.getLogger(__name__)

_MOST_JOBS = 8

Compare = Callable[[Path, Path], dict[str, float]]

_PROTOCOLS = {
    "eat": "protocol eat: 25 fps; SSIM, PSNR, LMD and the Fréchet distance on crops of 128x128 aligned by 68 "
    "landmarks; clips of different lengths are paired frame by frame with linspace",
    "native": "protocol native: 25 fps; the frames as they are; clips of different lengths are not compared",
}


@dataclass(frozen=True, kw_only=True)
class Table1:
    """Compare generated videos with real ones: one row per method, GT first, every metric that is available here.

    Videos belong together by name (`NAME#seed3.mp4` and `NAME_seed3.mp4` are samples of `NAME`), or by a table.
    """

    method: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME=FOLDER")] = ()
    """A row: its name and the folder (or .csv: generated,real[,emotion,source,name,seed]) of its videos; repeat it."""
    real: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Real videos of the same names."""
    labels: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Table (.csv) with name and emotion. Default: the emotion that a name spells, as in M003#angry#level_1#001."""
    common: bool = False
    """Compare only the names that the real folder and all methods have, instead of refusing others."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="BASE")] = None
    """Write BASE.md, BASE.csv and BASE.json as well."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)

    def run(self) -> None:
        """Measure, print, write."""
        if not self.method:
            raise UserError("no method was given; for instance --method ours=out/animate --real out/real")
        labels = None if self.labels is None else read_labels(self.labels)
        methods = [read_method(text, self.real, labels, self.common) for text in self.method]
        table = measure(common(methods) if self.common else methods, self.options)
        print(markdown(table).rstrip())
        if self.output is not None:
            print(", ".join(str(path) for path in write(table, self.output)))


def measure(
    methods: Sequence[Method],
    options: Options,
    *,
    title: str = "Table 1",
    notes: Iterable[str] = (),
    measures: Sequence[Measure] | None = None,
) -> Table:
    """Measure every method, and the real videos against themselves.

    Arguments:
        methods: rows; their names must differ.
        options: how to measure.
        title, notes: printed with the table.
        measures: None takes those that the options ask for.

    Raises:
        UserError: if an option is wrong, a required metric is not available, or no pair can be compared.
    """
    _check(methods, options)
    if measures is None:
        measures = all_measures(options)
    chosen, extractors, missing = available(measures, options.require)
    if not chosen:
        raise UserError(f"no metric is available here: {'; '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="flowvqtalker-") as place:
        job = _Job(chosen, list(extractors.values()), options.cache or Path(place), options)
        rows = job.rows(methods)
    if not any(row.clips for row in rows):
        raise UserError(f"no pair can be compared: {listed(job.problems)}")
    columns = [column for one in chosen for column in one.columns]
    columns = [c for c in columns if any(row.values.get(c.key) is not None for row in rows)]
    remarks = [*notes, _PROTOCOLS[options.protocol], *(f"left out: {line}" for line in missing)]
    if len({row.clips for row in rows if not row.reference}) > 1:
        remarks.append("the rows have different numbers of clips: compare them with care")
    remarks += [f"not compared: {problem}" for problem in dict.fromkeys(job.problems)]
    return Table(title, tuple(columns), tuple(rows), _settings(chosen, extractors), tuple(remarks))


def _check(methods: Sequence[Method], options: Options) -> None:
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    names = ["GT", *(method.name for method in methods)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two rows are called {', '.join(twice)}; use each name once (GT are the real videos)")


def available(
    measures: Sequence[Measure], required: Sequence[str]
) -> tuple[list[Measure], dict[str, Extractor], list[str]]:
    """The measures that are available, their extractors by name, and why the others are not."""
    chosen: list[Measure] = []
    extractors: dict[str, Extractor] = {}
    missing: list[str] = []
    for one in measures:
        try:
            needed = one.extractors()
        except MissingDependency as error:
            if one.name in required:
                raise
            missing.append(f"{one.name} ({error})")
            continue
        chosen.append(one)
        for extractor in needed:
            extractors.setdefault(extractor.name, extractor)
    return chosen, extractors, missing


def _settings(measures: Sequence[Measure], extractors: dict[str, Extractor]) -> dict[str, Settings]:
    found = {one.name: dict(one.settings()) for one in measures}
    for name, extractor in extractors.items():
        found[name] = {**dict(extractor.settings()), **found.get(name, {})}
    return {name: values for name, values in found.items() if values}


class _Job:
    """One call of :func:`measure`: analyses all videos in parallel, then makes rows with one pair in memory at a time.

    Attributes:
        problems: pairs that could not be compared, and why.
    """

    def __init__(self, measures: list[Measure], extractors: list[Extractor], cache: Path, options: Options) -> None:
        self.measures, self.extractors, self.cache, self.options = measures, extractors, cache, options
        self._jobs = options.jobs or min(os.cpu_count() or 1, _MOST_JOBS)
        self.problems: list[str] = []
        self.broken: dict[Path, str] = {}
        self.compared: dict[tuple[Path, Path], dict[str, float]] = {}

    def rows(self, methods: Sequence[Method]) -> list[Row]:
        """The row of the real videos, then one per method."""
        pairs = [pair for method in methods for pair in method.pairs]
        self._analyse(dict.fromkeys(path for pair in pairs for path in (pair.real, pair.generated)))
        self._compare(dict.fromkeys((pair.real, pair.generated) for pair in pairs))
        real = {pair.real: replace(pair, generated=pair.real, seed=None) for pair in reversed(pairs)}
        reference = Method("GT", tuple(real[path] for path in dict.fromkeys(pair.real for pair in pairs)))
        return [self._row(reference, reference=True), *(self._row(method) for method in methods)]

    def _analyse(self, paths: Iterable[Path]) -> None:
        """Fill the cache with the analyses of all videos; note what cannot be analysed."""
        waiting = []
        for path in paths:
            try:
                if cached(path, self.extractors, self.cache) is None:
                    waiting.append(path)
            except UserError as error:
                self.broken[path] = str(error)
        jobs = min(self._jobs, len(waiting))
        try:
            start = partial(_analyser, self.extractors, self.cache, jobs)
            for number, problem in in_processes(waiting, start, jobs, "analyse"):
                if problem != "":
                    self.broken[waiting[number]] = DIED if problem is None else problem
        finally:  # native parts must not outlive the interpreter
            for extractor in self.extractors:
                getattr(extractor, "close", lambda: None)()

    def _compare(self, pairs: Iterable[tuple[Path, Path]]) -> None:
        """Values that need the frames of two videos, by (real, generated)."""
        sound = [pair for pair in pairs if not self.broken.keys() & set(pair)]
        tasks = [(one.compare, *pair) for one in self.measures if one.compare is not None for pair in sound]
        for number, values in in_processes(tasks, _comparer, self._jobs, "compare"):
            if values is None:
                raise UserError(f"{tasks[number][2]} could not be compared: {DIED}")
            self.compared.setdefault(tasks[number][1:], {}).update(values)

    def _row(self, method: Method, reference: bool = False) -> Row:
        """Means over the pairs of a method, and what is measured on all of them together."""
        sets = {one.name: score for one in self.measures if (score := one.start()) is not None}
        found: dict[str, list[tuple[float, int]]] = {}
        pairs: dict[str, dict[str, float | None]] = {}
        count = frames = 0
        for pair in method.pairs:
            clips = self._clips(pair)
            if clips is None:
                continue
            count += 1
            frames += len(clips.i)
            values = pairs.setdefault(pair.name if pair.seed is None else f"{pair.name}#seed{pair.seed}", {})
            for one in self.measures:
                for key, value in self._values(one, clips, sets.get(one.name)).items():
                    values[key] = value
                    if not np.isnan(value):
                        found.setdefault(key, []).append((value, len(clips.i) if one.by_frames else 1))
        means: dict[str, float | None] = {
            key: sum(value * weight for value, weight in items) / sum(weight for _, weight in items)
            for key, items in found.items()
        }
        for score in sets.values():
            means.update((key, value) for key, value in score.result().items() if not np.isnan(value))
        return Row(method.name, means, count, frames, reference, pairs)

    def _values(self, one: Measure, clips: ClipPair, score: SetScore | None) -> dict[str, float]:
        if score is not None:
            score.add(clips)
        values = one.pair(clips)
        if one.compare is not None and not clips.same:
            made = self.compared.get((clips.pair.real, clips.pair.generated), {})
            values |= {column.key: made[column.key] for column in one.columns if column.key in made}
        return values

    def _clips(self, pair: Pair) -> ClipPair | None:
        """A pair's analyses; None (and a problem is noted) if it cannot be compared."""
        for path in (pair.real, pair.generated):
            if path in self.broken:
                self.problems.append(f"{path.name}: {self.broken[path]}")
                return None
        real = self._load(pair.real)
        generated = real if pair.generated == pair.real else self._load(pair.generated)
        if self.options.protocol == "native" and generated.frames != real.frames:
            lengths = f"{pair.generated.name} has {generated.frames} frames, {pair.real.name} has {real.frames}"
            self.problems.append(lengths)
            return None
        return ClipPair(pair, generated, real, *pair_frames(generated.frames, real.frames))

    def _load(self, path: Path) -> Analysis:
        # The analysis is made again if the file changed meanwhile, or the cache was emptied.
        return cached(path, self.extractors, self.cache) or analyse(path, self.extractors, self.cache)


def _analyser(extractors: Sequence[Extractor], cache: Path, jobs: int, number: int) -> Callable[[Path], str]:
    """What puts the analysis of a video into the cache and returns what is wrong with the video, if anything."""
    if jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)

    def work(path: Path) -> str:
        try:
            analyse(path, extractors, cache)
        except MissingDependency:
            raise
        except UserError as error:
            return str(error)
        return ""

    return work


def _comparer(number: int) -> Callable[[tuple[Compare, Path, Path]], dict[str, float]]:
    return lambda task: task[0](*task[1:])
