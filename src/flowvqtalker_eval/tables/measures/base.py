"""What a measure of a table is made of: columns, extractors, values of clip pairs and of whole sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import tyro

from flowvqtalker import weights
from flowvqtalker.errors import MissingDependency
from flowvqtalker_eval.metrics.analysis import Analysis, Array, Extractor, Settings
from flowvqtalker_eval.report import Column
from flowvqtalker_eval.tables.pairs import Pair

__all__ = ["ClipPair", "Measure", "Options", "SetScore", "landmark_extractors", "need_weights", "pair_frames"]

_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]


@dataclass(frozen=True)
class Options:
    """How a table is made."""

    protocol: Literal["eat", "native"] = "eat"
    """eat: images aligned by 68 landmarks to 128x128, clips of different lengths paired by linspace. native: the
    frames as they are, of clips with equal lengths."""
    landmarks: Literal["dlib", "mediapipe"] = "dlib"
    """Detector of the 68 landmarks; numbers of one are not comparable with those of the other."""
    metrics: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Only these metrics. Default: all that are available here."""
    require: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME")] = ()
    """Fail if these metrics are not available; by default such columns are left out with a note."""
    syncnet: _File = None
    """SyncNet's published weights (syncnet_v2.model)."""
    inception: _File = None
    """Inception's weights of pytorch-fid."""
    emotion_fan: _File = None
    """Emotion-FAN's published weights."""
    cache: _Folder = None
    """Keep what is found in the videos, for the next table."""
    jobs: int | None = None
    """Number of processes. Default: one per core, at most 8."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    weights: _Folder = None
    """Folder of weights with a manifest. Default: those of the package."""

    def chosen_device(self) -> str:
        """The device that ``device`` stands for."""
        from flowvqtalker.loading import choose_device

        return str(choose_device(self.device))


@dataclass(frozen=True)
class ClipPair:
    """A generated clip beside its real one.

    Attributes:
        pair: names and labels.
        generated, real: their analyses.
        i, j: (n,) indices of the frames to compare, of the generated and of the real clip.
    """

    pair: Pair
    generated: Analysis
    real: Analysis
    i: npt.NDArray[np.int64]
    j: npt.NDArray[np.int64]

    @property
    def same(self) -> bool:
        """Whether the real clip is compared with itself (row GT)."""
        return self.pair.generated == self.pair.real

    def paired(self, name: str) -> tuple[Array, Array]:
        """Rows of a per-frame array: (real, generated), n each."""
        return self.real.arrays[name][self.j], self.generated.arrays[name][self.i]


def pair_frames(generated: int, real: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of the frames to compare: both clips are spread evenly (``linspace``) over the length of the shorter one,
    as in EAT's evaluation."""
    count = min(generated, real)
    i, j = (np.linspace(0, frames - 1, count).astype(np.int64) for frames in (generated, real))
    return i, j


class SetScore:
    """Accumulates a score of a set of clips, as opposed to a mean over clips.

    Arguments:
        keep: what is kept of a clip; None skips the clip.
        reduce: values by column of everything that was kept, at least one item.
    """

    def __init__(self, keep: Callable[[ClipPair], Any], reduce: Callable[[list[Any]], dict[str, float]]) -> None:
        self._keep, self._reduce = keep, reduce
        self._kept: list[Any] = []

    def add(self, clips: ClipPair) -> None:
        """Add a clip."""
        item = self._keep(clips)
        if item is not None:
            self._kept.append(item)

    def result(self) -> dict[str, float]:
        """Values by column; empty if nothing was kept."""
        return self._reduce(self._kept) if self._kept else {}


class Measure:
    """One or more columns of the table.

    Attributes:
        name: for ``--metrics`` and ``--require``.
        columns: the columns it fills.
        by_frames: weigh clips by their frames in the mean; else each clip weighs the same.
        compare: values of a pair from the files of the real and the generated video; picklable, None if not needed.
    """

    name = ""
    columns: tuple[Column, ...] = ()
    by_frames = False
    compare: Callable[[Path, Path], dict[str, float]] | None = None

    def __init__(self, options: Options) -> None:
        self.options = options

    def extractors(self) -> list[Extractor]:
        """What must be extracted from the videos.

        Raises:
            MissingDependency: if a package or weights are missing; the message becomes a note of the table.
        """
        return []

    def settings(self) -> Settings:
        """What the numbers depend on besides the settings of the extractors."""
        return {}

    def pair(self, clips: ClipPair) -> dict[str, float]:
        """Values of one pair by column; NaN or missing where the measure does not apply."""
        return {}

    def start(self) -> SetScore | None:
        """A new accumulator, if anything is measured on whole sets."""
        return None


def landmark_extractors(options: Options) -> list[Extractor]:
    """Extractors that give ``landmarks68``.

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


def need_weights(name: str, folder: Path | None) -> None:
    """Check that a folder of weights holds a network.

    Raises:
        MissingDependency: if it does not.
    """
    if f"{name}.safetensors" not in weights.manifest(folder):
        stage = weights.STAGES.get(name)
        how = f"train them with `flowvqtalker train {stage}`" if stage else "copy them from the package's folder"
        raise MissingDependency(f"the weights {name} are missing; {how}")
