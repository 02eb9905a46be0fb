"""Answers of a study: read from SQLite, JSON or CSV, checked against the key, written for export.

Whatever cannot be used is listed with its reason, never dropped silently.
"""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

from pydantic import AwareDatetime, BeforeValidator, Field, ValidationError, model_validator

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_path
from flowvqtalker_eval.study.key import Emotion, Frozen, Key, Rating, reasons

__all__ = ["ANSWERS_FORMAT", "DATABASE_FILE", "SUFFIXES", "Answer", "ClipAnswer", "Rater", "Session", "collect"]
__all__ += ["read_file", "write_file"]

#: Format of a participant's answers as the page sends and downloads them.
ANSWERS_FORMAT = "flowvqtalker-study-answers/1"
#: Name of the server's database in a study's folder.
DATABASE_FILE = "answers.sqlite"
#: Files that answers are read from.
SUFFIXES = (".sqlite", ".db", ".json", ".csv")

_EXPORT_FORMAT = "flowvqtalker-study-export/1"

#: Code of a participant.
Rater = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
#: Distinguishes two people who use the same code.
Session = Annotated[str, Field(pattern=r"^[a-z]{16}$")]
_Empty = BeforeValidator(lambda value: None if value == "" else value)  # of a csv file
_Count = Annotated[int, Field(ge=0, le=1_000_000)]


class ClipAnswer(Frozen):
    """The answers to one clip, as the page sends them.

    Attributes:
        clip: identifier of the clip.
        position: place in the participant's order, from 1.
        lip_sync: 1 to 5; None where it was not asked for or the clip did not play.
        quality: 1 to 5; None where the clip did not play.
        emotion: one of the eight; None where the clip did not play.
        seconds: from seeing the clip to saving the answer.
        plays: how often the clip was played to its end.
        revision: how often the answer was changed after it had been saved.
        problem: whether the clip did not play.
        answered: date and time.
    """

    clip: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    position: Annotated[int, Field(ge=1, le=1_000_000)]
    lip_sync: Annotated[Rating | None, _Empty]
    quality: Annotated[Rating | None, _Empty]
    emotion: Annotated[Emotion | None, _Empty]
    seconds: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
    plays: _Count
    revision: _Count
    problem: bool
    answered: AwareDatetime

    @model_validator(mode="after")
    def _whole(self) -> ClipAnswer:
        if self.problem != (self.quality is None) or self.problem != (self.emotion is None):
            raise ValueError("a clip has all its answers, or none if it did not play")
        return self

    def misfit(self, key: Key) -> str:
        """Why the answer does not belong to a study; empty if it does."""
        if self.clip not in key.by_id:
            return f"the study has no clip {self.clip}"
        if (self.lip_sync is None) != (self.problem or not key.speech):
            return f"lip_sync of clip {self.clip} is {self.lip_sync}"
        return ""


class Answer(ClipAnswer):
    """What one participant said of one clip."""

    study: str
    rater: Rater
    session: Session

    @property
    def values(self) -> tuple[Any, ...]:
        """What was answered."""
        return self.lip_sync, self.quality, self.emotion, self.problem


def read_file(path: str | Path) -> tuple[list[Answer], list[str]]:
    """Read answers from a file.

    Arguments:
        path: the server's database, a participant's download (JSON or CSV), an export, or a study's folder.

    Returns:
        the answers that can be read, and one line for each thing that cannot.

    Raises:
        UserError: if the file does not exist or is of no known kind.
    """
    path = Path(path)
    if path.is_dir() and (path / DATABASE_FILE).is_file():
        path = path / DATABASE_FILE
    if not path.is_file():
        raise UserError(f"answers {path} {'is a folder without answers' if path.is_dir() else 'does not exist'}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"answers {path}: the name must end in one of {', '.join(SUFFIXES)}")
    try:
        rows = (_from_json if suffix == ".json" else _from_csv if suffix == ".csv" else _from_database)(path)
    except (ValueError, TypeError, KeyError, AttributeError, sqlite3.Error, OSError) as error:
        return [], [f"{path.name}: cannot be read ({error})"]
    answers, problems = [], []
    for number, row in enumerate(rows, 1):
        try:
            answers.append(Answer.model_validate({k: v for k, v in row.items() if k in Answer.model_fields}))
        except ValidationError as error:
            problems.append(f"{path.name}: answer {number} cannot be used ({reasons(error)})")
    if not rows:
        problems.append(f"{path.name}: holds no answer")
    return answers, problems


def collect(paths: Iterable[str | Path], key: Key) -> tuple[list[Answer], list[str]]:
    """Answers of several files that belong to a study, one for each participant and clip.

    The same answer in several files counts once. Where answers of one session differ, the one changed most often and
    last is used, and listed. Two sessions under one code are two people; neither's answers to a shared clip are used.

    Returns:
        the answers, sorted, and one line for each thing that was left out.
    """
    answers: dict[tuple[str, str], Answer] = {}
    problems: list[str] = []
    clashes: set[tuple[str, str]] = set()
    for path in paths:
        found, unreadable = read_file(path)
        problems += unreadable
        for answer in found:
            name = f"{Path(path).name}: {answer.rater}, clip {answer.clip}"
            other = f"belongs to study {answer.study}, not {key.study}" if answer.study != key.study else ""
            if reason := other or answer.misfit(key):
                problems.append(f"{name}: {reason}")
                continue
            place = answer.rater, answer.clip
            former = answers.setdefault(place, answer)
            if former.session != answer.session:
                clashes.add(place)
            elif former.values != answer.values:
                problems.append(f"{name}: answered twice, the later answer is used")
                answers[place] = max(former, answer, key=lambda one: (one.revision, one.answered))
    for rater in sorted({rater for rater, _ in clashes}):
        count = sum(clash[0] == rater for clash in clashes)
        problems.append(f"{rater}: two people used this code, {count} clips that both answered are left out")
    return [answers[place] for place in sorted(answers) if place not in clashes], problems


def write_file(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as ``.json`` or ``.csv``, readable by :func:`read_file`."""
    rows = [answer.model_dump(mode="json") for answer in answers]
    with atomic_path(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".json":
            json.dump({"format": _EXPORT_FORMAT, "answers": rows}, file, indent=1)
        else:
            writer = csv.DictWriter(file, tuple(Answer.model_fields), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _from_json(path: Path) -> list[dict[str, Any]]:
    return _rows(json.loads(path.read_text(encoding="utf-8-sig")))


def _rows(content: Any) -> list[dict[str, Any]]:
    """Answers of a participant's submission or of an export."""
    if not isinstance(content, dict) or content.get("format") not in (ANSWERS_FORMAT, _EXPORT_FORMAT):
        raise ValueError("it holds no answers of a study")
    shared = {name: content[name] for name in ("study", "rater", "session") if name in content}
    return [{**shared, **row} for row in content["answers"]]


def _from_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = set(Answer.model_fields) - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"the columns {', '.join(sorted(missing))} are missing")
        return list(rows)


def _from_database(path: Path) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(f"file:{path.resolve().as_posix()}?mode=ro", uri=True, timeout=10)) as connection:
        found = connection.execute("SELECT content FROM submissions ORDER BY rater")
        return [row for (content,) in found for row in _rows(json.loads(content))]
