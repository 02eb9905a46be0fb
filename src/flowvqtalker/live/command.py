"""The commands ``live`` and ``say``."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import wave
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from flowvqtalker.errors import UserError
from flowvqtalker.options import AnimateArguments, File, Folder, MarkArguments

if TYPE_CHECKING:
    from flowvqtalker.live.engine import LiveFrame
    from flowvqtalker.live.talker import LiveTalker

__all__ = ["Live", "Say"]

#: Sound of the stream; every encoder and player takes it.
_RATE = 48_000
#: Frames of silence after which a stream whose input has ended is complete.
_TAIL = 25


@dataclass(frozen=True, kw_only=True)
class Live(MarkArguments):
    """Let a portrait talk in real time: from a microphone or a pipe to a window, a camera, a file or a server."""

    portrait: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="PORTRAIT")]
    """Image with a face (JPEG, PNG, WebP, ...)."""
    speech: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SPEECH")] = "mic"
    """`mic`, `mic:NAME` for a certain microphone, or `-`: raw 16-bit mono samples on standard input."""
    rate: int = 16_000
    """Samples per second of standard input."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="TARGET")] = None
    """Where to stream: `-` (standard output), a file (.ts, .mp4, .mkv, .flv) or a URL (rtmp://, srt://, udp://)."""
    format: str = "mpegts"
    """Of standard output: mpegts or mp4 (fragmented)."""
    camera: bool = False
    """Send the images to a virtual camera (needs pyvirtualcam)."""
    play: bool | None = None
    """Play the sound (needs sounddevice). Default: with a window, unless a microphone would hear it."""
    emotion: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Emotion, or a mixture such as happy:0.7,surprised:0.3. Default: neutral."""
    intensity: float = 1.0
    """Strength of the emotion: 0 is neutral, 1 as learnt, at most 2."""
    seed: int = 0
    """Another seed gives other motion."""
    fps: float = 25.0
    """Images per second: 25, 22.5, 20, 15, 12.5, 10 or 5. It falls by itself on a machine that is too slow."""
    weights: Folder = None
    """Folder of weights with a manifest. Default: those of the package."""
    device: str = "auto"
    """Where the image generator runs: auto (a GPU if there is one), cpu, cuda or mps."""

    def run(self) -> None:
        """Stream until the input ends, the window is closed or Ctrl-C is pressed."""
        from flowvqtalker.live.inputs import feed, loudspeaker, microphone
        from flowvqtalker.live.outputs import StreamWriter, show, virtual_camera
        from flowvqtalker.live.talker import LiveTalker
        from flowvqtalker.motion.options import MotionOptions
        from flowvqtalker.pipeline import Talker

        heard = self.speech.partition(":")
        if self.speech != "-" and heard[0] != "mic":
            raise UserError(f"speech must be mic, mic:NAME or -, got {self.speech!r}; for a file use `animate`")
        if not self.portrait.is_file():
            raise UserError(f"{self.portrait} does not exist; check the name")
        options = MotionOptions(emotion=self.emotion, intensity=self.intensity, seed=self.seed)
        marks = self.marks()
        window = self.output is None and not self.camera
        with contextlib.ExitStack() as stack:
            writer = None
            if self.output is not None:
                writer = stack.enter_context(StreamWriter(self.output, _RATE, self.format))
            talker = Talker.from_pretrained(self.weights, device=self.device, components=LiveTalker.COMPONENTS)
            live = LiveTalker(talker, self.portrait, options, audio_rate=_RATE, fps=self.fps, marks=marks)
            stack.enter_context(live)
            frames: Iterable[LiveFrame] = live.frames()
            if self.speech == "-":
                frames = _until_spoken(live, frames, feed(live, sys.stdin.buffer, self.rate).is_alive)
            else:
                stack.enter_context(microphone(live, heard[2] or None))
            if self.play or (self.play is None and window and self.speech == "-"):
                frames = loudspeaker(frames, _RATE)
            if self.camera:
                frames = virtual_camera(frames)
            for frame in show(frames) if window else frames:
                if writer is not None:
                    writer.write(frame)


def _until_spoken(live: LiveTalker, frames: Iterable[LiveFrame], feeding: Callable[[], bool]) -> Iterator[LiveFrame]:
    """The frames until the input has ended and everything was spoken."""
    silent = 0
    for frame in frames:
        yield frame
        done = not feeding() and live.waiting == 0 and not frame.audio.any()
        silent = silent + 1 if done else 0
        if silent > _TAIL:
            return


@dataclass(frozen=True, kw_only=True)
class Say(AnimateArguments):
    """Say a text: as sound (.wav, or raw samples for `live` on standard output), or, with --portrait, as a video."""

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")]
    """What to say."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")]
    """Sound (.wav) or video (.mp4, .mov, .mkv) to write; `-`: raw 16-bit mono samples, 22,050 per second."""
    portrait: File = None
    """Image with a face, for a video."""
    voice: str = "en-us"
    """Language of eSpeak NG, with a variant on request: en-us, de, fr+f3 (f1 to f5 female, m1 to m8 male)."""
    speed: int = 160
    """Words per minute, 80 to 450."""

    def run(self) -> None:
        """Write the sound or the video."""
        from flowvqtalker.commands import Animate
        from flowvqtalker.io.atomic import atomic_write, check_output
        from flowvqtalker.speech.tts import speak

        sound = str(self.output) == "-" or self.output.suffix.lower() == ".wav"
        if sound == (self.portrait is not None):
            raise UserError("give --portrait with a video as output (.mp4, .mov, .mkv), and none with .wav or -")
        if str(self.output) != "-":
            check_output(self.output, (".wav",)) if sound else check_output(self.output)
        samples, rate = speak(self.text, self.voice, self.speed)
        if str(self.output) == "-":
            sys.stdout.buffer.write(samples.astype("<i2").tobytes())
            return

        def write(path: Path) -> None:
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(rate)
                file.writeframes(samples.astype("<i2").tobytes())

        if sound:
            atomic_write(self.output, write)
            return
        assert self.portrait is not None
        with tempfile.TemporaryDirectory() as folder:
            spoken = Path(folder) / "speech.wav"
            write(spoken)
            shared = {f.name: getattr(self, f.name) for f in fields(AnimateArguments)}
            Animate(portrait=self.portrait, speech=spoken, output=self.output, **shared).run()
