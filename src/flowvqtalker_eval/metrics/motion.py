"""Metrics of motion: of coefficients (β, ρ), of the face model's vertices, and of tracked landmarks.

Arrays are NumPy's, one row per frame at 25 fps. Metrics of a pair need clips of equal length; pair the frames first.
Frames without a face are rows of NaN. They are left out, and a metric of nothing is NaN. Lengths are shares of the
distance between the outer eye corners, so no metric depends on the size of the face in the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from flowvqtalker.constants import FPS
from flowvqtalker.errors import UserError
from flowvqtalker.face.geometry import fill_gaps
from flowvqtalker.face.model import IDENTITY, FaceModel
from flowvqtalker.face.topology import EYE_CORNERS, EYES, LIPS, RIGID
from flowvqtalker.motion.blink import BLINK_FRAMES, measure_blinks
from flowvqtalker_eval.metrics.analysis import Array

__all__ = [
    "PoseDistance",
    "blink_rate",
    "diversity",
    "expression_distance",
    "eye_aspect_ratio",
    "eye_closure_of_landmarks",
    "face_frame",
    "finite_mean",
    "head_deviation",
    "jitter",
    "landmark_distance",
    "landmark_jitter",
    "lip_vertex_error",
    "pose_distance",
    "shape",
]

_LIPS, _RIGID = list(LIPS), list(RIGID)


def _pair(real: Array, generated: Array, width: int | None = None) -> tuple[Array, Array]:
    """The frames that both have, as float64."""
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.shape != generated.shape or len(real) == 0 or (width is not None and real.shape[1:] != (width,)):
        wanted = "the same shape" if width is None else f"the same shape (T, {width})"
        raise UserError(
            f"motion of {wanted} is compared, got {real.shape} and {generated.shape}; pair the frames first"
        )
    both = [np.isfinite(values).reshape(len(values), -1).all(1) for values in (real, generated)]
    return real[both[0] & both[1]], generated[both[0] & both[1]]


def finite_mean(values: Array) -> float:
    """Mean of what is finite; NaN if nothing is."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")


# ------------------------------------------------------------------------------------------------------ coefficients


@dataclass(frozen=True)
class PoseDistance:
    """APD in two parts, since radians and lengths do not add up.

    Attributes:
        angles: mean absolute difference of pitch, yaw and roll in degrees.
        translation: the same of (tx, ty, tz) in the face model's unit, the mean face's eye distance.
    """

    angles: float
    translation: float


def expression_distance(real: Array, generated: Array, norm: int = 1) -> float:
    """AED, average expression distance of β (T, 64), in standard deviations of faces.

    Arguments:
        real, generated: (T, 64).
        norm: 1 is PIRender's definition, the mean over frames and coefficients of |β̂ - β|; 2 is the mean over frames
            of ‖β̂ - β‖₂.
    """
    real, generated = _pair(real, generated, 64)
    difference = generated - real
    return finite_mean(np.abs(difference) if norm == 1 else np.linalg.norm(difference, axis=1))


def pose_distance(real: Array, generated: Array) -> PoseDistance:
    """APD, average pose distance, of ρ (T, 6) = (pitch, yaw, roll in radians, tx, ty, tz)."""
    real, generated = _pair(real, generated, 6)
    difference = generated - real
    angles = np.abs((difference[:, :3] + np.pi) % (2 * np.pi) - np.pi)  # the short way round
    return PoseDistance(finite_mean(np.degrees(angles)), finite_mean(np.abs(difference[:, 3:])))


def head_deviation(rho: Array) -> Array:
    """(3,) standard deviation of pitch, yaw and roll within a clip (T, 6), degrees."""
    angles = np.asarray(rho, np.float64)[:, :3]
    angles = angles[np.isfinite(angles).all(1)]
    return np.degrees(angles.std(0)) if len(angles) else np.full(3, np.nan)


def diversity(samples: Sequence[Array]) -> float:
    """Mean over pairs of samples and over frames of their Euclidean distance; NaN for a single sample.

    Arguments:
        samples: (T, D) or (T,) each, generated for the same speech with different seeds. The frames that a pair has in
            common are compared.
    """
    rows = [np.asarray(sample, np.float64).reshape(len(sample), -1) for sample in samples]
    common = [(a, b, min(len(a), len(b))) for a, b in combinations(rows, 2)]
    return finite_mean(np.array([finite_mean(np.linalg.norm(a[:n] - b[:n], axis=1)) for a, b, n in common]))


# ---------------------------------------------------------------------------------------------------------- vertices


def shape(face: FaceModel, beta: Array, alpha: Array | None = None) -> Array:
    """Vertices (T, 478, 3) of β (T, 64) on the identity α (80,), or on the mean identity; no head pose."""
    person = torch.zeros(IDENTITY) if alpha is None else torch.as_tensor(np.asarray(alpha, np.float32))
    with torch.inference_mode():
        return face.shape(person, torch.as_tensor(np.asarray(beta, np.float32))).numpy()


def lip_vertex_error(real: Array, generated: Array) -> float:
    """LVE: the largest L2 error of a lip vertex in a frame, mean over frames, in % of the eye distance.

    The definition of VOCA, MeshTalk and FaceFormer, whose scans have one identity and a still head. So have the
    vertices that :func:`shape` gives.

    Arguments:
        real, generated: (T, 478, 3) vertices in any unit.
    """
    real, generated = _pair(real, generated)
    if real.ndim != 3 or real.shape[1] <= max(_LIPS):
        raise UserError(f"vertices (T, 478, 3) are compared, got {real.shape}")
    worst = np.linalg.norm(generated[:, _LIPS] - real[:, _LIPS], axis=-1).max(axis=1)
    return 100 * finite_mean(worst) / finite_mean(_eye_distance(real))


