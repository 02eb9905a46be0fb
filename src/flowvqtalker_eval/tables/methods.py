"""Make the videos that a benchmark compares: ours, and the baselines that ours must beat."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

from flowvqtalker.constants import FPS, SAMPLE_RATE
from flowvqtalker.errors import UserError
from flowvqtalker.face.fit import fit
from flowvqtalker.face.portrait import load_portrait, track_landmarks
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.io.audio import load as load_audio
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.image import ImageArray, read_image
from flowvqtalker.io.video import VideoWriter, read_video, write_video
from flowvqtalker.loading import choose_device, choose_dtype, fast_dtype, load_face_model, load_flows, load_generator
from flowvqtalker.pipeline import Talker
from flowvqtalker.provenance import Marks
from flowvqtalker.render.renderer import ImageGenerator, Renderer
from flowvqtalker_eval.metrics.analysis import read_wave
from flowvqtalker_eval.tables.plan import METHODS, Output
from flowvqtalker_eval.tables.splits import Item

__all__ = ["Animator"]

# Real videos are encoded almost without loss: the metrics shall see the clip, not our encoder.
_REAL_CRF, _REAL_PRESET = 10, "medium"
_BATCH = 4
# The metrics shall see the frames, not the watermark.
_UNMARKED = Marks(mark=False)


class _WarpRenderer(Renderer):
    """Renders I_w in place of the generated frame."""

    def _image(self, motion: Tensor, prior: Tensor | None) -> Tensor:
        return self._generated(motion, prior).warped


def _pixels(images: Tensor) -> npt.NDArray[np.uint8]:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    values = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    pixels: npt.NDArray[np.uint8] = values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


class Animator:
    """Makes the videos of one item after the other; loads a network when it is first needed.

    Arguments:
        folder: of the run; ``real/`` and ``portraits/`` are filled besides the outputs.
        weights: folder of weights; None are those of the package.
        device, dtype: see :meth:`flowvqtalker.pipeline.Talker.from_pretrained`.
        seconds: at most so much of each clip; None is all.
    """

    def __init__(
        self,
        folder: Path,
        weights: Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        seconds: float | None = None,
    ) -> None:
        self.folder, self.weights, self.seconds = folder, weights, seconds
        self.device = choose_device(device)
        self._dtype = choose_dtype(dtype)
        self.face = load_face_model(weights)
        self._talker = cache(self._load_talker)

    @cached_property
    def generator(self) -> ImageGenerator:
        """VQIG with its codebook."""
        return load_generator(self.weights)

    def _load_talker(self, motion: bool) -> Talker:
        """With the flows or without."""
        expflow, poseflow, bank = load_flows(self.weights) if motion else (None, None, None)
        return Talker(self.face, expflow, poseflow, bank, self.generator, device=self.device, dtype=self._dtype)

    def make(self, item: Item, outputs: Iterable[Output]) -> dict[Output | None, str]:
        """Make the outputs of one item, and its real video and portrait if they are missing.

        Returns:
            errors by output; None stands for the item as a whole.
        """
        errors: dict[Output | None, str] = {}
        with tempfile.TemporaryDirectory(prefix="flowvqtalker-") as place:
            try:
                clip = _Clip(self, item, Path(place))
            except Exception as error:  # a broken item must not end a run of thousands
                return {None: _reason(error)}
            for output in outputs:
                try:
                    output.path.parent.mkdir(parents=True, exist_ok=True)
                    self._make(clip, output)
                except Exception as error:
                    errors[output] = _reason(error)
        return errors

    def _make(self, clip: _Clip, output: Output) -> None:
        if output.method == "animate":
            if clip.speech is None:
                raise UserError(f"{clip.item.clip} has no speech to animate with")
            emotion = clip.item.emotion
            self._talker(True).animate(
                clip.portrait, clip.speech, output.path, emotion=emotion, seed=output.seed, marks=_UNMARKED
            )
            return
        frames: Iterator[ImageArray]
        if output.method == "copy":
            frames = (clip.portrait.image for _ in range(clip.frames))
        elif output.method == "reenact":
            frames = self._talker(False).render(clip.portrait, [clip.motion()])
        elif output.method == "warp":
            frames = self._warped(clip)
        elif output.method == "codebook":
            frames = self._reconstructed(clip)
        else:
            raise UserError(f"unknown method {output.method!r}; choose one of {', '.join(METHODS)}")
        write_video(frames, output.path, clip.speech, clip.frames)

    @property
    def dtype(self) -> torch.dtype:
        """The type that was chosen, or the fastest on the device."""
        return self._dtype or fast_dtype(self.device)

    def _warped(self, clip: _Clip) -> Iterator[ImageArray]:
        source = clip.portrait
        renderer = _WarpRenderer(
            self.generator, self.face, source.image, source.identity, source.expression, source.pose,
            device=self.device, dtype=self.dtype,
        )  # fmt: skip
        return renderer.render([clip.motion()])

    def _reconstructed(self, clip: _Clip) -> Iterator[ImageArray]:
        generator = self.generator.to(self.device).eval()
        crops = clip.crops()
        while batch := list(islice(crops, _BATCH)):
            images = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
            with torch.inference_mode(), autocast:
                reconstructed = generator.reconstruct(images.contiguous(memory_format=torch.channels_last))
            yield from _pixels(reconstructed)


class _Clip:
    """An item with its portrait, its speech cut to its frames, and its real video written.

    Attributes:
        item, portrait: what is animated.
        frames: number of frames at 25 fps.
        speech: 16 kHz WAV file of 640 samples per frame; None if the clip has no speech.
    """

    def __init__(self, animator: Animator, item: Item, place: Path) -> None:
        self.item, self.face = item, animator.face
        limits = [s for s in (item.seconds, animator.seconds) if s is not None]
        self.limit = max(1, round(min(limits) * FPS)) if limits else None
        first = next(read_video(item.clip))
        self.portrait = load_portrait(self.face, first if item.portrait is None else read_image(item.portrait), face=0)
        # A given portrait is another image: the real clip gets the crop of its own first frame.
        self.crop = self.portrait.crop if item.portrait is None else load_portrait(self.face, first, face=0).crop
        self.frames = sum(1 for _ in self._read())
        self.speech = self._write_speech(place / "speech.wav")
        real = animator.folder / "real" / f"{item.name}.mp4"
        if not real.exists():
            real.parent.mkdir(parents=True, exist_ok=True)
            with VideoWriter(real, self.speech, crf=_REAL_CRF, preset=_REAL_PRESET) as writer:
                for frame in self.crops():
                    writer.write(frame)
        image = animator.folder / "portraits" / f"{item.name}.png"
        if not image.exists():
            image.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(image, lambda path: Image.fromarray(self.portrait.image).save(path, format="PNG"))

    def _read(self) -> Iterator[ImageArray]:
        return islice(read_video(self.item.clip), self.limit)

    def crops(self) -> Iterator[ImageArray]:
        """The real frames (512, 512, 3), cut like the portrait."""
        return map(self.crop.apply, self._read())

    def motion(self) -> Motion:
        """Motion of the real clip, in the portrait's crop and of its identity."""
        landmarks, _ = track_landmarks(self.item.clip, limit=self.limit)
        found = fit(self.face, self.crop.points(landmarks), identity=self.portrait.identity.cpu().numpy(), smooth=True)
        return Motion(torch.from_numpy(found.expression[: self.frames]), torch.from_numpy(found.pose[: self.frames]))

    def _write_speech(self, path: Path) -> Path | None:
        if not self.item.has_speech:
            return None
        given = self.item.speech
        samples = read_wave(self.item.clip, self.frames) if given is None else load_audio(given)
        if samples is None:
            return None
        padded = np.zeros(self.frames * SAMPLE_RATE // FPS, np.float32)
        padded[: len(samples)] = samples[: len(padded)]
        wavfile.write(path, SAMPLE_RATE, (np.clip(padded, -1, 1) * 32767).round().astype(np.int16))
        return path


def _reason(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
