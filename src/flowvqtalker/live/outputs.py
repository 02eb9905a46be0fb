"""Where a live stream goes: a window, a virtual camera, a file, a pipe or a server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np

from flowvqtalker.constants import CROP, FPS
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.io.media import error_text
from flowvqtalker.live.engine import LiveFrame

__all__ = ["StreamWriter", "show", "virtual_camera"]

#: Form of the stream by where it goes: a prefix of the URL, or the end of a file's name.
_FORMATS = {"rtmp://": "flv", "rtmps://": "flv", "srt://": "mpegts", "udp://": "mpegts"}
_SUFFIXES = {".ts": "mpegts", ".mp4": "mp4", ".mkv": "matroska", ".flv": "flv"}
_WINDOW = "flowvqtalker (q closes)"


class StreamWriter:
    """Encodes a live stream as H.264 and AAC while it comes, without delay; a context manager.

    Arguments:
        target: ``-`` (standard output), a file (.ts, .mp4, .mkv, .flv) or a URL (rtmp://, srt://, udp://).
        audio_rate: samples per second of the sound.
        kind: ``mpegts`` or ``mp4`` (fragmented) for standard output.

    Raises:
        UserError: if the target cannot be written.
    """

    def __init__(self, target: str, audio_rate: int, kind: str = "mpegts") -> None:
        import av

        known = [*_FORMATS.items(), *_SUFFIXES.items()]
        form = kind if target == "-" else None
        form = form or next((f for key, f in known if target.startswith(key) or target.lower().endswith(key)), None)
        if form is None:
            raise UserError(
                f"{target}: give - (standard output), a file ({', '.join(_SUFFIXES)}) or a URL ({', '.join(_FORMATS)})"
            )
        # In fragments: what was written can be played at any time, also after a crash.
        options = {"movflags": "frag_keyframe+delay_moov+default_base_moof"} if form == "mp4" else {}
        self.target, self._converter = target, av.video.reformatter.VideoReformatter()
        where: Any = sys.stdout.buffer if target == "-" else target if "://" in target else f"file:{target}"
        try:
            self._container = av.open(where, "w", format=form, options=options)
            self._add_tracks(audio_rate)
            self._container.start_encoding()
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"output {target} cannot be opened ({error_text(error)}); check the address") from error
        self._rate, self._samples = audio_rate, 0

    def _add_tracks(self, audio_rate: int) -> None:
        settings = {"preset": "superfast", "tune": "zerolatency", "crf": "20"}
        self._video: Any = self._container.add_stream("libx264", rate=FPS, options=settings)
        self._video.width = self._video.height = CROP
        self._video.pix_fmt, self._video.gop_size = "yuv420p", 2 * FPS
        context = self._video.codec_context
        context.thread_count = 1  # the networks need the cores
        context.time_base = Fraction(1, FPS)
        context.color_primaries = context.color_trc = context.colorspace = context.color_range = 1  # BT.709
        self._audio: Any = self._container.add_stream("aac", rate=audio_rate, layout="mono")

    def write(self, frame: LiveFrame) -> None:
        """Append 40 ms.

        Raises:
            BrokenPipeError: if the reader of a pipe is gone.
            UserError: if it cannot be written.
        """
        import av

        try:
            if frame.image is not None:
                image = av.VideoFrame.from_ndarray(frame.image, format="rgb24")
                image = self._converter.reformat(
                    image, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
                )
                image.pts, image.time_base = round(frame.pts * FPS), Fraction(1, FPS)
                self._container.mux(self._video.encode(image))
            sound = av.AudioFrame.from_ndarray(frame.audio[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = self._rate, self._samples, Fraction(1, self._rate)
            self._samples += len(frame.audio)
            self._container.mux(self._audio.encode(sound))
        except BrokenPipeError:
            raise
        except (av.FFmpegError, OSError) as error:
            raise UserError(
                f"output {self.target} cannot be written ({error_text(error)}); is it still there?"
            ) from error

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # the reader may be gone
            for stream in (self._video, self._audio):
                self._container.mux(stream.encode(None))
            self._container.close()


def show(frames: Iterable[LiveFrame]) -> Iterable[LiveFrame]:
    """Show the images in a window while they pass; ends when q is pressed or the window is closed."""
    import cv2

    for frame in frames:
        if frame.image is not None:
            try:
                cv2.imshow(_WINDOW, np.ascontiguousarray(frame.image[..., ::-1]))
            except cv2.error as error:
                raise UserError("there is no screen for a window; give --output or --camera instead") from error
            if cv2.waitKey(1) == ord("q") or cv2.getWindowProperty(_WINDOW, cv2.WND_PROP_VISIBLE) < 1:
                break
        yield frame
    cv2.destroyAllWindows()


def virtual_camera(frames: Iterable[LiveFrame]) -> Iterable[LiveFrame]:
    """Send the images to a virtual camera while they pass.

    Raises:
        MissingDependency, UserError: without pyvirtualcam, or without a virtual camera.
    """
    try:
        import pyvirtualcam
    except ImportError as error:
        raise MissingDependency("--camera needs pyvirtualcam; run `pip install 'flowvqtalker[live]'`") from error
    try:
        camera = pyvirtualcam.Camera(CROP, CROP, FPS)
    except RuntimeError as error:
        raise UserError(f"there is no virtual camera ({error}); on Linux: modprobe v4l2loopback") from error
    with camera:
        for frame in frames:
            if frame.image is not None:
                camera.send(frame.image)
            yield frame
