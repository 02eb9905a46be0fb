"""The command line: one tyro app over every command; user errors become one line and exit code 2."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from flowvqtalker import EMOTIONS, __version__
from flowvqtalker.errors import MissingDependency, UserError

__all__ = ["COMMANDS", "main"]


@dataclass(frozen=True)
class _Command:
    """Where a command lives. Only the command that was asked for is imported.

    Attributes:
        target: ``module:Class``, a dataclass of options with a method ``run``; or ``module`` of a training stage.
        about: one line for the list of commands.
        extra: extra of the package that brings what the command needs beyond animating.
    """

    target: str
    about: str
    extra: str = ""


_HERE = "flowvqtalker.commands"
#: Command -> where it lives, or a group of commands.
COMMANDS: dict[str, _Command | dict[str, _Command]] = {
    "animate": _Command(f"{_HERE}:Animate", "Animate a portrait with speech."),
    "batch": _Command("flowvqtalker.batch.command:Batch", "Animate many portraits, from a table of jobs."),
    "serve": _Command("flowvqtalker.serve.command:Serve", "Serve a web page and an HTTP API.", "serve"),
    "live": _Command("flowvqtalker.live.command:Live", "Let a portrait talk in real time."),
    "say": _Command("flowvqtalker.live.command:Say", "Say a text, as sound or as a video of a portrait."),
    "track": _Command(f"{_HERE}:Track", "Track the face of an image or video."),
    "motion": _Command(f"{_HERE}:Motion", "Make motion from speech, without images."),
    "render": _Command(f"{_HERE}:Render", "Animate a portrait with stored motion."),
    "verify": _Command(f"{_HERE}:Verify", "Tell whether a video carries our marks."),
    "prepare": _Command(
        "flowvqtalker.data.prepare:Prepare", "Turn clips and images into shards for training.", "train"
    ),
    "prepare-speech": _Command(
        "flowvqtalker.data.speech_sets:PrepareSpeech", "Turn speech into a set for training the speech encoder."
    ),
    "prepare-mouths": _Command(
        "flowvqtalker_eval.evaluators.mouths:PrepareMouths", "Add mouth crops to a shard, for the sync expert.", "eval"
    ),
    "sync-clips": _Command(
        "flowvqtalker_eval.evaluators.sync_clips:SyncClips", "Find the lag between sound and lips of each clip.", "eval"
    ),
    "identity-split": _Command(
        "flowvqtalker.train.identity_split:IdentitySplit",
        "Teach a face model to keep smiles out of the identity.",
        "train",
    ),
    "weights-add": _Command(
        "flowvqtalker.train.release:WeightsAdd", "Put the weights of a training run into a folder of weights."
    ),
    "weights-list": _Command("flowvqtalker.train.release:WeightsList", "List weights and check their hashes."),
    "doctor": _Command(f"{_HERE}:Doctor", "List what is installed, what is missing and how to get it."),
}

#: What each training stage learns.
_STAGES = {
    "face-model": "The linear 3D morphable model, from tracked faces.",
    "codebook": "Encoder, codebook and decoder, by self-reconstruction of faces.",
    "vqig": "The vector-quantized image generator, on a trained codebook.",
    "speech": "The speech encoder.",
    "speech-live": "The speech encoder with a short look-ahead, distilled from the long one.",
    "voice-emotion": "The emotion of a voice, on the speech encoder.",
    "expflow": "The expression flow.",
    "poseflow": "The head pose flow.",
    "sync": "Evaluator: which sound belongs to which lips.",
    "motion-emotion": "Evaluator: the emotion of expression coefficients.",
}

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: What torch, the system and the loader of shared libraries say instead of raising a MemoryError.
_NO_MEMORY = re.compile(
    r"out of memory|alloc(ate memory|\b)|bad_alloc|not enough memory|failed to map segment|start new thread",
    re.IGNORECASE,
)

_DESCRIPTION = (
    "One portrait, a speech recording and an emotion in, an emotional 512x512 talking-face video out. "
    f"Emotions: {', '.join(EMOTIONS)}."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Arguments:
        arguments: command line; None takes that of the process.

    Returns:
        the exit code: 0, 1 (something needed is missing), 2 (user error), 130, or 128 and the signal (143, 129).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="flowvqtalker: %(levelname)s: %(message)s")
    for package in ("flowvqtalker", "flowvqtalker_eval"):
        logging.getLogger(package).setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # mediapipe imports it; it warns where there is no home
    for level, name in ((logging.WARNING, "warning"), (logging.INFO, "info"), (logging.ERROR, "error")):
        logging.addLevelName(level, name)
    try:
        with _quiet_libraries(), _terminable():
            if given in (["--version"], ["version"]):
                print(f"flowvqtalker {__version__}")
            else:
                tyro.cli(
                    _union(_registry(), given),
                    prog="flowvqtalker",
                    description=_DESCRIPTION,
                    args=given or ["--help"],
                ).run()
            sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"flowvqtalker: error: {_printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flowvqtalker: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            place = _printable(str(error.filename or "the output"))
            print(f"flowvqtalker: error: {place} cannot be written ({error.strerror}); check the disk", file=sys.stderr)
            return 2
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        print("flowvqtalker: error: not enough memory; close other programs or give shorter input", file=sys.stderr)
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _printable(text: str) -> str:
    """A message on one line: line ends and undecodable bytes of file names are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _registry() -> dict[str, _Command | dict[str, _Command]]:
    """Every command, with the stages of training and the tables and figures of evaluation."""
    from flowvqtalker.train import STAGES
    from flowvqtalker_eval.commands import COMMANDS as EVALUATE
    from flowvqtalker_eval.evaluators import STAGES as EVALUATORS

    train = {name: _Command(module, _STAGES[name], "train") for name, module in (STAGES | EVALUATORS).items()}
    evaluate = {name: _Command(target, about, "eval") for name, (target, about) in EVALUATE.items()}
    return {**COMMANDS, "train": train, "evaluate": evaluate}


