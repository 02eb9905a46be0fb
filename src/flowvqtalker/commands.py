"""The commands that animate: ``animate``, ``track``, ``motion``, ``render``, ``verify`` and ``doctor``.

Torch, mediapipe and PyAV are imported inside ``run``, so that ``--help`` stays quick.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowvqtalker.motion.options import FILES
from flowvqtalker.options import (
    AnimateArguments,
    AudioTrack,
    FaceNumber,
    File,
    Folder,
    MarkArguments,
    MotionArguments,
    VideoArguments,
)

if TYPE_CHECKING:
    from flowvqtalker.motion.options import MotionOptions
    from flowvqtalker.pipeline import Talker

__all__ = ["Animate", "Doctor", "Motion", "Render", "Track", "Verify"]

_Output = Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
_Input = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="INPUT")]
_Portrait = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PORTRAIT")]
_Speech = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SPEECH")]


@dataclass(frozen=True, kw_only=True)
class Animate(AnimateArguments):
    """Animate a portrait with speech: 512x512 at 25 fps by default, H.264 and AAC, exactly as long as the speech."""

    portrait: _Portrait
    """Image with a face (JPEG, PNG, WebP, ...)."""
    speech: _Speech
    """Recording of speech: any audio or video file with sound."""
    output: _Output
    """Video to write (.mp4, .mov or .mkv)."""

    def run(self) -> None:
        """Write the videos and print one line for each."""
        from flowvqtalker.io.atomic import check_output, sample_paths
        from flowvqtalker.io.audio import scan
        from flowvqtalker.pipeline import Talker

        for path in sample_paths(self.output, self.num_samples):
            check_output(path)
        options, marks, video = _motion_options(self), self.marks(), self.video()
        _check_inputs(self.portrait, self.speech, self.sign_cert, self.sign_key)
        speech = scan(self.speech, self.audio_track)
        talker = Talker.from_pretrained(self.weights, device=self.device, dtype=self.dtype, exact=self.exact)
        options = _resolve(talker, options)
        with _progress("animate") as progress:
            results = talker.animate_samples(
                self.portrait,
                speech,
                self.output,
                self.num_samples,
                options,
                face=self.face,
                full=self.full,
                progress=progress,
                marks=marks,
                video=video,
            )
            written = list(results)
        for result in written:
            print(f"{result.path}: {result.frames} frames, {result.width}x{result.height}")


@dataclass(frozen=True)
class Track:
    """Track the face of an image or video: landmarks, identity, expression and pose at 25 fps, as .npz or .csv."""

    input: _Input
    """Image or video."""
    output: _Output
    """File to write (.npz, or .csv with the ARKit blendshapes and the head rotation)."""
    landmarks_only: bool = False
    """Leave the coefficients at zero; needs no weights."""
    smooth: bool = True
    """Smooth the coefficients of a clip over time, except those of lips and lids."""
    weights: Folder = None
    """Folder of weights with a manifest. Default: those of the package."""

    def run(self) -> None:
        """Write the file and print one line."""
        from flowvqtalker.face.portrait import track
        from flowvqtalker.io.atomic import check_output
        from flowvqtalker.loading import load_face_model

        check_output(self.output, (".npz", ".csv"))
        _check_inputs(self.input)
        model = None if self.landmarks_only else load_face_model(self.weights)
        with _progress("track") as progress:
            found = track(model, self.input, smooth=self.smooth, progress=progress)
        if self.output.suffix.lower() == ".csv":
            from flowvqtalker.face.export import save_live_link

            assert found.blendshapes is not None  # the tracker always gives them
            save_live_link(self.output, found, found.blendshapes)
        else:
            found.save(self.output)
        print(f"{self.output}: {len(found)} frames")


@dataclass(frozen=True, kw_only=True)
class Motion(MotionArguments):
    """Make motion from speech, without images: .npz of coefficients, .csv of 52 ARKit blendshapes and head rotation
    (as Live Link Face records them), or .glb, an animated face."""

    speech: _Speech
    """Recording of speech: any audio or video file with sound."""
    output: _Output
    """File to write (.npz, .csv or .glb)."""
    fps: Annotated[float | None, tyro.conf.arg(metavar="X")] = None
    """Frames per second of the file, for instance 30 or 60. Default: 25, the rate of the model."""

    def run(self) -> None:
        """Write the files and print one line for each."""

        from flowvqtalker.face.export import SUFFIXES, check_fps, export_motion
        from flowvqtalker.io.atomic import check_output, sample_paths
        from flowvqtalker.io.audio import scan
        from flowvqtalker.io.coefficients import Coefficients, Motion
        from flowvqtalker.pipeline import Talker

        paths = [check_output(path, SUFFIXES) for path in sample_paths(self.output, self.num_samples)]
        check_fps(self.fps)
        options = _motion_options(self)
        _check_inputs(self.speech)
        found = scan(self.speech, self.audio_track)
        talker = Talker.from_pretrained(self.weights, device="cpu", components=("face", "motion"), exact=self.exact)
        options = _resolve(talker, options)
        for number, path in enumerate(paths):
            blocks = []
            done = 0
            with _progress("motion") as progress:
                for block in talker.motion(found, options=replace(options, seed=self.seed + number)):
                    blocks.append(block)
                    done += len(block)
                    progress(done, found.frames)
            made = Coefficients.of(Motion.join(blocks))
            print(f"{path}: {len(export_motion(path, made, talker.face_model, self.fps))} frames")


@dataclass(frozen=True, kw_only=True)
class Render(MarkArguments, VideoArguments):
    """Animate a portrait with stored motion, made by `flowvqtalker motion` or tracked from a video."""

    portrait: _Portrait
    """Image with a face (JPEG, PNG, WebP, ...)."""
    motion: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MOTION")]
    """Motion file: .npz; or .csv of blendshapes, as `flowvqtalker motion` and Live Link Face write it (approximate)."""
    output: _Output
    """Video to write (.mp4, .mov or .mkv)."""
    speech: File = None
    """Sound for the video. Default: silent."""
    audio_track: AudioTrack = None
    """Which audio track of that file, from 0. Default: the one that a player plays."""
    absolute_pose: bool = False
    """Take the poses as they are stored; by default they move the portrait's own pose."""
    face: FaceNumber = None
    """Which face of the image; 0 is the largest. Default: the largest."""
    full: bool = False
    """Write the whole image, which bends with the head, instead of the 512x512 crop."""
    weights: Folder = None
    """Folder of weights with a manifest. Default: those of the package."""
    device: str = "auto"
    """Where the image generator runs: auto (a GPU if there is one), cpu, cuda or mps."""
    dtype: str = "auto"
    """Type of the image generator's arithmetic: auto (the fastest on the device), float32 or bfloat16."""

    def run(self) -> None:
        """Write the video and print one line."""
        from flowvqtalker.face.export import load_motion
        from flowvqtalker.io.atomic import check_output
        from flowvqtalker.io.audio import scan
        from flowvqtalker.pipeline import Talker

        check_output(self.output)
        marks, video = self.marks(), self.video()
        _check_inputs(self.portrait, self.motion, self.speech, self.sign_cert, self.sign_key)
        speech = None if self.speech is None else scan(self.speech, self.audio_track)
        talker = Talker.from_pretrained(
            self.weights, device=self.device, dtype=self.dtype, components=("face", "render")
        )
        motion = load_motion(self.motion, talker.face_model)
        with _progress("render") as progress:
            result = talker.reenact(
                self.portrait,
                motion,
                self.output,
                speech=speech,
                absolute=self.absolute_pose,
                face=self.face,
                full=self.full,
                progress=progress,
                marks=marks,
                video=video,
            )
        print(f"{result.path}: {result.frames} frames, {result.width}x{result.height}")


