"""The videos that a benchmark compares: ours, and what ours must beat."""

from __future__ import annotations

import tempfile
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.errors import UserError
from flowvqtalker.face.fit import fit
from flowvqtalker.face.portrait import Portrait, find_portrait, track_landmarks
from flowvqtalker.io.audio import load as load_sound
from flowvqtalker.io.coefficients import write_whole
from flowvqtalker.io.media import FPS, Picture, VideoWriter, read_image, read_video
from flowvqtalker.loading import choose_device, choose_dtype, fast_dtype, load_face_model, load_flows, load_generator
from flowvqtalker.pipeline import Block, Talker, write_video
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics.analysis import read_wave
from flowvqtalker_eval.tables.splits import Item

__all__ = ["METHODS", "Animator", "Output"]

#: What can be made of each clip, by name on the command line.
METHODS = {
    "animate": "the portrait driven by the clip's speech and emotion",
    "reenact": "the portrait driven by the clip's own tracked expression and pose",
    "copy": "the portrait, repeated",
    "warp": "I_w alone: the portrait warped to the tracked expression and pose",
    "codebook": "each real frame through E_h, C and D_h",
}

_RATE = 16_000
_SAMPLES = _RATE // FPS
# Of the real videos: the metrics shall see the clip, not our encoder.
_REAL_CRF = 10
_REAL_PRESET = "medium"
_BATCH = 4


@dataclass(frozen=True)
class Output:
    """One video to make: by which method, with which seed (of ``animate``), where."""

    method: str
    seed: int
    path: Path


