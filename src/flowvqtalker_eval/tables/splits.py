"""Splits to evaluate on: which clips of a dataset on disk, with their emotions."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.pairs import emotion_of

__all__ = ["BUILTIN", "Item", "load_split"]

#: Splits of the package.
BUILTIN = ("mead-test", "hdtf-test", "shared-val")

_VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".m4v"}
_SOUNDS = (".wav", ".m4a", ".mp3", ".flac", ".ogg")
_VIEWS = re.compile(r"(?<![a-z])(down|top|(?:left|right)_?\d\d)(?![a-z0-9])")
_SUBJECT = re.compile(r"(?<![A-Za-z0-9])([MW]\d{3})(?!\d)")
_LEVEL = re.compile(r"level_?(\d)")
_TAKE = re.compile(r"(?<![A-Za-z0-9])(\d{3})(?!\d)")


@dataclass(frozen=True)
class Item:
    """One clip to animate.

    Attributes:
        name: of the files that are made.
        clip: the real video.
        emotion: one of the nine, or None where unknown.
        voiced: whether the clip (or ``speech``) has the speech of its face.
        speech: file with the sound, if it is not the clip.
        portrait: picture to animate, if it is not the clip's first frame.
        seconds: how much of the clip is used; None is all.
    """

    name: str
    clip: Path
    emotion: str | None = None
    voiced: bool = True
    speech: Path | None = None
    portrait: Path | None = None
    seconds: float | None = None


def load_split(split: str, data: str | Path | None) -> list[Item]:
    """The items of a split, in a fixed order.

    Arguments:
        split: one of :data:`BUILTIN`, or a table (.csv) with the column ``clip`` and optionally ``name``, ``emotion``,
            ``voiced`` (yes or no), ``speech`` (a sound file), ``portrait`` (a picture) and ``seconds``.
        data: folder of the dataset; for a table None is the table's folder.

    Raises:
        UserError: if the split is unknown or broken, or no clip of it is there.
    """
    table = Path(split)
    if split not in BUILTIN and table.suffix.lower() != ".csv":
        raise UserError(
            f"unknown split {split!r}; choose one of {', '.join(BUILTIN)}, or give a .csv with a column clip"
        )
    if split in BUILTIN and data is None:
        raise UserError(f"--split {split} needs --data FOLDER, where the clips are")
    root = table.parent if data is None else Path(data)
    if not root.is_dir():
        raise UserError(f"no folder {root}; give the folder of the dataset with --data")
    if split not in BUILTIN:
        return _from_table(table, root)
    folder = files("flowvqtalker_eval") / "splits"
    if split == "shared-val":
        return _from_table(Path(str(folder / f"{split}.csv")), root)
    rules = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    items = (_mead if rules["layout"] == "mead" else _hdtf)(root, rules)
    if not items:
        raise UserError(f"{root} holds no clip of {split} ({_expected(rules)}); check --data")
    return items


def _expected(rules: dict[str, Any]) -> str:
    if rules["layout"] == "mead":
        return "M003/video/front/angry/level_1/001.mp4 or M003#angry#level_1#001.mp4"
    return f"{rules['videos'][0]}.mp4 or {rules['videos'][0]}#0.mp4"


def _mead(root: Path, rules: dict[str, Any]) -> list[Item]:
    """MEAD as its authors publish it (SUBJECT/video/front/EMOTION/level_L/NNN.mp4) or cut flat
    (SUBJECT#EMOTION#level_L#NNN.mp4, SUBJECT_front_EMOTION_levelL_NNN.mp4)."""
    items: dict[str, Item] = {}
    for path in _videos(root):
        text = path.relative_to(root).as_posix()
        subject, emotion = _SUBJECT.search(text), emotion_of(text)
        level, takes = _LEVEL.search(text), _TAKE.findall(path.stem)
        if not subject or subject[1] not in rules["subjects"] or emotion is None or not level or not takes:
            continue
        if _VIEWS.search(text.lower()):  # only the front is in the split
            continue
        name = f"{subject[1]}#{emotion}#level_{level[1]}#{takes[-1]}"
        if name in items:
            raise UserError(f"{path} and {items[name].clip} are the same clip {name}; give a folder with one of them")
        items[name] = Item(name, path, emotion, speech=_mead_sound(path, subject[1], emotion, level[1], takes[-1]))
    return [items[name] for name in sorted(items)]


def _mead_sound(path: Path, subject: str, emotion: str, level: str, take: str) -> Path | None:
    """MEAD's sound lies beside its video: SUBJECT/audio/EMOTION/level_L/NNN.m4a."""
    for parent in path.parents:
        if parent.name == subject:
            found = (parent / "audio" / emotion / f"level_{level}" / f"{take}{kind}" for kind in _SOUNDS)
            return next((file for file in found if file.is_file()), None)
    return None


def _hdtf(root: Path, rules: dict[str, Any]) -> list[Item]:
    """HDTF's videos by name, whole (their first seconds are used) or cut (VIDEO#3.mp4)."""
    wanted = set(rules["videos"])
    items = []
    for path in _videos(root):
        video, sign, _ = path.stem.partition("#")
        if video in wanted:
            items.append(Item(path.stem, path, "natural", seconds=None if sign else float(rules["seconds"])))
    return sorted(items, key=lambda item: item.name)


def _videos(root: Path) -> Iterable[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in _VIDEOS and not p.name.startswith("."))


def _from_table(table: Path, root: Path) -> list[Item]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"split {table} cannot be read ({reason}); give a .csv with a column clip") from error
    if not rows or not all(row.get("clip") for row in rows):
        raise UserError(f"split {table} has no clips; it needs the column clip with a file in each row")
    items, missing = [], []
    for row in rows:
        paths = {key: _find(root, row.get(key) or "") for key in ("clip", "speech", "portrait")}
        missing += [row[key] for key, path in paths.items() if row.get(key) and path is None]
        emotion = row.get("emotion") or None
        if emotion is not None and emotion not in EMOTIONS:
            raise UserError(
                f"{table}: unknown emotion {emotion!r}; use one of {', '.join(EMOTIONS)}, or leave it empty"
            )
        seconds = row.get("seconds") or ""
        if seconds and not re.fullmatch(r"\d+(\.\d+)?", seconds):
            raise UserError(f"{table}: seconds must be a number, got {seconds!r}")
        if paths["clip"] is not None:
            name = row.get("name") or Path(row["clip"]).stem
            voiced = (row.get("voiced") or "yes").lower() != "no"
            items.append(
                Item(
                    name,
                    paths["clip"],
                    emotion,
                    voiced,
                    paths["speech"],
                    paths["portrait"],
                    float(seconds) if seconds else None,
                )
            )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{root} lacks files of {table.name}: {', '.join(missing[:3])}{more}; check --data")
    _check_names(items, table)
    return items


def _find(root: Path, name: str) -> Path | None:
    """A file of a table: in the folder, or in its ``clips``."""
    found = (place / name for place in (root, root / "clips"))
    return next((path for path in found if name and path.is_file()), None)


def _check_names(items: Sequence[Item], table: Path) -> None:
    names = [item.name for item in items]
    for name in names:
        if names.count(name) > 1 or "/" in name or name.startswith("."):
            raise UserError(f"{table}: {name!r} cannot name a file (or names two); give each row its own name")
