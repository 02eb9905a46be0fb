"""Fit the face model to landmarks: one identity, and an expression and a pose per frame, all frames at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.geometry import Floats, align, angles_of, fill_gaps, rodrigues, tangents, unproject
from flowvqtalker.face.model import CENTRE, EXPRESSION, FOCAL, IDENTITY, FaceModel
from flowvqtalker.face.topology import EYE_CORNERS, LIDS, LIPS, RIGID, VERTICES

__all__ = ["Fit", "Fitter", "State", "fast_directions", "fit", "reprojection_error", "smooth_clip"]

# Weight of residuals in depth: MediaPipe estimates depth from x and y, so it is less reliable.
_DEPTH_WEIGHT = 0.25
_ROUNDS = 7
# Precision of the prior on β, relative to α's, while the identity of one image is fitted: an expression explains a
# smile better than an identity does.
_SINGLE_PRECISION = 0.02
# Frames per batch; bounds the memory for long clips.
_BLOCK = 2048
# Vertices of the irises: the gaze jumps within one or two frames.
_IRISES = tuple(range(468, VERTICES))
# Cubic polynomials over 9 frames (0.36 s) keep 95 % of a 2 Hz nod and a quarter of the noise's power.
_WINDOW, _ORDER = 9, 3

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fit:
    """Coefficients of one clip (T frames) or image (T = 1).

    Attributes:
        identity: (80,) α in standard deviations.
        expression: (T, 64) β in standard deviations.
        pose: (T, 6) ρ = (pitch, yaw, roll [rad], tx, ty, tz), see :meth:`FaceModel.project`.
        residual: (T,) mean distance between landmarks and projected vertices before smoothing, in distances between
            the outer eye corners; NaN where the frame had no landmarks and was interpolated.
    """

    identity: Array
    expression: Array
    pose: Array
    residual: Array


@dataclass
class State:
    """Similarities from the model's unit to points in space (see geometry.unproject), and the expression."""

    scale: Floats  # (T,)
    rotation: Floats  # (T, 3, 3)
    shift: Floats  # (T, 3)
    beta: Floats  # (T, 64)


