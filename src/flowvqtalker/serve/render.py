"""Render one job of the server: samples one after the other, with their motion stored and previews on the way."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2

from flowvqtalker.batch.runner import Runner, collected_warnings, spread
from flowvqtalker.errors import UserError
from flowvqtalker.face.portrait import Portrait
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.audio import scan
from flowvqtalker.io.coefficients import Coefficients, Motion
from flowvqtalker.io.format import DEFAULT_VIDEO, VideoFormat
from flowvqtalker.io.image import ImageArray
from flowvqtalker.pipeline import Talker
from flowvqtalker.serve.tasks import Cancelled, Link, Task, motion_path, preview_path, sample_path

__all__ = ["JobRunner"]

_PREVIEW_SIDE = 256  # pixels
_PREVIEW_SECONDS = 0.4  # between two previews


class _Talker(Talker):
    """A talker that keeps the motion of what it renders, and shows frames on the way."""

    folder: Path | None = None

    def render(
        self, portrait: Portrait, motion: Iterable[Motion], *, full: bool = False, video: VideoFormat = DEFAULT_VIDEO
    ) -> Iterator[ImageArray]:
        """As :meth:`Talker.render`."""
        self.blocks: list[Motion] = []

        def kept() -> Iterator[Motion]:
            for block in motion:
                self.blocks.append(block)
                yield block

        shown = 0.0
        for frame in super().render(portrait, kept(), full=full, video=video):
            if time.monotonic() - shown >= _PREVIEW_SECONDS and self.folder is not None:
                shown = time.monotonic()
                _write_preview(frame, preview_path(self.folder))
            yield frame


def _write_preview(frame: ImageArray, path: Path) -> None:
    scale = _PREVIEW_SIDE / max(frame.shape[:2])
    small = cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    atomic_write(path, lambda temporary: temporary.write_bytes(jpeg.tobytes()))


class JobRunner(Runner):
    """Renders jobs; the models and prepared portraits stay, as in :class:`~flowvqtalker.batch.runner.Runner`."""

    def load(self, weights: Path | None, device: str, dtype: str) -> None:
        """Load the models before the first job comes."""
        self._talker(weights, device, dtype, False)

    def _load(self, weights: Path | None, device: str, dtype: str, exact: bool) -> Talker:
        return _Talker.from_pretrained(weights, device=spread(device, self.number), dtype=dtype, exact=exact)

    def render(self, task: Task, link: Link) -> tuple[str | None, str, list[str]]:
        """Render the samples of a job that are not there yet.

        Returns:
            code and message of the error (None and empty: it is done), and warnings.
        """
        with collected_warnings() as warnings:
            code, message = None, ""
            try:
                self._render(task, link)
            except Cancelled:
                code = "cancelled"
            except UserError as error:
                code, message = error.code, str(error)
            except Exception as error:  # one job must not end the others
                code, message = "internal", f"{type(error).__name__}: {error}"

        def named(text: str) -> str:
            for path, name in task.names.items():
                text = text.replace(path, name)
            return text

        return code, named(message), [named(text) for text in dict.fromkeys(warnings)]

    def _render(self, task: Task, link: Link) -> None:
        job = task.job
        link.report("preparing", 0, 0)
        talker, portrait, options = self._ready(job)
        assert isinstance(talker, _Talker)
        track: Any = options.emotion_track
        if track is not None and task.transition is not None:
            options = replace(options, emotion_track=replace(track, blend=task.transition))
        speech = scan(job.speech, job.audio_track)
        video = job.video()
        each = video.frames(speech.frames)
        frames = each * job.num_samples
        talker.folder = task.folder
        for number in range(1, job.num_samples + 1):
            before, path = (number - 1) * each, sample_path(task.folder, number)
            if path.exists():  # made before the server was killed
                continue

            def advance(done: int, of: int, before: int = before) -> None:
                link.report("rendering" if done < of else "finishing", before + done, frames)

            # The motion gets its name first: whoever sees the video finds both.
            unnamed = path.with_name(f"unnamed-{number}.mp4")
            sample = replace(options, seed=options.seed + number - 1)
            link.report("rendering", before, frames)
            result = talker.animate(
                portrait, speech, unnamed, sample, full=job.full, progress=advance, marks=job.marks(), video=video
            )
            identity = portrait.identity.numpy()
            Coefficients.of(Motion.join(talker.blocks), identity).save(motion_path(task.folder, number))
            unnamed.replace(path)
            link.size(f"{result.width}x{result.height}", frames)
