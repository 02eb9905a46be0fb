"""The videos that a study compares: found, matched by name, checked, and labelled with the intended emotion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.io.video import MediaInfo, probe
from flowvqtalker_eval.tables.pairs import emotion_of, listed, named_paths, read_labels, videos_in

__all__ = ["REAL", "Source", "differences", "find_sources", "method_folders"]

#: Name of the real videos' column, as in the paper.
REAL = "GT"

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
    folders = named_paths(given, "method", "METHOD=FOLDER")
    if real is not None:
        if REAL.lower() in (known.lower() for known in folders):
            raise UserError(f"method {REAL!r} is the name of the real videos of --real; choose another name")
        folders[REAL] = real
    if not folders:
        raise UserError("no method was given; write METHOD=FOLDER, for instance ours=results/ours")
    return folders


def find_sources(
    folders: Mapping[str, Path], emotions: Path | None = None, only: Sequence[str] = (), speech: bool = True
) -> list[list[Source]]:
    """Match the videos of all methods by name.

    Arguments:
        folders: by method.
        emotions: csv with columns ``name`` and ``emotion``; None: the last emotion in the name counts
            (``M003_happy_12.mp4``).
        only: names to include; empty: all.
        speech: whether every video needs sound.

    Returns:
        sources by item (sorted by name) and method (in the given order).

    Raises:
        UserError: if a folder is empty, a name is missing from a method, an emotion is unknown, or a video has no
            sound.
    """
    found = {method: videos_in(folder) for method, folder in folders.items()}
    names = sorted(set().union(*found.values()))
    if only:
        if unknown := [name for name in only if name not in names]:
            raise UserError(
                f"no method has a video {listed(unknown)}; the names are {listed(names)}, without the ending"
            )
        names = sorted(set(only))
    missing = [f"{method} lacks {name}" for method, videos in found.items() for name in names if name not in videos]
    if missing:
        raise UserError(
            f"every method needs a video of every name, {listed(missing)}; add them, or name those to show with --only"
        )
    labels = {name: emotion_of(name) for name in names}
    if emotions is not None:  # by name with or without the ending
        given = read_labels(emotions)
        labels = {name: given.get(name) or given.get(path.name) for name, path in found[next(iter(found))].items()}
    unlabelled = [name for name in names if labels[name] is None]
    if unlabelled:
        raise UserError(
            f"the intended emotion of {listed(unlabelled)} is not known; put one of {', '.join(EMOTIONS)} into the "
            "names as a word, or give --emotions FILE, a csv with the columns name and emotion"
        )
    table = [
        [Source(method, name, str(labels[name]), own[name], probe(own[name])) for method, own in found.items()]
        for name in names
    ]
    sources = [source for row in table for source in row]
    for source in sources:
        if source.info.kind != "video":
            raise UserError(f"{source.path} is an image; a study compares videos")
    silent = [str(source.path) for source in sources if speech and not source.info.sound]
    if silent:
        raise UserError(f"no sound in {listed(silent)}; lip synchronisation needs it, or build with --speech no")
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
    return [f"the methods differ in {what}: {listed(where)}" for what, where in notes.items()]
