"""Motion files: what ``track`` and ``motion`` write and ``render`` reads."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.io.atomic import atomic_write

__all__ = ["Coefficients", "Motion", "resampled"]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Motion:
    """Consecutive frames of motion: what the sampler makes, block by block, and the renderer draws.

    Attributes:
        expression: (T, 64) β, float32.
        pose: (T, 6) ρ, float32; see :class:`Coefficients`.
        fps: frames per second.
    """

    expression: Tensor
    pose: Tensor
    fps: float = float(FPS)

    def __len__(self) -> int:
        return len(self.expression)

    @classmethod
    def join(cls, parts: Iterable[Motion]) -> Motion:
        """Concatenate parts of the same frame rate; at least one."""
        held = list(parts)
        expression, pose = torch.cat([part.expression for part in held]), torch.cat([part.pose for part in held])
        return cls(expression, pose, held[0].fps)


def resampled(motion: Iterable[Motion], fps: float) -> Iterator[Motion]:
    """Motion at another frame rate, as it arrives: linear between two frames, the last one held.

    T frames become T fps / FPS, rounded up. :meth:`Coefficients.at` is smoother, but needs the whole motion.
    """
    if fps == FPS:
        yield from motion
        return
    done = start = 0  # frames given; the number of the first frame that is held
    held = torch.empty(0, 70)

    def take(count: int) -> Iterator[Motion]:
        """The frames up to number ``count`` that were not given yet."""
        nonlocal done
        times = torch.arange(done, count, dtype=torch.float64) * (FPS / fps) - start
        if len(times):
            done = count
            before = times.long().clamp(max=len(held) - 1)
            after = (before + 1).clamp(max=len(held) - 1)
            frames = torch.lerp(held[before], held[after], (times - before).clamp(max=1)[:, None].float())
            yield Motion(frames[:, :64], frames[:, 64:], fps)

    for block in motion:
        held = torch.cat([held, torch.cat([block.expression, block.pose], 1).float().cpu()])
        yield from take(math.floor((start + len(held) - 1) * fps / FPS + 1e-9) + 1)
        keep = max(0, min(math.floor(done * FPS / fps) - start, len(held) - 1))
        start, held = start + keep, held[keep:]
    if len(held):
        yield from take(math.ceil((start + len(held)) * fps / FPS - 1e-9))


@dataclass(frozen=True)
class Coefficients:
    """Motion of T frames (T = 1 for an image).

    Attributes:
        expression: (T, 64) β.
        pose: (T, 6) ρ = (pitch, yaw, roll, tx, ty, tz) in radians and the face model's unit (the distance between the
            outer eye corners of the mean face).
        identity: (80,) α; zeros if unknown.
        fps: frames per second.
        landmarks: (T, 478, 3) in pixels of the input, NaN where no face was found; None if generated.
        blendshapes: (T, 52) of the tracker in MediaPipe's order, or None.
        crop: (2, 3) affine map from input pixels to pixels of the 512x512 crop, or None.
    """

    expression: Array
    pose: Array
    identity: Array
    fps: float = float(FPS)
    landmarks: Array | None = None
    blendshapes: Array | None = None
    crop: Array | None = None

    def __len__(self) -> int:
        return len(self.expression)

    @classmethod
    def of(cls, motion: Motion, identity: Array | None = None) -> Coefficients:
        """Coefficients that hold a motion; without an identity (80,), of the mean face."""
        shape = np.zeros(80, np.float32) if identity is None else identity
        return cls(motion.expression.numpy(force=True), motion.pose.numpy(force=True), shape, motion.fps)

    def motion(self, fps: float = float(FPS)) -> Motion:
        """Expression and pose at a frame rate; see :meth:`at`."""
        moved = self.at(fps)
        return Motion(torch.from_numpy(moved.expression), torch.from_numpy(moved.pose), fps)

    def save(self, path: str | Path) -> None:
        """Write ``.npz``; it appears whole or not at all."""
        arrays = {
            "expression": self.expression,
            "pose": self.pose,
            "identity": self.identity,
            "fps": np.float32(self.fps),
            "landmarks": self.landmarks,
            "blendshapes": self.blendshapes,
            "crop": self.crop,
        }
        kept = {name: np.asarray(value, dtype=np.float32) for name, value in arrays.items() if value is not None}
        atomic_write(path, lambda temporary: _savez(temporary, kept))

    @classmethod
    def load(cls, path: str | Path) -> Coefficients:
        """Read an ``.npz`` file.

        Raises:
            UserError: if it is missing, damaged, or its arrays do not match.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"motion file {path} does not exist; make one with `flowvqtalker motion` or `flowvqtalker track`"
            )
        try:
            with np.load(path) as content:
                arrays = {name: np.asarray(content[name], dtype=np.float32) for name in content.files}
        except Exception as error:  # numpy and zipfile raise errors of many kinds, some without a message
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            if not zipfile.is_zipfile(path):
                reason = "another kind of file, or damaged"
            raise UserError(
                f"{path} is not an .npz file of motion ({reason}); "
                "make one with `flowvqtalker motion` or `flowvqtalker track`"
            ) from error
        problems = _problems(arrays)
        if problems:
            raise UserError(
                f"{path} is not a file of motion: {'; '.join(problems)}; "
                "make one with `flowvqtalker motion` or `flowvqtalker track`"
            )
        return cls(
            expression=arrays["expression"],
            pose=arrays["pose"],
            identity=arrays.get("identity", np.zeros(80, np.float32)),
            fps=float(arrays.get("fps", np.float32(FPS))),
            landmarks=arrays.get("landmarks"),
            blendshapes=arrays.get("blendshapes"),
            crop=arrays.get("crop"),
        )

    def at(self, fps: float) -> Coefficients:
        """Expression and pose at another rate; the rest is dropped.

        Interpolation is monotone, so lips that touch do not cross, and the head follows rotations rather than three
        separate angles. The last frame is held.
        """
        if abs(self.fps - fps) < 1e-6 or len(self) == 1:
            return self
        count = max(1, round(len(self) * fps / self.fps))
        times = np.minimum(np.arange(count) * (self.fps / fps), len(self) - 1)  # in frames
        turned, shifted = _interpolate_rotations(self.pose[:, :3], times), _interpolate(self.pose[:, 3:], times)
        pose = np.concatenate([turned, shifted], axis=1)
        return Coefficients(_interpolate(self.expression, times), pose.astype(np.float32), self.identity, fps)


