"""The teacher of our speech encoder: Whisper, for features to distil and layers to start from.

Only ``flowvqtalker prepare-speech`` and ``train speech`` need it. The model is Whisper in CTranslate2's format (a
folder with ``model.bin``); the base model's encoder takes about 20 ms of one CPU core per second of speech.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.speech.features import mel_filters

__all__ = ["RATE", "WIDTH", "Teacher", "read_variables", "whisper_mel"]

#: Features per second and feature size of Whisper base.
RATE, WIDTH = 50, 512
_FFT, _HOP = 400, 160
#: Mel columns of 10 ms per call of the encoder, which was trained on 3,000 (30 s).
_CHUNK = 2800
#: Samples of silence after the end, so that the last features see a future.
_TAIL = 3200

Floats = npt.NDArray[np.float32]


def whisper_mel(wave: Floats) -> Floats:
    """Whisper's log-mel (80, n // 160) of samples (n,) at 16 kHz: 25 ms Hann frames every 10 ms, clipped at 8 decades
    below the maximum (openai/whisper: ``whisper/audio.py``)."""
    padded = np.pad(wave, _FFT // 2, mode="reflect")
    count = max(0, (len(padded) - _FFT) // _HOP)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[: count * _HOP : _HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power = np.abs(np.fft.rfft(frames * hann.astype(np.float32), axis=1)).astype(np.float32) ** 2
    logs = np.log10(np.maximum(power @ mel_filters(_FFT, 0.0, 8000.0).astype(np.float32), 1e-10))
    result: Floats = ((np.maximum(logs, logs.max() - 8) + 4) / 4).T.astype(np.float32)
    return result


class Teacher:
    """The encoder of a Whisper model.

    Arguments:
        folder: with ``model.bin`` in the format of CTranslate2 and its ``config.json``.

    Raises:
        UserError: if CTranslate2 or the model is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        if not (Path(folder) / "model.bin").is_file():
            raise UserError(f"{folder} holds no model.bin; give the folder of a Whisper model for CTranslate2")
        try:
            import ctranslate2
        except ImportError as error:
            raise UserError("ctranslate2 is missing; run pip install 'flowvqtalker[teacher]'") from error
        self._ctranslate2: Any = ctranslate2
        try:
            self._model = ctranslate2.models.Whisper(
                str(folder), device="cpu", compute_type="int8_float32", intra_threads=1, inter_threads=1
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{folder} is not a Whisper model for CTranslate2: {error}") from error

    def __call__(self, wave: Floats, frames: int) -> Floats:
        """Features of video frames, two concatenated per frame.

        Arguments:
            wave: (n,) samples at 16 kHz.
            frames: number of 25-fps frames, up to about n / 640.

        Returns:
            (frames, 1024); the last is repeated where the sound is shorter.
        """
        mel = whisper_mel(np.concatenate([wave, np.zeros(_TAIL, np.float32)]))
        mel = mel[:, : mel.shape[1] // 2 * 2]
        parts = []
        for start in range(0, mel.shape[1], _CHUNK):
            block = np.ascontiguousarray(mel[None, :, start : start + _CHUNK])
            view = self._ctranslate2.StorageView.from_array(block)
            parts.append(np.array(self._model.encode(view, to_cpu=True))[0])
        found = np.concatenate(parts)
        index = np.minimum(np.arange(2 * frames), len(found) - 1)
        pairs: Floats = found[index].reshape(frames, 2 * found.shape[1]).astype(np.float32)
        return pairs


#: Types of variables in CTranslate2's binary format, by number.
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_variables(folder: str | Path) -> dict[str, Tensor]:
    """The variables of the encoder of a CTranslate2 model (``model.bin``; OpenNMT/CTranslate2: ``ctranslate2/specs``).

    Only models stored in a floating point type can be read; int8 models keep their scales elsewhere.

    Raises:
        UserError: if the file is missing, of another format, or quantised.
    """
    path = Path(folder) / "model.bin"
    if not path.is_file():
        raise UserError(f"{folder} holds no model.bin; give the folder of a Whisper model for CTranslate2")
    data, place = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal place
        value: int = struct.unpack_from("<" + kind, data, place)[0]
        place += struct.calcsize(kind)
        return value

    def text() -> str:
        nonlocal place
        length = number("H")
        place += length
        return data[place - length : place].rstrip(b"\0").decode()

    try:
        version, name = number("I"), text()
        if version < 4 or not name.startswith("Whisper"):
            raise UserError(f"{path} is no Whisper model of CTranslate2's format 4 or later; convert it again")
        number("I")  # revision of the model specification
        found = {}
        for _ in range(number("I")):
            key = text()
            shape = [number("I") for _ in range(number("B"))]
            kind, size = _TYPES[number("B")], number("I")
            values = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, place)
            place += size
            if key.startswith("encoder/"):
                found[key] = torch.from_numpy(values.reshape(shape).copy())
    except (struct.error, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a model of CTranslate2 ({error}); convert it again") from error
    if any(value.dtype == torch.int8 for value in found.values()):
        raise UserError(f"{path} is quantised to int8; convert it with --quantization float16")
    return found
