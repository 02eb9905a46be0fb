"""Table 1: generated videos against real ones, methods side by side."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics.analysis import Analysis, Extractor, Settings, analyse, cached
from flowvqtalker_eval.report import Row, Table, markdown, write
from flowvqtalker_eval.tables.measures.base import Both, Measure, Options, Whole, pair_frames
from flowvqtalker_eval.tables.pairs import Method, Pair, common, read_labels, read_method

__all__ = ["Options", "Table1", "available", "measure"]

logger = logging.getLogger(__name__)

_MOST_JOBS = 8
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Table1:
    """Compare generated videos with real ones: a row for each method, GT first, every metric that can be had here.

    Videos belong together by their names (`NAME#seed3.mp4` and `NAME_seed3.mp4` are takes of `NAME`), or by a table.
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
    protocol: Annotated[str, tyro.conf.arg(metavar="eat|native")] = "eat"
    """eat: pictures aligned by 68 landmarks to 128x128, clips of different lengths paired by linspace. native: the
    frames as they are, of clips with equal lengths."""
    landmarks: Annotated[str, tyro.conf.arg(metavar="dlib|mediapipe")] = "dlib"
    """Who finds the 68 landmarks; numbers of the one are not comparable with those of the other."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Only these. Default: all that can be had here."""
    require: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """An error if these cannot be had; by default such columns are left out with a note."""
    syncnet: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """SyncNet's published weights (syncnet_v2.model)."""
    inception: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Inception's weights of pytorch-fid."""
    emotion_fan: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Emotion-FAN's published weights."""
    cache: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Keep what is found in the videos, for the next table."""
    jobs: int | None = None
    """Processes. Default: one a core, at most 8."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""

    def run(self) -> None:
        """Measure, print, write."""
        if not self.method:
            raise UserError("no method was given; for instance --method ours=out/animate --real out/real")
        labels = None if self.labels is None else read_labels(self.labels)
        methods = [read_method(text, self.real, labels, self.common) for text in self.method]
        if self.common:
            methods = common(methods)
        options = Options(
            protocol=self.protocol,
            only=self.metrics,
            require=self.require,
            cache=self.cache,
            jobs=self.jobs,
            device=self.device,
            weights=self.weights,
            syncnet=self.syncnet,
            inception=self.inception,
            emotion_fan=self.emotion_fan,
            landmarks=self.landmarks,
        )
        table = measure(methods, options)
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
    """Measure every method and the real videos themselves.

    Arguments:
        methods: rows; their names must differ.
        options: see there.
        title: of the table.
        notes: to be printed with it.
        measures: None takes those of the options.

    Raises:
        UserError: if an option is wrong, a required metric cannot be had, or no pair can be compared.
    """
    _check(methods, options)
    if measures is None:
        from flowvqtalker_eval.tables.measures import all_measures

        measures = all_measures(options)
    chosen, extractors, missing = available(measures, options.require)
    if not chosen:
        raise UserError(f"no metric can be had here: {'; '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="flowvqtalker-") as place:
        cache = options.cache or Path(place)
        paths = [path for method in methods for pair in method.pairs for path in (pair.real, pair.generated)]
        broken = _analyse_all(list(dict.fromkeys(paths)), extractors, cache, options)
        compared = _compare_all(chosen, methods, broken, options)
        collector = _Collector(chosen, extractors, cache, options, broken, compared)
        rows = [collector.row(_reference(methods), reference=True)]
        rows += [collector.row(method) for method in methods]
    if not any(row.clips for row in rows):
        raise UserError(f"no pair can be compared: {'; '.join(collector.problems[:_LISTED])}")
    columns = [column for m in chosen for column in m.columns]
    columns = [c for c in columns if any(row.values.get(c.key) is not None for row in rows)]
    everything = [*notes, _protocol_note(options), *(f"left out: {line}" for line in missing)]
    if len({row.clips for row in rows if not row.reference}) > 1:
        everything.append("the rows are of different numbers of clips: compare them with care")
    everything += [f"not compared: {problem}" for problem in dict.fromkeys(collector.problems)]
    return Table(title, tuple(columns), tuple(rows), _settings(chosen, extractors), tuple(everything))


def _check(methods: Sequence[Method], options: Options) -> None:
    if options.protocol not in ("eat", "native"):
        raise UserError(f"unknown protocol {options.protocol!r}; choose eat or native")
    if options.landmarks not in ("dlib", "mediapipe"):
        raise UserError(f"unknown landmarks {options.landmarks!r}; choose dlib or mediapipe")
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {options.jobs}")
    names = ["GT", *(method.name for method in methods)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two rows are called {', '.join(twice)}; give each method its own name (GT are the real videos)"
        )


def _protocol_note(options: Options) -> str:
    if options.protocol == "eat":
        return (
            "protocol eat: 25 fps; SSIM, PSNR, LMD and the Fréchet distance on crops of 128x128 aligned by 68 "
            "landmarks; clips of different lengths are paired frame by frame with linspace"
        )
    return "protocol native: 25 fps; the frames as they are; clips of different lengths are not compared"


def available(
    measures: Sequence[Measure], required: Sequence[str]
) -> tuple[list[Measure], dict[str, Extractor], list[str]]:
    """The measures that can be had, their extractors by name, and why the others cannot."""
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


def _reference(methods: Sequence[Method]) -> Method:
    """The real videos as a method of their own, each once."""
    pairs: dict[Path, Pair] = {}
    for method in methods:
        for pair in method.pairs:
            pairs.setdefault(pair.real, replace(pair, generated=pair.real, seed=None))
    return Method("GT", tuple(pairs.values()))


# ------------------------------------------------------------------------------------------------------------ analysis


def _analyse_all(
    paths: Sequence[Path], extractors: dict[str, Extractor], cache: Path, options: Options
) -> dict[Path, str]:
    """Fill the cache with the analyses of all videos, in several processes; returns what could not be analysed."""
    wanted = list(extractors.values())
    broken: dict[Path, str] = {}
    waiting = []
    for path in paths:
        try:
            if cached(path, wanted, cache) is None:
                waiting.append(path)
        except UserError as error:
            broken[path] = str(error)
    calls = [(_analyse_one, (path, cache, options.batch)) for path in waiting]
    for path, problem in zip(waiting, _in_parallel(calls, options, "analyse", wanted), strict=True):
        if problem is not None:
            broken[path] = problem
    return broken


def _compare_all(
    measures: Sequence[Measure], methods: Sequence[Method], broken: dict[Path, str], options: Options
) -> dict[tuple[Path, Path], dict[str, float]]:
    """Values that are made of the frames of two videos, by (real, generated)."""
    pairs = {(pair.real, pair.generated): None for method in methods for pair in method.pairs}
    sound = [pair for pair in pairs if pair[0] not in broken and pair[1] not in broken]
    comparing = [one.compare for one in measures if one.compare is not None]
    calls = [(compare, pair) for compare in comparing for pair in sound]
    found: dict[tuple[Path, Path], dict[str, float]] = {}
    for (_, pair), values in zip(calls, _in_parallel(calls, options, "compare"), strict=True):
        found.setdefault(pair, {}).update(values)
    return found


def _in_parallel(
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]],
    options: Options,
    name: str,
    extractors: Sequence[Extractor] = (),
) -> list[Any]:
    """Results of calls, made in several processes, with a bar; the extractors stay loaded from call to call."""
    from tqdm import tqdm

    jobs = min(options.jobs or min(os.cpu_count() or 1, _MOST_JOBS), len(calls))
    with tqdm(total=len(calls), desc=name, unit="video", disable=None, dynamic_ncols=True, leave=False) as bar:
        if jobs <= 1:
            results = []
            try:
                _start(extractors)
                for function, arguments in calls:
                    results.append(function(*arguments))
                    bar.update()
            finally:
                _start(())
            return results
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(extractors, jobs)) as pool:
            futures = [pool.submit(function, *arguments) for function, arguments in calls]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, BrokenProcessPool):
                    raise UserError(
                        "a process died, perhaps for lack of memory; try again with fewer --jobs"
                    ) from error
                raise
            return [future.result() for future in futures]


