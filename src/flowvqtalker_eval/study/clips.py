"""The videos of a study's page: anonymous copies, attention checks, and the practice clip."""

from __future__ import annotations

import itertools
import os
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import FPS, SAMPLE_RATE
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
    """Copy a video so that the file tells nothing of its origin but images and sound.

    What browsers play (H.264 in yuv420p, AAC or MP3 sound) is copied losslessly into a new MP4 container: without tags
    and track names, without the encoder's settings (SEI units), every file with the same date. Anything else is
    re-encoded.

    Returns:
        whether the video was copied losslessly.
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
    from PIL import Image

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
            if frame.shape[1] < _CHECK_SIDE:  # too small for the text
                size = (_CHECK_SIDE, round(_CHECK_SIDE * frame.shape[0] / frame.shape[1]))
                frame = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
            if index >= _CHECK_FROM * rate:
                text = _text(lines, frame.shape[1], frame.shape[0]) if text is None else text
                frame = (frame * 0.15 * (1 - text) + 255 * text).astype(np.uint8)
            writer.write(frame)
    _bare(target)


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

    It shows the controls, lets people set the volume, and sets no standard for the clips that count.
    """
    from scipy.io import wavfile

    from flowvqtalker.io.audio import load

    with as_file(files("flowvqtalker") / "assets" / "sample_speech.ogg") as path:
        samples = load(path)[: round(_PRACTICE_SECONDS * SAMPLE_RATE)]
    window = SAMPLE_RATE // FPS
    frames = len(samples) // window
    loud = np.sqrt((samples[: frames * window].reshape(frames, window) ** 2).mean(1))
    opening = np.convolve(np.clip(loud / np.percentile(loud, 95), 0, 1), [0.25, 0.5, 0.25], "same")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        speech = Path(folder) / "speech.wav"
        wavfile.write(speech, SAMPLE_RATE, samples)
        with VideoWriter(target, speech) as writer:
            for wide in opening:
                writer.write(_face(float(wide)))
    _bare(target)


def _face(opening: float) -> ImageArray:
    """A drawn face, at twice the size and scaled down for smooth edges."""
    from PIL import Image, ImageDraw

    size = _PRACTICE_SIZE * 2
    image = Image.new("RGB", (size, size), (206, 214, 220))
    draw = ImageDraw.Draw(image)
    lips, inside = 0.02 + 0.065 * opening, 0.004 + 0.058 * opening
    for x, y, rx, ry, colour in (
        (0.5, 0.52, 0.30, 0.38, (243, 212, 180)),
        *((eye, 0.42, 0.05, 0.035, (255, 255, 255)) for eye in (0.38, 0.62)),
        *((eye, 0.42, 0.02, 0.028, (60, 70, 90)) for eye in (0.38, 0.62)),
        (0.5, 0.58, 0.02, 0.008, (200, 160, 130)),
        (0.5, 0.72, 0.10, lips, (176, 84, 80)),
        (0.5, 0.72, 0.085, inside, (70, 22, 26)),
    ):
        draw.ellipse([(x - rx) * size, (y - ry) * size, (x + rx) * size, (y + ry) * size], fill=colour)
    return np.asarray(image.resize((_PRACTICE_SIZE, _PRACTICE_SIZE), Image.Resampling.BOX))


def _bare(path: Path) -> None:
    """Strip a file that was just written of its tags, like every other clip."""
    part = path.with_name(f".{path.name}.part")
    if not _remux(path, part):
        raise UserError(f"{path} cannot be copied; check the disk")
    os.replace(part, path)
    os.utime(path, (0, 0))
