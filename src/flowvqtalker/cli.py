"""The command line: parses, calls, and turns every user error into one line and exit code 2."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from flowvqtalker import EMOTIONS, __version__
from flowvqtalker.errors import UserError
from flowvqtalker.options import MotionOptions

if TYPE_CHECKING:
    from flowvqtalker.pipeline import Talker

# What is slow to import (torch, mediapipe, PyAV) is imported inside the commands, so that --help is quick.

__all__ = ["main"]

_STAGES = "face-model, codebook, vqig, speech, expflow, poseflow or sync"


_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="X")]


@dataclass(frozen=True, kw_only=True)
class _MotionOptions(MotionOptions):
    """What animate and motion let the user choose of the motion; the base class describes it."""

    emotion: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    emotion_reference: _File = None
    emotion_track: _File = None
    pose_from: _File = None
    temperature: _Number = None
    articulation: _Number = None
    blink_rate: _Number = None
    takes: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Takes in one call, with the seeds SEED to SEED+N-1; they go to OUT_1 to OUT_N."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""

    def __post_init__(self) -> None:
        """Checks nothing: an error in here would be the parser's. :meth:`motion` checks."""

    def motion(self) -> MotionOptions:
        """The options as :meth:`flowvqtalker.pipeline.Talker.motion` takes them."""
        _check_inputs(self.emotion_reference, self.emotion_track, self.pose_from)
        return MotionOptions(**{f.name: getattr(self, f.name) for f in fields(MotionOptions)})

    def prepare(self, talker: Talker, options: MotionOptions) -> MotionOptions:
        """The options with clips tracked, which takes a while."""
        if self.pose_from is None or self.pose_from.suffix.lower() == ".npz":
            return talker.resolve(options)
        with _progress("pose") as progress:
            return talker.resolve(replace(options, pose_from=talker.track(self.pose_from, progress=progress)))


