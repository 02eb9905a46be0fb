"""Which generated video belongs to which real one: by name in two folders, or by a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError

__all__ = [
    "VIDEO_SUFFIXES",
    "Method",
    "Pair",
    "common",
    "emotion_of",
    "listed",
    "named_paths",
    "read_folders",
    "read_labels",
    "read_method",
    "read_rows",
    "read_table",
    "videos_in",
]

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm", ".mpg")

_SEED = re.compile(r"(?:#|_)seed_?(\d+)$")
# Spellings of the emotions in other datasets and programs.
_SPELLINGS = {
    **{name: name for name in EMOTIONS},
    **{"anger": "angry", "disgust": "disgusted", "contemptuous": "contempt", "fearful": "fear", "happiness": "happy"},
    **{"sadness": "sad", "surprise": "surprised"},
}


@dataclass(frozen=True)
class Pair:
    """A generated video and the real one to compare it with.

    Attributes:
        name: of the pair; samples of one item with several seeds share it.
        generated, real: the videos.
        emotion: the requested emotion; None if unknown.
        source: the portrait that was animated, for identity; None if unknown.
        seed: for diversity over seeds; None if the file's name has none.
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


def named_paths(given: Iterable[str], option: str, form: str = "NAME=PATH") -> dict[str, Path]:
    """Parse the NAME=PATH arguments of an option that may be repeated.

    Raises:
        UserError: if one has another form, a name comes twice (in whatever case), or a path does not exist.
    """
    found: dict[str, Path] = {}
    for text in given:
        name, equals, place = text.partition("=")
        path = Path(place).expanduser()
        if not (name.strip() and equals and place):
            raise UserError(f"{option} {text!r} is not {form}; write for instance ours=out/animate")
        if name.strip().lower() in (known.lower() for known in found):
            raise UserError(f"{option} {name!r} is given twice; use each name once")
        if not path.exists():
            raise UserError(f"{option} {name}: {path} does not exist; check the path")
        found[name.strip()] = path
    return found


def videos_in(folder: Path) -> dict[str, Path]:
    """The videos of a folder by their names without suffix."""
    if not folder.is_dir():
        problem = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"folder {folder} {problem}; give a folder of videos")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{folder} holds both {found[path.stem].name} and {path.name}; remove one of them")
            found[path.stem] = path
    if not found:
        raise UserError(f"folder {folder} holds no video ({', '.join(VIDEO_SUFFIXES)}); give a folder of videos")
    return found


def read_folders(
    generated: str | Path, real: str | Path, labels: dict[str, str] | None = None, *, shared: bool = False
) -> list[Pair]:
    """Pair the videos of two folders by name.

    A generated video may carry its seed: ``NAME#seed3.mp4`` and ``NAME_seed3.mp4`` belong to ``NAME``.

    Arguments:
        generated, real: folders.
        labels: emotion by name; other names may spell it, see :func:`emotion_of`.
        shared: leave out videos without a partner instead of raising.

    Raises:
        UserError: if a folder holds no video, or the names differ (those without a partner are listed).
    """
    ours, theirs = videos_in(Path(generated)), videos_in(Path(real))
    pairs, unmatched = [], []
    for stem, path in ours.items():
        match = None if stem in theirs else _SEED.search(stem)
        name = stem[: match.start()] if match else stem
        if name in theirs:
            emotion = (labels or {}).get(name) or emotion_of(name)
            pairs.append(Pair(name, path, theirs[name], emotion, None, int(match[1]) if match else None))
        else:
            unmatched.append(path.name)
    missing = [theirs[name].name for name in sorted(set(theirs) - {pair.name for pair in pairs})]
    problems = [f"{listed(unmatched)} in {generated} without a real video"] if unmatched else []
    problems += [f"{listed(missing)} in {real} without a generated video"] if missing else []
    if problems and not shared:
        raise UserError(
            f"the names of generated and real videos differ: {'; '.join(problems)}; "
            "rename them, give a table of pairs (.csv), or compare the shared names only with --common"
        )
    return pairs