def _eye_distance(points: Array) -> Array:
    """(T,) distance between the outer eye corners of (T, 478, 2 or 3)."""
    return np.asarray(np.linalg.norm(points[:, EYE_CORNERS[0]] - points[:, EYE_CORNERS[1]], axis=-1))


def jitter(points: Array, order: int = 2, fps: float = FPS) -> float:
    """Mean acceleration (order 2) or jerk (order 3) of points (T, V, 2 or 3), in their unit per s² or s³.

    NaN if the clip is too short or has no run of frames with a face.
    """
    return finite_mean(np.linalg.norm(np.diff(np.asarray(points, np.float64), n=order, axis=0), axis=-1)) * fps**order


# --------------------------------------------------------------------------------------------------------- landmarks


def face_frame(mesh: Array) -> Array:
    """Landmarks without the head's movement in the image plane.

    A similarity brings each frame's vertices over bone (:data:`~flowvqtalker.face.topology.RIGID`) closest to their
    mean place, which is found in two rounds.

    Arguments:
        mesh: (T, 478, 2 or 3) tracked landmarks in pixels, NaN without a face; their depth is a guess and not used.

    Returns:
        (T, 478, 2) in mean eye distances.
    """
    plane = np.asarray(mesh, np.float64)[..., :2]
    found = np.isfinite(plane).all(axis=(1, 2))
    if not found.any():
        raise UserError("no frame has a face; landmarks of a face are needed")
    points = plane[found] @ [1, 1j]  # a similarity of the plane is a product and a sum of complex numbers
    points = points - points[:, _RIGID].mean(1, keepdims=True)
    target = points[0, _RIGID]
    for _ in range(2):
        rigid = points[:, _RIGID]
        aligned = points * ((rigid.conj() @ target) / (np.abs(rigid) ** 2).sum(1))[:, None]
        target = aligned[:, _RIGID].mean(0)
    flat = np.full(plane.shape, np.nan)
    flat[found] = np.stack([aligned.real, aligned.imag], axis=-1)
    return np.asarray(flat / finite_mean(_eye_distance(flat)))


def landmark_jitter(mesh: Array) -> dict[str, float]:
    """Acceleration of tracked landmarks (T, 478, 2 or 3) without the head's movement, in eye distances / s².

    Returns:
        ``face``: of all landmarks; ``bone``: of those over bone, which do not move at all in an ideal video.
    """
    frame = face_frame(mesh)
    return {"face": jitter(frame), "bone": jitter(frame[:, _RIGID])}


def eye_aspect_ratio(mesh: Array) -> Array:
    """(T,) height of the eyes' opening over its width, mean of both eyes (Soukupová and Čech 2016), of landmarks
    (T, 478, 2 or 3)."""
    plane = np.asarray(mesh, np.float64)[..., :2]
    ratios = []
    for eye in EYES:
        outer, upper, upper2, inner, lower2, lower = (plane[:, i] for i in eye)
        height = np.linalg.norm(upper - lower, axis=-1) + np.linalg.norm(upper2 - lower2, axis=-1)
        ratios.append(height / (2 * np.linalg.norm(outer - inner, axis=-1)))
    return np.asarray(np.mean(ratios, axis=0))


def landmark_distance(real: Array, generated: Array) -> tuple[float, float]:
    """Landmark distances of the mouth and the whole face (M-LMD, F-LMD) of one clip, as ``yuangan/evaluation_eat``
    computes them, in pixels.

    From the 20 points of the mouth (48..67), or from all 68, their mean is subtracted; nothing is scaled. Distances are
    averaged over points, then over the frames in which both faces were found. ATVGnet (Chen et al. 2019) sums over the
    mouth's points: numbers 20 times as large.

    Arguments:
        real, generated: (T, 68, 2) landmarks on the aligned crop of 128 pixels, frame by frame.
    """
    real, generated = _pair(real, generated)
    if real.shape[1:] != (68, 2):
        raise UserError(f"landmarks must have shape (T, 68, 2), got {real.shape}")

    def distance(first: int) -> float:
        a, b = (points[:, first:] - points[:, first:].mean(1, keepdims=True) for points in (real, generated))
        return finite_mean(np.linalg.norm(a - b, axis=-1))

    return distance(48), distance(0)


# ------------------------------------------------------------------------------------------------------------ blinks


def eye_closure_of_landmarks(mesh: Array) -> Array:
    """(T,) how far the eyes are shut: 0 as open as the clip's widest tenth, 1 without any opening."""
    ratio = eye_aspect_ratio(mesh)
    found = np.isfinite(ratio)
    if not found.any():
        raise UserError("no frame has a face; landmarks of a face are needed")
    ratio = fill_gaps(ratio[found], found)
    return np.asarray(1 - ratio / np.percentile(ratio, 90))


def blink_rate(closures: Iterable[Array]) -> float:
    """Blinks per minute of clips together, counted as :func:`~flowvqtalker.motion.blink.measure_blinks` does.

    A blink is seen only if its middle lies some frames from both ends of its clip. Only the time in which it can be
    seen counts; otherwise clips of a second would seem to blink half as often.

    Arguments:
        closures: (T,) each, from :func:`eye_closure_of_landmarks` or of the same kind.

    Returns:
        NaN if every clip is shorter than a blink.
    """
    clips = [np.asarray(closure, np.float32)[:, None] for closure in closures]
    seen = sum(max(0, len(clip) - BLINK_FRAMES) for clip in clips)
    if seen == 0:
        return float("nan")
    rate = measure_blinks(clips, np.array([1, 0], np.float32))[1]
    return float(rate * sum(map(len, clips)) / seen)
