"""The videos of a study's page: copies that do not tell where they come from, attention checks, the practice clip."""

from __future__ import annotations

import itertools
import os
import tempfile
import wave
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.io.image import ImageArray
from flowvqtalker.io.video import VideoWriter, probe, read_video
from flowvqtalker_eval.study.key import LABELS, Expected

__all__ = ["blind_copy", "write_check", "write_practice"]

_PLAYABLE_SOUND = ("aac", "mp3")
_PRACTICE_SECONDS = 6.0
_PRACTICE_SIZE = 512
_CHECK_SECONDS = 5.0  # length of an attention check
_CHECK_FROM = 1.0  # seconds after which its text appears
_CHECK_SIDE = 512


def blind_copy(source: Path, target: Path) -> bool:
    """Copy a video so that the file tells nothing of its origin but the pictures and the sound.

    What browsers play (H.264 in yuv420p, AAC or MP3 sound) is copied without loss into a new MP4 container: without
    tags and names of tracks, without the encoder's settings (SEI units), every file with the same date. Anything else
    is encoded anew.

    Returns:
        whether the video was copied without loss.
    """
    lossless = _remux(source, target)
    if not lossless:
        sound = probe(source).sound
        rate = max(1, round(probe(source).fps) or FPS)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            encoded = Path(folder) / "encoded.mp4"
            with VideoWriter(encoded, source if sound else None, fps=rate, crf=12) as writer:
                for frame in read_video(source, fps=rate):
                    writer.write(frame)
            if not _remux(encoded, target):
                raise UserError(f"{source} cannot be made playable in a browser; convert it to H.264 in MP4 first")
    os.utime(target, (0, 0))
    return lossless


def _remux(source: Path, target: Path) -> bool:
    """Copy packets into a bare MP4; False where browsers would not play them."""
    import av
    from av.bitstream import BitStreamFilterContext

    try:
        with av.open(str(source), metadata_errors="ignore") as inside:
            video = inside.streams.video[0]
            sound = inside.streams.audio[0] if inside.streams.audio else None
            context = video.codec_context
            playable = context.name == "h264" and context.pix_fmt in ("yuv420p", "yuvj420p")
            if sound is not None:
                playable = playable and sound.codec_context.name in (*_PLAYABLE_SOUND, "mp3float")
            turned = getattr(next(inside.decode(video)), "rotation", 0)
            if not playable or turned:
                return False
            inside.seek(0)
            options = {"movflags": "+faststart", "fflags": "+bitexact"}
            with av.open(str(target), "w", format="mp4", options=options) as outside:
                copies = {stream.index: _like(outside, stream) for stream in (video, sound) if stream is not None}
                strip = BitStreamFilterContext("filter_units=remove_types=6", video, copies[video.index])
                for packet in inside.demux([stream for stream in (video, sound) if stream is not None]):
                    index = packet.stream.index
                    for piece in strip.filter(packet) if index == video.index and packet.dts is not None else [packet]:
                        if piece.dts is not None:
                            piece.stream = copies[index]
                            outside.mux(piece)
                for piece in strip.filter(None):
                    piece.stream = copies[video.index]
                    outside.mux(piece)
        return True
    except (av.FFmpegError, OSError, ValueError, StopIteration):
        target.unlink(missing_ok=True)
        return False


def _like(container: Any, stream: Any) -> Any:
    """A track of the same codec without the tags; PyAV renamed the call in 14."""
    if hasattr(container, "add_stream_from_template"):
        return container.add_stream_from_template(stream)
    return container.add_stream(template=stream)


def write_check(source: Path, target: Path, expected: Expected) -> None:
    """An attention check: a video that soon darkens and says in words which answers to choose."""
    lines = ["Attention check", "", "Please answer this clip with:"]
    if expected.lip_sync is not None:
        lines.append(f"Lips and speech: {expected.lip_sync}")
    lines += [f"Image quality: {expected.quality}", f"Emotion: {LABELS[expected.emotion]}"]
    info = probe(source)
    rate = max(1, round(info.fps) or FPS)
    again = itertools.chain.from_iterable(read_video(source, fps=rate) for _ in itertools.count())
    frames = itertools.islice(again, round(_CHECK_SECONDS * rate))
    with VideoWriter(target, source if info.sound else None, fps=rate) as writer:
        text: npt.NDArray[np.float32] | None = None
        for index, frame in enumerate(frames):
            frame = _fit(frame)
            if index >= _CHECK_FROM * rate:
                text = _text(lines, frame.shape[1], frame.shape[0]) if text is None else text
                frame = (frame * 0.15 * (1 - text) + 255 * text).astype(np.uint8)
            writer.write(frame)
    _bare(target)


