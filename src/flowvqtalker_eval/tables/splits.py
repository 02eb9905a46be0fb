"""Splits to evaluate on: which clips of a dataset on disk, with their emotions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker_eval.tables.pairs import VIDEO_SUFFIXES, emotion_of, listed, read_rows

__all__ = ["BUILTIN", "Item", "load_split"]

#: Splits that come with the package.
BUILTIN = ("mead-test", "hdtf-test", "shared-val")

_AUDIO_SUFFIXES = (".wav", ".m4a", ".mp3", ".flac", ".ogg")
_VIEWS = re.compile(r"(?<![a-z])(down|top|(?:left|right)_?\d\d)(?![a-z0-9])")
_SUBJECT = re.compile(r"(?<![A-Za-z0-9])([MW]\d{3})(?!\d)")
_LEVEL = re.compile(r"level_?(\d)")
_NUMBER = re.compile(r"(?<![A-Za-z0-9])(\d{3})(?!\d)")


@dataclass(frozen=True)
class Item:
    """One clip to animate.

    Attributes:
        name: of the files to make.
        clip: the real video.
        emotion: one of the nine, or None if unknown.
        has_speech: whether the clip (or ``speech``) holds the speech of its face.
        speech: audio file, if the audio is not in the clip.
        portrait: image to animate, if not the clip's first frame.
        seconds: how much of the clip is used; None is all.
    """

    name: str
    clip: Path
    emotion: str | None = None
    has_speech: bool = True
    speech: Path | None = None
    portrait: Path | None = None
    seconds: float | None = None


def load_split(split: str, data: str | Path | None) -> list[Item]:
    """The items of a split, in a fixed order.

    Arguments:
        split: one of :data:`BUILTIN`, or a csv file with the column ``clip`` and optionally ``name``, ``emotion``,
            ``voiced`` (whether it holds speech: yes or no), ``speech`` (an audio file), ``portrait`` (an image) and
            ``seconds``.
        data: folder of the dataset; None is the folder of the csv file.

    Raises:
        UserError: if the split is unknown or broken, or a clip of it is missing.
    """
    table = Path(split)
    builtin = split in BUILTIN
    if not builtin and table.suffix.lower() != ".csv":
        raise UserError(
            f"unknown split {split!r}; choose one of {', '.join(BUILTIN)}, or give a .csv with a column clip"
        )
    if builtin and data is None:
        raise UserError(f"--split {split} needs --data FOLDER, where the clips are")
    root = table.parent if data is None else Path(data)
    if not root.is_dir():
        raise UserError(f"no folder {root}; give the folder of the dataset with --data")
    folder = Path(str(files("flowvqtalker_eval") / "splits"))
    if not builtin or split == "shared-val":
        return _from_table(folder / f"{split}.csv" if builtin else table, root)
    rules = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
    items = (_mead if rules["layout"] == "mead" else _hdtf)(root, rules)
    if not items:
        raise UserError(f"{root} holds no clip of {split} (for instance {rules['example']}); check --data")
    return items


def _mead(root: Path, rules: dict[str, Any]) -> list[Item]:
    """MEAD as published (SUBJECT/video/front/EMOTION/level_L/NNN.mp4) or flat (SUBJECT#EMOTION#level_L#NNN.mp4,
    SUBJECT_front_EMOTION_levelL_NNN.mp4)."""
    items: dict[str, Item] = {}
    for path in _videos(root):
        text = path.relative_to(root).as_posix()
        subject, emotion = _SUBJECT.search(text), emotion_of(text)
        level, numbers = _LEVEL.search(text), _NUMBER.findall(path.stem)
        if not subject or subject[1] not in rules["subjects"] or emotion is None or not level or not numbers:
            continue
        if _VIEWS.search(text.lower()):  # the split holds front views only
            continue
        name = f"{subject[1]}#{emotion}#level_{level[1]}#{numbers[-1]}"
        if name in items:
            raise UserError(f"{path} and {items[name].clip} are the same clip {name}; give a folder with one of them")
        speech = _mead_audio(path, subject[1], f"audio/{emotion}/level_{level[1]}/{numbers[-1]}")
        items[name] = Item(name, path, emotion, speech=speech)
    return [items[name] for name in sorted(items)]


def _mead_audio(path: Path, subject: str, stem: str) -> Path | None:
    """MEAD keeps the audio beside the video: SUBJECT/audio/EMOTION/level_L/NNN.m4a."""
    home = next((parent for parent in path.parents if parent.name == subject), None)
    found = () if home is None else (home / f"{stem}{suffix}" for suffix in _AUDIO_SUFFIXES)
    return next((file for file in found if file.is_file()), None)


def _hdtf(root: Path, rules: dict[str, Any]) -> list[Item]:
    """HDTF's videos by name, whole (their first seconds are used) or cut (VIDEO#3.mp4)."""
    items = []
    for path in _videos(root):
        video, sign, _ = path.stem.partition("#")
        if video in rules["videos"]:
            items.append(Item(path.stem, path, "natural", seconds=None if sign else float(rules["seconds"])))
    return sorted(items, key=lambda item: item.name)


def _videos(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith("."))


def _from_table(table: Path, root: Path) -> list[Item]:
    items, missing = [], []
    names: set[str] = set()
    for row in read_rows(table, ("clip",)):
        paths = {key: _find(root, row.get(key, "")) for key in ("clip", "speech", "portrait")}
        missing += [row[key] for key, path in paths.items() if row.get(key) and path is None]
        emotion, seconds = row.get("emotion") or None, row.get("seconds", "")
        if emotion is not None and emotion not in EMOTIONS:
            raise UserError(
                f"{table}: unknown emotion {emotion!r}; use one of {', '.join(EMOTIONS)}, or leave it empty"
            )
        if seconds and not re.fullmatch(r"\d+(\.\d+)?", seconds):
            raise UserError(f"{table}: seconds must be a number, got {seconds!r}")
        name = row.get("name") or Path(row["clip"]).stem
        if name in names or not name or "/" in name or name.startswith("."):
            raise UserError(f"{table}: {name!r} cannot name a file (or names two); give each row its own name")
        names.add(name)
        if paths["clip"] is not None:
            has_speech = row.get("voiced", "").lower() != "no"
            length = float(seconds) if seconds else None
            items.append(Item(name, paths["clip"], emotion, has_speech, paths["speech"], paths["portrait"], length))
    if missing:
        raise UserError(f"{root} lacks files of {table.name}: {listed(missing, 3)}; check --data")
    return items


def _find(root: Path, name: str) -> Path | None:
    """A file of a table, in the folder or in its ``clips``."""
    found = (place / name for place in (root, root / "clips"))
    return next((path for path in found if name and path.is_file()), None)
