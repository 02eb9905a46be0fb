"""``python -m flowvqtalker.weights add NAME RUN --data TEXT`` releases the weights of a run, ``list`` shows them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from flowvqtalker import weights
from flowvqtalker.errors import UserError

__all__ = ["main"]


@dataclass(frozen=True)
class Add:
    """Copy a run's weights into the package as fp16 and write their manifest entry."""

    name: Annotated[str, tyro.conf.Positional]
    """face_model, codebook, vqig, expflow, poseflow, speech_encoder, or a judge: sync, emotion, motion_emotion."""
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished training run, or a safetensors file."""
    data: str = ""
    """What they were trained on, in a sentence."""
    terms: str = weights.TERMS
    """Terms of use."""
    folder: Path | None = None
    """Folder of weights; default: inside the package."""


@dataclass(frozen=True)
class List:
    """Show the manifest and check every hash."""

    folder: Path | None = None
    """Folder of weights; default: inside the package."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (None: that of the process); returns the exit code."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"add": Add, "list": List}, prog="python -m flowvqtalker.weights", args=arguments
    )
    try:
        if isinstance(command, Add):
            entry = weights.add(command.run, command.name, path=command.folder, data=command.data, terms=command.terms)
            sys.stdout.write(f"{command.name}: {entry.parameters:,} parameters, sha256 {entry.sha256}\n")
            return 0
        damaged = False
        for name, entry in weights.manifest(command.folder).items():
            file = weights.folder(command.folder) / name
            good = file.is_file() and weights.sha256(file) == entry.sha256
            damaged |= not good
            size = file.stat().st_size / 2**20 if file.is_file() else 0.0
            state = "ok" if good else "DAMAGED"
            sys.stdout.write(f"{name}: {entry.parameters:,} parameters, {size:.1f} MiB, step {entry.steps}, {state}\n")
        return int(damaged)
    except UserError as error:
        sys.stderr.write(f"flowvqtalker.weights: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
