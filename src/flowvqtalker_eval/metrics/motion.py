"""Measures of motion: of coefficients (β, ρ), of the face model's vertices, and of tracked landmarks.

Arrays are NumPy's, one row a frame at 25 fps. A pair of clips must have the same number of frames; whoever compares
clips of different lengths pairs their frames first. Frames without a face are rows of NaN; they are left out, and a
measure of nothing is NaN. Lengths are shares of the distance between the outer eye corners,
so no measure depends on how large a face is in its picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import arkit_index
from flowvqtalker.face.model import IDENTITY, FaceModel
from flowvqtalker.face.topology import EYE_CORNERS, EYES, LIPS, RIGID
from flowvqtalker.io.media import FPS
from flowvqtalker.motion.blink import BLINK_FRAMES, measure_blinks

__all__ = [
    "Jitter",
    "PoseDistance",
    "blink_rate",
    "correlation",
    "diversity",
    "expression_distance",
    "eye_aspect_ratio",
    "eye_closure",
    "face_frame",
    "head_deviation",
    "jitter",
    "landmark_jitter",
    "lip_opening",
    "lip_vertex_error",
    "pose_distance",
    "shape",
    "shut_from_landmarks",
    "speed",
]

Array = npt.NDArray[np.floating[Any]]

#: Middle of the upper and of the lower lip, inner side.
_UPPER, _LOWER = 13, 14
_LIPS, _RIGID = list(LIPS), list(RIGID)


def _pair(real: Array, made: Array, width: int | None = None) -> tuple[Array, Array]:
    """The frames that both have, as float64, after checking that the arrays fit together."""
    real, made = np.asarray(real, np.float64), np.asarray(made, np.float64)
    if real.shape != made.shape or len(real) == 0 or (width is not None and real.shape[1:] != (width,)):
        wanted = "the same shape" if width is None else f"the same shape (T, {width})"
        raise UserError(f"motion of {wanted} is compared, got {real.shape} and {made.shape}; pair the frames first")
    both = np.isfinite(real).reshape(len(real), -1).all(1) & np.isfinite(made).reshape(len(made), -1).all(1)
    return real[both], made[both]


def _mean(values: Array) -> float:
    """Mean of what is finite; NaN if nothing is."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")


# ------------------------------------------------------------------------------------------------------ coefficients


@dataclass(frozen=True)
class PoseDistance:
    """APD in two parts, since radians and lengths do not add up.

    Attributes:
        angles: mean over frames and the three axes of the absolute difference, degrees.
        translation: the same of (tx, ty, tz), in the face model's unit, the mean face's eye distance.
    """

    angles: float
    translation: float


def expression_distance(real: Array, made: Array, norm: int = 1) -> float:
    """AED, average expression distance.

    Arguments:
        real, made: (T, 64) β, in standard deviations of faces.
        norm: 1 is the definition of PIRender and its successors, the mean over frames and coefficients of |β̂ - β|; 2 is
            the mean over frames of ‖β̂ - β‖₂.
    """
    real, made = _pair(real, made, 64)
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, got {norm}")
    difference = made - real
    return _mean(np.abs(difference) if norm == 1 else np.linalg.norm(difference, axis=1))


def pose_distance(real: Array, made: Array) -> PoseDistance:
    """APD, average pose distance, of ρ (T, 6) = (pitch, yaw, roll in radians, tx, ty, tz)."""
    real, made = _pair(real, made, 6)
    difference = made - real
    angles = np.abs((difference[:, :3] + np.pi) % (2 * np.pi) - np.pi)  # the short way round
    return PoseDistance(_mean(np.degrees(angles)), _mean(np.abs(difference[:, 3:])))


def head_deviation(rho: Array) -> Array:
    """(3,) standard deviation of pitch, yaw and roll within a clip (T, 6), degrees."""
    angles = np.asarray(rho, np.float64)[:, :3]
    angles = angles[np.isfinite(angles).all(1)]
    deviation: Array = np.degrees(angles.std(0)) if len(angles) else np.full(3, np.nan)
    return deviation


def speed(values: Array, fps: float = FPS) -> float:
    """Mean over frames of the Euclidean distance that (T, D) moves, a second; NaN for a single frame."""
    return _mean(np.linalg.norm(np.diff(np.asarray(values, np.float64), axis=0), axis=1)) * fps