def _union(commands: dict[str, Any], given: Sequence[str]) -> Any:
    """The type that tyro parses: the chosen command with its options, the others by name and description alone."""
    chosen = given[0] if given else None
    if chosen is not None and chosen not in commands and not chosen.startswith("-"):
        raise UserError(f"unknown command {chosen!r}; choose one of {', '.join(commands)}")
    members = []
    for name, command in commands.items():
        if isinstance(command, dict):
            kind = _group(name, command, given[1:] if name == chosen else ())
            about = _GROUPS[name]
        else:
            kind = _load(name, command, given[1:]) if name == chosen else make_dataclass(name, ())
            about = command.about
        members.append(Annotated[kind, tyro.conf.subcommand(name, description=about, prefix_name=False)])
    return Union[tuple(members)]  # noqa: UP007  # built at run time


_GROUPS = {
    "train": "Train a stage; `train STAGE --help` shows its options.",
    "evaluate": "The paper's tables and figures; `evaluate NAME --help` shows the options of one.",
}


def _group(name: str, commands: dict[str, _Command], given: Sequence[str]) -> Any:
    """A command that holds commands."""

    def run(self: Any) -> None:
        self.command.run()

    return make_dataclass(
        name,
        [("command", Annotated[_union(commands, given), tyro.conf.arg(name="")])],
        namespace={"run": run, "__doc__": _GROUPS[name]},
    )


def _load(name: str, command: _Command, given: Sequence[str]) -> Any:
    """Import a command's class.

    Raises:
        MissingDependency: if a package is missing that the command's extra would bring.
    """
    module, _, kind = command.target.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not command.extra or package in ("flowvqtalker", "flowvqtalker_eval"):
            raise
        raise MissingDependency(
            f"{name} needs the package {package}; run `pip install 'flowvqtalker[{command.extra}]'`"
        ) from error
    return getattr(found, kind) if kind else _stage(name, found, given)


def _stage(name: str, module: Any, given: Sequence[str]) -> Any:
    """The command that trains a stage: --out, --config, --resume, and every field of the stage's ``Config``.

    The defaults that ``--help`` shows are those of the configuration file, so it is read before the options are parsed.
    """
    from flowvqtalker.train import train
    from flowvqtalker.train.config import load_yaml

    def option(flag: str) -> str | None:
        for place, part in enumerate(given):
            if part == flag and place + 1 < len(given):
                return given[place + 1]
            if part.startswith(flag + "="):
                return part.partition("=")[2]
        return None

    out, config = Path(option("--out") or f"runs/{name}"), option("--config")
    if config is None and "--resume" in given and (out / "config.yaml").exists():
        config = str(out / "config.yaml")

    def run(self: Any) -> None:
        train(module, self.options, self.out, self.resume)

    default: Any = MISSING if config is None else load_yaml(module.Config, config)
    options = field(default_factory=module.Config) if default is MISSING else field(default=default)
    fields: list[Any] = [
        ("out", Annotated[Path, tyro.conf.arg(help="Folder of the run.", metavar="FOLDER")], field(default=out)),
        (
            "config",
            Annotated[Path | None, tyro.conf.arg(help="YAML file whose values replace the defaults.", metavar="FILE")],
            field(default=None),
        ),
        ("resume", Annotated[bool, tyro.conf.arg(help="Continue the run in that folder.")], field(default=False)),
        ("options", Annotated[module.Config, tyro.conf.arg(name="")], options),
    ]
    return make_dataclass(name, fields, frozen=True, namespace={"run": run, "__doc__": module.__doc__})


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, unwind the program, so that no half-written file stays.

    The exit code is 128 and the signal's number. Under `nohup`, which ignores SIGHUP, the program goes on.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    former = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep native libraries (MediaPipe, TensorFlow Lite) from writing to the terminal; Python's own messages pass.

    They write to file descriptor 2 whatever is asked of them. FLOWVQTALKER_NATIVE_LOGS=1 lets them.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        descriptor = -1
    if descriptor != 2 or os.environ.get("FLOWVQTALKER_NATIVE_LOGS"):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    ours = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 2)
    os.close(silent)
    stderr, sys.stderr = sys.stderr, ours
    handlers = [h for h in logging.getLogger().handlers if getattr(h, "stream", None) is stderr]
    for handler in handlers:
        handler.setStream(ours)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        ours.flush()
        sys.stderr = stderr
        for handler in handlers:
            handler.setStream(stderr)  # type: ignore[attr-defined]
        os.dup2(kept, 2)
        os.close(kept)
        ours.close()


if __name__ == "__main__":
    sys.exit(main())
