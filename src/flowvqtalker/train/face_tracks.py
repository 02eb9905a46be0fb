"""Reading tracked faces for the stage ``face-model``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.crop import crop_box
from flowvqtalker.face.geometry import Floats

__all__ = ["Track", "read_tracks"]

# Vertices beside the ears, left and right in the image.
_SIDES = (234, 454)


@dataclass(frozen=True)
class Track:
    """Some frames of a clip (or the one frame of an image) of one person.

    Attributes:
        name: name of the tracked file.
        identity: name of the person.
        source: name of the collection.
        landmarks: (T, 478, 3) float32 in pixels of the crop.
        blendshapes: (T, 52) float32.
        frames: (T,) numbers of the frames in the clip.
        is_image: whether it is a single image.
        split: ``train`` or ``val``.
    """

    name: str
    identity: str
    source: str
    landmarks: Floats
    blendshapes: Floats
    frames: npt.NDArray[np.int64]
    is_image: bool
    split: str


@dataclass(frozen=True)
class _Row:
    name: str
    identity: str
    source: str
    split: str


def read_tracks(
    folders: Sequence[Path], tables: Sequence[Path], *, frames: int = 48, clips: int = 150, max_yaw: float = 35.0
) -> list[Track]:
    """Read frames of tracked clips and images.

    A folder holds one ``NAME.npz`` per clip or image, as ``flowvqtalker track --landmarks-only`` and ``flowvqtalker
    prepare`` write it: ``landmarks`` (T, 478, 3) in pixels of the input and ``blendshapes`` (T, 52), or ``lm`` and
    ``bs``. NAME is the tracked file's name, with or without its ending and a prefix ``clip_`` or ``pic_``. Files that
    no table names are skipped. Each identity that ends with ``unknown`` counts as a person of its own in the training
    split, because it may be anybody.

    Arguments:
        folders: folders with .npz files.
        tables: CSV files with the columns ``file``, ``identity`` and ``source``.
        frames: frames per clip, as evenly spread pairs of neighbours.
        clips: clips per source, evenly spread, so that large sources do not drown small ones; all images are read.
        max_yaw: frames turned further (degrees) are left out.

    Raises:
        UserError: if a table or a folder is missing, or nothing matches.
    """
    rows = _read_tables(tables)
    found: dict[str, list[tuple[Path, _Row]]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; give folders of .npz files as `flowvqtalker track` writes them")
        for path in sorted(folder.glob("*.npz")):
            row = rows.get(path.stem) or rows.get(path.stem.removeprefix("clip_").removeprefix("pic_"))
            if row is not None:
                found.setdefault(row.source, []).append((path, row))
    tracks: list[Track] = []
    for items in found.values():
        many = len(items) > clips and len(_load(items[0][0])[0]) > 1
        for path, row in [items[i] for i in _spread(len(items), clips)] if many else items:
            track = _read(path, row, frames, max_yaw)
            if track is not None:
                tracks.append(track)
    if not tracks:
        places = ", ".join(map(str, folders)), ", ".join(map(str, tables))
        raise UserError(f"no file in {places[0] or 'no folder'} is named in {places[1] or 'no table'} and shows a face")
    return tracks


def _read_tables(tables: Sequence[Path]) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for table in tables:
        if not table.is_file():
            raise UserError(f"no table {table}; give a CSV file with the columns file, identity, source")
        with table.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = {"file", "identity", "source"} - set(reader.fieldnames or ())
            if missing:
                raise UserError(f"{table} has no column {', '.join(sorted(missing))}; needed: file, identity, source")
            for line in reader:
                name, identity = line["file"], line["identity"]
                unknown = identity.endswith("unknown")
                split = "train" if unknown else split_of(identity)
                row = _Row(name, name if unknown else identity, line["source"], split)
                rows[name] = row
                rows.setdefault(Path(name).stem, row)
    return rows


def _load(path: Path) -> tuple[Floats, Floats]:
    with np.load(path) as file:
        for names in (("landmarks", "blendshapes"), ("lm", "bs")):
            if all(name in file for name in names):
                return file[names[0]].astype(np.float32), file[names[1]].astype(np.float32)
        raise UserError(f"{path} holds {', '.join(file.files)}; landmarks and blendshapes are needed, track it again")


def _spread(length: int, count: int) -> list[int]:
    return [int(i) for i in np.unique(np.linspace(0, length - 1, min(count, length)).round())]


def _pairs(usable: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """Up to ``count`` of the usable frames as pairs of neighbours; single frames if there are no neighbours."""
    first = np.flatnonzero(usable[:-1] & usable[1:])
    if len(first) == 0:
        return np.flatnonzero(usable)[_spread(int(usable.sum()), count)]
    first = first[_spread(len(first), max(1, count // 2))]
    return np.unique(np.concatenate([first, first + 1]))


def _read(path: Path, row: _Row, frames: int, max_yaw: float) -> Track | None:
    landmarks, blendshapes = _load(path)
    near, far = (landmarks[:, side] for side in _SIDES)
    yaw = np.degrees(np.arctan2(far[:, 2] - near[:, 2], far[:, 0] - near[:, 0]))
    usable = np.isfinite(landmarks).all((1, 2)) & (np.abs(np.nan_to_num(yaw, nan=180.0)) < max_yaw)
    if not usable.any():
        return None
    chosen = _pairs(usable, frames)
    points = crop_box(landmarks).points(landmarks[chosen]).astype(np.float32)
    return Track(
        row.name, row.identity, row.source, points, blendshapes[chosen], chosen, len(landmarks) == 1, row.split
    )
