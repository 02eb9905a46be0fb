"""What every measure of a table is made of: columns, the extractors it needs, values of pairs and of whole sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flowvqtalker_eval.metrics.analysis import Analysis, Array, Extractor, Settings
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.pairs import Pair

__all__ = ["Both", "Measure", "Options", "Whole", "landmark_extractors", "pair_frames"]


@dataclass(frozen=True)
class Options:
    """How a table is made.

    Attributes:
        protocol: ``eat`` (aligned 128x128 crops, clips of different lengths paired by linspace) or ``native`` (the
            frames as they are, lengths must agree).
        only: names of measures; empty takes all.
        require: names of measures that must not be left out.
        cache: folder of analyses; None keeps them for this table alone.
        jobs: processes; None takes as many as there are cores (and videos).
        device: where the networks run.
        weights: folder of weights of this project; None are the package's.
        syncnet, inception, emotion_fan: published weights; None looks in their usual places.
        landmarks: who finds the 68 landmarks, ``dlib`` or ``mediapipe``.
        batch: frames at a time.
    """

    protocol: str = "eat"
    only: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    cache: Path | None = None
    jobs: int | None = None
    device: str = "auto"
    weights: Path | None = None
    syncnet: Path | None = None
    inception: Path | None = None
    emotion_fan: Path | None = None
    landmarks: str = "dlib"
    batch: int = 16


@dataclass(frozen=True)
class Both:
    """A generated clip beside its real one, frame by frame.

    Attributes:
        pair: their names and labels.
        made, real: their analyses.
        i, j: (n,) numbers of the frames that are compared, of the generated and of the real one.
    """

    pair: Pair
    made: Analysis
    real: Analysis
    i: npt.NDArray[np.int64]
    j: npt.NDArray[np.int64]

    @property
    def same(self) -> bool:
        """Whether the real clip stands beside itself (the row GT)."""
        return self.pair.generated == self.pair.real

    def paired(self, name: str) -> tuple[Array, Array]:
        """Rows of a per-frame array: (real, generated), n each."""
        return self.real.arrays[name][self.j], self.made.arrays[name][self.i]


def pair_frames(made: int, real: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Frames that are compared when clips differ in length: both are spread evenly over the shorter one's number
    (``linspace``, as EAT's evaluation does)."""
    count = min(made, real)
    i, j = (np.linspace(0, frames - 1, count).astype(np.int64) for frames in (made, real))
    return i, j


class Whole(Protocol):
    """Something that is measured on a set of clips and not on each."""

    def add(self, both: Both) -> None:
        """One more clip."""
        ...

    def result(self) -> dict[str, float]:
        """Values by column."""
        ...


class Measure:
    """One or more columns of the table.

    Attributes:
        name: for ``--metrics`` and ``--require``.
        columns: what it fills.
        by_frames: whether a clip counts in the mean by its frames; else each clip counts the same.
    """

    name = ""
    columns: tuple[Column, ...] = ()
    by_frames = False
    compare: Callable[[Path, Path], dict[str, float]] | None = None
    """Values of a pair from the frames of the real and the generated video; picklable. None where none is needed."""

    def extractors(self) -> list[Extractor]:
        """What it needs of the videos.

        Raises:
            MissingDependency: if a package or weights are missing; the message becomes the note beside the table.
        """
        return []

    def settings(self) -> Settings:
        """What the numbers depend on besides the extractors' settings."""
        return {}

    def pair(self, both: Both) -> dict[str, float]:
        """Values of one pair by column; NaN where it does not apply."""
        return {}

    def start(self) -> Whole | None:
        """A new set, for what is measured on sets; None where nothing is."""
        return None


def landmark_extractors(options: Options) -> list[Extractor]:
    """What gives ``landmarks68``.

    Raises:
        MissingDependency: if dlib or its files are missing.
    """
    from flowvqtalker_eval.metrics.landmarks68 import Dlib68, Mesh68, dlib_module, find_dlib_model
    from flowvqtalker_eval.metrics.mesh import MeshExtractor

    if options.landmarks == "mediapipe":
        return [MeshExtractor(), Mesh68()]
    dlib_module()
    find_dlib_model("shape_predictor_68_face_landmarks.dat")
    return [Dlib68()]
