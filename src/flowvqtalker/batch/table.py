"""Job lists: csv or JSON lines, or the product of portraits, speech and emotions. All problems are reported at once."""

from __future__ import annotations

import csv
import functools
import glob
import itertools
import json
import re
import types
import typing
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flowvqtalker.batch.job import RECORD, Job, weights_hashes
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import VIDEO_SUFFIXES
from flowvqtalker.io.remote import glob_remote, is_remote, location
from flowvqtalker.motion.options import FILES, MotionOptions
from flowvqtalker.options import AnimateArguments, MarkArguments, VideoArguments

__all__ = ["COLUMNS", "Problems", "check_jobs", "product", "read_table"]

#: Columns of a table: every option of ``animate``.
COLUMNS = tuple(f.name for f in fields(Job) if f.name not in ("named_by_inputs", "source"))

_PATTERN = ("portrait", "speech")
_LONGEST = 30  # problems that are printed


@dataclass
class Problems:
    """Collects what is wrong with a job list, so that the user sees all of it."""

    name: str
    found: list[str] = field(default_factory=list)

    def add(self, place: str, message: object) -> None:
        """Note a problem.

        Arguments:
            place: file, line and column, or the option of the command line.
        """
        self.found.append(f"{place}: {message}")

    def stop(self) -> None:
        """Raise a :class:`UserError` with all problems, if there are any."""
        if self.found:
            shown = self.found[:_LONGEST]
            if more := len(self.found) - len(shown):
                shown.append(f"... and {more} more")
            count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
            raise UserError("\n  ".join([f"{self.name}: {count}; nothing was made", *shown]))


def read_table(path: Path, out: Path, defaults: AnimateArguments) -> tuple[list[Job], Problems]:
    """The jobs of a table.

    Relative paths start at the table's folder; ``portrait`` and ``speech`` may be glob patterns, which stand for a job
    with each match; ``output`` is a name inside the output folder.

    Arguments:
        path: ``.csv`` with a header, or ``.jsonl``, one object on each line.
        out: folder of the videos.
        defaults: values for columns and cells that are left out.

    Returns:
        the jobs that could be read, and the problems of the others.

    Raises:
        UserError: if the file cannot be read, or for an unknown column, after which nothing else makes sense.
    """
    readers = {".csv": _read_csv, ".jsonl": _read_lines, ".ndjson": _read_lines}
    if path.suffix.lower() not in readers:
        raise UserError(f"job list {path}: the name must end in one of {', '.join(readers)}")
    problems = Problems(str(path))
    jobs: list[Job] = []
    try:
        for line, row in readers[path.suffix.lower()](path, problems):
            jobs += _row_jobs(row, f"{path}, line {line}", path.parent, out, defaults, problems)
    except OSError as error:
        raise UserError(f"job list {path} cannot be read ({error.strerror}); check the name") from error
    except UnicodeDecodeError as error:
        raise UserError(f"job list {path} is not UTF-8 text; save it as UTF-8") from error
    if not jobs:
        problems.stop()
        raise UserError(f"job list {path} holds no job; give one on each line")
    return jobs, problems


def product(
    portraits: Sequence[str], speech: Sequence[str], emotions: str | None, out: Path, defaults: AnimateArguments
) -> tuple[list[Job], Problems]:
    """A job for each portrait with each speech with each emotion.

    Arguments:
        portraits, speech: files or glob patterns.
        emotions: names with commas between; ``+`` joins the parts of a mixture. None takes that of the defaults.
    """
    problems = Problems("batch")
    jobs: list[Job] = []
    names = [defaults.emotion] if emotions is None else [name.strip() for name in emotions.split(",")]
    faces = _all_matches(portraits, "--portraits", problems)
    voices = _all_matches(speech, "--speech", problems)
    for portrait, voice, emotion in itertools.product(faces, voices, names):
        row = {"portrait": str(portrait), "speech": str(voice)} | ({"emotion": emotion} if emotion is not None else {})
        made = _row_jobs(row, "--emotions", Path(), out, defaults, problems, patterns=False)
        jobs += [replace(job, source=f"{portrait} with {voice}") for job in made]
    problems.found = list(dict.fromkeys(problems.found))  # each wrong emotion once, not once per pair
    return jobs, problems


