"""The same speech by another voice, in another room, over another line: changes of log-mel columns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flowvqtalker.speech.features import MELS

__all__ = ["perturb", "reverberate", "vary", "vary_fine"]

Floats = npt.NDArray[np.float32]

#: A unit of the log-mel features is 12.5 dB; natural logarithm of power per unit.
_NATURAL = 12.5 / 10 * np.log(10)


def perturb(mel: Floats, random: np.random.Generator) -> Floats:
    """One change of loudness, spectral tilt, vocal tract length and noise floor for all columns.

    Arguments:
        mel: (m, 80) columns in [-4, 4], where 0.08 is a decibel.
        random: of the change.
    """
    bands = np.arange(MELS, dtype=np.float32)
    where = np.clip(bands * random.uniform(0.9, 1.1) + random.uniform(-1, 1), 0, MELS - 1)  # vocal tract length
    low = np.minimum(where.astype(np.int64), MELS - 2)
    part = (where - low).astype(np.float32)
    changed = mel[:, low] * (1 - part) + mel[:, low + 1] * part
    tilt = (bands / (MELS - 1) - 0.5) * random.uniform(-1, 1)
    changed += (random.uniform(-0.8, 0.5) + tilt).astype(np.float32)
    floor = random.uniform(-5, -1.5)  # noise fills what lies below it
    if floor > -4:
        noise = floor + random.normal(0, 0.2, changed.shape).astype(np.float32)
        changed = np.logaddexp(changed * 3, noise * 3) / 3
    limited: Floats = np.clip(changed, -4, 4).astype(np.float32)
    return limited


def vary(mel: Floats, random: np.random.Generator, rate: int = 80) -> Floats:
    """:func:`perturb`, sometimes with reverberation before it and a telephone or codec's band limit after it.

    Arguments:
        mel: (m, 80) columns in [-4, 4].
        random: of the change.
        rate: columns a second.
    """
    if random.random() < 0.4:
        mel = reverberate(mel, random.uniform(0.15, 0.7), random.uniform(0.05, 0.4), rate)
    mel = perturb(mel, random)
    if random.random() < 0.3:
        cut = int(random.integers(50, MELS))  # 3 kHz and up
        mel = mel.copy()
        mel[:, cut:] = np.maximum(-4, mel[:, cut:] - random.uniform(1, 4))
    return mel


def vary_fine(mel: Floats, random: np.random.Generator) -> Floats:
    """:func:`vary` for columns (m, 80) of the front end ``fine``, where a unit is 40 decibels."""
    units = (40 * np.asarray(mel, np.float32) - 40 + 80) / 12.5 - 4  # its -80 to 20 dB lie in [-4, 4]
    changed: Floats = ((12.5 * (vary(units, random, rate=100) + 4) - 80 + 40) / 40).astype(np.float32)
    return changed


def reverberate(mel: Floats, seconds: float, level: float, rate: int = 80) -> Floats:
    """Add the decaying tail of a room to the power of each band.

    Arguments:
        mel: (m, 80) columns in [-4, 4].
        seconds: reverberation time: the tail falls by 60 dB in it.
        level: of the tail, as a share of the power that feeds it.
        rate: columns a second.
    """
    from scipy.signal import lfilter

    power = np.exp(_NATURAL * mel.astype(np.float64))
    keep = 10 ** (-6 / (rate * seconds))
    tail = lfilter([0.0, 1 - keep], [1.0, -keep], power, axis=0)
    louder: Floats = np.clip(np.log(power + level * tail) / _NATURAL, -4, 4).astype(np.float32)
    return louder