class _WarpRenderer(Renderer):
    """Gives I_w in place of the generated frame."""

    @torch.inference_mode()
    def _batch(self, motion: Tensor) -> npt.NDArray[np.uint8]:
        motion = motion.to(self.device, torch.float32)
        now = motion[:, motion.shape[1] // 2]
        prior = None
        if self.generator.config.warp.prior == "mesh" and self.generator.config.use_warp:
            target = self.face.project(self.alpha.expand(len(motion), -1), now[:, :64], now[:, 64:])
            prior = self.mesh(self._start, target)
        with self._autocast():
            warped = self.generator.predict(self.source.expand(len(motion)), motion, prior)[0].warped
        return _pixels(warped)


def _pixels(images: Tensor) -> npt.NDArray[np.uint8]:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8."""
    values = images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    pictures: npt.NDArray[np.uint8] = values.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pictures


class Animator:
    """Makes the videos of one item after the other; loads what its methods need when it is first needed.

    Arguments:
        folder: of the run: ``real/`` and ``portraits/`` are filled besides the outputs.
        weights: folder of weights; None are those of the package.
        device, dtype: see :meth:`flowvqtalker.pipeline.Talker.load`.
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
        self.device, self.dtype = choose_device(device), choose_dtype(dtype)
        self.face = load_face_model(weights)
        self._generator: VQIG | None = None
        self._talkers: dict[bool, Talker] = {}

    @property
    def generator(self) -> VQIG:
        """VQIG with its codebook."""
        if self._generator is None:
            self._generator = load_generator(self.weights)
        return self._generator

    def _talker(self, motion: bool) -> Talker:
        """With the flows or without."""
        if motion not in self._talkers:
            expflow = poseflow = bank = None
            if motion:
                expflow, poseflow, bank = load_flows(self.weights)
            self._talkers[motion] = Talker(
                self.face, expflow, poseflow, bank, self.generator, device=self.device, dtype=self.dtype
            )
        return self._talkers[motion]

    # -------------------------------------------------------------------------------------------------------- one item

    def make(self, item: Item, outputs: Iterable[Output]) -> dict[Output | None, str]:
        """Make the real video, if it is not there, and the outputs of one item.

        Returns:
            what went wrong, by output; None is the item as a whole.
        """
        errors: dict[Output | None, str] = {}
        with tempfile.TemporaryDirectory(prefix="flowvqtalker-") as place:
            try:
                prepared = _Prepared(self, item, Path(place))
            except Exception as error:  # a broken item must not end a run of thousands
                return {None: _reason(error)}
            for output in outputs:
                try:
                    output.path.parent.mkdir(parents=True, exist_ok=True)
                    self._make(prepared, output)
                except Exception as error:
                    errors[output] = _reason(error)
        return errors

    def _make(self, item: _Prepared, output: Output) -> None:
        if output.method == "animate":
            if item.sound is None:
                raise UserError(f"{item.item.clip} has no speech to animate with")
            self._talker(motion=True).animate(
                item.portrait, item.sound, output.path, emotion=item.item.emotion, seed=output.seed
            )
            return
        frames: Iterator[Picture]
        if output.method == "copy":
            frames = (item.portrait.image for _ in range(item.frames))
        elif output.method == "reenact":
            frames = self._talker(motion=False).render(item.portrait, [item.motion()])
        elif output.method == "warp":
            frames = self._warped(item)
        elif output.method == "codebook":
            frames = self._rebuilt(item)
        else:
            raise UserError(f"unknown method {output.method!r}; choose one of {', '.join(METHODS)}")
        write_video(frames, output.path, item.sound, item.frames)

    def _warped(self, item: _Prepared) -> Iterator[Picture]:
        portrait = item.portrait
        renderer = _WarpRenderer(
            self.generator,
            self.face,
            portrait.image,
            portrait.identity,
            portrait.expression,
            portrait.pose,
            device=self.device,
            dtype=self.dtype or fast_dtype(self.device),
        )
        return renderer.render([item.motion()])

    def _rebuilt(self, item: _Prepared) -> Iterator[Picture]:
        autoencoder = self.generator.to(self.device).eval().autoencoder
        dtype = self.dtype or fast_dtype(self.device)
        crops = item.crops()
        while batch := list(islice(crops, _BATCH)):
            images = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            with torch.inference_mode(), torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                rebuilt, _ = autoencoder(images.contiguous(memory_format=torch.channels_last))
            yield from _pixels(rebuilt)


class _Prepared:
    """An item with its portrait, its sound cut to its frames, and its real video written.

    Attributes:
        item, portrait: as they are named.
        frames: number of frames at 25 fps.
        sound: 16 kHz WAV of 640 samples a frame; None where the clip has no speech.
    """

    def __init__(self, animator: Animator, item: Item, place: Path) -> None:
        self.item, self.face = item, animator.face
        limits = [s for s in (item.seconds, animator.seconds) if s is not None]
        self.limit = max(1, round(min(limits) * FPS)) if limits else None
        first = next(read_video(item.clip))
        self.portrait: Portrait = find_portrait(
            self.face, first if item.portrait is None else read_image(item.portrait), face=0
        )
        # A given portrait is another picture: the real clip gets the crop of its own first frame.
        self.crop = self.portrait.crop if item.portrait is None else find_portrait(self.face, first, face=0).crop
        self.frames = sum(1 for _ in self._clip())
        self.sound = self._write_sound(place)
        real = animator.folder / "real" / f"{item.name}.mp4"
        if not real.exists():
            real.parent.mkdir(parents=True, exist_ok=True)
            with VideoWriter(real, self.sound, crf=_REAL_CRF, preset=_REAL_PRESET) as writer:
                for frame in self.crops():
                    writer.write(frame)
        picture = animator.folder / "portraits" / f"{item.name}.png"
        if not picture.exists():
            from PIL import Image

            picture.parent.mkdir(parents=True, exist_ok=True)
            write_whole(picture, lambda path: Image.fromarray(self.portrait.image).save(path, format="PNG"))

    def _clip(self) -> Iterator[Picture]:
        return islice(read_video(self.item.clip), self.limit)

    def crops(self) -> Iterator[Picture]:
        """The real frames (512, 512, 3), cut like the portrait."""
        return map(self.crop.apply, self._clip())

    def motion(self) -> Block:
        """Expression (T, 64) and pose (T, 6) of the real clip in the portrait's crop and of its identity."""
        landmarks, _ = track_landmarks(self.item.clip, limit=self.limit)
        found = fit(self.face, self.crop.points(landmarks), identity=self.portrait.identity.cpu().numpy(), smooth=True)
        return torch.from_numpy(found.expression[: self.frames]), torch.from_numpy(found.pose[: self.frames])

    def _write_sound(self, place: Path) -> Path | None:
        if not self.item.voiced:
            return None
        if self.item.speech is not None:
            samples: npt.NDArray[np.float32] | None = load_sound(self.item.speech)
        else:
            samples = read_wave(self.item.clip, self.frames)
        if samples is None:
            return None
        whole = np.zeros(self.frames * _SAMPLES, np.float32)
        whole[: len(samples)] = samples[: len(whole)]
        path = place / "speech.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(_RATE)
            file.writeframes((np.clip(whole, -1, 1) * 32767).round().astype("<i2").tobytes())
        return path


def _reason(error: Exception) -> str:
    """One line about an error."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
