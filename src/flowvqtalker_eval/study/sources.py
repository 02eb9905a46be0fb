"""The videos that a study compares: found, matched by name, checked, and labelled with the intended emotion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.io.video import MediaInfo, probe

__all__ = ["REAL", "Source", "differences", "find_sources", "method_folders"]

#: Name of the real videos' column, as in the paper.
REAL = "GT"

_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
_SHOWN = 5  # names that an error lists
_LENGTH_TOLERANCE = 0.1  # seconds


@dataclass(frozen=True)
class Source:
    """One video of one method."""

    method: str
    item: str
    emotion: str
    path: Path
    info: MediaInfo


def method_folders(given: Sequence[str], real: Path | None) -> dict[str, Path]:
    """``METHOD=FOLDER`` arguments as a mapping, the real videos last.

    Raises:
        UserError: if one is malformed, a name comes twice, or a folder does not exist.
    """
    folders: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        name = name.strip()
        if not equals or not name or not folder:
            raise UserError(f"method {text!r} is not METHOD=FOLDER; write for instance EAT=results/eat")
        if name.lower() in (known.lower() for known in folders):
            raise UserError(f"method {name!r} was given twice; give every method one name and one folder")
        folders[name] = Path(folder).expanduser()
    if real is not None:
        if REAL.lower() in (known.lower() for known in folders):
            raise UserError(f"method {REAL!r} is the name of the real videos of --real; choose another name")
        folders[REAL] = real
    if not folders:
        raise UserError("no method was given; write METHOD=FOLDER, for instance ours=results/ours")
    for name, path in folders.items():
        if not path.is_dir():
            raise UserError(f"folder {path} of {name} does not exist; check the name")
    return folders


def find_sources(
    folders: Mapping[str, Path], emotions: Path | None = None, only: Sequence[str] = (), speech: bool = True
) -> list[list[Source]]:
    """Match the videos of all methods by name.

    Arguments:
        folders: by method.
        emotions: csv with columns ``name`` and ``emotion``; None: the emotion is a word of the name
            (``M003_happy_12.mp4``).
        only: names to include; empty: all.
        speech: whether every video needs sound.

    Returns:
        sources by item (sorted by name) and method (in the given order).

    Raises:
        UserError: if a folder is empty, a name is missing from a method, an emotion is unknown, or a video has no
            sound.
    """
    found = {method: _videos(method, folder) for method, folder in folders.items()}
    names = sorted(set().union(*found.values()))
    if only:
        unknown = [name for name in only if name not in names]
        if unknown:
            raise UserError(f"no method has a video {_some(unknown)}; the names are {_some(names)}, without the ending")
        names = sorted(set(only))
    missing = [f"{method} lacks {name}" for method, videos in found.items() for name in names if name not in videos]
    if missing:
        raise UserError(
            f"every method needs a video of every name, {_some(missing)}; add them, or name those to show with --only"
        )
    labels = _read_emotions(emotions) if emotions is not None else {name: _emotion_of(name) for name in names}
    unlabelled = [name for name in names if not labels.get(name)]
    if unlabelled:
        raise UserError(
            f"the intended emotion of {_some(unlabelled)} is not known; put one of {', '.join(EMOTIONS)} into the "
            "names as a word, or give --emotions FILE, a csv with the columns name and emotion"
        )
    table = [
        [Source(method, name, labels[name], own[name], probe(own[name])) for method, own in found.items()]
        for name in names
    ]
    sources = [source for row in table for source in row]
    for source in sources:
        if source.info.kind != "video":
            raise UserError(f"{source.path} is an image; a study compares videos")
    silent = [str(source.path) for source in sources if speech and not source.info.sound]
    if silent:
        raise UserError(f"no sound in {_some(silent)}; lip synchronisation needs it, or build with --speech no")
    return table


def differences(table: Sequence[Sequence[Source]]) -> list[str]:
    """What else than the method distinguishes the videos of an item, one line each; a fair comparison has none."""
    notes: dict[str, list[str]] = {}
    for row in table:
        infos = [source.info for source in row]
        lengths = [info.seconds for info in infos]
        sizes = sorted({f"{info.width}x{info.height}" for info in infos})
        rates = sorted({round(info.fps, 2) for info in infos})
        spread = max(lengths) - min(lengths) > _LENGTH_TOLERANCE
        for what, differs, detail in (
            ("length", spread, f" ({min(lengths):.1f}-{max(lengths):.1f} s)"),
            ("aspect ratio", len({info.width / info.height for info in infos}) > 1, f" ({', '.join(sizes)})"),
            ("frames per second", len(rates) > 1, f" ({', '.join(map(str, rates))})"),
            ("having sound", len({info.sound for info in infos}) > 1, ""),
        ):
            if differs:
                notes.setdefault(what, []).append(row[0].item + detail)
    return [f"the methods differ in {what}: {_some(where)}" for what, where in notes.items()]


def _videos(method: str, folder: Path) -> dict[str, Path]:
    result: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in result:
            raise UserError(f"{method} has {result[path.stem].name} and {path.name} in {folder}; keep one of them")
        result[path.stem] = path
    if not result:
        raise UserError(f"no video in {folder} of {method}; the names end in one of {', '.join(_SUFFIXES)}")
    return result


def _emotion_of(name: str) -> str:
    """The emotion that stands in a name as a word; empty if there is none or more than one."""
    words = set(re.split(r"[^a-z]+", name.lower())) & set(EMOTIONS)
    return words.pop() if len(words) == 1 else ""


def _read_emotions(path: Path) -> dict[str, str]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a csv with the columns name and emotion") from error
    if not {"name", "emotion"} <= set(table.columns):
        raise UserError(f"{path} needs the columns name and emotion, it has {', '.join(table.columns)}")
    labels = {}
    for name, emotion in zip(table.name.str.strip(), table.emotion.str.strip().str.lower(), strict=True):
        if emotion not in EMOTIONS:
            raise UserError(f"{path}: {emotion!r} of {name!r} is no emotion; choose one of {', '.join(EMOTIONS)}")
        labels[Path(name).stem if Path(name).suffix.lower() in _SUFFIXES else name] = emotion
    return labels


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