def _fit(frame: ImageArray) -> ImageArray:
    """A picture large enough for the text."""
    from PIL import Image

    scale = max(1.0, _CHECK_SIDE / frame.shape[1])
    if scale == 1.0:
        return frame
    size = (round(frame.shape[1] * scale), round(frame.shape[0] * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


def _text(lines: list[str], width: int, height: int) -> npt.NDArray[np.float32]:
    """Lines of text in the middle: (height, width, 1) in [0, 1]."""
    from PIL import Image, ImageDraw, ImageFont

    size = width / 17
    font = ImageFont.load_default(size)
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    top = (height - 1.5 * size * len(lines)) / 2
    for number, line in enumerate(lines):
        draw.text((width / 2, top + 1.5 * size * number), line, fill=255, font=font, anchor="ma")
    return np.asarray(image, np.float32)[..., None] / np.float32(255)


def write_practice(target: Path) -> None:
    """The practice clip: a drawn face whose mouth opens with the loudness of the bundled speech.

    It shows the controls and lets people set the volume, and it sets no standard for the clips that count.
    """
    from flowvqtalker.constants import SAMPLE_RATE
    from flowvqtalker.io.audio import load

    with as_file(files("flowvqtalker") / "assets" / "sample_speech.ogg") as path:
        samples = load(path)[: round(_PRACTICE_SECONDS * SAMPLE_RATE)]
    frames = round(len(samples) / SAMPLE_RATE * FPS)
    window = SAMPLE_RATE // FPS
    loud = np.sqrt((samples[: frames * window].reshape(frames, window) ** 2).mean(1))
    opening = np.convolve(np.clip(loud / np.percentile(loud, 95), 0, 1), [0.25, 0.5, 0.25], "same")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        speech = Path(folder) / "speech.wav"
        with wave.open(str(speech), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(SAMPLE_RATE)
            file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
        with VideoWriter(target, speech) as writer:
            for index in range(frames):
                blink = 1.0 if index % 60 in (40, 41, 42) else 0.0
                writer.write(_face(float(opening[index]), blink))
    _bare(target)


def _face(opening: float, blink: float) -> ImageArray:
    """A drawn face, twice as large and scaled down for smooth edges."""
    from PIL import Image, ImageDraw

    size = _PRACTICE_SIZE * 2
    image = Image.new("RGB", (size, size), (206, 214, 220))
    draw = ImageDraw.Draw(image)

    def ellipse(x: float, y: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse([(x - rx) * size, (y - ry) * size, (x + rx) * size, (y + ry) * size], fill=colour)

    ellipse(0.5, 0.52, 0.30, 0.38, (243, 212, 180))
    for x in (0.38, 0.62):
        if blink:
            draw.line([((x - 0.05) * size, 0.42 * size), ((x + 0.05) * size, 0.42 * size)], (90, 60, 45), 10)
        else:
            ellipse(x, 0.42, 0.05, 0.035, (255, 255, 255))
            ellipse(x, 0.42, 0.02, 0.028, (60, 70, 90))
    draw.line([(0.5 * size, 0.46 * size), (0.48 * size, 0.58 * size), (0.52 * size, 0.585 * size)], (200, 160, 130), 8)
    ellipse(0.5, 0.72, 0.10, 0.02 + 0.065 * opening, (176, 84, 80))
    ellipse(0.5, 0.72, 0.085, 0.004 + 0.058 * opening, (70, 22, 26))
    return np.asarray(image.resize((_PRACTICE_SIZE, _PRACTICE_SIZE), Image.Resampling.BOX))


def _bare(path: Path) -> None:
    """Strip a file that was just written of its tags, like every other clip."""
    part = path.with_name(f".{path.name}.part")
    if not _remux(path, part):
        raise UserError(f"{path} cannot be copied; check the disk")
    os.replace(part, path)
    os.utime(path, (0, 0))
