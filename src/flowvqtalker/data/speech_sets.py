"""Speech sets: training data of the stage ``speech``, in files that it reads with numpy.

    flowvqtalker prepare-speech --shards SHARD --recordings ROOT --teacher WHISPER -o SET

A speech set is a folder. Rows are video frames (25 fps) of all recordings, concatenated:

=================  ==================================================================================================
``index.npz``      per recording: name, speaker, split, first row, rows, first mel column, mel columns, rate; and the
                   principal components of the teacher's features
``mel.npy``        (M, 80) float16 log-mel of the frontend ``whisper``, 100 columns per second (``speech.features``)
``teacher.npy``    (N, 256) float16: the teacher's features, standardised and reduced
``lips.npy``       (N, 64) float16: β around the recording's mean, of clips with a tracked face; NaN elsewhere
``units.npy``      (N, 17) float16: facial action units, standardised; NaN where there are none
``curves.npy``     (N, 12) float16: principal components of an animator's mouth curves, standardised; NaN elsewhere
=================  ==================================================================================================

Every recording is stored twice: as it is, and played faster or slower (at 0.85 to 1.18 times the speed), which moves
pitch and formants like another speaker's; targets and teacher follow the changed sound. Recordings of training speakers
are stored once more, degraded by a room, noise and a line or codec (``speech.augment.degrade``); their
targets are those of the clean recording, so that the speech encoder learns to ignore all that.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import numpy.typing as npt
import tyro
from tqdm import tqdm

from flowvqtalker.constants import FPS
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_folder
from flowvqtalker.io.audio import load
from flowvqtalker.speech.augment import degrade
from flowvqtalker.speech.features import log_mel

__all__ = ["CURVES", "TEACHER", "UNITS", "PrepareSpeech", "Recording", "SpeechSet"]

logger = logging.getLogger(__name__)

#: Sizes of the targets per frame.
TEACHER, UNITS, CURVES = 256, 17, 12
COLUMNS = {"teacher": TEACHER, "lips": 64, "units": UNITS, "curves": CURVES}

_SLOWEST, _FASTEST = 0.85, 1.18
#: Clips whose lips hardly correlate with their sound give no lip targets.
_CORRELATION = 0.1

Floats = npt.NDArray[np.float32]


class SpeechSet:
    """Read a speech set.

    Attributes:
        mel, teacher, lips, units, curves: see the module; memory-mapped.
        speaker, split: of each recording.
        start, length: rows of each recording.
        mel_start, mel_length: mel columns of each recording.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        try:
            with np.load(path / "index.npz", allow_pickle=False) as index:
                self.index = {key: index[key] for key in index.files}
            self.mel = np.load(path / "mel.npy", mmap_mode="r")
            columns = {key: np.load(path / f"{key}.npy", mmap_mode="r") for key in COLUMNS}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{path} is not a speech set ({error}); make one with flowvqtalker prepare-speech"
            ) from error
        self.teacher, self.lips = columns["teacher"], columns["lips"]
        self.units, self.curves = columns["units"], columns["curves"]
        self.speaker, self.split = self.index["speaker"], self.index["split"]
        self.start, self.length = self.index["start"], self.index["length"]
        self.mel_start, self.mel_length = self.index["mel_start"], self.index["mel_length"]

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Recording:
    """Speech with its targets.

    Attributes:
        name, speaker: text; the speaker determines the split.
        wave: (n,) samples at 16 kHz.
        targets: name of a column -> (frames per second, values (T, D)).
    """

    name: str
    speaker: str
    wave: Floats
    targets: dict[str, tuple[float, Floats]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """Number of complete 25-fps frames."""
        return len(self.wave) // SAMPLES

    def at(self, rate: float) -> Recording:
        """The recording played ``rate`` times as fast."""
        if rate == 1:
            return self
        where = np.arange(int(len(self.wave) / rate)) * rate
        wave = np.interp(where, np.arange(len(self.wave)), self.wave).astype(np.float32)
        moved = {key: (fps * rate, values) for key, (fps, values) in self.targets.items()}
        return Recording(f"{self.name} x{rate:.3f}", self.speaker, wave, moved)

    def target(self, key: str) -> Floats:
        """A target at 25 fps, (frames, D); NaN after its end, and where there is none."""
        result = np.full((self.frames, COLUMNS[key]), np.nan, np.float32)
        if key in self.targets:
            fps, values = self.targets[key]
            where = np.arange(self.frames) / FPS * fps
            there = where <= len(values) - 1
            low = np.clip(where.astype(np.int64), 0, max(0, len(values) - 2))
            part = (where - low)[:, None].astype(np.float32)
            between = values[low] * (1 - part) + values[np.minimum(low + 1, len(values) - 1)] * part
            result[there] = between[there]
        return result


@dataclass(frozen=True)
class PrepareSpeech:
    """Write a speech set from shards, recordings of speech and a pretrained speech encoder."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="SET")]
    """Folder to write."""
    teacher: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Whisper base for CTranslate2."""
    shards: tuple[Path, ...] = ()
    """Folders of `flowvqtalker prepare`."""
    recordings: Annotated[Path | None, tyro.conf.arg(metavar="ROOT")] = None
    """Folder with speech.csv, and optionally ravdess_au/ and facegood/."""
    degraded: bool = True
    """Add every training recording through a room, noise and a line or codec."""
    seed: int = 0
    """Seed of rates and degradations."""

    def run(self) -> None:
        from flowvqtalker.data.teacher import Teacher

        if not self.shards and self.recordings is None:
            raise UserError("no speech was given; give --shards, --recordings or both")
        write(self.output, self.shards, self.recordings, Teacher(self.teacher), self.seed, self.degraded)


def write(
    output: Path, shards: tuple[Path, ...], root: Path | None, teacher: Any, seed: int = 0, degraded: bool = True
) -> None:
    """Write a speech set; the folder appears when it is complete.

    Arguments:
        output: folder.
        shards, root: see :class:`PrepareSpeech`.
        teacher: (wave, frames) -> (frames, width) features.
        seed: of rates and degradations.
        degraded: see :class:`PrepareSpeech`.

    Raises:
        UserError: if the folder exists or there is no recording.
    """
    if output.exists():
        raise UserError(f"{output} exists; remove it or choose another name")
    found = list(_of_shards(shards)) + (list(_of_folder(root)) if root is not None else [])
    if not found:
        raise UserError("no recording was found; check the folders")
    rows: dict[str, list[npt.NDArray[np.float16]]] = {key: [] for key in COLUMNS}
    mels, about = [], []
    for number, original in enumerate(tqdm(found, desc="speech", unit="recording", disable=None)):
        random = np.random.default_rng([seed, number])
        for rate in (1.0, float(np.exp(random.uniform(np.log(_SLOWEST), np.log(_FASTEST))))):
            recording = original.at(rate)
            if recording.frames == 0:
                continue
            split = split_of(recording.speaker)
            waves = [(recording.name, recording.wave)]
            if degraded and rate == 1 and split == "train":
                waves.append((f"{recording.name} degraded", degrade(recording.wave, random, codecs=True)))
            features = teacher(recording.wave, recording.frames).astype(np.float16)
            for name, wave in waves:
                mel = log_mel(wave, "whisper")
                about.append((name, recording.speaker, split, recording.frames, len(mel), rate))
                mels.append(mel.astype(np.float16))
                rows["teacher"].append(features)
                for key in ("lips", "units", "curves"):
                    rows[key].append(recording.target(key).astype(np.float16))
    names, speakers, splits, lengths, columns, rates = map(np.array, zip(*about, strict=True))
    every = np.concatenate(rows["teacher"])
    mean, matrix = _principal(every, np.repeat(splits == "train", lengths), TEACHER)
    blocks = (every[i : i + 8192] for i in range(0, len(every), 8192))
    rows["teacher"] = [((block - mean) @ matrix).astype(np.float16) for block in blocks]
    with atomic_folder(output) as folder:
        np.save(folder / "mel.npy", np.concatenate(mels))
        for key, values in rows.items():
            np.save(folder / f"{key}.npy", np.concatenate(values))
        index = {
            **{"name": names, "speaker": speakers, "split": splits, "rate": rates},
            **{"length": lengths, "start": np.cumsum([0, *lengths[:-1]])},
            **{"mel_length": columns, "mel_start": np.cumsum([0, *columns[:-1]])},
            **{"mean": mean, "components": matrix},
        }
        np.savez(folder / "index.npz", **cast(Any, index))
    logger.info("%s: %d recordings, %.1f minutes", output, len(about), lengths.sum() / FPS / 60)


def _principal(features: npt.NDArray[Any], rows: npt.NDArray[np.bool_], size: int) -> tuple[Floats, Floats]:
    """Mean (F,) and matrix (F, 256) to principal components, not whitened.

    Features are scaled to unit variance first, since a few are a hundred times larger than the rest.
    """
    chosen = np.flatnonzero(rows)
    sample = features[chosen[:: max(1, len(chosen) // 40_000)]].astype(np.float32)
    mean, scale = sample.mean(0), sample.std(0) + 1e-4
    _, _, vh = np.linalg.svd(((sample - mean) / scale)[:16384], full_matrices=False)
    size = min(size, len(vh))
    matrix = np.zeros((features.shape[1], TEACHER), np.float32)
    matrix[:, :size] = vh[:size].T / scale[:, None]
    return mean, matrix


def _of_shards(shards: tuple[Path, ...]) -> Iterator[Recording]:
    for folder in shards:
        shard = Shard(folder)
        for number in np.flatnonzero(shard.speech & shard.sound & ~shard.is_image):
            expression = np.array(shard.expression[shard.rows(int(number))], np.float32)
            follows = shard.split[number] == "val" or not shard.correlation[number] < _CORRELATION
            lips = {"lips": (float(FPS), expression - expression.mean(0))} if follows else {}
            yield Recording(str(shard.name[number]), str(shard.identity[number]), shard.wave(int(number)), lips)


def _of_folder(root: Path) -> Iterator[Recording]:
    """Recordings of ``speech.csv`` (columns file and speaker, files under ``speech/``) with action units from
    ``ravdess_au/frames.npz``, and the sequences of ``facegood/``."""
    table = root / "speech.csv"
    if not table.is_file():
        raise UserError(f"{root} holds no speech.csv (columns file and speaker); check --recordings")
    with open(table, newline="", encoding="utf-8") as file:
        listed = [(row["file"], row["speaker"]) for row in csv.DictReader(file)]
    units: dict[str, Floats] = {}
    if (root / "ravdess_au" / "frames.npz").is_file():
        with np.load(root / "ravdess_au" / "frames.npz", allow_pickle=False) as archive:
            units = {key: archive[key].astype(np.float32) for key in archive.files if key != "names"}
        every = np.concatenate(list(units.values()))
        mean, scale = np.nanmean(every, 0), np.nanstd(every, 0) + 1e-3
        units = {key: (values - mean) / scale for key, values in units.items()}
    for name, speaker in tqdm(listed, desc="decode", unit="file", disable=None):
        targets = {"units": (29.97, units[Path(name).stem])} if Path(name).stem in units else {}
        yield Recording(name, speaker, load(root / "speech" / name), targets)
    yield from _of_curves(root / "facegood")


def _of_curves(folder: Path) -> Iterator[Recording]:
    found = [(path, np.load(path)) for path in sorted(folder.glob("*.npz"))]
    if not found:
        return
    every = np.concatenate([np.asarray(data["weights"], np.float32) for _, data in found])
    mean = every.mean(0)
    _, s, vh = np.linalg.svd(every - mean, full_matrices=False)
    matrix = vh[:CURVES].T / (s[:CURVES] / len(every) ** 0.5 + 1e-6)
    for path, data in found:
        curves = (np.asarray(data["weights"], np.float32) - mean) @ matrix
        wave = load(path.with_suffix(".opus"))
        # In pieces of ten seconds, since a batch draws recordings evenly.
        for start in range(0, len(wave) // (10 * 16000) + 1):
            part = wave[start * 160_000 : (start + 1) * 160_000]
            fps = float(data["fps"])
            values = curves[int(start * 10 * fps) : int((start + 1) * 10 * fps)]
            if len(part) >= 16000 and len(values) > fps:
                yield Recording(f"facegood/{path.stem}_{start}", "facegood", part, {"curves": (fps, values)})
