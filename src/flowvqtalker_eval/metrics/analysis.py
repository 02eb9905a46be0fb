"""A video analysed once: frames stream through extractors in batches into small arrays, which are kept on disk.

Metrics of pairs compare two analyses, so that a real clip is analysed once for any number of methods.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard, TypeVar, cast
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker.io.media import probe, read_video

__all__ = [
    "Analysis",
    "AnyExtractor",
    "Array",
    "ClipExtractor",
    "Extractor",
    "Settings",
    "StreamExtractor",
    "analyse",
    "cached",
    "read_wave",
]

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]
Settings = dict[str, str | float | int]

# Part of every key of the cache: a change here makes old files unread.
_VERSION = 1


class Extractor(Protocol):
    """Makes arrays out of frames, one row a frame. Stateless over clips; loads its model when it is first called."""

    name: str
    needs: tuple[str, ...]

    def settings(self) -> Settings:
        """What the numbers depend on (weights' sha256 too): printed with them, and part of the cache's key."""
        ...

    def __call__(self, frames: npt.NDArray[np.uint8], known: dict[str, Array]) -> dict[str, Array]:
        """Frames (n, H, W, 3) uint8 RGB at 25 fps and the arrays that it needs of them, to arrays of n rows."""
        ...


class ClipExtractor(Protocol):
    """Makes arrays of any shape out of the arrays of a whole clip and its sound."""

    name: str
    needs: tuple[str, ...]

    def settings(self) -> Settings:
        """See :meth:`Extractor.settings`."""
        ...

    def __call__(self, known: dict[str, Array], wave: npt.NDArray[np.float32] | None) -> dict[str, Array]:
        """Arrays of T rows and the sound, (S,) 16 kHz mono in [-1, 1] with sample 640 t at frame t (None: silent)."""
        ...


class StreamExtractor(Protocol):
    """As :class:`ClipExtractor`, but it also sees the frames, one after the other, in a decoding of its own."""

    name: str
    needs: tuple[str, ...]

    def settings(self) -> Settings:
        """See :meth:`Extractor.settings`."""
        ...

    def __call__(
        self, frames: Iterable[npt.NDArray[np.uint8]], known: dict[str, Array], wave: npt.NDArray[np.float32] | None
    ) -> dict[str, Array]:
        """Frames (H, W, 3) and what :class:`ClipExtractor` gets."""
        ...


AnyExtractor = Extractor | ClipExtractor | StreamExtractor
AnyT = TypeVar("AnyT", Extractor, ClipExtractor | StreamExtractor)


def _parameters(extractor: AnyExtractor) -> list[str]:
    return list(inspect.signature(extractor.__call__).parameters)


def _is_clip_level(extractor: AnyExtractor) -> TypeGuard[ClipExtractor | StreamExtractor]:
    """Whether an extractor wants whole clips: its last parameter is called ``wave``."""
    return _parameters(extractor)[-1] == "wave"


def _is_stream(extractor: ClipExtractor | StreamExtractor) -> TypeGuard[StreamExtractor]:
    """Whether it wants the frames as well: its first parameter is called ``frames``."""
    return _parameters(extractor)[0] == "frames"


@dataclass(frozen=True)
class Analysis:
    """What the extractors found in one video.

    Attributes:
        path: the video.
        frames: T, number of frames at 25 fps.
        size: width and height in pixels.
        fps: rate of the file itself.
        arrays: per-frame arrays have T rows.
        settings: those of each extractor, by its name.
    """

    path: Path
    frames: int
    size: tuple[int, int]
    fps: float
    arrays: dict[str, Array]
    settings: dict[str, Settings]


def analyse(
    path: str | Path, extractors: Sequence[AnyExtractor], cache: str | Path | None = None, batch: int = 16
) -> Analysis:
    """Run extractors over a video.

    It is decoded once, and not at all if the cache holds everything. Each extractor runs as soon as the arrays that it
    needs are there; those of whole clips run at the end.

    Arguments:
        path: the video, read at 25 fps.
        extractors: in any order.
        cache: folder of earlier results, one file for each video (its sha256) and extractor (its settings and those of
            the ones that it builds on); None keeps nothing.
        batch: frames at a time.

    Raises:
        UserError: if the video cannot be read, or an extractor needs an array that no other one gives.
    """
    return _Run(Path(path), extractors, cache, batch).run()


def cached(path: str | Path, extractors: Sequence[AnyExtractor], cache: str | Path) -> Analysis | None:
    """What :func:`analyse` would return, if the cache holds all of it; else None."""
    return _Run(Path(path), extractors, cache, 1).look()


@dataclass
class _Run:
    """One call of :func:`analyse`."""

    path: Path
    extractors: Sequence[AnyExtractor]
    cache: str | Path | None
    batch: int
    arrays: dict[str, Array] = field(default_factory=dict)
    providers: dict[str, str] = field(default_factory=dict)  # array -> key of the extractor that made it
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [e.name for e in self.extractors]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two extractors are called {', '.join(twice)}")
        if self.batch < 1:
            raise ValueError(f"a batch holds at least one frame, got {self.batch}")
        self.info = probe(self.path)
        if self.info.kind != "video":
            raise UserError(f"{self.path} is a picture; give a video")
        self.stored = _Store(self.cache, self.path)
        self.by_frame = [e for e in self.extractors if not _is_clip_level(e)]
        self.by_clip = [e for e in self.extractors if _is_clip_level(e)]

    def run(self) -> Analysis:
        """Everything, from the cache or anew."""
        frames = self._frame_count()
        pending = self._load_cached(self.by_frame)
        if pending or frames is None:
            frames = self._decode(pending)
        self._clips(self.by_clip, frames)
        return self._result(frames)

    def look(self) -> Analysis | None:
        """Everything from the cache, or None."""
        frames = self._frame_count()
        if frames is None or self._load_cached(self.by_frame) or self._load_cached(self.by_clip):
            return None
        return self._result(frames)

    def _result(self, frames: int) -> Analysis:
        size = self.info.width, self.info.height
        settings = {e.name: dict(e.settings()) for e in self.extractors}
        return Analysis(self.path, frames, size, self.info.fps, self.arrays, settings)

    def _frame_count(self) -> int | None:
        found = self.stored.load("video", "frames")
        return None if found is None else int(found["frames"])

    # ------------------------------------------------------------------------------------------------ frame by frame

    def _decode(self, pending: list[Extractor]) -> int:
        """Decode the video through the pending extractors; returns the number of frames."""
        parts: dict[str, dict[str, list[Array]]] = {}
        order: list[Extractor] = []
        total = 0
        for frames in _batches(self.path, self.batch):
            rows = slice(total, total + len(frames))
            known = {name: values[rows] for name, values in self.arrays.items()}

            def apply(
                extractor: Extractor, frames: npt.NDArray[np.uint8] = frames, known: dict[str, Array] = known
            ) -> None:
                found = extractor(frames, {name: known[name] for name in extractor.needs})
                for name, values in found.items():
                    if len(values) != len(frames):
                        raise ValueError(f"{extractor.name}: {name} has {len(values)} rows for {len(frames)} frames")
                    parts.setdefault(extractor.name, {}).setdefault(name, []).append(values)
                known.update(found)

            for extractor in order:
                apply(extractor)
            while pending:  # the first batch shows which extractor gives what, and so their order
                extractor = self._next(pending, known)
                pending.remove(extractor)
                if self._try_cache(extractor):  # the key of what it builds on may have been unknown before
                    known.update({name: values[rows] for name, values in self.arrays.items()})
                    continue
                apply(extractor)
                self._provided(extractor, parts.setdefault(extractor.name, {}))
                order.append(extractor)
            total += len(frames)
        for extractor in order:
            whole = {name: np.concatenate(pieces) for name, pieces in parts.pop(extractor.name).items()}
            self.arrays.update(whole)
            self.stored.save(extractor.name, self.keys[extractor.name], whole)
        self.stored.save("video", "frames", {"frames": np.array(total)})
        return total

    # ---------------------------------------------------------------------------------------------------- whole clips

    def _clips(self, pending: list[ClipExtractor | StreamExtractor], frames: int) -> None:
        pending = self._load_cached(pending)
        if not pending:
            return
        wave = read_wave(self.path, frames)
        while pending:
            extractor = self._next(pending, self.arrays)
            pending.remove(extractor)
            known = {name: self.arrays[name] for name in extractor.needs}
            if _is_stream(extractor):
                found = extractor(read_video(self.path), known, wave)
            else:
                found = cast(ClipExtractor, extractor)(known, wave)
            self._provided(extractor, found)
            self.arrays.update(found)
            self.stored.save(extractor.name, self.keys[extractor.name], found)
            pending = self._load_cached(pending)

    # -------------------------------------------------------------------------------------------------------- caching

    def _load_cached(self, extractors: list[Any]) -> list[Any]:
        """Take what the cache holds, dependants after what they need; returns the others."""
        pending, progress = list(extractors), True
        while progress:
            progress = False
            for extractor in list(pending):
                if self._try_cache(extractor):
                    pending.remove(extractor)
                    progress = True
        return pending

    def _try_cache(self, extractor: AnyExtractor) -> bool:
        if not set(extractor.needs) <= set(self.providers):
            return False
        found = self.stored.load(extractor.name, self._key(extractor))
        if found is None:
            return False
        self._provided(extractor, found)
        self.arrays.update(found)
        return True

    def _provided(self, extractor: AnyExtractor, found: Iterable[str]) -> None:
        key = self.keys[extractor.name] = self._key(extractor)
        for name in found:
            if self.providers.get(name, key) != key:
                raise ValueError(f"extractor {extractor.name} makes the array {name} again")
            self.providers[name] = key

    def _key(self, extractor: AnyExtractor) -> str:
        """Hash of an extractor's settings and of the keys of what it builds on."""
        base = [self.providers.get(name, "") for name in extractor.needs]
        text = json.dumps([_VERSION, extractor.name, extractor.settings(), base], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _next(self, waiting: Sequence[AnyT], known: dict[str, Array]) -> AnyT:
        """The first extractor whose needs are there."""
        for extractor in waiting:
            if set(extractor.needs) <= set(known):
                return extractor
        lacking = "; ".join(f"{e.name} needs {', '.join(sorted(set(e.needs) - set(known)))}" for e in waiting)
        raise UserError(f"{self.path} cannot be analysed: {lacking}, which no other extractor gives; add it")


class _Store:
    """Results on disk: ``FOLDER/<sha256 of the video>/NAME-KEY.npz``."""

    def __init__(self, folder: str | Path | None, video: Path) -> None:
        self.folder: Path | None = None
        if folder is not None:
            digest = hashlib.sha256()
            with open(video, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            self.folder = Path(folder) / digest.hexdigest()[:32]

    def load(self, name: str, key: str) -> dict[str, Array] | None:
        """The arrays, or None where there are none (or a damaged file, which is made again)."""
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
        """Write the arrays; the file appears whole or not at all."""
        if self.folder is None:
            return
        temporary = self.folder / f".{name}.{uuid.uuid4().hex[:8]}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **cast(Any, arrays))
            os.replace(temporary, self.folder / f"{name}-{key}.npz")
        except OSError as error:
            raise UserError(
                f"the cache {self.folder} cannot be written ({error.strerror}); check the folder and the disk"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _batches(path: Path, size: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames (n, H, W, 3) of a video, ``size`` at a time."""
    held: list[npt.NDArray[np.uint8]] = []
    for frame in read_video(path):
        held.append(frame)
        if len(held) == size:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)


def read_wave(path: str | Path, frames: int) -> npt.NDArray[np.float32] | None:
    """Sound of a video, cut or padded to its frames: sample 640 t belongs to the start of frame t.

    Arguments:
        path: the video.
        frames: T, at 25 fps.

    Returns:
        (640 T,) float32 in [-1, 1], 16 kHz mono; None if there is no sound or it cannot be decoded.
    """
    import av

    from flowvqtalker.data.clips import read_audio, read_timing

    try:
        found = read_audio(path, read_timing(path).start, frames)
    except (av.FFmpegError, OSError, UserError) as error:
        logger.warning("%s: its sound cannot be read (%s)", path, getattr(error, "strerror", None) or error)
        return None
    return None if found is None else (found.astype(np.float32) / np.float32(32768))
