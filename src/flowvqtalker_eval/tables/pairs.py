"""Which generated video belongs to which real one: two folders, or a table."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError

__all__ = [
    "Method",
    "Pair",
    "common",
    "emotion_of",
    "read_folders",
    "read_labels",
    "read_method",
    "read_table",
    "videos",
]

_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
_SEED = re.compile(r"(?:#|_)seed_?(\d+)$")
# How other programs spell the nine.
_SPELLINGS = {
    **{name: name for name in EMOTIONS},
    **{"anger": "angry", "disgust": "disgusted", "contemptuous": "contempt", "fearful": "fear", "happiness": "happy"},
    **{"sadness": "sad", "surprise": "surprised"},
}
_LISTED = 5


@dataclass(frozen=True)
class Pair:
    """A generated video and the real one that it is compared to.

    Attributes:
        name: of the pair; several seeds of one item share it.
        generated: the generated video.
        real: the real video.
        emotion: which of the nine it was meant to show; None where unknown.
        source: the portrait that was animated, for identity; None takes the real video.
        seed: for diversity over seeds; None where the file's name has none.
    """

    name: str
    generated: Path
    real: Path
    emotion: str | None = None
    source: Path | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    name: str
    pairs: tuple[Pair, ...]


def videos(folder: str | Path) -> dict[str, Path]:
    """The videos of a folder by their names without suffix.

    Raises:
        UserError: if there is no such folder, no video in it, or two of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"folder {folder} {problem}; give a folder of videos")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _VIDEOS and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{folder} holds both {found[path.stem].name} and {path.name}; remove one of them")
            found[path.stem] = path
    if not found:
        raise UserError(f"folder {folder} holds no video ({', '.join(_VIDEOS)}); give a folder of videos")
    return found


def read_folders(generated: str | Path, real: str | Path, labels: dict[str, str] | None = None) -> list[Pair]:
    """Pairs of the videos of two folders that have the same name.

    A generated video may carry the seed it was made with: ``NAME#seed3.mp4`` and ``NAME_seed3.mp4`` belong to ``NAME``.

    Arguments:
        generated: folder.
        real: folder.
        labels: emotion of each name; for the others the name itself may tell, see :func:`emotion_of`.

    Raises:
        UserError: if a folder holds no video, or the names differ (those without a partner are listed).
    """
    pairs, lonely, missing = _match(generated, real, labels)
    problems = []
    if lonely:
        problems.append(f"{_listed(lonely)} in {generated} without a real video")
    if missing:
        problems.append(f"{_listed(missing)} in {real} without a generated video")
    if problems:
        raise UserError(
            f"the names of generated and real videos differ: {'; '.join(problems)}; "
            "rename them, give a table of pairs (.csv), or compare what all have in common with --common"
        )
    return pairs


def _match(
    generated: str | Path, real: str | Path, labels: dict[str, str] | None
) -> tuple[list[Pair], list[str], list[str]]:
    """Pairs of equal names, and the files of either folder that have no partner."""
    ours, theirs = videos(generated), videos(real)
    pairs, lonely = [], []
    for stem, path in ours.items():
        match = None if stem in theirs else _SEED.search(stem)
        name = stem[: match.start()] if match else stem
        if name not in theirs:
            lonely.append(path.name)
            continue
        emotion = (labels or {}).get(name) or emotion_of(name)
        pairs.append(Pair(name, path, theirs[name], emotion, None, int(match.group(1)) if match else None))
    missing = sorted(set(theirs) - {pair.name for pair in pairs})
    return pairs, lonely, [theirs[name].name for name in missing]


def read_table(path: str | Path) -> list[Pair]:
    """Pairs of a table with the columns ``generated`` and ``real``, and optionally ``emotion``, ``source`` (the
    portrait), ``name`` and ``seed``. Paths are relative to the table's folder.

    Raises:
        UserError: if it cannot be read, a column or file is missing, or an emotion is none of the nine.
    """
    path = Path(path)
    rows = _rows(path, ("generated", "real"))
    pairs = []
    for row in rows:
        generated, real = path.parent / row["generated"], path.parent / row["real"]
        emotion = row.get("emotion") or ""
        pairs.append(
            Pair(
                row.get("name") or generated.stem,
                generated,
                real,
                _known(emotion, path) if emotion else emotion_of(generated.stem),
                path.parent / row["source"] if row.get("source") else None,
                int(row["seed"]) if (row.get("seed") or "").isdigit() else None,
            )
        )
    files = {file for pair in pairs for file in (pair.generated, pair.real, pair.source) if file is not None}
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise UserError(f"{path} names files that do not exist: {_listed(missing)}; correct the table")
    return pairs


def read_method(text: str, real: Path | None, labels: dict[str, str] | None = None, shared: bool = False) -> Method:
    """A row from ``NAME=FOLDER`` or ``NAME=TABLE.csv``.

    Arguments:
        text: what was given.
        real: folder of the real videos, for folders.
        labels: see :func:`read_folders`.
        shared: leave out videos without a partner instead of raising.
    """
    name, sign, place = text.partition("=")
    if not sign or not name or not place:
        raise UserError(
            f"--method {text!r} is not NAME=FOLDER or NAME=TABLE.csv; for instance --method ours=out/animate"
        )
    path = Path(place)
    if path.suffix.lower() == ".csv":
        return Method(name, tuple(read_table(path)))
    if real is None:
        raise UserError(f"--method {text}: a folder needs --real FOLDER with the real videos of the same names")
    if shared:
        return Method(name, tuple(_match(path, real, labels)[0]))
    return Method(name, tuple(read_folders(path, real, labels)))


def common(methods: Iterable[Method]) -> list[Method]:
    """The methods with the names that all of them have.

    Raises:
        UserError: if there is none.
    """
    methods = list(methods)
    shared = set.intersection(*({pair.name for pair in method.pairs} for method in methods)) if methods else set()
    if not shared:
        raise UserError("the methods have no name in common; check the folders")
    return [replace(m, pairs=tuple(pair for pair in m.pairs if pair.name in shared)) for m in methods]


def read_labels(path: str | Path) -> dict[str, str]:
    """Emotions from a table with the columns ``name`` and ``emotion``."""
    path = Path(path)
    rows = _rows(path, ("name", "emotion"))
    return {Path(row["name"]).name: _known(row["emotion"], path) for row in rows if row["emotion"]}


def emotion_of(name: str) -> str | None:
    """The emotion that a name spells (``M003#angry#level_1#001`` is angry), or None; other programs' spellings too."""
    found = [_SPELLINGS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPELLINGS]
    return found[-1] if found else None


def _known(emotion: str, path: Path) -> str:
    known = _SPELLINGS.get(emotion.strip().lower())
    if known is None:
        raise UserError(f"{path}: unknown emotion {emotion!r}; use one of {', '.join(EMOTIONS)}")
    return known


def _rows(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a table that has some columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"table {path} cannot be read ({reason}); give a .csv with {', '.join(needed)}") from error
    missing = [column for column in needed if not rows or rows[0].get(column) is None]
    if missing:
        problem = f"lacks the columns {', '.join(missing)}" if rows else "holds no row"
        raise UserError(f"table {path} {problem}; it needs {', '.join(needed)}")
    return rows


def _listed(names: Iterable[str]) -> str:
    """The first names of a list and how many there are."""
    names = list(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest
