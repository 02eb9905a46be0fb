"""Output files that appear whole or not at all: written under another name, then renamed.

Where Linux allows it, a file has no name until it is complete, so that even a killed process leaves nothing behind.
Elsewhere it grows as ``.XXXXXXXX.part`` beside its place, and what killed processes left is removed by later ones.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from flowvqtalker.errors import UserError

__all__ = [
    "VIDEO_SUFFIXES",
    "atomic_folder",
    "atomic_path",
    "atomic_write",
    "check_not_input",
    "check_output",
    "sample_paths",
]

#: Suffixes of the videos that :class:`flowvqtalker.io.video.VideoWriter` writes.
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
_ABANDONED = 3600.0  # seconds after which a half-written file must come from a killed process


def check_output(path: str | Path, suffixes: tuple[str, ...] = VIDEO_SUFFIXES) -> Path:
    """Check that a file can be written, before any work is done.

    Raises:
        UserError: if the suffix is unknown, the folder is missing or not writable, or the path is a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"output {path}: the name must end in one of {', '.join(suffixes)}")
    try:
        if path.is_dir():
            raise UserError(f"output {path} is a folder; give a file name")
        if not path.parent.is_dir():
            raise UserError(f"output {path} cannot be written: there is no folder {path.parent}; create it first")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"output {path} cannot be written: permission denied; choose another folder")
    except UserError:
        raise
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"output {path} cannot be written: {reason}; choose another name") from error
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; its file takes the place of ``path`` when the block ends without an error.

    The temporary path may have no suffix: writers must be told the format. A symbolic link stays; the file that it
    points to is replaced.
    """
    target = Path(os.path.realpath(path))
    descriptor = _unnamed(target.parent)
    if descriptor is not None:
        try:
            yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
            _give_name(descriptor, target)
        finally:
            os.close(descriptor)
        return
    for left in target.parent.glob(".????????.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    named = target.with_name(f".{uuid.uuid4().hex[:8]}.part")  # no longer than any name may be
    try:
        yield named
        os.replace(named, target)
    finally:
        named.unlink(missing_ok=True)


def _give_name(descriptor: int, target: Path) -> None:
    """Name an unnamed file. To replace one takes a second name for a moment; whoever is killed then leaves it."""
    # The descriptor as folder is of no use for an absolute path, but Python follows the link only with one.
    link = functools.partial(os.link, f"/proc/self/fd/{descriptor}", src_dir_fd=descriptor)
    with contextlib.suppress(FileExistsError):
        link(target)
        return
    import fcntl

    folder = os.open(target.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a network's file system may have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # so that what has this name now was left by a killed process
        named = target.with_name(".flowvqtalker.part")
        named.unlink(missing_ok=True)
        link(named)
        os.replace(named, target)
    finally:
        os.close(folder)


def _unnamed(folder: Path) -> int | None:
    """A new file without a name in a folder, as a descriptor; None where the system has no such files."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError:  # the file system has none, or the folder cannot be written to: a named file tells
        return None


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Write a file by ``write(temporary path)``, see :func:`atomic_path`.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            write(temporary)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"output {path} cannot be written ({reason}); check the folder and the disk") from error


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder ``NAME.writing`` that replaces ``path`` when the block ends without an error.

    What a killed process left there is removed first; a folder that it had moved aside comes back.
    """
    path = Path(path)
    beside, old = path.with_name(path.name + ".writing"), path.with_name(path.name + ".old")
    if old.exists() and not path.exists():  # killed between the two renames below
        old.rename(path)
    for folder in (beside, old):
        shutil.rmtree(folder, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sample_paths(path: str | Path, num_samples: int) -> list[Path]:
    """Names of several samples: ``OUT_1.mp4`` to ``OUT_N.mp4``; of a single one, the name itself.

    Raises:
        UserError: for fewer than one sample, or more than a thousand.
    """
    if not 1 <= num_samples <= 1000:
        raise UserError(f"num_samples must be from 1 to 1000, got {num_samples}")
    path = Path(path) if isinstance(path, str) else path  # a path of a URL stays one
    return [path] if num_samples == 1 else [path.with_stem(f"{path.stem}_{k}") for k in range(1, num_samples + 1)]


def check_not_input(path: Path, *inputs: object) -> None:
    """Raise a :class:`UserError` if an output would overwrite one of the inputs."""
    for item in inputs:
        given = getattr(item, "path", item)  # of speech that was measured
        if isinstance(given, str | Path) and path.exists() and Path(given).exists() and os.path.samefile(path, given):
            raise UserError(f"output {path} is also an input; choose another name")
