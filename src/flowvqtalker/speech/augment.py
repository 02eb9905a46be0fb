"""Speech augmentation for training: rooms, noise, lines and codecs on the wave; voices and rooms on log-mel columns.

Log-mel columns are cheap to change, but no change of columns is a room, a telephone or a codec; those work on the wave.
Nothing here moves the speech in time: what was said at a sample is still said there.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import SAMPLE_RATE
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.speech.features import MELS

__all__ = [
    "CODECS",
    "change_voice",
    "codec",
    "degrade",
    "noise",
    "reverberate",
    "room",
    "spectral_augment",
    "telephone",
]

Floats = npt.NDArray[np.float32]

#: Name -> container, FFmpeg encoder and its sampling rate, bit rates to choose from.
CODECS: dict[str, tuple[str, str, int, tuple[int, ...]]] = {
    "mp3": ("mp3", "libmp3lame", 16_000, (16_000, 24_000, 48_000)),
    "opus": ("ogg", "libopus", 48_000, (8_000, 12_000, 24_000)),
}
#: Largest delay of a codec that is corrected, in samples (a tenth of a second).
_SHIFT = 1600


def room(wave: Floats, random: np.random.Generator, seconds: float, level: float) -> Floats:
    """Reverberate: the direct sound, and noise that decays exponentially from 5 ms after it.

    Arguments:
        wave: (n,) samples.
        random: of the tail.
        seconds: reverberation time, in which the tail falls by 60 dB.
        level: power of the tail as a fraction of the direct sound's.
    """
    from scipy.signal import fftconvolve

    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tail = random.normal(size=len(time)) * 10 ** (-3 * time / seconds) * (time > 0.005)
    tail *= np.sqrt(level / np.square(tail).sum())
    result: Floats = (wave + fftconvolve(wave, tail)[: len(wave)]).astype(np.float32)
    return result


def noise(wave: Floats, random: np.random.Generator, decibels: float, slope: float) -> Floats:
    """Add stationary noise ``decibels`` below the speech, with power falling as frequency ** ``slope`` (0 white, 1
    pink, 2 brown)."""
    spectrum = np.fft.rfft(random.normal(size=len(wave)))
    spectrum *= np.maximum(np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE), 50.0) ** (-slope / 2)
    added = np.fft.irfft(spectrum, len(wave))
    power = np.square(wave).mean() / np.maximum(np.square(added).mean(), 1e-20)
    result: Floats = (wave + added * np.sqrt(power * 10 ** (-decibels / 10))).astype(np.float32)
    return result


def telephone(wave: Floats, low: float = 300.0, high: float = 3400.0) -> Floats:
    """Limit the band without delay, then quantise to 8 bits by the mu-law (ITU-T G.711)."""
    from scipy.signal import butter, sosfiltfilt

    if len(wave) < 64:  # shorter than the filter
        return wave
    limited = sosfiltfilt(butter(3, [low, high], "bandpass", fs=SAMPLE_RATE, output="sos"), wave)
    loudest = np.abs(limited).max() + 1e-9
    squeezed = np.sign(limited) * np.log1p(255 * np.abs(limited) / loudest) / np.log(256)
    steps = np.round(squeezed * 127) / 127
    result: Floats = (np.sign(steps) * (256 ** np.abs(steps) - 1) / 255 * loudest).astype(np.float32)
    return result


def codec(wave: Floats, name: str, bit_rate: int) -> Floats:
    """Encode and decode by one of :data:`CODECS`, corrected for the delay of the codec.

    Raises:
        MissingDependency: without PyAV.
        UserError: if its FFmpeg lacks the encoder.
    """
    try:
        import av
    except ImportError as error:
        raise MissingDependency("PyAV is not installed; run `pip install 'av>=13'`") from error
    container, encoder, rate, _ = CODECS[name]
    file = io.BytesIO()
    try:
        with av.open(file, "w", format=container) as output:
            track = output.add_stream(encoder, rate=rate, layout="mono")
            track.bit_rate = bit_rate
            resampler = av.AudioResampler(format=track.format, layout="mono", rate=rate, frame_size=track.frame_size)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, np.float32)[None], "fltp", "mono")
            frame.sample_rate = SAMPLE_RATE
            for part in (*resampler.resample(frame), *resampler.resample(None), None):
                output.mux(track.encode(part))
    except (av.FFmpegError, ValueError) as error:
        raise UserError(
            f"this PyAV cannot encode {name} ({error}); install PyAV from PyPI, or leave codecs out"
        ) from error
    file.seek(0)
    back = av.AudioResampler(format="fltp", layout="mono", rate=SAMPLE_RATE)
    with av.open(file) as given:
        parts = [part for frame in given.decode(audio=0) for part in back.resample(frame)]
    decoded = np.concatenate([part.to_ndarray()[0] for part in (*parts, *back.resample(None))])
    return _aligned(decoded, wave)


def _aligned(decoded: Floats, wave: Floats) -> Floats:
    """The segment of ``decoded`` that correlates best with ``wave``, of the same length."""
    from scipy.signal import fftconvolve

    padded = np.concatenate([np.zeros(_SHIFT, np.float32), decoded, np.zeros(len(wave), np.float32)])
    likeness = fftconvolve(padded[: len(wave) + 2 * _SHIFT], wave[::-1], mode="valid")
    start = int(np.argmax(likeness))
    result: Floats = padded[start : start + len(wave)].astype(np.float32)
    return result


def degrade(wave: Floats, random: np.random.Generator, codecs: bool = False) -> Floats:
    """Degrade speech by a random choice of room, noise and line.

    Arguments:
        wave: (n,) samples at 16 kHz.
        random: of the changes.
        codecs: allow the :data:`CODECS` as a line (needs PyAV; about 10 ms per second of speech).
    """
    if len(wave) == 0 or not np.any(wave):
        return wave
    if random.random() < 0.6:
        wave = room(wave, random, float(random.uniform(0.15, 0.8)), float(random.uniform(0.05, 0.6)))
    if random.random() < 0.6:
        wave = noise(wave, random, float(random.uniform(5, 30)), float(random.uniform(0, 2)))
    line = random.random()
    if line < 0.2:
        wave = telephone(wave, float(random.uniform(100, 350)), float(random.uniform(3000, 5000)))
    elif codecs and line < 0.6:
        name = str(random.choice(sorted(CODECS)))
        wave = codec(wave, name, int(random.choice(CODECS[name][3])))
    return wave


#: One unit of the ``mel`` features is 12.5 dB; the natural logarithm of power per unit.
_LOG_POWER = 12.5 / 10 * np.log(10)


def spectral_augment(mel: Floats, random: np.random.Generator, frontend: str = "mel") -> Floats:
    """Change log-mel columns as another voice, room or line would.

    Draws loudness, spectral tilt, vocal tract length and noise floor; sometimes reverberation and a band limit.

    Arguments:
        mel: (m, 80) columns of the frontend.
        random: of the change.
        frontend: name of the frontend, one of :data:`flowvqtalker.speech.features.FRONTENDS`.
    """
    if frontend == "whisper":  # a unit is 40 dB there; its -80 to 20 dB lie in [-4, 4] of the other frontend
        units = (40 * np.asarray(mel, np.float32) - 40 + 80) / 12.5 - 4
        changed: Floats = ((12.5 * (_augment(units, random, 100) + 4) - 80 + 40) / 40).astype(np.float32)
        return changed
    return _augment(mel, random, 80)


def _augment(mel: Floats, random: np.random.Generator, rate: int) -> Floats:
    """:func:`spectral_augment` of columns in [-4, 4], ``rate`` of them per second."""
    if random.random() < 0.4:
        mel = reverberate(mel, random.uniform(0.15, 0.7), random.uniform(0.05, 0.4), rate)
    mel = change_voice(mel, random)
    if random.random() < 0.3:
        cut = int(random.integers(50, MELS))  # 3 kHz and up
        mel = mel.copy()
        mel[:, cut:] = np.maximum(-4, mel[:, cut:] - random.uniform(1, 4))
    return mel


def change_voice(mel: Floats, random: np.random.Generator) -> Floats:
    """Change loudness, spectral tilt, vocal tract length and noise floor of all columns alike.

    Arguments:
        mel: (m, 80) columns in [-4, 4], where 0.08 is one decibel.
        random: of the change.
    """
    bands = np.arange(MELS, dtype=np.float32)
    position = np.clip(bands * random.uniform(0.9, 1.1) + random.uniform(-1, 1), 0, MELS - 1)  # vocal tract length
    low = np.minimum(position.astype(np.int64), MELS - 2)
    part = (position - low).astype(np.float32)
    changed = mel[:, low] * (1 - part) + mel[:, low + 1] * part
    tilt = (bands / (MELS - 1) - 0.5) * random.uniform(-1, 1)
    changed += (random.uniform(-0.8, 0.5) + tilt).astype(np.float32)
    floor = random.uniform(-5, -1.5)  # noise fills everything below
    if floor > -4:
        noise = floor + random.normal(0, 0.2, changed.shape).astype(np.float32)
        changed = np.logaddexp(changed * 3, noise * 3) / 3
    clipped: Floats = np.clip(changed, -4, 4).astype(np.float32)
    return clipped


def reverberate(mel: Floats, seconds: float, level: float, rate: int = 80) -> Floats:
    """Add the decaying tail of a room to the power of each band.

    Arguments:
        mel: (m, 80) columns in [-4, 4].
        seconds: reverberation time, in which the tail falls by 60 dB.
        level: power of the tail as a share of the power that feeds it.
        rate: columns per second.
    """
    from scipy.signal import lfilter

    power = np.exp(_LOG_POWER * mel.astype(np.float64))
    keep = 10 ** (-6 / (rate * seconds))
    tail = lfilter([0.0, 1 - keep], [1.0, -keep], power, axis=0)
    louder: Floats = np.clip(np.log(power + level * tail) / _LOG_POWER, -4, 4).astype(np.float32)
    return louder