def check_jobs(jobs: list[Job], problems: Problems) -> list[Job]:
    """Give jobs without a name one, and check that no two write the same file and that none writes over an input.

    Returns:
        the jobs, with distinct outputs.
    """
    twice = Counter(job.output for job in jobs)
    # A name from the inputs' names may not tell all jobs apart; then the hash does, whatever else is in the table.
    jobs = [
        replace(job, output=job.output.with_stem(f"{job.output.stem}_{job.fingerprint()[:8]}"))
        if twice[job.output] > 1 and job.named_by_inputs
        else job
        for job in jobs
    ]
    first: dict[Path, Job] = {}
    inputs = {path.resolve() for job in jobs for path in job.inputs.values()}
    for job in jobs:
        other = first.setdefault(job.output, job)
        if other is not job:
            problems.add(job.source, f"{job.output} is already the output of {other.source}; remove one of them")
        elif job.output.resolve() in inputs:
            problems.add(job.source, f"output {job.output} is also an input; choose another name or folder")
    return jobs


def _read_csv(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = [_column(name) for name in next(rows, [])]
            _check_header(header, f"{path}, line 1")
            for row in rows:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) > len(header):
                    problems.add(
                        f"{path}, line {rows.line_num}",
                        f"{len(row)} cells, but {len(header)} columns; put quotes around cells with commas",
                    )
                    continue
                cells = {name: cell.strip() for name, cell in zip(header, row, strict=False)}
                yield rows.line_num, {name: cell for name, cell in cells.items() if cell}
        except csv.Error as error:
            problems.add(f"{path}, line {rows.line_num}", f"broken csv ({error}); check the quotes")


def _read_lines(path: Path, problems: Problems) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                problems.add(f"{path}, line {number}", f"broken JSON ({error}); write one object on each line")
                continue
            if not isinstance(row, dict):
                problems.add(f"{path}, line {number}", 'not a JSON object; write for instance {"portrait": ...}')
                continue
            row = {_column(name): value for name, value in row.items() if value is not None}
            unknown = [name for name in row if name not in COLUMNS]
            for name in unknown:
                problems.add(f"{path}, line {number}, column {name}", _unknown(name))
            if not unknown:
                yield number, row


def _at(folder: Path, path: Path) -> Path:
    """A path of a table, which lies in a folder."""
    return path if is_remote(path) or path.is_absolute() else folder / str(path)


def _column(name: str) -> str:
    return name.strip().lower().lstrip("-").replace("-", "_")


def _unknown(name: str) -> str:
    return f"unknown column {name!r}; choose from {', '.join(COLUMNS)}"


def _check_header(names: list[str], place: str) -> None:
    for name, count in Counter(names).items():
        if name not in COLUMNS:
            raise UserError(f"{place}: {_unknown(name)}")
        if count > 1:
            raise UserError(f"{place}: column {name} stands there twice; remove one")
    if missing := [name for name in _PATTERN if name not in names]:
        raise UserError(f"{place}: no column {' and '.join(missing)}; the first line must name the columns")


def _row_jobs(
    row: dict[str, Any],
    place: str,
    folder: Path,
    out: Path,
    defaults: AnimateArguments,
    problems: Problems,
    *,
    patterns: bool = True,
) -> list[Job]:
    """The jobs of a row: its patterns expanded, its samples apart. Problems are noted, and the row is left out."""
    before = len(problems.found)

    def wrong(column: str, message: object) -> None:
        problems.add(f"{place}, column {column}" if patterns else place, message)

    values: dict[str, Any] = {}
    for column, given in row.items():
        try:
            values[column] = _convert(given, _KINDS[column])
        except ValueError as error:
            wrong(column, error)
    for column in (name for name in _PATTERN if name not in row):
        wrong(column, "missing; give a file")
    matches = {}
    for column in _PATTERN:
        if column in values:
            given = _at(folder, values[column])
            matches[column] = _matches(str(given)) if patterns else [given]
            if not matches[column]:
                wrong(column, f"{given} {_absence(given)}; check the name")
    for column in (*FILES, "sign_cert", "sign_key"):
        if column in values:
            values[column] = _at(folder, values[column])
            if not values[column].is_file():
                wrong(column, f"{values[column]} {_absence(values[column])}; check the name")
    if "weights" in values:
        values["weights"] = _at(folder, values["weights"])
    _check_values(values, defaults, wrong)
    pairs = list(itertools.product(*matches.values())) if len(matches) == len(_PATTERN) else []
    output = values.pop("output", None)
    if output is not None and len(pairs) > 1:
        wrong("output", f"one name for {len(pairs)} jobs; leave it out where a pattern matches several files")
    if len(problems.found) > before:
        return []
    given = {f.name: getattr(defaults, f.name) for f in fields(AnimateArguments)}
    given |= {name: value for name, value in values.items() if name not in _PATTERN}
    jobs = []
    for portrait, speech in pairs:
        job = Job(portrait=portrait, speech=speech, output=out / str(output or "video.mp4"), source=place, **given)
        samples = job.samples()
        if output is None:
            samples = [replace(sample, output=out / _name(sample), named_by_inputs=True) for sample in samples]
        jobs += samples
    return jobs