def _interpolate(values: Array, times: npt.NDArray[np.float64]) -> Array:
    """Values (T, n) at times in frames, by monotone cubic interpolation."""
    from scipy.interpolate import PchipInterpolator

    moved: Array = PchipInterpolator(np.arange(len(values)), values.astype(np.float64))(times).astype(np.float32)
    return moved


def _interpolate_rotations(angles: Array, times: npt.NDArray[np.float64]) -> Array:
    """(pitch, yaw, roll) (T, 3) at times in frames, by a spline of rotations."""
    from scipy.spatial.transform import Rotation, RotationSpline

    turns = Rotation.from_euler("ZYX", angles[:, ::-1].astype(np.float64))  # R = Rz(roll) Ry(yaw) Rx(pitch)
    found: Array = RotationSpline(np.arange(len(angles)), turns)(times).as_euler("ZYX")[:, ::-1].astype(np.float32)
    return found


def _problems(arrays: dict[str, Array]) -> list[str]:
    """What is wrong with the arrays of a motion file."""
    problems = [f"it has no {name}" for name in ("expression", "pose") if name not in arrays]
    if problems:
        return problems
    count = len(arrays["expression"]) if arrays["expression"].ndim else 0
    per_frame = {"expression": (64,), "pose": (6,), "landmarks": (478, 3), "blendshapes": (52,)}
    fixed: dict[str, tuple[int, ...]] = {"identity": (80,), "fps": (), "crop": (2, 3)}
    for name in (name for name in (*per_frame, *fixed) if name in arrays):
        shape = (count, *per_frame[name]) if name in per_frame else fixed[name]
        if arrays[name].shape != shape or count == 0:
            needed = f"(T, {', '.join(map(str, shape[1:]))})" if name in per_frame else str(shape)
            problems.append(f"{name} has shape {arrays[name].shape}, {needed} is needed")
        elif name not in ("landmarks", "blendshapes") and not np.isfinite(arrays[name]).all():
            problems.append(f"{name} holds values that are not numbers")
    if not problems and "fps" in arrays and not 1 <= float(arrays["fps"]) <= 1000:
        problems.append(f"fps is {float(arrays['fps']):g}, 1 to 1000 are allowed")
    return problems


def _savez(path: Path, arrays: dict[str, Array]) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