@dataclass(frozen=True, kw_only=True)
class Animate(_MotionOptions):
    """Animate a portrait with speech: 512x512, 25 fps, H.264 and AAC, exactly as long as the speech."""

    portrait: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PORTRAIT")]
    """Picture with a face (JPEG, PNG, WebP, ...)."""
    speech: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SPEECH")]
    """Recording of speech: any audio or video file with sound."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """Video to write (.mp4, .mov or .mkv)."""
    face: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Which face of the picture; 0 is the largest. Default: the largest."""
    full: bool = False
    """The whole picture, which bends with the head, instead of the 512x512 crop."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """float32 or bfloat16. Default: what is fastest on the device."""

    def run(self) -> None:
        from flowvqtalker.io.media import check_output
        from flowvqtalker.pipeline import Talker, take_paths

        for path in take_paths(self.output, self.takes):
            check_output(path)
        options = self.motion()
        _check_inputs(self.portrait, self.speech)
        talker = Talker.load(self.weights, self.device, self.dtype)
        options = self.prepare(talker, options)
        with _progress("animate") as progress:
            results = talker.animate_takes(
                self.portrait,
                self.speech,
                self.output,
                self.takes,
                options,
                face=self.face,
                full=self.full,
                progress=progress,
            )
            written = list(results)
        for result in written:
            print(f"{result.path}: {result.frames} frames, {result.width}x{result.height}")


@dataclass(frozen=True)
class Track:
    """Track the face of a picture or video: landmarks, identity, expression and pose at 25 fps, as .npz or .csv."""

    input: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")]
    """Picture or video."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """File to write (.npz, or .csv with the ARKit blendshapes and the head's turns)."""
    landmarks_only: bool = False
    """Leave the coefficients at zero; needs no weights."""
    smooth: bool = True
    """Smooth the coefficients of a clip over time, lips and lids excepted."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""

    def run(self) -> None:
        from flowvqtalker.face.portrait import track
        from flowvqtalker.io.media import check_output

        check_output(self.output, (".npz", ".csv"))
        _check_inputs(self.input)
        model = None
        if not self.landmarks_only:
            from flowvqtalker.loading import load_face_model

            model = load_face_model(self.weights)
        with _progress("track") as progress:
            found = track(model, self.input, smooth=self.smooth, progress=progress)
        if self.output.suffix.lower() == ".csv":
            from flowvqtalker.io.export import save_live_link

            assert found.blendshapes is not None  # a tracker's result has them
            save_live_link(self.output, found, found.blendshapes)
        else:
            found.save(self.output)
        print(f"{self.output}: {len(found)} frames")


@dataclass(frozen=True, kw_only=True)
class Motion(_MotionOptions):
    """Make motion from speech, without pictures: .npz of coefficients, .csv of 52 ARKit blendshapes and the head's
    turns (as Live Link Face records them), or .glb, an animated face."""

    speech: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SPEECH")]
    """Recording of speech: any audio or video file with sound."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """File to write (.npz, .csv or .glb)."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Frames per second of the file, for instance 30 or 60. Default: 25, as the motion is made."""

    def run(self) -> None:
        import numpy as np
        import torch

        from flowvqtalker.io.audio import scan
        from flowvqtalker.io.coefficients import Coefficients
        from flowvqtalker.io.export import SUFFIXES, check_fps, export_motion
        from flowvqtalker.io.media import check_output
        from flowvqtalker.pipeline import Talker, take_paths

        paths = [check_output(path, SUFFIXES) for path in take_paths(self.output, self.takes)]
        check_fps(self.fps)
        options = self.motion()
        _check_inputs(self.speech)
        found = scan(self.speech)
        talker = Talker.load(self.weights, "cpu", parts=("face", "motion"))
        options = self.prepare(talker, options)
        for take, path in enumerate(paths):
            expression, pose = [], []
            done = 0
            with _progress("motion") as progress:
                for beta, rho in talker.motion(found, options=options, seed=self.seed + take):
                    expression.append(beta)
                    pose.append(rho)
                    done += len(beta)
                    progress(done, found.frames)
            made = Coefficients(torch.cat(expression).numpy(), torch.cat(pose).numpy(), np.zeros(80, np.float32))
            print(f"{path}: {len(export_motion(path, made, talker.face_model, self.fps))} frames")


@dataclass(frozen=True)
class Render:
    """Animate a portrait with stored motion, made by `flowvqtalker motion` or tracked from a video."""

    portrait: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PORTRAIT")]
    """Picture with a face (JPEG, PNG, WebP, ...)."""
    motion: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MOTION")]
    """Motion file (.npz)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """Video to write (.mp4, .mov or .mkv)."""
    speech: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Sound for the video. Default: silent."""
    absolute_pose: bool = False
    """Take the poses as they are stored; by default they move the portrait's own pose."""
    face: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Which face of the picture; 0 is the largest. Default: the largest."""
    full: bool = False
    """The whole picture, which bends with the head, instead of the 512x512 crop."""
    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    dtype: Annotated[str | None, tyro.conf.arg(metavar="TYPE")] = None
    """float32 or bfloat16. Default: what is fastest on the device."""

    def run(self) -> None:
        from flowvqtalker.io.coefficients import Coefficients
        from flowvqtalker.io.media import check_output
        from flowvqtalker.pipeline import Talker

        check_output(self.output)
        _check_inputs(self.portrait, self.speech)
        motion = Coefficients.load(self.motion)
        talker = Talker.load(self.weights, self.device, self.dtype, parts=("face", "render"))
        with _progress("render") as progress:
            result = talker.reenact(
                self.portrait,
                motion,
                self.output,
                speech=self.speech,
                absolute=self.absolute_pose,
                face=self.face,
                full=self.full,
                progress=progress,
            )
        print(f"{result.path}: {result.frames} frames, {result.width}x{result.height}")


@dataclass(frozen=True)
class Train:
    """Train a stage; `flowvqtalker train STAGE --help` shows its options."""

    def run(self) -> None:
        raise UserError(f"no stage was given; choose {_STAGES}")


@dataclass(frozen=True)
class Prepare:
    """Turn clips and pictures on disk into shards for training; `flowvqtalker prepare --help` shows its options."""

    def run(self) -> None:
        raise UserError("no folder was given; see `flowvqtalker prepare --help`")


@dataclass(frozen=True)
class PrepareSpeech:
    """Turn speech into a set for training the audio encoder; `flowvqtalker prepare-speech --help` shows its options."""

    def run(self) -> None:
        raise UserError("nothing was given; see `flowvqtalker prepare-speech --help`")


@dataclass(frozen=True)
class Evaluate:
    """The paper's tables and figures, on any data; `flowvqtalker evaluate --help` lists them."""

    def run(self) -> None:
        raise UserError("nothing was given; see `flowvqtalker evaluate --help`")


@dataclass(frozen=True)
class Doctor:
    """List what is installed, what is missing and how to get it; exit code 1 if something needed is missing."""

    weights: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of weights with a manifest. Default: those of the package."""

    def run(self) -> None:
        from flowvqtalker.doctor import examine, report

        findings = examine(self.weights)
        print(report(findings))
        if any(finding.needed and not finding.good for finding in findings):
            raise SystemExit(1)


_COMMANDS: dict[str, Callable[..., Any]] = {
    "animate": Animate,
    "track": Track,
    "motion": Motion,
    "render": Render,
    "train": Train,
    "prepare": Prepare,
    "prepare-speech": PrepareSpeech,
    "evaluate": Evaluate,
    "doctor": Doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Arguments:
        arguments: command line; None takes that of the process.

    Returns:
        the exit code: 0, 1 (something needed is missing), 2 (user error), 130 or 143 (interrupted, terminated).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `prepare` says itself whether a line is an error.
    style = "%(message)s" if given[:1] in (["prepare"], ["prepare-speech"]) else "%(levelname)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=f"flowvqtalker: {style}")
    logging.getLogger("flowvqtalker").setLevel(logging.INFO)
    for level, name in ((logging.WARNING, "warning"), (logging.INFO, "info"), (logging.ERROR, "error")):
        logging.addLevelName(level, name)
    try:
        with _quiet_libraries(), _terminable():
            _dispatch(given)
            sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"flowvqtalker: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flowvqtalker: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; keep Python from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _dispatch(given: list[str]) -> None:
    if given in (["--version"], ["version"]):
        print(f"flowvqtalker {__version__}")
        return
    if len(given) > 1 and given[0] == "train" and not given[1].startswith("-"):
        from flowvqtalker import train

        train.main(given[1], given[2:])
        return
    if len(given) > 1 and given[0] in ("prepare", "prepare-speech"):
        from flowvqtalker.data import prepare, speech

        (prepare if given[0] == "prepare" else speech).main(given[1:])
        return
    if len(given) > 1 and given[0] == "evaluate":
        from flowvqtalker_eval import commands as evaluate

        evaluate.main(given[1:])
        return
    description = (
        "One portrait, a speech recording and an emotion in, an emotional 512x512 talking-face video out. "
        f"Emotions: {', '.join(EMOTIONS)}."
    )
    command = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS, prog="flowvqtalker", description=description, args=given or ["--help"]
    )
    command.run()


def _check_inputs(*paths: Path | None) -> None:
    """Missing files are named before anything slow begins."""
    for path in paths:
        if path is not None and not path.is_file():
            raise UserError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; check the name")


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="frame", disable=None, dynamic_ncols=True, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield advance


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the program as an exit with code 143, so that no half-written file stays."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


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
