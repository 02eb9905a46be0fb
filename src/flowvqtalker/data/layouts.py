"""How data sets lie on disk: which files are clips and images, of whom, with which emotion.

=============  ====================================================================================================
``tables``     ``clips.csv`` (file, source, identity, emotion, speech; files in ``clips/``) and ``faces.csv`` (file,
               source, identity; files in ``faces/``); either may be missing
``mead``       ``M003/video/front/angry/level_1/001.mp4``, sound in ``M003/audio/angry/level_1/001.m4a``
``hdtf``       the lists of HDTF (``RD_annotion_time.txt``, ``RD_crop_wh.txt``, ``RD_resolution.txt``), and videos
               of their names (``Radio1.mp4`` or ``RD_Radio1.mp4``) anywhere below; or clips that are cut already
``ravdess``    ``Actor_01/01-01-06-01-02-01-01.mp4``
``cremad``     ``VideoFlash/1001_DFA_ANG_XX.flv``
``ffhq``       ``images1024x1024/00000/00000.png``, each of another person
``celebv``     ``YOUTUBE-ID_0_1.mp4`` or images of such names, as CelebV-HQ and CelebV-Text have them
``folders``    all other videos and images; the identity is the name of the sub-folder, or else of the file
=============  ====================================================================================================
"""

from __future__ import annotations

import csv
import logging
import math
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.sources import Box, Source
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_folder

__all__ = ["LAYOUTS", "Catalogue", "catalogue", "hdtf_person", "unpack"]

logger = logging.getLogger(__name__)

_VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".m4v", ".flv"}
_IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
_SOUNDS = {".m4a", ".wav", ".mp3", ".flac", ".ogg", ".opus"}
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_VIEWS = "(?:front|down|top|left_30|left_60|right_30|right_60)"  # cameras of MEAD
_PIECE = 20.0  # longer stretches of a video become several clips of at most so many seconds


@dataclass
class Catalogue:
    """What is to be prepared, in a fixed order.

    Attributes:
        sources: the clips and images.
        left_out: name -> reason, of files that belong to the data set but are not used.
    """

    sources: list[Source] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tree:
    """Files below the folder of the data and of its unpacked archives.

    Attributes:
        data: the folder.
        files: name inside the folder, with ``/`` -> file, sorted.
        views: wanted cameras of MEAD.
    """

    data: Path
    files: dict[str, Path]
    views: tuple[str, ...]

    def matches(self, pattern: str, suffixes: set[str]) -> Iterator[tuple[re.Match[str], Path]]:
        """Files with one of the suffixes in whose names the pattern is found."""
        compiled = re.compile(pattern)
        for name, path in self.files.items():
            if path.suffix.lower() in suffixes and (found := compiled.search(name)):
                yield found, path


def catalogue(
    data: str | Path, layout: str = "auto", views: tuple[str, ...] = ("front",), unpacked: Path | None = None
) -> Catalogue:
    """Everything to prepare in a folder.

    Arguments:
        data: the folder.
        layout: one of :data:`LAYOUTS`, or ``auto``: the tables; without them every published layout whose names are
            found; without those any folder of videos.
        views: cameras of MEAD to take.
        unpacked: what :func:`unpack` made of the folder's archives.

    Raises:
        UserError: if nothing is found or a table lacks a column or names a missing file.
    """
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"no folder {data}; give one with clips.csv and clips/, or one with videos")
    if layout not in ("auto", *LAYOUTS):
        raise UserError(f"unknown layout {layout!r}; choose from auto, {', '.join(LAYOUTS)}")
    roots = [data] if unpacked is None or not unpacked.is_dir() else [data, unpacked]
    files = {path.relative_to(root).as_posix(): path for root in reversed(roots) for path in _files(root)}
    tree = _Tree(data, {name: files[name] for name in sorted(files)}, views)
    found, taken = Catalogue(), ""
    for name in LAYOUTS if layout == "auto" else (layout,):
        if taken == "tables" or (taken and name == "folders"):
            break
        more = LAYOUTS[name](tree)
        known = {source.path for source in found.sources}  # names of one data set can look like another's
        more.sources = [source for source in more.sources if source.path not in known]
        if more.sources:
            logger.info("layout %s: %d sources, %d left out", name, len(more.sources), len(more.left_out))
            found, taken = Catalogue(found.sources + more.sources, found.left_out | more.left_out), name
    if found.sources:
        unique = {source.key: source for source in reversed(found.sources)}  # an archive may lie beside its files
        found.sources = [source for source in found.sources if unique[source.key] is source]
        return found
    wanted = "with clips.csv and clips/, or with videos" if layout == "auto" else f"of the layout {layout}"
    raise UserError(f"no clips in {data}; give a folder {wanted} ({', '.join(sorted(_VIDEOS))})")


def _files(root: Path) -> Iterator[Path]:
    """Files below a folder, also behind links: data sets are often linked into one place."""
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (Path(folder, name) for name in names)