def diversity(takes: Sequence[Array]) -> float:
    """Mean over pairs of takes and over frames of the Euclidean distance between them.

    Arguments:
        takes: N >= 2 of (T, D): the same speech drawn with N seeds, or N clips; of different lengths, the frames that
            both have are compared.

    Returns:
        0 for equal takes, NaN for a single one.
    """
    rows = [np.asarray(take, np.float64).reshape(len(take), -1) for take in takes]
    found = []
    for a, b in combinations(rows, 2):
        length = min(len(a), len(b))
        found.append(_mean(np.linalg.norm(a[:length] - b[:length], axis=1)))
    return _mean(np.array(found))


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two (T,); 0 where one of the two does not move."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-9 and b.std() > 1e-9 else 0.0


# ---------------------------------------------------------------------------------------------------------- vertices


def shape(face: FaceModel, beta: Array, alpha: Array | None = None) -> Array:
    """Vertices (T, 478, 3) of β (T, 64) on the identity α (80,), or on the mean identity; no head pose."""
    person = torch.zeros(IDENTITY) if alpha is None else torch.as_tensor(np.asarray(alpha, np.float32))
    with torch.inference_mode():
        vertices: Array = face.shape(person, torch.as_tensor(np.asarray(beta, np.float32))).numpy()
    return vertices


def lip_opening(face: FaceModel, beta: Array) -> Array:
    """(T,) distance that β parts the middles of the lips' inner rims by, beyond the mean face's."""
    gap = face.expression[:, _LOWER, 1] - face.expression[:, _UPPER, 1]
    opening: Array = np.asarray(beta) @ gap.numpy()
    return opening


def lip_vertex_error(real: Array, made: Array) -> float:
    """LVE: the largest distance of a lip vertex from where it should be, mean over frames, in % of the eye distance.

    The definition of VOCA, MeshTalk and FaceFormer: of each frame the maximum over the lips' vertices of the L2
    distance. (The last one's code leaves out the root; here it is taken.) They work on their scans' fixed identity and
    a still head; so does this, on what :func:`shape` gives for the true identity or for the mean face.

    Arguments:
        real, made: (T, 478, 3) vertices in any unit.
    """
    real, made = _pair(real, made)
    if real.ndim != 3 or real.shape[1] <= max(_LIPS):
        raise UserError(f"vertices (T, 478, 3) are compared, got {real.shape}")
    worst = np.linalg.norm(made[:, _LIPS] - real[:, _LIPS], axis=-1).max(axis=1)
    return 100 * _mean(worst) / _mean(_eye_distance(real))


def _eye_distance(points: Array) -> Array:
    """(T,) distance between the outer corners of the eyes of (T, 478, 2 or 3)."""
    distance: Array = np.linalg.norm(points[:, EYE_CORNERS[0]] - points[:, EYE_CORNERS[1]], axis=-1)
    return distance


@dataclass(frozen=True)
class Jitter:
    """How unsteadily points move; NaN where the clip is too short or has no run of frames with a face.

    Attributes:
        acceleration: mean over frames and points of the length of the second difference, eye distances / s².
        jerk: the same of the third difference, eye distances / s³.
    """

    acceleration: float
    jerk: float


def jitter(points: Array, fps: float = FPS, scale: float = 1.0) -> Jitter:
    """Mean acceleration and jerk of points (T, V, 2 or 3); rows of NaN are left out with all that touches them.

    Arguments:
        points: in units of ``scale``.
        fps: frames a second.
        scale: the eye distance in the points' unit: 1 for :func:`shape`.
    """
    points = np.asarray(points, np.float64)

    def mean(order: int) -> float:
        return _mean(np.linalg.norm(np.diff(points, n=order, axis=0), axis=-1)) * fps**order / scale

    return Jitter(mean(2), mean(3))


# --------------------------------------------------------------------------------------------------------- landmarks


