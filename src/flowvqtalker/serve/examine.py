"""What looks into uploads, in processes of its own: a file that crashes a decoder does not take the server along.

The server itself imports neither torch nor mediapipe.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import multiprocessing
import threading
import wave
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from flowvqtalker.errors import UserError
from flowvqtalker.serve.problems import Problem, from_user_error
from flowvqtalker.serve.settings import Settings
from flowvqtalker.serve.store import ORIGINAL
from flowvqtalker.workers import prepare_process

__all__ = [
    "Examiner",
    "check_request",
    "examine_clip",
    "examine_portrait",
    "examine_speech",
    "export",
    "list_options",
    "say",
    "verify_file",
]

P = ParamSpec("P")
R = TypeVar("R")

#: Longer side of the picture that a client gets back.
VIEW = 1024
#: Longest text in characters.
LONGEST_TEXT = 5000
#: Shortest speech in seconds.
SHORTEST = 0.2


class Examiner:
    """Runs the functions of this module in other processes."""

    def __init__(self, processes: int = 2) -> None:
        self._processes = processes
        self._lock = threading.Lock()
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._processes, context, initializer=_prepare_process)

    async def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function there.

        Raises:
            Problem: that the function raised, or ``invalid`` if it ended its process.
        """
        pool = self._pool
        try:
            call = functools.partial(function, *args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(pool, call)
        except BrokenProcessPool as error:
            with self._lock:
                if pool is self._pool:
                    self._pool = self._start()
            raise Problem("invalid", "The file cannot be read; give another one.") from error

    def warm(self, weights: Path | None) -> None:
        """Load what looks for faces before the first upload comes."""
        self._pool.submit(_warm, weights)

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _prepare_process() -> None:
    prepare_process(1)
    import cv2
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@functools.lru_cache(maxsize=1)
def _face_model(weights: Path | None) -> Any:
    from flowvqtalker.loading import load_face_model

    return load_face_model(weights)


def _warm(weights: Path | None) -> None:
    from flowvqtalker.face.tracker import FaceTracker

    _face_model(weights)
    FaceTracker().close()


def examine_portrait(folder: Path, settings: Settings) -> dict[str, Any]:
    """Find the faces of an uploaded image, and write the pictures that a client may see of it.

    Returns:
        width, height, faces (box in pixels of the upright image; why one cannot be used), warnings.

    Raises:
        Problem: if it is no image, is too large, or shows no face.
    """
    from PIL import Image

    from flowvqtalker.batch.runner import collected_warnings
    from flowvqtalker.face.crop import crop_box
    from flowvqtalker.face.detect import detect_faces
    from flowvqtalker.face.portrait import prepare_face
    from flowvqtalker.face.tracker import FaceTracker
    from flowvqtalker.io.image import image_size, read_image

    path = folder / ORIGINAL
    size = image_size(path)
    if size is not None and size[0] * size[1] > settings.max_pixels:
        text = f"The portrait has {size[0] * size[1]} pixels, {settings.max_pixels} are allowed; scale it down."
        raise Problem("too_large", text, "portrait", allowed=settings.max_pixels)
    model = _face_model(settings.weights)
    try:
        image = read_image(path)
        with FaceTracker(max_faces=10) as tracker:
            found = detect_faces(tracker, model, image)
    except UserError as error:
        raise from_user_error(error, "portrait", **{str(path): "the portrait"}) from error
    if not found:
        raise Problem("no_face", "There is no face in the portrait; give an image that shows one clearly.", "portrait")
    faces: list[dict[str, Any]] = []
    with collected_warnings() as warnings:
        for index, one in enumerate(found):
            problem = None
            try:
                crop = prepare_face(model, image, one, "the portrait").image
            except UserError as error:
                problem = from_user_error(error)
                crop = crop_box(one.face.landmarks).apply(image)
            _save_jpeg(Image.fromarray(crop), folder / f"face-{index}.jpg")
            box = [round(float(value), 1) for value in one.face.box]
            why = problem and {"code": problem.code, "detail": problem.detail}
            faces.append({"index": index, "box": box, "usable": problem is None, "problem": why})
    view = Image.fromarray(image)
    view.thumbnail((VIEW, VIEW))
    _save_jpeg(view, folder / "view.jpg")
    height, width = image.shape[:2]
    return {"width": width, "height": height, "faces": faces, "warnings": list(dict.fromkeys(warnings))}


def _save_jpeg(image: Any, path: Path) -> None:
    from flowvqtalker.io.atomic import atomic_write

    atomic_write(path, lambda temporary: image.save(temporary, "JPEG", quality=88))


def examine_speech(folder: Path, settings: Settings) -> dict[str, Any]:
    """Measure uploaded speech.

    Returns:
        seconds, frames.

    Raises:
        Problem: if it is no sound, silent, too short or too long.
    """
    from flowvqtalker.constants import SAMPLE_RATE
    from flowvqtalker.io import audio

    path = folder / ORIGINAL
    try:
        samples = 0
        for block in audio.stream(path, seconds=10.0):  # stops at once where a small file holds a day of sound
            samples += len(block)
            if samples > settings.max_seconds * SAMPLE_RATE:
                text = f"The speech is longer than {settings.max_seconds:g} seconds; give a shorter recording."
                raise Problem("too_long", text, "speech", allowed=settings.max_seconds)
        speech = audio.scan(path)
    except UserError as error:
        raise from_user_error(error, "speech", **{str(path): "the speech"}) from error
    if speech.seconds < SHORTEST:
        text = f"The speech lasts {speech.seconds:.2f} seconds, {SHORTEST} are needed; give a longer recording."
        raise Problem("audio_too_short", text, "speech")
    return {"seconds": round(speech.seconds, 3), "frames": speech.frames}


def examine_clip(path: Path, field: str, settings: Settings) -> None:
    """Check an image, clip or motion file that a job takes an emotion or head motion from.

    Raises:
        Problem: if it is none of these, or too large.
    """
    from flowvqtalker.face.export import load_motion
    from flowvqtalker.io.coefficients import Coefficients
    from flowvqtalker.io.video import probe

    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as content:  # a bomb says so in its directory
                if sum(entry.file_size for entry in content.infolist()) > 4 * settings.max_upload:
                    raise Problem("too_large", f"{field} holds too much data.", field)
            Coefficients.load(path)
            return
        if path.suffix == ".csv":
            load_motion(path, _face_model(settings.weights))
            return
        info = probe(path)
    except zipfile.BadZipFile as error:
        raise Problem("invalid", f"{field} is not an .npz file of motion.", field) from error
    except UserError as error:
        raise from_user_error(error, field, **{str(path): field}) from error
    if info.width * info.height > settings.max_pixels:
        raise Problem("too_large", f"{field} has too many pixels; scale it down.", field, allowed=settings.max_pixels)
    if info.seconds > settings.max_seconds:
        raise Problem("too_long", f"{field} is too long.", field, allowed=settings.max_seconds)


def check_request(
    options: dict[str, Any], files: list[str], track: Any, path: Path, max_samples: int
) -> dict[str, Any]:
    """The checked options of a job, see :mod:`flowvqtalker.serve.choices`; a track is written to a file.

    Arguments:
        options: as given.
        files: names of the options that came as files.
        track: emotion track as csv text or a list, or None.
        path: csv file for it.
    """
    from flowvqtalker.serve.choices import check_options, load_track

    values = check_options(options, [*files, *["emotion_track"] * (track is not None)], max_samples)
    if track is not None:
        load_track(path, track)
    return values


def say(text: str, voice: str) -> bytes:
    """Speech for a text as a wav file."""
    from flowvqtalker.speech.tts import speak

    if len(text) > LONGEST_TEXT:
        raise Problem("out_of_range", f"A text has at most {LONGEST_TEXT} characters.", "text")
    try:
        samples, rate = speak(text, voice)
    except UserError as error:
        raise from_user_error(error, "voice" if "voice" in str(error) else "text") from error
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return content.getvalue()


@functools.cache
def list_options() -> list[dict[str, Any]]:
    """Every option of a job, see :func:`~flowvqtalker.serve.choices.describe_options`."""
    from flowvqtalker.serve.choices import describe_options

    return describe_options()


def export(motion: Path, output: Path, fps: float, weights: Path | None) -> None:
    """Write stored motion as ``.csv`` (ARKit) or ``.glb``."""
    from flowvqtalker.face.export import export_motion
    from flowvqtalker.io.coefficients import Coefficients

    try:
        export_motion(output, Coefficients.load(motion), _face_model(weights), fps)
    except UserError as error:
        raise from_user_error(error, "fps", **{str(output): "the file", str(motion): "the motion"}) from error


def verify_file(path: Path, settings: Settings) -> dict[str, Any]:
    """The report of ``verify``, without the server's path."""
    from flowvqtalker.provenance import verify

    examine_clip(path, "file", settings)
    logging.disable(logging.WARNING)
    try:
        report = verify(path).json()
    except UserError as error:
        raise from_user_error(error, "file", **{str(path): "the file"}) from error
    finally:
        logging.disable(logging.NOTSET)
    del report["path"]
    return report