def _tables(tree: _Tree) -> Catalogue:
    return Catalogue([*_table(tree.data, "clips", is_image=False), *_table(tree.data, "faces", is_image=True)])


def _table(data: Path, kind: str, is_image: bool) -> list[Source]:
    table = data / f"{kind}.csv"
    if not table.is_file():
        return []
    with open(table, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    needed = ("file", "source", "identity") if is_image else ("file", "source", "identity", "emotion", "speech")
    missing = [column for column in needed if rows and column not in rows[0]]
    if missing:
        raise UserError(f"{table} lacks the columns {', '.join(missing)}")
    absent = [row["file"] for row in rows if not (data / kind / row["file"]).is_file()]
    if absent:
        raise UserError(f"{table} names {len(absent)} files that are not in {data / kind}, the first: {absent[0]}")
    return [
        Source(
            name=row["file"],
            path=data / kind / row["file"],
            collection=row["source"],
            identity=None if row["identity"].endswith("unknown") else row["identity"],
            emotion=_emotion(row.get("emotion")),
            speech=row.get("speech") == "yes",
            is_image=is_image,
        )
        for row in rows
    ]


def _emotion(name: str | None) -> int:
    return EMOTIONS.index(name) if name in EMOTIONS else -1


def _mead(tree: _Tree) -> Catalogue:
    take = r"(?P<who>[MW]\d{3})/(?:[^/]+/)*?%s(?P<take>[a-z]+/level_\d/\d+)\.\w+$"
    sounds = {(m["who"], m["take"]): path for m, path in tree.matches(take % "audio/", _SOUNDS)}
    found = Catalogue()
    for match, path in tree.matches(take % f"(?P<view>{_VIEWS})/", _VIDEOS):
        name = f"{match['who']}/{match['view']}/{match['take']}.mp4"
        if match["view"] not in tree.views:
            found.left_out[name] = "another view"
            continue
        emotion = _emotion(match["take"].partition("/")[0])
        sound = sounds.get((match["who"], match["take"]))
        found.sources.append(
            Source(name, path, "MEAD", f"MEAD_{match['who']}", emotion, True, False, sound=sound)
        )  # fmt: skip
    return found


def _hdtf(tree: _Tree) -> Catalogue:
    """Source: https://github.com/MRzzm/HDTF. Times are MM:SS-MM:SS; a crop is x, width, y, height at the resolution."""
    found = Catalogue()
    neutral = EMOTIONS.index("neutral")
    cut = r"(?:^|/)(?P<name>(?P<subset>RD|WDA|WRA)_(?P<video>[^/]+)_\d+)\.\w+$"
    for match, file in tree.matches(cut, _VIDEOS):
        person = hdtf_person(match["subset"], match["video"])
        found.sources.append(Source(f"{match['name']}.mp4", file, "HDTF", person, neutral, True, False))
    videos = {match["name"]: path for match, path in tree.matches(r"(?:^|/)(?P<name>[^/]+)\.\w+$", _VIDEOS)}
    for match, table in tree.matches(r"(?:^|/)(?P<subset>RD|WDA|WRA)_annotion_time\.txt$", {".txt"}):
        subset = match["subset"]
        crops = _hdtf_list(table.with_name(f"{subset}_crop_wh.txt"))
        heights = _hdtf_list(table.with_name(f"{subset}_resolution.txt"))
        for video, times in _hdtf_list(table).items():
            stem = video.rpartition(".")[0]
            path = videos.get(f"{subset}_{stem}") or videos.get(stem)
            for number, given in enumerate(times):
                name = f"{subset}_{stem}_{number:03d}"
                crop, height = crops.get(f"{stem}_{number}.mp4"), heights.get(video)
                if path is None:
                    found.left_out[name] = "no video"
                    continue
                try:
                    start, end = (60 * float(m) + float(s) for m, s in (t.split(":") for t in given.split("-")))
                    box = None
                    if crop is not None and height is not None:
                        box = Box(int(crop[0]), int(crop[2]), int(crop[1]), int(crop[3]), int(height[0]))
                except (ValueError, IndexError):
                    found.left_out[name] = f"unreadable time or crop: {given} {crop} {height}"
                    continue
                pieces = max(1, math.ceil((end - start) / _PIECE))
                step = (end - start) / pieces
                for k in range(pieces):
                    span = start + k * step, start + (k + 1) * step
                    clip, person = f"{name}_{k:02d}.mp4", hdtf_person(subset, stem)
                    found.sources.append(Source(clip, path, "HDTF", person, neutral, True, False, span=span, box=box))
    return found


def _hdtf_list(path: Path) -> dict[str, list[str]]:
    """First word of each line -> the others."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {words[0]: words[1:] for words in map(str.split, lines) if words}


def hdtf_person(subset: str, video: str) -> str:
    """Speaker of a video: RD numbers its speakers, WDA and WRA the videos of a speaker."""
    return video if subset == "RD" else video.rstrip("0123456789")


_RAVDESS = {"01": "neutral", "03": "happy", "04": "sad", "05": "angry", "06": "fear", "07": "disgusted"}
_RAVDESS |= {"08": "surprised"}  # 02, calm, is none of our classes


def _ravdess(tree: _Tree) -> Catalogue:
    """Source: https://zenodo.org/records/1188976: modality-channel-emotion-intensity-statement-repetition-actor."""
    found = Catalogue()
    for match, path in tree.matches(r"(?:^|/)(?P<name>\d\d(?:-\d\d){6})\.\w+$", _VIDEOS):
        modality, channel, emotion, *_, actor = match["name"].split("-")
        name = f"{match['name']}.mp4"
        if modality != "01":
            found.left_out[name] = "no sound; another file holds it with sound"
        elif channel != "01":
            found.left_out[name] = "song"
        else:
            found.sources.append(
                Source(name, path, "RAVDESS", f"ravdess_{actor}", _emotion(_RAVDESS.get(emotion)), True, False)
            )
    return found


_CREMA = {"ANG": "angry", "DIS": "disgusted", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"}


def _cremad(tree: _Tree) -> Catalogue:
    """Source: https://github.com/CheyneyComputerScience/CREMA-D."""
    pattern = r"(?:^|/)(?P<name>(?P<who>1\d{3})_[A-Z]{3}_(?P<emotion>[A-Z]{3})_(?:LO|MD|HI|XX?))\.\w+$"
    return Catalogue(
        [
            Source(f"{name}.mp4", path, "CREMA-D", f"crema_{who}", _emotion(_CREMA.get(emotion)), True, False)
            for match, path in tree.matches(pattern, _VIDEOS)
            for name, who, emotion in [match.group("name", "who", "emotion")]
        ]
    )  # fmt: skip


def _ffhq(tree: _Tree) -> Catalogue:
    pattern = r"(?:^|/)(?:images1024x1024/(?:\d{5}/)?|\d{5}/)(?P<name>\d{5})\.\w+$"
    return Catalogue(
        [
            Source(f"{m['name']}.png", path, "FFHQ", f"ffhq_{m['name']}", -1, False, True)
            for m, path in tree.matches(pattern, _IMAGES)
        ]
    )


def _celebv(tree: _Tree) -> Catalogue:
    pattern = r"(?:^|/)(?P<name>(?P<who>[\w-]{11})(?:_\d+){1,2}\.\w+)$"
    sources = []
    for match, path in tree.matches(pattern, _VIDEOS | _IMAGES):
        image = path.suffix.lower() in _IMAGES
        sources.append(Source(match["name"], path, "CelebV", f"celebv_{match['who']}", -1, not image, image))
    return Catalogue(sources)


def _folders(tree: _Tree) -> Catalogue:
    sources = []
    for match, path in tree.matches(r"^(?P<name>(?:(?P<who>[^/]+)/)?.*)$", _VIDEOS | _IMAGES):
        image = path.suffix.lower() in _IMAGES
        sources.append(Source(match["name"], path, tree.data.name, match["who"] or path.stem, -1, not image, image))
    return Catalogue(sources)


#: Layout -> what finds its files, in the order in which ``auto`` tries them.
LAYOUTS: dict[str, Callable[[_Tree], Catalogue]] = {
    "tables": _tables,
    "mead": _mead,
    "hdtf": _hdtf,
    "ravdess": _ravdess,
    "cremad": _cremad,
    "ffhq": _ffhq,
    "celebv": _celebv,
    "folders": _folders,
}


def unpack(data: Path, target: Path, views: tuple[str, ...] = ("front",)) -> None:
    """Unpack the tar and zip archives below a folder, each once; only media, and of MEAD only the wanted views.

    Raises:
        UserError: if an archive is broken.
    """
    unwanted = re.compile(rf"/(?!(?:{'|'.join(views)})/){_VIEWS}/")
    used = _VIDEOS | _IMAGES | _SOUNDS | {".txt", ".csv"}

    def wanted(name: str) -> bool:
        return Path(name).suffix.lower() in used and not unwanted.search(f"/{name}")

    for archive in sorted(path for path in data.rglob("*") if path.name.lower().endswith(_ARCHIVES)):
        name = archive.relative_to(data).as_posix()
        inside = target / re.sub(r"\.(tar\.gz|\w+)$", "", name, flags=re.IGNORECASE)
        if inside.exists():
            continue
        logger.info("unpacking %s", name)
        try:
            with atomic_folder(inside) as folder, open(archive, "rb") as stream:
                _extract(stream, folder, wanted)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"archive {archive} cannot be read ({error}); download it again") from error


def _extract(stream: IO[bytes], folder: Path, wanted: Callable[[str], bool]) -> None:
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as packed:
            packed.extractall(folder, [name for name in packed.namelist() if wanted(name)])
        return
    stream.seek(0)
    with tarfile.open(fileobj=stream) as bundle:
        bundle.extractall(folder, [m for m in bundle if m.isfile() and wanted(m.name)], filter="data")
