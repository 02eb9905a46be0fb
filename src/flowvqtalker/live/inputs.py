"""Where live speech comes from: a microphone, or raw samples on standard input; and where it is heard."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.live.engine import LiveFrame
from flowvqtalker.live.talker import LiveTalker

__all__ = ["feed", "loudspeaker", "microphone"]

#: Samples read at once, 20 ms at 48 kHz.
_BLOCK = 960


def feed(live: LiveTalker, source: BinaryIO, rate: int) -> threading.Thread:
    """Push raw samples, 16-bit mono little-endian, as they arrive, on a thread of its own; ends with the source."""

    def run() -> None:
        left = b""
        # read1 returns what is there, so that a slow writer is not waited for.
        read = getattr(source, "read1", source.read)
        with contextlib.suppress(UserError):  # the stream was closed
            while data := read(2 * _BLOCK):
                left += data
                whole = len(left) & ~1
                while live.waiting > 30:  # a file piped in: take it as it is spoken
                    time.sleep(0.5)
                live.push(np.frombuffer(left[:whole], "<i2"), rate)
                left = left[whole:]
            live.end_of_utterance()

    thread = threading.Thread(target=run, name="flowvqtalker-input", daemon=True)
    thread.start()
    return thread


def _sounddevice(what: str) -> Any:
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise MissingDependency(
            f"{what} needs sounddevice and PortAudio ({error}); run `pip install 'flowvqtalker[live]'`"
        ) from error
    return sounddevice


@contextlib.contextmanager
def microphone(live: LiveTalker, device: str | None = None) -> Iterator[None]:
    """Push what a microphone hears, within the block.

    Raises:
        MissingDependency, UserError: without sounddevice, or without a microphone.
    """
    sounddevice = _sounddevice("the microphone")
    try:
        rate = int(sounddevice.query_devices(device, "input")["default_samplerate"])
        stream = sounddevice.InputStream(
            samplerate=rate,
            device=device,
            channels=1,
            dtype="int16",
            blocksize=rate // 50,
            callback=lambda data, *_: live.push(data[:, 0].copy(), rate),
        )
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"no microphone can be opened ({error}); give - for raw samples on standard input") from error
    with stream:
        yield


def loudspeaker(frames: Iterable[LiveFrame], rate: int) -> Iterator[LiveFrame]:
    """Play the sound while the frames pass.

    Raises:
        MissingDependency, UserError: without sounddevice, or without a loudspeaker.
    """
    sounddevice = _sounddevice("the loudspeaker")
    try:
        stream = sounddevice.OutputStream(samplerate=rate, channels=1, dtype="float32", latency="low")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise UserError(f"no loudspeaker can be opened ({error}); give --no-play") from error
    with stream:
        for frame in frames:
            stream.write(frame.audio[:, None])
            yield frame
