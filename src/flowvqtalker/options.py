"""Options of the command line, declared once for the commands that animate and for the columns of a job table.

Nothing heavy is imported, so that ``--help`` stays quick.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowvqtalker.errors import UserError
from flowvqtalker.io.format import VideoFormat
from flowvqtalker.motion.options import MotionOptions

if TYPE_CHECKING:
    from flowvqtalker.provenance import Marks

__all__ = [
    "AnimateArguments",
    "AudioTrack",
    "FaceNumber",
    "File",
    "Folder",
    "MarkArguments",
    "MotionArguments",
    "VideoArguments",
]

File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
FaceNumber = Annotated[int | None, tyro.conf.arg(metavar="N")]
AudioTrack = Annotated[int | None, tyro.conf.arg(metavar="N")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="X")]


@dataclass(frozen=True, kw_only=True)
class MotionArguments(MotionOptions):
    """Options of the motion as the user writes them; the base class describes them."""

    emotion: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    emotion_reference: File = None
    reference_neutral: File = None
    emotion_track: File = None
    valence: _Number = None
    arousal: _Number = None
    pose_from: File = None
    temperature: _Number = None
    articulation: _Number = None
    blink_rate: _Number = None
    fixed_pose: Annotated[bool, tyro.conf.arg(aliases=["--still"])] = False
    num_samples: Annotated[int, tyro.conf.arg(aliases=["--takes"], metavar="N")] = 1
    """Number of videos to sample, with the seeds SEED to SEED+N-1; they go to OUT_1 to OUT_N."""
    exact: bool = False
    """Compute in float32 throughout: slower, but the same seed gives the same motion to 1e-4 on every x86 machine."""
    audio_track: AudioTrack = None
    """Which audio track of the speech file, from 0. Default: the one that a player plays."""
    weights: Folder = None
    """Folder of weights with a manifest. Default: those of the package."""

    def __post_init__(self) -> None:
        """Checks nothing: tyro would report the error as its own. :meth:`motion_options` checks."""

    def motion_options(self) -> MotionOptions:
        """The options that :meth:`flowvqtalker.pipeline.Talker.motion` takes.

        Raises:
            UserError: as the constructor of :class:`~flowvqtalker.motion.options.MotionOptions`.
        """
        return MotionOptions(**{f.name: getattr(self, f.name) for f in fields(MotionOptions)})


@dataclass(frozen=True, kw_only=True)
class MarkArguments:
    """Options of the marks that say a video is generated."""

    mark: bool = True
    """Write the invisible watermark and, where c2pa-python is installed, content credentials."""
    label: bool = False
    """Show a visible label, "AI-generated", in the corner."""
    mark_id: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Number of 48 bits to write into the watermark, for instance that of a job; `verify` shows it."""
    sign_cert: File = None
    """Certificate chain (PEM) for the content credentials. Default: a local one, made at first use."""
    sign_key: File = None
    """Private key (PEM, P-256) of that certificate."""
    timestamp_url: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None
    """Ask this time stamp authority (RFC 3161) for a time stamp. Default: none, without network."""

    def marks(self) -> Marks:
        """The marks that :meth:`flowvqtalker.pipeline.Talker.animate` takes.

        Raises:
            UserError: as the constructor of :class:`~flowvqtalker.provenance.Marks`.
        """
        from flowvqtalker.provenance import Marks

        return Marks(**{f.name: getattr(self, f.name) for f in fields(MarkArguments)})


@dataclass(frozen=True, kw_only=True)
class VideoArguments(VideoFormat):
    """Options of the written video; the base class describes them."""

    fps: _Number = None
    size: Annotated[int | None, tyro.conf.arg(metavar="N")] = None

    def __post_init__(self) -> None:
        """Checks nothing: tyro would report the error as its own. :meth:`video` checks."""

    def video(self) -> VideoFormat:
        """The format that :meth:`flowvqtalker.pipeline.Talker.animate` takes.

        Raises:
            UserError: as the constructor of :class:`~flowvqtalker.io.format.VideoFormat`, or if the options of
                ``--full`` and ``--size`` exclude each other.
        """
        if self.size is not None and getattr(self, "full", False):
            raise UserError("--size is that of the crop and --full writes the whole image; give one of them")
        return VideoFormat(preset=self.preset, fps=self.fps, size=self.size)


@dataclass(frozen=True, kw_only=True)
class AnimateArguments(MarkArguments, VideoArguments, MotionArguments):
    """Options of ``animate`` beside the portrait, the speech and the output."""

    face: FaceNumber = None
    """Which face of the image; 0 is the largest. Default: the largest."""
    full: bool = False
    """Write the whole image, which bends with the head, instead of the 512x512 crop."""
    device: str = "auto"
    """Where the image generator runs: auto (a GPU if there is one), cpu, cuda or mps."""
    dtype: str = "auto"
    """Type of the image generator's arithmetic: auto (the fastest on the device), float32 or bfloat16."""
