"""Analyse a video once: frames stream through extractors into small arrays, which a cache keeps on disk.

Metrics compare two analyses, so a real clip is analysed once for any number of methods.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import islice
from pathlib import Path
from typing import Any, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.video import probe, read_video
from flowvqtalker.weights import sha256

__all__ = [
    "Analysis",
    "Array",
    "ClipExtractor",
    "Extractor",
    "FrameExtractor",
    "Frames",
    "Settings",
    "StreamExtractor",
    "Wave",
    "analyse",
    "cached",
    "read_wave",
]

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Frames = npt.NDArray[np.uint8]
Wave = npt.NDArray[np.float32]
Settings = dict[str, str | float | int]

# Part of every cache key. Increase it when stored results must not be read any more.
_VERSION = 2


class Extractor(ABC):
    """One step of an analysis. Subclass :class:`FrameExtractor`, :class:`ClipExtractor` or :class:`StreamExtractor`.

    An extractor keeps nothing from one clip to the next. It loads its model into ``_model`` on the first call; a model
    is not pickled, since many cannot travel between processes.

    Attributes:
        name: unique within an analysis.
        needs: arrays that it reads, which other extractors give.
        gives: arrays that it makes.
    """

    name: str
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...]
    _model: Any = None

    @abstractmethod
    def settings(self) -> Settings:
        """Everything the numbers depend on, hashes of weights included. Part of the cache key and of every table."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_model"}


class FrameExtractor(Extractor):
    """Makes arrays with one row per frame."""

    @abstractmethod
    def __call__(self, frames: Frames, known: dict[str, Array]) -> dict[str, Array]:
        """Frames (n, H, W, 3) uint8 RGB at 25 fps and n rows of each array in ``needs``, to arrays of n rows."""


