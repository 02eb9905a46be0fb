"""What is installed, what is missing, and how to get it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flowvqtalker import weights
from flowvqtalker.errors import UserError

__all__ = ["SYSTEM_LIBRARIES", "Finding", "examine", "report"]

#: Shared libraries that the wheels of mediapipe and OpenCV link, and their Debian packages.
SYSTEM_LIBRARIES = {
    "libEGL.so.1": "libegl1",
    "libGLESv2.so.2": "libgles2",
    "libGL.so.1": "libgl1",
    "libglib-2.0.so.0": "libglib2.0-0",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        good: whether it is as it should be.
        detail: version or reason.
        remedy: what to do if it is not.
        needed: whether animating needs it.
    """

    name: str
    good: bool
    detail: str
    remedy: str = ""
    needed: bool = True


def examine(folder: str | Path | None = None) -> list[Finding]:
    """Look at everything.

    Arguments:
        folder: of the weights; None is that of the package.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_python, _torch, _libraries, _mediapipe, _codecs, _packages)
    return [finding for check in checks for finding in check()] + list(_weights(folder)) + list(_optional())


def report(findings: list[Finding]) -> str:
    """The findings as text, one line each, and what to do about the bad ones."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        state = "ok     " if finding.good else "MISSING" if finding.needed else "absent "
        remedy = f"  ->  {finding.remedy}" if finding.remedy and not finding.good else ""
        lines.append(f"{state}  {finding.name:<{width}}  {finding.detail}{remedy}")
    missing = sum(finding.needed and not finding.good for finding in findings)
    lines.append("nothing is missing" if not missing else f"{missing} of what animating needs is missing")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _python() -> Iterator[Finding]:
    good = sys.version_info >= (3, 10)
    yield Finding(
        "python", good, f"{platform.python_version()} on {platform.platform()}", "install Python 3.10 or newer"
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch

        from flowvqtalker.loading import choose_device, fast_dtype
    except (ImportError, OSError) as error:
        yield Finding("torch", False, _short(error), "pip install torch")
        return
    device = choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    kind = str(fast_dtype(device)).removeprefix("torch.")
    yield Finding("torch", True, f"{torch.__version__}, {device} ({name}), images in {kind}")


def _libraries() -> Iterator[Finding]:
    if sys.platform != "linux":
        return
    for library, package in SYSTEM_LIBRARIES.items():
        try:
            ctypes.CDLL(library)
            yield Finding(library, True, "found")
        except OSError as error:
            yield Finding(library, False, _short(error), f"apt-get install {package}")


def _mediapipe() -> Iterator[Finding]:
    try:
        importlib.import_module("mediapipe")
        yield Finding("mediapipe", True, str(_version("mediapipe")))
    except (ImportError, OSError) as error:
        packages = " ".join(SYSTEM_LIBRARIES.values())
        yield Finding("mediapipe", False, _short(error), f"pip install 'mediapipe>=1.2'; apt-get install {packages}")
    from flowvqtalker.face.tracker import find_landmarker

    try:
        yield Finding("landmark model", True, f"{find_landmarker()}, sha256 as expected")
    except UserError as error:
        yield Finding("landmark model", False, str(error), "pip install --force-reinstall --no-deps flowvqtalker")


def _codecs() -> Iterator[Finding]:
    try:
        import av
    except (ImportError, OSError) as error:
        yield Finding("PyAV", False, _short(error), "pip install 'av>=13'")
        return
    for codec in ("libx264", "aac"):
        try:
            av.codec.Codec(codec, "w")
            yield Finding(f"encoder {codec}", True, f"in PyAV {av.__version__}")
        except ValueError as error:
            yield Finding(f"encoder {codec}", False, _short(error), "pip install --force-reinstall --only-binary av av")


def _packages() -> Iterator[Finding]:
    for package in _requirements(""):
        version = _version(package)
        yield Finding(package, version is not None, version or "not installed", f"pip install {package}")


def _requirements(extra: str) -> list[str]:
    """Packages that the package itself ("") or one of its extras requires, by its own metadata."""
    found = []
    for line in importlib.metadata.requires("flowvqtalker") or []:
        name, _, marker = line.partition(";")
        if "platform_machine" in marker and platform.machine() not in marker:
            continue
        wanted = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if (wanted.group(1) if wanted else "") == extra:
            found.append(re.split(r"[\s<>=!~\[]", name.strip(), maxsplit=1)[0])
    return [name for name in found if name != "flowvqtalker"]


def _weights(folder: str | Path | None) -> Iterator[Finding]:
    try:
        entries = weights.manifest(folder)
        needed = weights.needed(folder)
    except UserError as error:
        yield Finding("weights", False, str(error))
        return
    for name in needed:
        file = f"{name}.safetensors"
        try:
            weights.load(name, folder)
            entry = entries[file]
            place = "the package's own" if weights.place(name, folder) == weights.folder() else f"of {folder}"
            detail = f"{place}, {entry.parameters:,} parameters, step {entry.steps}, sha256 {entry.sha256[:12]}..."
            yield Finding(f"weights {name}", True, detail)
        except UserError as error:
            yield Finding(f"weights {name}", False, str(error))
    for file, entry in entries.items():
        use = "commercial use allowed" if entry.commercial else "no commercial use"
        yield Finding(f"terms {Path(file).stem}", True, f"{use} ({entry.terms}); from {entry.data}")


def _optional() -> Iterator[Finding]:
    for extra in importlib.metadata.metadata("flowvqtalker").get_all("Provides-Extra") or []:
        absent = [package for package in _requirements(extra) if _version(package) is None]
        detail = "complete" if not absent else f"without {', '.join(absent)}"
        yield Finding(f"extra {extra}", not absent, detail, f"pip install 'flowvqtalker[{extra}]'", needed=False)


def _short(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