class Fitter:
    """Gauss-Newton on the reprojection error in the object's coordinates.

    There the expression's derivatives are the same in all frames and the pose's nearly so. One inverse serves all
    frames, and an iteration is two matrix products.
    """

    def __init__(self, model: FaceModel) -> None:
        self.mean: Floats = model.mean.cpu().numpy()
        self.identity: Floats = model.identity.cpu().numpy().reshape(IDENTITY, -1)
        self.expression: Floats = model.expression.cpu().numpy().reshape(EXPRESSION, -1)
        self.precision = 1.0 / float(model.noise) ** 2
        self.rigid = np.zeros(VERTICES, dtype=np.float32)
        self.rigid[list(RIGID)] = 1
        self.weights = np.tile(np.array([1, 1, _DEPTH_WEIGHT], dtype=np.float32), VERTICES)
        # The mean face's derivatives serve all identities: they only direct the steps; residuals are exact.
        both = np.concatenate([self.identity, self.expression])
        self._first = self.solver(both, self.mean)
        self._frame = self.solver(self.expression, self.mean)
        leak = model.smile_leak.cpu().numpy().astype(np.float64)
        self._single = self._first
        if len(leak):
            prior = np.eye(len(both))
            prior[:IDENTITY, :IDENTITY] += leak.T @ leak
            prior[IDENTITY:] *= _SINGLE_PRECISION
            self._single = self.solver(both, self.mean, prior)

    def shape(self, alpha: Floats, beta: Floats) -> Floats:
        """Vertices (T, V, 3) of one α (80,) and β (T, 64)."""
        person = self.mean.ravel() + alpha @ self.identity
        return (person + beta @ self.expression).reshape(-1, VERTICES, 3)

    def solver(
        self, basis: Floats, shape: Floats, prior: npt.NDArray[np.float64] | None = None
    ) -> tuple[Floats, Floats]:
        """Gain (V * 3, K + 7) and shrinkage (K, K + 7) of the regularised least squares over basis and pose.

        The step from residuals r (T, V * 3) at coefficients c (T, K) is r @ gain - c @ shrinkage. ``prior`` (K, K) is
        the precision of the coefficients; None is the identity matrix.
        """
        jacobian = np.concatenate([basis, tangents(shape)]).astype(np.float64)
        weighted = jacobian * (self.weights * self.precision)
        gram = weighted @ jacobian.T
        count = len(basis)
        prior = np.eye(count) if prior is None else prior
        gram[:count, :count] += prior
        inverse = scipy.linalg.inv(gram, check_finite=False)
        return (weighted.T @ inverse).astype(np.float32), (prior @ inverse[:count]).astype(np.float32)

    def start(self, landmarks: Floats) -> State:
        """The pose that aligns the mean face's rigid vertices."""
        scale, rotation, shift = align(unproject(landmarks), self.mean, self.rigid)
        return State(scale, rotation, shift, np.zeros((len(landmarks), EXPRESSION), dtype=np.float32))

    def objects(self, landmarks: Floats, state: State, shape: Floats) -> Floats:
        """Landmarks (T, V * 3) in the object's coordinates: x, y on their rays at the depth of ``shape`` (T, V, 3)."""
        z = state.shift[:, 2:] + state.scale[:, None] * np.einsum("tvc,tc->tv", shape, state.rotation[:, 2])
        points = np.empty_like(landmarks)
        np.multiply(landmarks[..., :2] - np.float32(CENTRE), z[..., None] / np.float32(FOCAL), out=points[..., :2])
        points[..., 2] = landmarks[..., 2] + np.float32(FOCAL)
        points -= state.shift[:, None]
        return ((points @ state.rotation) / state.scale[:, None, None]).reshape(len(landmarks), -1)

    def move(self, state: State, step: Floats) -> None:
        """Apply pose steps (T or 1, 7) in the object's coordinates."""
        step = np.broadcast_to(step, (len(state.shift), 7))
        moved = (state.rotation @ step[:, 3:6, None])[..., 0]
        state.shift = state.shift + state.scale[:, None] * moved
        state.rotation = state.rotation @ rodrigues(step[:, :3])
        state.scale = state.scale * np.exp(step[:, 6])

    def run(self, landmarks: Floats, identity: Floats | None) -> tuple[State, Floats]:
        """Fit clean landmarks (T, 478, 3); returns the state and α (80,)."""
        state = self.start(landmarks)
        alpha = np.zeros(IDENTITY, dtype=np.float32) if identity is None else identity.astype(np.float32)
        first, first_shrink = self._first if len(landmarks) > 1 else self._single
        gain, shrink = self._frame
        for round_ in range(_ROUNDS):
            if identity is None and round_ < _ROUNDS - 2:
                # Fit α and the mean expression to the clip's mean face, as to one image, under their priors.
                shape = self.shape(alpha, state.beta)
                residual = (self.objects(landmarks, state, shape) - shape.reshape(len(shape), -1)).mean(0)
                now = np.concatenate([alpha, state.beta.mean(0)])
                step = residual @ first - now @ first_shrink
                alpha = alpha + step[:IDENTITY]
                state.beta = state.beta + step[IDENTITY:-7]
                self.move(state, step[None, -7:])
            shape = self.shape(alpha, state.beta)
            residual = self.objects(landmarks, state, shape) - shape.reshape(len(shape), -1)
            steps = residual @ gain - state.beta @ shrink
            state.beta = state.beta + steps[:, :-7]
            self.move(state, steps[:, -7:])
        return state, alpha

    def pose(self, state: State) -> Floats:
        """ρ (T, 6), with the translation in the model's unit."""
        return np.concatenate([angles_of(state.rotation), state.shift / state.scale[:, None]], axis=1)


