"""Speech sets as training reads them, with numpy alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowvqtalker.errors import UserError

__all__ = ["COLUMNS", "CURVES", "TEACHER", "UNITS", "SpeechSet"]

#: Sizes of the targets.
TEACHER, UNITS, CURVES = 256, 17, 12
COLUMNS = {"teacher": TEACHER, "lips": 64, "units": UNITS, "curves": CURVES}


class SpeechSet:
    """Read a speech set (:mod:`flowvqtalker.data.speech` says what its files hold).

    Attributes:
        mel, teacher, lips, units, curves: see the module (memory-mapped).
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
