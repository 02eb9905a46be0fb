"""Answers of a study: read from SQLite, JSON or CSV, checked against the key, written for export.

What cannot be used is listed with its reason, never dropped in silence.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flowvqtalker.errors import UserError
from flowvqtalker_eval.study.key import CHOICES, SCALE, Key

__all__ = [
    "ANSWERS_FORMAT",
    "DATABASE_FILE",
    "RATER_PATTERN",
    "SUFFIXES",
    "Answer",
    "collect",
    "read_file",
    "write_file",
]

#: Format of a participant's answers as the page sends and downloads them.
ANSWERS_FORMAT = "flowvqtalker-study-answers/1"
#: Name of the server's database in a study's folder.
DATABASE_FILE = "answers.sqlite"
#: Codes of participants.
RATER_PATTERN = r"^[A-Za-z0-9_-]{1,40}$"
#: Files that answers are read from.
SUFFIXES = (".sqlite", ".db", ".json", ".csv")

_EXPORT_FORMAT = "flowvqtalker-study-export/1"


@dataclass(frozen=True)
class Answer:
    """What one participant said of one clip.

    Attributes:
        study: identifier of the study.
        rater: code of the participant.
        session: what tells apart two people who used the same code.
        clip: identifier of the clip.
        position: place in the participant's order, from 1.
        lip_sync: 1 to 5; None where it was not asked for or the clip did not play.
        quality: 1 to 5; None where the clip did not play.
        emotion: one of the eight; None where the clip did not play.
        seconds: from seeing the clip to saving the answer.
        plays: how often the clip was played to its end.
        revision: how often the answer was changed after it had been saved.
        problem: whether the clip did not play.
        answered: date and time, ISO 8601.
    """

    study: str
    rater: str
    session: str
    clip: str
    position: int
    lip_sync: int | None
    quality: int | None
    emotion: str | None
    seconds: float
    plays: int
    revision: int
    problem: bool
    answered: str

    @property
    def values(self) -> tuple[int | None, int | None, str | None, bool]:
        """What was answered."""
        return self.lip_sync, self.quality, self.emotion, self.problem


_FIELDS = tuple(field.name for field in fields(Answer))


def read_file(path: str | Path) -> tuple[list[Answer], list[str]]:
    """Read answers, whatever they are stored in.

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
            answers.append(_answer(row))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
            problems.append(f"{path.name}: answer {number} cannot be used ({reason})")
    if not rows:
        problems.append(f"{path.name}: holds no answer")
    return answers, problems


def collect(paths: Iterable[str | Path], key: Key) -> tuple[list[Answer], list[str]]:
    """Answers of several files that belong to a study, one for each participant and clip.

    The same answer in several files counts once. Where they differ, the one changed most often and last is taken, and
    listed; but two different sessions under one code are two people, and neither's answers to that clip are used.

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
            reason = _unfit(answer, key)
            if reason:
                problems.append(f"{name}: {reason}")
                continue
            former = answers.setdefault((answer.rater, answer.clip), answer)
            if former.values == answer.values and former.session == answer.session:
                continue
            if former.session != answer.session:
                clashes.add((answer.rater, answer.clip))
                continue
            problems.append(f"{name}: answered twice, the later answer is taken")
            answers[answer.rater, answer.clip] = max(former, answer, key=lambda one: (one.revision, one.answered))
    for rater in sorted({rater for rater, _ in clashes}):
        count = sum(clash[0] == rater for clash in clashes)
        problems.append(f"{rater}: two people used this code, {count} clips that both answered are left out")
    for clash in clashes:
        del answers[clash]
    return [answers[name] for name in sorted(answers)], problems


def write_file(answers: Sequence[Answer], path: Path) -> None:
    """Write answers as ``.json`` or ``.csv``, readable by :func:`read_file`."""
    rows = [asdict(answer) for answer in answers]
    if path.suffix.lower() == ".json":
        text = json.dumps({"format": _EXPORT_FORMAT, "answers": rows}, indent=1) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, _FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "problem": str(row["problem"]).lower()} for row in rows)
        text = buffer.getvalue()
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _from_json(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict) or content.get("format") not in (ANSWERS_FORMAT, _EXPORT_FORMAT):
        raise ValueError("it holds no answers of a study")
    shared = {name: content[name] for name in ("study", "rater", "session") if name in content}
    return [{**shared, **row} for row in content["answers"]]


def _from_csv(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        missing = set(_FIELDS) - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"the columns {', '.join(sorted(missing))} are missing")
        return [{name: row[name] for name in _FIELDS} for row in rows]


def _from_database(path: Path) -> list[dict[str, Any]]:
    connection = sqlite3.connect(f"file:{path.resolve().as_posix()}?mode=ro", uri=True, timeout=10)
    try:
        connection.row_factory = sqlite3.Row
        query = "SELECT * FROM answers NATURAL JOIN raters ORDER BY rater, position"
        return [dict(row) for row in connection.execute(query)]
    finally:
        connection.close()


def _answer(row: dict[str, Any]) -> Answer:
    """One row of any source as an answer; text is read as what it means.

    Raises:
        ValueError: if a value is out of range.
        KeyError: if one is missing.
    """
    problem = str(row["problem"]).strip().lower()
    if problem not in ("true", "false", "1", "0"):
        raise ValueError(f"problem is {row['problem']!r}")
    seconds = float(row["seconds"])
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"seconds is {row['seconds']!r}")
    answer = Answer(
        study=str(row["study"]),
        rater=str(row["rater"]),
        session=str(row["session"]),
        clip=str(row["clip"]),
        position=_whole(row, "position", 1),
        lip_sync=_rating(row, "lip_sync"),
        quality=_rating(row, "quality"),
        emotion=str(row["emotion"]) if row["emotion"] not in (None, "") else None,
        seconds=seconds,
        plays=_whole(row, "plays", 0),
        revision=_whole(row, "revision", 0),
        problem=problem in ("true", "1"),
        answered=str(row["answered"]),
    )
    if answer.emotion is not None and answer.emotion not in CHOICES:
        raise ValueError(f"emotion is {answer.emotion!r}")
    return answer


def _whole(row: dict[str, Any], name: str, lowest: int) -> int:
    value = float(row[name])
    if value != int(value) or value < lowest:
        raise ValueError(f"{name} is {row[name]!r}")
    return int(value)


def _rating(row: dict[str, Any], name: str) -> int | None:
    if row[name] in (None, ""):
        return None
    if float(row[name]) not in SCALE:
        raise ValueError(f"{name} is {row[name]!r}, not 1 to 5")
    return int(float(row[name]))


def _unfit(answer: Answer, key: Key) -> str:
    """Why an answer does not belong to a study; empty if it does."""
    if answer.study != key.study:
        return f"belongs to study {answer.study}, not {key.study}"
    if answer.clip not in key.by_id:
        return "the study has no such clip"
    given = (answer.quality, answer.emotion) + ((answer.lip_sync,) if key.speech else ())
    if answer.problem != all(value is None for value in given) or (not answer.problem and None in given):
        return "some of its answers are missing"
    return ""
