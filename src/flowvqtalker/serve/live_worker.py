"""Body of a process that keeps one live session at a time, with models that are loaded once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from flowvqtalker.errors import UserError

__all__ = ["Opening", "keep_sessions", "live_work"]

_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Opening:
    """What a session begins with.

    Attributes:
        portrait: image file.
        face: number of the face.
        options: of the motion.
        audio_rate: samples per second of the sound that comes out.
        fps: images per second.
        jpeg: images as JPEG; else raw RGB.
    """

    portrait: Path
    face: int
    options: dict[str, Any]
    audio_rate: int
    fps: float
    jpeg: bool = True


def live_work(connection: Connection, threads: int, weights: Path | None, device: str, dtype: str) -> None:
    """Body of the process: load the models, then :func:`keep_sessions`."""
    import cv2
    import torch

    from flowvqtalker.live import LiveTalker
    from flowvqtalker.pipeline import Talker

    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    talker = Talker.from_pretrained(weights, device=device, dtype=dtype, components=LiveTalker.COMPONENTS)
    keep_sessions(connection, talker)


def keep_sessions(connection: Connection, talker: Any) -> None:
    """Keep one session after the other, until the server's end of the pipe is closed.

    It receives an :class:`Opening`, then ``(method of LiveTalker, arguments)``, and None at the end. It sends
    ``("ready",)``, ``("opened",)``, ``("error", code, message)``, ``("frame", pts, state, image or None, sound, fps)``
    and, at the end of a session, ``("closed",)``. Images are bytes; sound is int16, mono, as bytes.

    Arguments:
        connection: to the server.
        talker: with the components of :class:`~flowvqtalker.live.LiveTalker`.
    """
    lock = threading.Lock()

    def send(*message: Any) -> None:
        with lock:
            connection.send(message)

    send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            opening = connection.recv()
            if isinstance(opening, Opening):  # else a command that came after the end
                try:
                    _session(talker, opening, connection, send)
                except UserError as error:
                    send("error", error.code, str(error))
                send("closed")


def _session(talker: Any, opening: Opening, connection: Connection, send: Callable[..., None]) -> None:
    import cv2
    import numpy as np

    from flowvqtalker.live import LiveTalker
    from flowvqtalker.motion.options import MotionOptions

    portrait = talker.portrait(opening.portrait, opening.face)
    options = MotionOptions(**opening.options)
    with LiveTalker(talker, portrait, options, audio_rate=opening.audio_rate, fps=opening.fps) as live:
        listener = threading.Thread(target=_obey, args=(live, talker, connection, send), daemon=True)
        listener.start()
        send("opened")
        for frame in live.frames():
            image = None
            if frame.image is not None and opening.jpeg:
                quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
                image = cv2.imencode(".jpg", cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR), quality)[1].tobytes()
            elif frame.image is not None:
                image = frame.image.tobytes()
            sound = (np.clip(frame.audio, -1, 1) * 32767).astype("<i2").tobytes()
            send("frame", frame.pts, frame.state.value, image, sound, live.fps)
        listener.join()


def _obey(live: Any, talker: Any, connection: Connection, send: Callable[..., None]) -> None:
    """Carry out commands until the session is closed."""
    import numpy as np

    try:
        while (command := connection.recv()) is not None:
            name, arguments = command
            try:
                if name == "push":
                    live.push(np.frombuffer(arguments[0], "<i2"), arguments[1])
                elif name == "set_portrait":
                    live.set_portrait(talker.portrait(*arguments))
                else:
                    getattr(live, name)(*arguments)
            except UserError as error:
                send("error", error.code, str(error))
    except (EOFError, OSError):  # the server ended
        pass
    finally:
        live.close()