class ClipExtractor(Extractor):
    """Makes arrays of any shape from the arrays of a whole clip and its sound."""

    @abstractmethod
    def __call__(self, known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        """Whole arrays and the sound: (640 T,) 16 kHz mono in [-1, 1], sample 640 t at frame t; None if silent."""


class StreamExtractor(Extractor):
    """A :class:`ClipExtractor` that also reads the frames one by one, in a decoding pass of its own."""

    @abstractmethod
    def __call__(self, frames: Iterable[Frames], known: dict[str, Array], wave: Wave | None) -> dict[str, Array]:
        """Frames (H, W, 3) one after the other, then what a :class:`ClipExtractor` gets."""


@dataclass(frozen=True)
class Analysis:
    """What the extractors found in one video.

    Attributes:
        path: the video.
        frames: T, number of frames at 25 fps.
        size: width and height in pixels.
        fps: frame rate of the file itself.
        arrays: per-frame arrays have T rows.
        settings: of each extractor, by its name.
    """

    path: Path
    frames: int
    size: tuple[int, int]
    fps: float
    arrays: dict[str, Array]
    settings: dict[str, Settings]


def analyse(
    path: str | Path, extractors: Sequence[Extractor], cache: str | Path | None = None, batch: int = 16
) -> Analysis:
    """Run extractors over a video, decoding it once, or not at all if the cache holds everything.

    Arguments:
        path: the video, read at 25 fps.
        extractors: in any order; each runs after those whose arrays it needs.
        cache: folder of earlier results; None keeps nothing. A result is found by the sha256 of the video, the
            extractor's settings, and the settings of the extractors it builds on.
        batch: frames at a time.

    Raises:
        UserError: if the video cannot be read, or an extractor needs an array that no other one gives.
    """
    if batch < 1:
        raise ValueError(f"a batch holds at least one frame, got {batch}")
    return _Run(Path(path), extractors, cache).run(batch)


def cached(path: str | Path, extractors: Sequence[Extractor], cache: str | Path) -> Analysis | None:
    """What :func:`analyse` would return if the cache holds all of it, else None."""
    run = _Run(Path(path), extractors, cache)
    return run.result() if not run.pending and run.frames is not None else None


class _Run:
    """One call of :func:`analyse`: what the cache holds is read at once, the rest is pending."""

    def __init__(self, path: Path, extractors: Sequence[Extractor], cache: str | Path | None) -> None:
        self.path, self.info = path, probe(path)
        if self.info.kind != "video":
            raise UserError(f"{path} is an image; give a video")
        self.store = _Store(cache, path)
        self.extractors = extractors
        self.arrays: dict[str, Array] = {}
        self.keys: dict[str, str] = {}
        self.pending: list[Extractor] = []
        for extractor, base in _in_order(path, extractors):
            below = [self.keys[name] for name in base]
            text = json.dumps([_VERSION, extractor.name, extractor.settings(), below], sort_keys=True)
            self.keys[extractor.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
            found = self.store.load(extractor.name, self.keys[extractor.name])
            if found is None:
                self.pending.append(extractor)
            else:
                self.arrays.update(found)
        count = self.store.load("video", "frames")
        self.frames = None if count is None else int(count["frames"])

    def run(self, batch: int) -> Analysis:
        """Make what is pending."""
        by_frame = [e for e in self.pending if isinstance(e, FrameExtractor)]
        if by_frame or self.frames is None:
            self._decode(by_frame, batch)
        by_clip = [e for e in self.pending if not isinstance(e, FrameExtractor)]
        if by_clip:
            self._clip(by_clip)
        return self.result()

    def result(self) -> Analysis:
        assert self.frames is not None
        size = self.info.width, self.info.height
        settings = {e.name: dict(e.settings()) for e in self.extractors}
        return Analysis(self.path, self.frames, size, self.info.fps, self.arrays, settings)

    def _decode(self, extractors: list[FrameExtractor], batch: int) -> None:
        parts: dict[str, list[Array]] = {name: [] for e in extractors for name in e.gives}
        self.frames = 0
        for frames in _batches(self.path, batch):
            rows = slice(self.frames, self.frames + len(frames))
            known = {name: values[rows] for name, values in self.arrays.items()}
            for extractor in extractors:
                found = extractor(frames, {name: known[name] for name in extractor.needs})
                _check_names(extractor, found)
                for name, values in found.items():
                    if len(values) != len(frames):
                        raise ValueError(f"{extractor.name}: {name} has {len(values)} rows for {len(frames)} frames")
                    parts[name].append(values)
                known.update(found)
            self.frames += len(frames)
        for extractor in extractors:
            self._keep(extractor, {name: np.concatenate(parts.pop(name)) for name in extractor.gives})
        self.store.save("video", "frames", {"frames": np.array(self.frames)})

    def _clip(self, extractors: list[Extractor]) -> None:
        assert self.frames is not None
        wave = read_wave(self.path, self.frames)
        for extractor in extractors:
            known = {name: self.arrays[name] for name in extractor.needs}
            if isinstance(extractor, StreamExtractor):
                found = extractor(read_video(self.path), known, wave)
            else:
                found = cast(ClipExtractor, extractor)(known, wave)
            _check_names(extractor, found)
            self._keep(extractor, found)

    def _keep(self, extractor: Extractor, found: dict[str, Array]) -> None:
        self.arrays.update(found)
        self.store.save(extractor.name, self.keys[extractor.name], found)


def _in_order(path: Path, extractors: Sequence[Extractor]) -> list[tuple[Extractor, list[str]]]:
    """Extractors, each after those whose arrays it needs (their names), frame extractors before the others."""
    makers = {name: extractor for extractor in extractors for name in extractor.gives}
    for names in ([e.name for e in extractors], [name for e in extractors for name in e.gives]):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two extractors are called or make {', '.join(twice)}")
    graph: dict[str, list[str]] = {}
    for extractor in extractors:
        late = isinstance(extractor, FrameExtractor)  # what whole clips give comes too late for frames
        usable = {name for name, maker in makers.items() if isinstance(maker, FrameExtractor) or not late}
        if lacking := sorted(set(extractor.needs) - usable):
            raise UserError(
                f"{path} cannot be analysed: {extractor.name} needs {', '.join(lacking)}, which no other extractor "
                "gives; add it"
            )
        graph[extractor.name] = [makers[name].name for name in extractor.needs]
    position = {name: number for number, name in enumerate(TopologicalSorter(graph).static_order())}
    order = sorted(extractors, key=lambda e: (not isinstance(e, FrameExtractor), position[e.name]))
    return [(extractor, graph[extractor.name]) for extractor in order]


def _check_names(extractor: Extractor, found: dict[str, Array]) -> None:
    if set(found) != set(extractor.gives):
        raise ValueError(f"{extractor.name} made {sorted(found)} instead of {sorted(extractor.gives)}")


class _Store:
    """Results on disk: ``FOLDER/<sha256 of the video>/NAME-KEY.npz``."""

    def __init__(self, folder: str | Path | None, video: Path) -> None:
        self.folder: Path | None = None
        if folder is not None:
            self.folder = Path(folder) / sha256(video)[:32]

    def load(self, name: str, key: str) -> dict[str, Array] | None:
        """The arrays; None if there are none, or the file is damaged and must be made again."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{name}-{key}.npz") as stored:
                return {array: stored[array] for array in stored.files}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            logger.warning("%s: damaged results of %s are made again (%s)", self.folder, name, error)
            return None

    def save(self, name: str, key: str, arrays: dict[str, Array]) -> None:
        """Write the arrays."""
        if self.folder is None:
            return

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez_compressed(file, **cast(Any, arrays))

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the cache {self.folder} cannot be made ({error.strerror}); choose another") from error
        atomic_write(self.folder / f"{name}-{key}.npz", write)


def _batches(path: Path, size: int) -> Iterator[Frames]:
    """Frames (n, H, W, 3) of a video, ``size`` at a time."""
    frames = read_video(path)
    while batch := list(islice(frames, size)):
        yield np.stack(batch)


def read_wave(path: str | Path, frames: int) -> Wave | None:
    """Sound of a video, cut or padded to its frames; None if there is none or it cannot be decoded.

    Arguments:
        path: the video.
        frames: T, at 25 fps.

    Returns:
        (640 T,) float32 in [-1, 1], 16 kHz mono; sample 640 t belongs to the start of frame t.
    """
    import av

    from flowvqtalker.data.sources import read_audio, read_timing

    try:
        found = read_audio(path, read_timing(path).start, frames)
    except (av.FFmpegError, OSError, UserError) as error:
        logger.warning("%s: its sound cannot be read (%s)", path, getattr(error, "strerror", None) or error)
        return None
    return None if found is None else (found.astype(np.float32) / np.float32(32768))
