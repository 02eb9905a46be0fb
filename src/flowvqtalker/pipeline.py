"""The whole path behind one class: portrait + speech + emotion -> frames -> video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.export import READABLE, load_motion
from flowvqtalker.face.model import EXPRESSION, IDENTITY, FaceModel
from flowvqtalker.face.portrait import Portrait, Progress, front_pose, load_portrait, track, track_expression
from flowvqtalker.io import audio as decode
from flowvqtalker.io.atomic import check_not_input, check_output, sample_paths
from flowvqtalker.io.coefficients import Coefficients, Motion, resampled
from flowvqtalker.io.format import DEFAULT_VIDEO, VideoFormat
from flowvqtalker.io.image import ImageArray
from flowvqtalker.io.video import Result
from flowvqtalker.loading import (
    choose_device,
    choose_dtype,
    load_face_model,
    load_flows,
    load_generator,
    load_live_encoder,
    load_voice,
    render_dtype,
)
from flowvqtalker.motion.emotion import EmotionTrack
from flowvqtalker.motion.flow import ExpFlow, PoseFlow
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.options import FILES, MotionChoices, MotionOptions
from flowvqtalker.motion.stream import MotionStream, open_stream
from flowvqtalker.provenance import DEFAULT_MARKS, Marks, write_marked
from flowvqtalker.render.paste import Paster, limit_pose, paste_frames
from flowvqtalker.render.renderer import ImageGenerator, Renderer
from flowvqtalker.speech.encoder import SpeechEncoder
from flowvqtalker.speech.voice import VoiceEmotion

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Result", "Talker"]

_BLOCK_SECONDS = 1.0

P = TypeVar("P")


class Talker:
    """Animates portraits. Load it once, use it often. Everything streams: memory does not grow with the speech. ::

        talker = Talker.from_pretrained()
        talker.animate("portrait.jpg", "speech.wav", "out.mp4", emotion="happy")

    Arguments:
        face_model, expflow, poseflow, bank, generator, live_encoder, voice: components; None where one is not needed.
        device: where the image generator runs.
        dtype: type of its arithmetic; None chooses the fastest on the device.
    """

    def __init__(
        self,
        face_model: FaceModel | None = None,
        expflow: ExpFlow | None = None,
        poseflow: PoseFlow | None = None,
        bank: LatentBank | None = None,
        generator: ImageGenerator | None = None,
        live_encoder: SpeechEncoder | None = None,
        voice: VoiceEmotion | None = None,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self._face_model, self._expflow, self._poseflow = face_model, expflow, poseflow
        self._bank, self._generator, self._live_encoder, self._voice = bank, generator, live_encoder, voice
        self.device, self.dtype = torch.device(device), dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        components: Iterable[str] = ("face", "motion", "render"),
        exact: bool = False,
    ) -> Talker:
        """Load the weights.

        Arguments:
            path: folder of weights with a manifest; None takes those of the package.
            device: where the image generator runs: ``auto``, ``cpu``, ``cuda`` or ``mps``.
            dtype: type of its arithmetic: ``auto`` (the fastest on the device), ``float32`` or ``bfloat16``.
            components: ``face`` can track, ``motion`` too: motion, ``render`` too: images, ``live`` too: without delay.
            exact: compute everything in float32, the speech encoder too, whose fast form depends on the processor.
                The same seed then gives the same motion to 1e-4 on every x86 machine.

        Raises:
            UserError: if weights are missing, damaged (named by their sha256) or do not fit, or a name is unknown.
        """
        wanted = set(components)
        if unknown := wanted - {"face", "motion", "render", "live"}:
            raise UserError(f"unknown components {', '.join(sorted(unknown))}; choose from face, motion, render, live")
        chosen = choose_device(device)
        kind = torch.float32 if exact else choose_dtype(dtype)
        face_model = load_face_model(path) if "face" in wanted else None
        exp, pose, bank = load_flows(path, exact=exact) if "motion" in wanted else (None, None, None)
        compiled = kind is None and chosen.type == "cpu"
        generator = load_generator(path, compiled=compiled) if "render" in wanted else None
        live_encoder = load_live_encoder(path, exact=exact) if "live" in wanted else None
        voice = load_voice(path) if "motion" in wanted else None
        return cls(face_model, exp, pose, bank, generator, live_encoder, voice, device=chosen, dtype=kind)

    @classmethod
    def load(
        cls,
        weights: str | Path | None = None,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        parts: Iterable[str] = ("face", "motion", "render"),
    ) -> Talker:
        """The former name of :meth:`from_pretrained`."""
        return cls.from_pretrained(weights, device=device, dtype="auto" if dtype is None else dtype, components=parts)

    @property
    def face_model(self) -> FaceModel:
        """The 3D morphable model."""
        return _part(self._face_model, "face")

    def portrait(self, source: str | Path | ImageArray, face: int | None = None) -> Portrait:
        """Prepare an image, once for many recordings; see :func:`flowvqtalker.face.portrait.load_portrait`."""
        return load_portrait(self.face_model, source, face)

    def track(self, source: str | Path, *, smooth: bool = True, progress: Progress | None = None) -> Coefficients:
        """Landmarks and coefficients of an image or video; see :func:`flowvqtalker.face.portrait.track`."""
        return track(self.face_model, source, smooth=smooth, progress=progress)

    def reference(self, source: str | Path) -> Tensor:
        """Expression (R, 64) of an image or clip, to take the emotion from; of a clip the first 30 seconds."""
        return track_expression(self.face_model, source)

    def front_pose(self) -> Tensor:
        """Pose (6,) of a face seen from the front; see :func:`flowvqtalker.face.portrait.front_pose`."""
        return front_pose(self.face_model)

    def stream(
        self, portrait: Portrait | None = None, options: MotionOptions | None = None, *, live: bool = False
    ) -> MotionStream:
        """Motion for speech that arrives in blocks; see :class:`flowvqtalker.motion.stream.MotionStream`.

        Arguments:
            portrait: whose face starts the motion; None is the mean face seen from the front.
            options: see :class:`flowvqtalker.motion.options.MotionOptions`.
            live: wait for 92.5 ms of speech instead of 252.5; needs the component ``live``.

        Raises:
            UserError: if an option cannot be used.
        """
        chosen = self.resolve(options or MotionOptions())
        identity = torch.zeros(IDENTITY) if portrait is None else portrait.identity
        pose0 = self.front_pose() if portrait is None else portrait.pose
        return open_stream(
            _part(self._expflow, "motion"),
            _part(self._poseflow, "motion"),
            self._bank,
            chosen,
            self.face_model,
            identity=identity,
            beta0=torch.zeros(EXPRESSION) if portrait is None else portrait.expression,
            pose0=pose0,
            speech_encoder=self._live_encoder if live else None,
            voice=self._voice,
        )

    def resolve(self, options: MotionOptions) -> MotionOptions:
        """The options with files read and clips tracked, so that several samples need it once.

        Raises:
            UserError: if a file cannot be used.
        """
        track, poses = options.emotion_track, options.pose_from
        if track is not None and not isinstance(track, EmotionTrack):
            options = replace(options, emotion_track=EmotionTrack.load(track))
        faces = {name: getattr(options, name) for name in ("emotion_reference", "reference_neutral")}
        read: Any = {name: self.reference(face) for name, face in faces.items() if isinstance(face, str | Path)}
        options = replace(options, **read)
        if poses is not None and not isinstance(poses, Coefficients):
            stored = Path(poses).suffix.lower() in READABLE
            moved = load_motion(poses, self.face_model) if stored else self.track(poses)
            options = replace(options, pose_from=moved)
        return options

    def motion(
        self,
        speech: str | Path | decode.Speech,
        portrait: Portrait | None = None,
        options: MotionOptions | None = None,
        **choices: Unpack[MotionChoices],
    ) -> Iterator[Motion]:
        """Motion for speech, block by block.

        Arguments:
            speech: any file with sound, or what :func:`flowvqtalker.io.audio.scan` found in it.
            portrait: whose face starts the motion; None is the mean face seen from the front.
            options: see :class:`flowvqtalker.motion.options.MotionOptions`.
            choices: fields of the options by name, as ``emotion="happy"``; they replace those of ``options``.

        Yields:
            blocks on the CPU; together one frame for each of the speech's
            (:attr:`flowvqtalker.io.audio.Speech.frames`).

        Raises:
            UserError: at once, if the speech or an option cannot be used.
        """
        chosen = (options or MotionOptions()).updated(choices)
        found = decode.scan(speech)
        return self.stream(portrait, chosen).run(decode.stream(found, _BLOCK_SECONDS))

    def renderer(self, portrait: Portrait, *, batch_size: int | None = None, workers: int | None = None) -> Renderer:
        """What draws the frames of a portrait; arguments as :class:`flowvqtalker.render.renderer.Renderer`."""
        generator: ImageGenerator = _part(self._generator, "render")  # type: ignore[assignment]  # mypy joins the union
        return Renderer(
            generator,
            self.face_model,
            *portrait.view,
            batch_size=batch_size,
            device=self.device,
            dtype=self.dtype or render_dtype(generator, self.device),
            workers=workers,
        )

    def render(
        self, portrait: Portrait, motion: Iterable[Motion], *, full: bool = False, video: VideoFormat = DEFAULT_VIDEO
    ) -> Iterator[ImageArray]:
        """Pictures for motion, at the rate of the video one for each frame of it.

        Arguments:
            portrait: see :meth:`portrait`.
            motion: blocks of any length, for instance from :meth:`motion`.
            full: paste each face back into the whole image instead of giving the 512x512 crop; of an image larger than
                :data:`flowvqtalker.face.portrait.MAX_FULL` the reduced one. The pose is held near the portrait's, see
                :func:`flowvqtalker.render.paste.limit_pose`.
            video: rate, and size of the crop.

        Yields:
            (512, 512, 3), or the size of the picture, uint8 RGB.
        """
        renderer = self.renderer(portrait)
        motion = resampled(motion, float(video.rate))
        if not full:
            return video.resized(renderer.render(motion))
        whole = portrait.reduced()
        paster = Paster(self.face_model, whole.crop, whole.picture, *whole.view)
        return paste_frames(paster, renderer.render, limit_pose(motion, whole.pose))

    def animate(
        self,
        portrait: str | Path | ImageArray | Portrait,
        speech: str | Path | decode.Speech,
        output: str | Path,
        options: MotionOptions | None = None,
        *,
        face: int | None = None,
        full: bool = False,
        progress: Progress | None = None,
        marks: Marks = DEFAULT_MARKS,
        video: VideoFormat = DEFAULT_VIDEO,
        **choices: Unpack[MotionChoices],
    ) -> Result:
        """Animate a portrait with speech into a video as long as the speech.

        Arguments:
            portrait: picture file, (H, W, 3) uint8 RGB, or what :meth:`portrait` returned.
            speech: any file with sound, or what :func:`flowvqtalker.io.audio.scan` found in it; it becomes the sound of
                the video.
            output: ``.mp4``, ``.mov`` or ``.mkv``; appears when it is complete.
            options: see :class:`flowvqtalker.motion.options.MotionOptions`.
            choices: fields of the options by name, as ``emotion="happy"``; they replace those of ``options``.
            face: which face of the image, 0 is the largest; None takes the largest.
            full: write the whole image instead of the 512x512 crop.
            progress: called after each frame with the frames done and in total.
            marks: what says that the video is generated; see :class:`flowvqtalker.provenance.Marks`.
            video: frame rate and size; see :class:`flowvqtalker.io.format.VideoFormat`.

        Raises:
            UserError: if an input cannot be used or the output cannot be written; then there is no output.
        """
        chosen = (options or MotionOptions()).updated(choices)
        (result,) = self.animate_samples(
            portrait, speech, output, 1, chosen, face=face, full=full, progress=progress, marks=marks, video=video
        )
        return result

    def animate_samples(
        self,
        portrait: str | Path | ImageArray | Portrait,
        speech: str | Path | decode.Speech,
        output: str | Path,
        num_samples: int,
        options: MotionOptions | None = None,
        *,
        face: int | None = None,
        full: bool = False,
        progress: Progress | None = None,
        marks: Marks = DEFAULT_MARKS,
        video: VideoFormat = DEFAULT_VIDEO,
    ) -> Iterator[Result]:
        """Several samples of :meth:`animate`, with the seeds ``seed``, ``seed + 1``, ...

        The portrait, a reference and a clip with head motion are prepared once.

        Arguments:
            output: the samples go to ``OUT_1.mp4`` to ``OUT_N.mp4`` (:func:`sample_paths`), each when it is complete.
            num_samples: N.
            progress: called after each frame with the frames of all samples.
            marks, video: see :meth:`animate`.

        Yields:
            a result after each sample.

        Raises:
            UserError: at once, if an input cannot be used or an output cannot be written.
        """
        chosen = options or MotionOptions()
        paths = [check_output(path) for path in sample_paths(output, num_samples)]
        inputs = (portrait, speech, *(getattr(chosen, name) for name in FILES))
        for path in paths:
            check_not_input(path, *inputs)
            marks.credential(path)
        found = decode.scan(speech)
        ready = portrait if isinstance(portrait, Portrait) else self.portrait(portrait, face)
        chosen = self.resolve(chosen)
        # Built before anything is written, so that a seed that is too large is refused at once.
        every = [replace(chosen, seed=chosen.seed + number) for number in range(num_samples)]
        first = self.motion(found, ready, every[0])

        def write() -> Iterator[Result]:
            each = video.frames(found.frames)
            for number, path in enumerate(paths):
                motion, before = self.motion(found, ready, every[number]) if number else first, number * each

                def advance(done: int, of: int, before: int = before) -> None:
                    if progress is not None:
                        progress(before + done, each * num_samples)

                frames = self.render(ready, motion, full=full, video=video)
                yield write_marked(frames, path, found, each, advance, marks, video)

        return write()

    def reenact(
        self,
        portrait: str | Path | ImageArray | Portrait,
        motion: Coefficients,
        output: str | Path,
        *,
        speech: str | Path | decode.Speech | None = None,
        absolute: bool = False,
        face: int | None = None,
        full: bool = False,
        progress: Progress | None = None,
        marks: Marks = DEFAULT_MARKS,
        video: VideoFormat = DEFAULT_VIDEO,
    ) -> Result:
        """Animate a portrait with stored motion.

        Arguments:
            portrait: picture file, (H, W, 3) uint8 RGB, or what :meth:`portrait` returned.
            motion: for instance of :meth:`track`, or from a file.
            output: ``.mp4``, ``.mov`` or ``.mkv``.
            speech: sound for the video; None is silent.
            absolute: take the poses as they are; else their difference to the first one moves the portrait's own pose.
            face, full, progress, marks, video: see :meth:`animate`.

        Raises:
            UserError: if an input cannot be used or the output cannot be written; then there is no output.
        """
        path = check_output(output)
        check_not_input(path, portrait, speech)
        marks.credential(path)
        if speech is not None:
            speech = decode.scan(speech)
        ready = portrait if isinstance(portrait, Portrait) else self.portrait(portrait, face)
        moved = motion.motion(FPS)
        if not absolute:
            moved = replace(moved, pose=ready.pose + moved.pose - moved.pose[:1])
        frames = self.render(ready, [moved], full=full, video=video)
        return write_marked(frames, path, speech, video.frames(len(moved)), progress, marks, video)


def _part(part: P | None, name: str) -> P:
    if part is None:
        raise UserError(f"this Talker was loaded without {name!r}; add it to the components of Talker.from_pretrained")
    return part
