"""A job of a batch: the options of ``animate`` for one video, and the record that says that it is done."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import sample_paths
from flowvqtalker.io.remote import is_remote, write_file
from flowvqtalker.motion.options import FILES
from flowvqtalker.options import AnimateArguments

__all__ = ["RECORD", "Job", "Outcome", "finished", "record_path", "weights_hashes", "write_record"]

#: Suffix of the record beside a video.
RECORD = ".json"

# Where a job runs and where its files lie do not change the video.
_NOT_HASHED = {"portrait", "speech", "output", "weights", "device", "num_samples", "named_by_inputs", "source"}
_FILES = ("portrait", "speech", *FILES)


@dataclass(frozen=True, kw_only=True)
class Job(AnimateArguments):
    """One video to make; :attr:`num_samples` is 1 once :meth:`samples` split it."""

    portrait: Path
    speech: Path
    output: Path
    named_by_inputs: bool = False
    """Whether the output has no name in the table."""
    source: str = ""
    """Where the job was written, for messages: file and line of the table."""

    @property
    def inputs(self) -> dict[str, Path]:
        """Column -> file, of those that the job reads."""
        return {name: getattr(self, name) for name in _FILES if getattr(self, name) is not None}

    def samples(self) -> list[Job]:
        """One job for each sample, with the names and seeds that ``animate`` gives them.

        Raises:
            UserError: if the number of samples cannot be.
        """
        paths = sample_paths(self.output, self.num_samples)
        return [replace(self, output=path, num_samples=1, seed=self.seed + number) for number, path in enumerate(paths)]

    def fingerprint(self) -> str:
        """SHA-256 over the options, the content of the inputs and the manifest of the weights.

        Raises:
            UserError: if an input or the weights cannot be read.
        """
        content: dict[str, Any] = {
            f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_HASHED
        }
        content |= {name: _digest(path if is_remote(path) else path.absolute()) for name, path in self.inputs.items()}
        content["weights"] = weights_hashes(self.weights)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        frames: frames of the video.
        seconds: time that the job took.
        error: why there is no video; empty if there is one.
        warnings: what the pipeline warned of.
    """

    frames: int = 0
    seconds: float = 0.0
    error: str = ""
    warnings: tuple[str, ...] = ()


def record_path(output: Path) -> Path:
    """The record beside a video: ``NAME.mp4.json``."""
    return output.with_name(output.name + RECORD)


def finished(job: Job, fingerprint: str) -> bool:
    """Whether the video of exactly this job is there."""
    try:
        record = json.loads(record_path(job.output).read_text(encoding="utf-8"))
        return job.output.is_file() and record["hash"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):  # no record, or none of ours
        return False


def write_record(job: Job, fingerprint: str, outcome: Outcome | None = None) -> None:
    """Write the record: the hash, the options, and, once they are known, the frames and seconds."""
    options = {
        f.name: _plain(value)
        for f in fields(job)
        if (value := getattr(job, f.name)) is not None and f.name not in ("num_samples", "named_by_inputs", "source")
    }
    content: dict[str, Any] = {"hash": fingerprint, "job": options}
    if outcome is not None:
        content |= {"frames": outcome.frames, "seconds": round(outcome.seconds, 3), "warnings": outcome.warnings}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_file(record_path(job.output), text)


def _plain(value: Any) -> Any:
    """An option's value as JSON holds it."""
    return value if value is None or isinstance(value, str | int | float) else str(value)


@functools.cache
def _digest(path: Path) -> str:
    from flowvqtalker.weights import sha256

    try:
        return sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check the file") from error


@functools.cache
def weights_hashes(path: Path | None) -> dict[str, str]:
    """File -> SHA-256 as the manifest of a folder of weights has them.

    Raises:
        UserError: if the folder or one of its entries is missing.
    """
    from flowvqtalker.weights import manifest, needed

    entries = manifest(path)
    files = [f"{name}.safetensors" for name in needed(path)]
    if missing := [name for name in files if name not in entries]:
        raise UserError(f"the package's weights lack {', '.join(missing)}; install the package again")
    return {name: entries[name].sha256 for name in files}