def face_frame(mesh: Array) -> Array:
    """Landmarks with the head's movement in the picture plane taken off.

    Each frame is moved by the similarity that brings the vertices over bone (:data:`~flowvqtalker.face.topology.RIGID`)
    closest to their mean place, which is found in two rounds.

    Arguments:
        mesh: (T, 478, 2 or 3) tracked landmarks in pixels, NaN where there is no face; z is not used, it is a guess.

    Returns:
        (T, 478, 2), unit: the mean eye distance.
    """
    plane = np.asarray(mesh, np.float64)[..., :2]
    found = np.isfinite(plane).all(axis=(1, 2))
    if not found.any():
        raise UserError("no frame has a face; landmarks of a face are needed")
    points = plane[found, :, 0] + 1j * plane[found, :, 1]  # a similarity of the plane is a product and a sum
    points = points - points[:, _RIGID].mean(1, keepdims=True)
    target = points[0, _RIGID]
    for _ in range(2):
        rigid = points[:, _RIGID]
        aligned = points * ((rigid.conj() @ target) / (np.abs(rigid) ** 2).sum(1))[:, None]
        target = aligned[:, _RIGID].mean(0)
    flat = np.full(plane.shape, np.nan)
    flat[found] = np.stack([aligned.real, aligned.imag], axis=-1)
    frame: Array = flat / _mean(_eye_distance(flat))
    return frame


def landmark_jitter(mesh: Array, fps: float = FPS) -> dict[str, Jitter]:
    """Jitter of tracked landmarks (T, 478, 2 or 3), NaN where there is no face.

    Returns:
        ``face``: all landmarks with the head's movement taken off; ``static``: those over bone, taken off likewise,
        which an ideal video does not move at all; ``head``: those over bone as they move in the picture.
    """
    frame = face_frame(mesh)
    plane = np.asarray(mesh, np.float64)[..., :2]
    size = float(np.nanmean(_eye_distance(plane)))
    return {
        "face": jitter(frame, fps),
        "static": jitter(frame[:, _RIGID], fps),
        "head": jitter(plane[:, _RIGID], fps, scale=size),
    }


def eye_aspect_ratio(mesh: Array) -> Array:
    """(T,) height of the eyes' opening as a share of its width, mean of both eyes (Soukupová and Čech 2016), of
    landmarks (T, 478, 2 or 3)."""
    plane = np.asarray(mesh, np.float64)[..., :2]
    ratios = []
    for eye in EYES:
        outer, upper, upper2, inner, lower2, lower = (plane[:, i] for i in eye)
        height = np.linalg.norm(upper - lower, axis=-1) + np.linalg.norm(upper2 - lower2, axis=-1)
        ratios.append(height / (2 * np.linalg.norm(outer - inner, axis=-1)))
    ratio: Array = np.mean(ratios, axis=0)
    return ratio


def shut_from_landmarks(mesh: Array) -> Array:
    """(T,) how far the eyes are shut: 0 as open as the clip's widest tenth, 1 without any opening."""
    ratio = eye_aspect_ratio(mesh)
    found = np.isfinite(ratio)
    if not found.any():
        raise UserError("no frame has a face; landmarks of a face are needed")
    ratio = np.interp(np.arange(len(ratio)), np.flatnonzero(found), ratio[found])
    shut: Array = 1 - ratio / np.percentile(ratio, 90)
    return shut


# ------------------------------------------------------------------------------------------------------------ blinks


def eye_closure(face: FaceModel, beta: Array) -> Array:
    """(T,) mean of the two ``eyeBlink`` blendshapes of β (T, 64), not clamped."""
    lids = face.arkit[[arkit_index("eyeBlinkLeft"), arkit_index("eyeBlinkRight")]].mean(0).numpy()
    closure: Array = np.asarray(beta) @ lids[:-1] + lids[-1]
    return closure


def blink_rate(closures: Iterable[Array]) -> float:
    """Blinks a minute of one or several clips together, counted as :func:`~flowvqtalker.motion.blink.measure_blinks`
    does.

    The middle of a blink must lie a few frames from either end of a clip to be seen, so only the time in which it can
    be seen counts; otherwise clips of a second would seem to blink half as often as they do.

    Arguments:
        closures: (T,) each, from :func:`eye_closure` or :func:`shut_from_landmarks`.

    Returns:
        NaN if every clip is shorter than a blink.
    """
    clips = [np.asarray(closure, np.float32)[:, None] for closure in closures]
    seen = sum(max(0, len(clip) - BLINK_FRAMES) for clip in clips)
    if seen == 0:
        return float("nan")
    rate = measure_blinks(clips, np.array([1, 0], np.float32))[1]
    return float(rate * sum(map(len, clips)) / seen)
