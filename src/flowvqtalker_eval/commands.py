"""``flowvqtalker evaluate``: the paper's tables and figures. Each subcommand is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import tyro

from flowvqtalker.errors import MissingDependency, UserError

__all__ = ["COMMANDS", "main"]

#: Command -> ("module:Class" of a dataclass with a method ``run``, one line of help).
COMMANDS = {
    "table1": ("flowvqtalker_eval.tables.table1:Table1", "Table 1: generated videos against real ones, many metrics"),
    "run": ("flowvqtalker_eval.tables.run:Run", "animate every clip of a split, then make Table 1"),
    "grid": ("flowvqtalker_eval.figures.grid:Grid", "Fig. 4: methods by frames, with enlarged details"),
    "pose": ("flowvqtalker_eval.figures.pose:Pose", "Fig. 5: head trace maps and audio-pose correlation"),
    "latent": ("flowvqtalker_eval.figures.latent:Latent", "Fig. 6: latents by emotion"),
    "ablation": ("flowvqtalker_eval.figures.ablation:Ablation", "Fig. 7: parts of the image generator"),
    "study": ("flowvqtalker_eval.study.commands:Study", "Table 2: page, server and analysis of a user study"),
}

_USAGE = "usage: flowvqtalker evaluate COMMAND [options]"


def main(arguments: Sequence[str]) -> None:
    """``flowvqtalker evaluate COMMAND [options]``.

    Arguments:
        arguments: the rest of the command line.

    Raises:
        UserError: if there is no such command, or what it was given cannot be used.
    """
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {about}" for command, (_, about) in COMMANDS.items()]
        print("\n".join([_USAGE, "", "The paper's tables and figures.", "", *lines, ""]))
        print("flowvqtalker evaluate COMMAND --help shows the options of one.")
        return
    if name not in COMMANDS:
        raise UserError(f"unknown command evaluate {name!r}; choose one of {', '.join(COMMANDS)}")
    place, about = COMMANDS[name]
    module, _, kind = place.partition(":")
    try:
        command = getattr(importlib.import_module(module), kind)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("flowvqtalker", "flowvqtalker_eval"):
            raise
        raise MissingDependency(
            f"evaluate {name} needs the package {error.name}; run `pip install 'flowvqtalker[eval]'`"
        ) from error
    tyro.cli(command, prog=f"flowvqtalker evaluate {name}", description=command.__doc__ or about, args=rest).run()