def read_table(path: str | Path) -> list[Pair]:
    """Pairs from a csv file with the columns ``generated`` and ``real``, and optionally ``emotion``, ``source`` (the
    portrait), ``name`` and ``seed``. Paths are relative to the file's folder.

    Raises:
        UserError: if it cannot be read, a column or file is missing, or an emotion is unknown.
    """
    path = Path(path)
    pairs = []
    for row in read_rows(path, ("generated", "real")):
        generated, source, seed = path.parent / row["generated"], row.get("source"), row.get("seed", "")
        pairs.append(
            Pair(
                row.get("name") or generated.stem,
                generated,
                path.parent / row["real"],
                _known(row["emotion"], path) if row.get("emotion") else emotion_of(generated.stem),
                path.parent / source if source else None,
                int(seed) if seed.isdigit() else None,
            )
        )
    files = {file for pair in pairs for file in (pair.generated, pair.real, pair.source) if file is not None}
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise UserError(f"{path} names files that do not exist: {listed(missing)}; correct the table")
    return pairs


def read_method(text: str, real: Path | None, labels: dict[str, str] | None = None, shared: bool = False) -> Method:
    """A row from ``NAME=FOLDER`` or ``NAME=TABLE.csv``.

    Arguments:
        text: the argument.
        real: folder of the real videos, for folders.
        labels, shared: see :func:`read_folders`.
    """
    ((name, path),) = named_paths([text], "--method", "NAME=FOLDER or NAME=TABLE.csv").items()
    if path.suffix.lower() == ".csv":
        return Method(name, tuple(read_table(path)))
    if real is None:
        raise UserError(f"--method {text}: a folder needs --real FOLDER with the real videos of the same names")
    return Method(name, tuple(read_folders(path, real, labels, shared=shared)))


def common(methods: Iterable[Method]) -> list[Method]:
    """The methods, restricted to the names that all of them have.

    Raises:
        UserError: if there is none.
    """
    methods = list(methods)
    shared = set.intersection(*({pair.name for pair in method.pairs} for method in methods)) if methods else set()
    if not shared:
        raise UserError("the methods have no name in common; check the folders")
    return [replace(m, pairs=tuple(pair for pair in m.pairs if pair.name in shared)) for m in methods]


def read_labels(path: str | Path) -> dict[str, str]:
    """Emotion by name, from a csv file with the columns ``name`` and ``emotion``."""
    path = Path(path)
    rows = read_rows(path, ("name", "emotion"))
    return {Path(row["name"]).name: _known(row["emotion"], path) for row in rows if row["emotion"]}


def emotion_of(name: str) -> str | None:
    """The emotion spelled in a name (``M003#angry#level_1#001`` is angry), or None."""
    found = [_SPELLINGS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPELLINGS]
    return found[-1] if found else None


def _known(emotion: str, path: Path) -> str:
    known = _SPELLINGS.get(emotion.strip().lower())
    if known is None:
        raise UserError(f"{path}: unknown emotion {emotion!r}; use one of {', '.join(EMOTIONS)}")
    return known


def read_rows(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a csv file as text; missing cells are empty.

    Raises:
        UserError: if it cannot be read, has no row, or lacks a required column.
    """
    needs = f"it needs {', '.join(required)}"
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig").fillna("")
    except pd.errors.EmptyDataError:
        raise UserError(f"table {path} holds no row; {needs}") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError) as error:
        reason = getattr(error, "strerror", None) or "not a valid csv file"
        raise UserError(f"table {path} cannot be read ({reason}); {needs}") from error
    missing = [column for column in required if column not in frame]
    if missing or frame.empty:
        problem = f"lacks the columns {', '.join(missing)}" if missing else "holds no row"
        raise UserError(f"table {path} {problem}; {needs}")
    return [{str(key): str(value) for key, value in row.items()} for row in frame.to_dict("records")]


def listed(names: list[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