def fit(model: FaceModel, landmarks: Floats, *, identity: Floats | None = None, smooth: bool = False) -> Fit:
    """Fit identity, expression and pose to the landmarks of one person.

    The posterior mode under unit Gaussian priors on α, on β of each frame and on the clip's mean β. A constant smile
    goes to β, since the identity basis explains it at a higher cost. A single image shows no change that would tell a
    smile from a wide mouth: there the prior on β is flatter, and α pays for directions that look like smiles
    (``smile_leak``, learned from people seen neutral and smiling).

    Arguments:
        model: the face model.
        landmarks: (T, 478, 3) or (478, 3), pixels of the crop (see :class:`flowvqtalker.face.crop.Crop`), z too. Frames
            with NaN are skipped and their coefficients interpolated in time.
        identity: (80,) α if known; otherwise one is fitted for all frames.
        smooth: smooth over time, see :func:`smooth_clip`.

    Raises:
        UserError: if the shape is wrong or no frame has landmarks.
    """
    clip = _checked(landmarks)
    seen = np.asarray(np.isfinite(clip).all((1, 2)))
    if not seen.any():
        raise UserError("no frame has landmarks; give a clip in which a face is clearly visible")
    fitter = Fitter(model)
    clean = clip[seen]
    if identity is None:
        chosen = clean[np.linspace(0, len(clean) - 1, min(len(clean), _BLOCK)).round().astype(int)]
        state, alpha = fitter.run(chosen, None)
    else:
        alpha = np.asarray(identity, dtype=np.float32)
        if alpha.shape != (IDENTITY,):
            raise UserError(f"identity must have shape ({IDENTITY},), got {alpha.shape}")
    if identity is not None or len(clean) > _BLOCK:
        states = [fitter.run(clean[i : i + _BLOCK], alpha) for i in range(0, len(clean), _BLOCK)]
        beta = np.concatenate([part.beta for part, _ in states])
        pose = np.concatenate([fitter.pose(part) for part, _ in states])
    else:
        beta, pose = state.beta, fitter.pose(state)
    residual = np.full(len(clip), np.nan, dtype=np.float32)
    residual[seen] = reprojection_error(model, clean, alpha, beta, pose)
    result = Fit(alpha, fill_gaps(beta, seen), fill_gaps(pose, seen), residual)
    if smooth and len(clip) > 2:
        result = smooth_clip(model, result)
    return result


def _checked(landmarks: Floats) -> Array:
    clip = np.asarray(landmarks, dtype=np.float32)
    if clip.ndim == 2:
        clip = clip[None]
    if clip.ndim != 3 or clip.shape[1:] != (VERTICES, 3):
        raise UserError(f"landmarks of shape (T, {VERTICES}, 3) are needed, got {np.shape(landmarks)}")
    return clip


def reprojection_error(
    model: FaceModel,
    landmarks: Floats,
    alpha: Floats,
    beta: Floats,
    pose: Floats,
    vertices: Sequence[int] | None = None,
) -> Array:
    """Mean distance (T,) between landmarks (T, 478, 3) and projected vertices, relative to the distance between the
    outer eye corners in the same frame.

    Arguments:
        vertices: indices of the vertices to compare; None takes all.
    """
    device = model.mean.device
    with torch.no_grad():
        points = model.project(*(torch.as_tensor(a, device=device) for a in (alpha, beta, pose))).cpu().numpy()
    distance: Floats = np.linalg.norm(points[..., :2] - landmarks[..., :2], axis=-1)
    if vertices is not None:
        distance = distance[:, list(vertices)]
    eyes = np.linalg.norm(landmarks[:, EYE_CORNERS[0], :2] - landmarks[:, EYE_CORNERS[1], :2], axis=-1)
    return np.asarray(distance.mean(-1) / np.maximum(eyes, 1e-6), dtype=np.float32)


def fast_directions(model: FaceModel, share: float = 0.999) -> Array:
    """Orthonormal directions (64, K) of β that move lips, lids and irises.

    Arguments:
        share: fraction of those vertices' variance (for β of unit variance) in the directions; the rest moves them by
            less than 0.2 % of the eye distance.
    """
    quick = sorted({*LIPS, *LIDS, *_IRISES})
    basis = model.expression[:, quick].flatten(1).cpu().numpy().astype(np.float64)
    directions, sizes, _ = np.linalg.svd(basis, full_matrices=False)
    held = np.cumsum(sizes**2) / (sizes**2).sum()
    return directions[:, : int(np.searchsorted(held, share)) + 1].astype(np.float32)


def smooth_clip(model: FaceModel, fit: Fit) -> Fit:
    """Smooth pose and slow expression of a clip at 25 to 30 fps (Savitzky-Golay).

    Speech and blinks are as fast as the tracker's noise; smoothing them closes the mouth early and leaves the eyes half
    open. So only the pose and the directions of β that move neither lips, lids nor irises are smoothed.
    """
    count = len(fit.pose)
    window = min(_WINDOW, count if count % 2 else count - 1)
    if window <= _ORDER:
        return fit
    from scipy.signal import savgol_filter  # takes most of a second, and a portrait does without

    pose = savgol_filter(fit.pose, window, _ORDER, axis=0)
    fast = fast_directions(model)
    quick = fit.expression @ fast @ fast.T
    slow = savgol_filter(fit.expression - quick, window, _ORDER, axis=0)
    return replace(fit, pose=pose.astype(np.float32), expression=(quick + slow).astype(np.float32))