_extractors: Sequence[Extractor] = ()  # of this process


def _start(extractors: Sequence[Extractor], jobs: int = 0) -> None:
    """Set up a process, one of a pool of so many or (0) this one; what it had before is closed."""
    global _extractors
    for former in _extractors:
        close = getattr(former, "close", None)
        if close is not None:
            close()
    _extractors = extractors
    if jobs:
        from multiprocessing.util import Finalize

        import cv2
        import torch

        Finalize(None, _start, ((),), exitpriority=10)  # native parts are closed before the process tears down
        threads = max(1, (os.cpu_count() or 1) // jobs)
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)


def _analyse_one(path: Path, cache: Path, batch: int) -> str | None:
    """Put the analysis of a video into the cache; returns what is wrong with the video."""
    try:
        analyse(path, _extractors, cache, batch)
    except MissingDependency:
        raise
    except UserError as error:
        return str(error)
    return None


# ---------------------------------------------------------------------------------------------------------------- rows


class _Collector:
    """Makes rows out of analyses; keeps one pair in memory at a time."""

    def __init__(
        self,
        measures: Sequence[Measure],
        extractors: dict[str, Extractor],
        cache: Path,
        options: Options,
        broken: dict[Path, str],
        compared: dict[tuple[Path, Path], dict[str, float]],
    ) -> None:
        self.measures, self.extractors, self.cache, self.options = measures, list(extractors.values()), cache, options
        self.broken, self.compared = broken, compared
        self.problems: list[str] = []

    def row(self, method: Method, reference: bool = False) -> Row:
        """The values of one method: means over its pairs, and what is measured on all of them."""
        wholes: dict[str, Whole] = {}
        for one in self.measures:
            whole = one.start()
            if whole is not None:
                wholes[one.name] = whole
        found: dict[str, list[tuple[float, int]]] = {}
        pairs: dict[str, dict[str, float | None]] = {}
        clips = frames = 0
        for pair in method.pairs:
            both = self._both(pair)
            if both is None:
                continue
            clips += 1
            frames += len(both.i)
            values: dict[str, float | None] = {}
            made = self.compared.get((pair.real, pair.generated), {})
            for one in self.measures:
                found_here = one.pair(both)
                if one.compare is not None and not both.same:
                    found_here |= {key: value for key, value in made.items() if key in {c.key for c in one.columns}}
                for key, value in found_here.items():
                    values[key] = value
                    if not np.isnan(value):
                        found.setdefault(key, []).append((value, len(both.i) if one.by_frames else 1))
                if one.name in wholes:
                    wholes[one.name].add(both)
            pairs[pair.name if pair.seed is None else f"{pair.name}#seed{pair.seed}"] = values
        means: dict[str, float | None] = {
            key: sum(value * weight for value, weight in items) / sum(weight for _, weight in items)
            for key, items in found.items()
        }
        for whole in wholes.values():
            means.update({key: value for key, value in whole.result().items() if not np.isnan(value)})
        return Row(method.name, means, clips, frames, reference, pairs)

    def _both(self, pair: Pair) -> Both | None:
        """A pair's analyses, or None (and the problem is kept) if it cannot be compared."""
        for path in (pair.real, pair.generated):
            if path in self.broken:
                self.problems.append(f"{path.name}: {self.broken[path]}")
                return None
        real = self._load(pair.real)
        made = real if pair.generated == pair.real else self._load(pair.generated)
        if self.options.protocol == "native" and made.frames != real.frames:
            self.problems.append(f"{pair.generated.name} has {made.frames} frames, {pair.real.name} has {real.frames}")
            return None
        return Both(pair, made, real, *pair_frames(made.frames, real.frames))

    def _load(self, path: Path) -> Analysis:
        found = cached(path, self.extractors, self.cache)
        if found is None:  # the file changed meanwhile, or somebody emptied the cache
            found = analyse(path, self.extractors, self.cache, self.options.batch)
        return found