def _check_values(values: dict[str, Any], defaults: AnimateArguments, wrong: Any) -> None:
    """Check the options by themselves and together, with the checks that ``animate`` has."""
    from flowvqtalker.io.format import VideoFormat
    from flowvqtalker.loading import choose_device, choose_dtype
    from flowvqtalker.provenance import Marks

    own = [f.name for f in fields(MotionOptions)]
    good = True
    for column in (name for name in own if name in values and name not in FILES):
        try:
            MotionOptions(**{column: values[column]})
        except UserError as error:
            wrong(column, error)
            good = False
    if good:
        try:
            together = {name: getattr(defaults, name) for name in own} | {n: v for n, v in values.items() if n in own}
            MotionOptions(**together)
        except UserError as error:
            named = [name for name in together if re.search(rf"\b{name}\b", str(error))]
            wrong(", ".join(named) or "emotion", error)
    for kind, build in ((MarkArguments, Marks), (VideoArguments, VideoFormat)):
        own = [f.name for f in fields(kind)]
        if any(name in values for name in own):
            try:
                build(**{name: values.get(name, getattr(defaults, name)) for name in own})
            except UserError as error:
                wrong(", ".join(name for name in own if name in values), error)
    checks: dict[str, Any] = {"device": choose_device, "dtype": choose_dtype, "weights": weights_hashes}
    for column, check in checks.items():
        if column in values:
            try:
                check(values[column])
            except UserError as error:
                wrong(column, error)
    if not 1 <= values.get("num_samples", 1) <= 1000:
        wrong("num_samples", f"must be from 1 to 1000, got {values['num_samples']}")
    if values.get("face", 0) < 0:
        wrong("face", f"must be a number from 0, got {values['face']}")
    output = values.get("output")
    if output is not None and (output.is_absolute() or ".." in output.parts):
        wrong("output", f"{output} lies outside of the output folder; give a name inside")
    elif output is not None and output.suffix.lower() not in VIDEO_SUFFIXES:
        wrong("output", f"{output}: the name must end in one of {', '.join(VIDEO_SUFFIXES)}")


def _kinds() -> dict[str, type]:
    """Column -> Path, str, int, float or bool."""
    kinds = {}
    for name, hint in typing.get_type_hints(Job).items():
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kinds[name],) = (choice for choice in choices if choice is not type(None))
    return kinds


_KINDS = _kinds()
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _convert(given: Any, kind: type) -> Any:
    """A cell, or a value from JSON, as the type of its column.

    Raises:
        ValueError: with what is allowed, if it is not one.
    """
    if kind is bool:
        if isinstance(given, bool):
            return given
        if isinstance(given, str) and given.lower() in _WORDS:
            return _WORDS[given.lower()]
        raise ValueError(f"must be true or false, got {given!r}")
    if kind in (int, float):
        if isinstance(given, str | int | float) and not isinstance(given, bool):
            try:
                value = kind(given)
                if kind is float or value == float(given):
                    return value
            except (ValueError, OverflowError):
                pass
        raise ValueError(f"must be a {'whole ' if kind is int else ''}number, got {given!r}")
    if not isinstance(given, str) or not given:
        raise ValueError(f"must be text, got {given!r}")
    return location(given) if kind is Path else kind(given)


@functools.cache
def _matches(pattern: str) -> list[Path]:
    """The file of that name, else the files that match the pattern, in order."""
    named = location(pattern)
    if is_remote(named):
        paths = glob_remote(named)
        return paths if len(paths) == 1 else [path for path in paths if path.suffix != RECORD]
    if named.is_file():
        return [named]
    found = map(Path, sorted(glob.glob(pattern, recursive=True)))
    return [path for path in found if path.is_file() and path.suffix != RECORD]


def _all_matches(patterns: Iterable[str], option: str, problems: Problems) -> list[Path]:
    found: dict[Path, None] = {}
    for pattern in patterns:
        if not _matches(pattern):
            problems.add(option, f"{pattern} {_absence(Path(pattern))}; check the name")
        found |= dict.fromkeys(_matches(pattern))
    return list(found)


def _absence(path: Path) -> str:
    if glob.has_magic(str(path)):
        return "matches no file"
    return "is a folder" if path.is_dir() else "does not exist"


def _name(job: Job) -> str:
    """Name of a video from its inputs: ``PORTRAIT_SPEECH_EMOTION_SEED.mp4``."""
    source = job.emotion_track or job.emotion_reference
    emotion = job.emotion or (source.stem if source else "neutral")
    return "_".join((job.portrait.stem, job.speech.stem, re.sub(r"[^\w.-]+", "-", emotion), str(job.seed))) + ".mp4"
