"""Files behind URLs (``s3://``, ``gs://``, ``https://`` ...), by fsspec: paths, local copies, uploads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.atomic import atomic_write

__all__ = ["glob_remote", "is_remote", "local_copy", "location", "uploaded", "write_file"]


def location(text: str) -> Path:
    """The path of a file name or of a URL. That of a URL is a :class:`upath.UPath`, which has the methods of a path.

    Raises:
        UserError: if the URL's scheme is unknown.
        MissingDependency: if the package that reads it is not installed.
    """
    if "://" not in text:
        return Path(text)
    if text.startswith("file://"):
        return Path(url2pathname(urlsplit(text).path))
    try:
        from upath import UPath

        path = UPath(text)
        path.fs  # noqa: B018  # loads the package that the scheme needs
    except ImportError as error:
        raise MissingDependency(
            f"{text} needs a package ({str(error).splitlines()[0]}); run `pip install 'flowvqtalker[ray]'`"
        ) from error
    except ValueError as error:
        raise UserError(f"{text} cannot be used ({error}); give a file, or a URL such as s3://bucket/name") from error
    return cast(Path, path)


def is_remote(path: Path) -> bool:
    """Whether a path that :func:`location` gave is a URL's."""
    return not isinstance(path, Path)


def _system(path: Path) -> tuple[Any, str]:
    """The file system of a URL, and the name in it."""
    remote = cast(Any, path)
    return remote.fs, remote.path


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the many clients raise into one kind of error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be reached ({reason}); check the URL and the credentials") from error


def glob_remote(pattern: Path) -> list[Path]:
    """The file of a URL, else those that match it as a pattern, in order."""
    with _readable(pattern):
        system, name = _system(pattern)
        names = [name] if system.isfile(name) else sorted(system.glob(name))
        return [location(system.unstrip_protocol(found)) for found in names if system.isfile(found)]


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file to read: the file itself, or of a URL a temporary copy.

    Raises:
        UserError: if the URL cannot be read.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="flowvqtalker-") as folder:
        copy = Path(folder) / path.name
        with _readable(path):
            system, name = _system(path)
            system.get_file(name, str(copy))
        yield copy


@contextlib.contextmanager
def uploaded(path: Path) -> Iterator[Path]:
    """A file to write: the file itself, or for a URL a temporary one, which is uploaded when the block ends without an
    error. Object stores show an uploaded file when it is complete."""
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="flowvqtalker-") as folder:
        yield Path(folder) / path.name
        with _readable(path):
            system, name = _system(path)
            system.makedirs(_system(path.parent)[1], exist_ok=True)
            system.put_file(str(Path(folder) / path.name), name)


def write_file(path: Path, text: str) -> None:
    """Write a small text file, which appears whole.

    Raises:
        UserError: if it cannot be written.
    """
    data = text.encode()
    with uploaded(path) as place:
        atomic_write(place, lambda temporary: temporary.write_bytes(data))