@dataclass(frozen=True)
class Verify:
    """Tell whether an image or video carries our marks; exit code 0 if it does, 1 if not, 2 if it cannot be read."""

    input: _Input
    """Image or video."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> None:
        """Print the report."""
        import json

        from flowvqtalker.provenance import verify

        _check_inputs(self.input)
        report = verify(self.input)
        print(json.dumps(report.json()) if self.json else report.text())
        if not report.marked:
            raise SystemExit(1)


@dataclass(frozen=True)
class Doctor:
    """List what is installed, what is missing and how to get it; exit code 1 if something needed is missing."""

    weights: Folder = None
    """Folder of weights with a manifest. Default: those of the package."""

    def run(self) -> None:
        """Print the report."""
        from flowvqtalker.doctor import examine, report

        findings = examine(self.weights)
        print(report(findings))
        if any(finding.needed and not finding.good for finding in findings):
            raise SystemExit(1)


def _motion_options(given: MotionArguments) -> MotionOptions:
    """The checked options of a command."""
    _check_inputs(*(getattr(given, name) for name in FILES))
    return given.motion_options()


def _resolve(talker: Talker, options: MotionOptions) -> MotionOptions:
    """The options with clips tracked, behind a progress bar because that takes a while."""
    clip = options.pose_from
    if not isinstance(clip, Path) or clip.suffix.lower() in (".npz", ".csv"):
        return talker.resolve(options)
    with _progress("pose") as progress:
        return talker.resolve(replace(options, pose_from=talker.track(clip, progress=progress)))


def _check_inputs(*paths: Path | None) -> None:
    """Name missing files before anything slow begins."""
    from flowvqtalker.io.media import existing_file

    for path in paths:
        if path is not None:
            existing_file(path, "input")


@contextlib.contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=name, unit="frame", disable=None, dynamic_ncols=True, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield advance
