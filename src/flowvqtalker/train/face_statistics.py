"""Statistics behind the face model: what differs between people, and what moves within one person."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from flowvqtalker.face.geometry import Floats, align

__all__ = ["Covariances", "Group", "remove_rigid", "rigid_objects", "separate"]


@dataclass(frozen=True)
class Group:
    """Aligned faces of one clip (or the one face of a picture), D coordinates of a face and B blendshapes side by side.

    Attributes:
        person: number of the person.
        mean: (D + B,) mean over the frames.
        scatter: (D + B, D + B) covariance of the frames around their mean, or None for a picture.
        count: how many independent faces the clip is worth; neighbouring frames are not independent.
        weight: weight of each of them in the covariance of expressions (balances the sources).
        picture: whether it is a single picture.
    """

    person: int
    mean: Floats
    scatter: Floats | None
    count: float
    weight: float
    picture: bool


@dataclass(frozen=True)
class Covariances:
    """Result of :func:`separate`.

    Attributes:
        mean: (D,) mean face of the clips.
        between: (D, D) covariance between people.
        within: (D, D) covariance of the expressions of a person.
    """

    mean: Floats
    between: Floats
    within: Floats


def rigid_objects(points: Floats, owner: npt.NDArray[np.int64], rigid: Floats, rounds: int = 4) -> Floats:
    """Align unprojected faces by their rigid vertices, each frame to its own person.

    Every person's mean is aligned to the mean of all people and every frame to its person's mean, so that the shape of
    a forehead is not mistaken for a turn of the head. The scale is free in each frame, as it is in a pose: coming
    nearer to the camera scales a face.

    Arguments:
        points: (N, V, 3), see geometry.unproject.
        owner: (N,) number of the person in each frame, 0 to P - 1.
        rigid: (V,) weights of the vertices that the alignment uses.

    Returns:
        (N, V, 3), with the mean face's rigid vertices centred and of unit mean square size.
    """
    people = int(owner.max()) + 1
    counts = np.bincount(owner, minlength=people).astype(points.dtype)[:, None, None]
    target = np.broadcast_to(_centred(points[0], rigid), (people, *points.shape[1:]))
    for _ in range(rounds):
        scale, rotation, shift = align(points, target[owner], rigid)
        aligned = ((points - shift[:, None]) @ rotation) / scale[:, None, None]
        means = np.zeros(target.shape, dtype=points.dtype)
        np.add.at(means, owner, aligned)
        means /= counts
        general = _centred(means.mean(0), rigid)
        scale, rotation, shift = align(means, general, rigid)
        target = ((means - shift[:, None]) @ rotation) / scale[:, None, None]
    scale, rotation, shift = align(points, target[owner], rigid)
    return ((points - shift[:, None]) @ rotation) / scale[:, None, None]


def _centred(face: Floats, rigid: Floats) -> Floats:
    weights = (rigid / rigid.sum())[:, None]
    face = face - (weights * face).sum(0)
    face = face / np.sqrt((weights * face**2).sum())
    return face


def remove_rigid(basis: Floats, tangents: Floats, rigid: Floats) -> Floats:
    """Take out of basis columns (K, V * 3) the motion that their rigid vertices share.

    Each column may hold a small turn, shift or scaling of the whole head, which belongs to the pose. The span of basis
    and pose stays what it was; only the border between expression and pose is fixed.

    Arguments:
        tangents: (7, V * 3) derivatives of the mean face by the pose.
        rigid: (V,) weights.
    """
    weights = np.repeat(rigid, 3).astype(np.float64)
    design = tangents.astype(np.float64)
    gram = (design * weights) @ design.T
    motion = np.linalg.solve(gram, (design * weights) @ basis.T.astype(np.float64))
    return (basis - motion.T @ design).astype(basis.dtype)


def separate(groups: list[Group], size: int, rounds: int = 12, ridge: float = 3e-4) -> Covariances:
    """Covariance between people and within people.

    A picture shows a person once, and many who pose for one smile. What of it is the person? Two sources tell:

    * the tracker's blendshapes, which hardly depend on the person: their linear effect on the shape is learned from
      what changes within people, and taken out of every clip and picture;
    * for the rest, expectation-maximisation on face = mean + person + expression with two Gaussian covariances
      (probabilistic linear discriminant analysis; Ioffe 2006, Prince and Elder 2007).

    Arguments:
        size: D, how many of the columns are the face.
        ridge: added to the variances of the blendshapes in the regression.
    """
    owner = np.array([group.person for group in groups])
    people = int(owner.max()) + 1
    counts = np.array([group.count for group in groups])
    weights = np.array([group.weight for group in groups]) * counts
    weights = weights / weights.sum()
    means = np.stack([group.mean for group in groups])
    still = np.array([group.picture for group in groups])
    scatter = np.zeros((means.shape[1],) * 2)
    for group, weight in zip(groups, weights, strict=True):
        if group.scatter is not None:
            scatter += weight * group.scatter
    # Within people: the frames around their clip, and clips and pictures of one person around that person.
    number = np.bincount(owner, counts, people)
    centres = _sums(means * counts[:, None], owner, people) / number[:, None]
    around = means - centres[owner]
    together = scatter + (around * weights[:, None]).T @ around
    shapes = together[size:, size:] + ridge * np.eye(len(together) - size)
    effect = np.linalg.solve(shapes, together[size:, :size])
    moving = np.average(means[~still], axis=0, weights=weights[~still])
    shown = (means - moving)[:, size:] @ _reliability(means[:, size:], owner, still, scatter[size:, size:]) @ effect
    rest_scatter = scatter[:size, :size] - effect.T @ scatter[size:, :size]
    rest_scatter = rest_scatter - (effect.T @ scatter[size:, :size]).T + effect.T @ scatter[size:, size:] @ effect
    faces = means[:, :size] - moving[:size]
    within, between, latent = _two_covariances(faces - shown, rest_scatter, owner, counts, weights, still, rounds)
    expression = faces - latent.mean[owner]
    expression -= np.where(still[:, None], np.average(expression[still], axis=0) if still.any() else 0.0, 0.0)
    within = scatter[:size, :size] + (expression * weights[:, None]).T @ expression + latent.doubt
    return Covariances(moving[:size], between, within)


def _reliability(shapes: Floats, owner: npt.NDArray[np.int64], still: npt.NDArray[np.bool_], scatter: Floats) -> Floats:
    """How much of the blendshapes (G, B) of a clip or picture is expression: (B, B), to be multiplied from the right.

    Narrow eyes read as a squint and low brows as a frown for life. People who are seen in two or more clips or pictures
    show how much of a blendshape stays with the person.
    """
    size = shapes.shape[1]
    several = np.bincount(owner)[owner] > 1
    if several.sum() < 2 * size:
        return np.eye(size)
    _, chosen = np.unique(owner[several], return_inverse=True)
    count = np.ones(int(several.sum()))
    within, between, _ = _two_covariances(
        shapes[several], scatter, chosen, count, count / len(count), still[several], 20
    )
    return np.linalg.solve(within + between + 1e-5 * np.eye(size), within)


@dataclass(frozen=True)
class _Latent:
    """Posterior of the people: means (P, D) and the weighted mean (D, D) of the covariances."""

    mean: Floats
    doubt: Floats


def _sums(values: Floats, owner: npt.NDArray[np.int64], people: int) -> Floats:
    sums = np.zeros((people, values.shape[1]))
    np.add.at(sums, owner, values)
    return sums


def _two_covariances(
    faces: Floats,
    scatter: Floats,
    owner: npt.NDArray[np.int64],
    counts: Floats,
    weights: Floats,
    still: npt.NDArray[np.bool_],
    rounds: int,
) -> tuple[Floats, Floats, _Latent]:
    """Expectation-maximisation for faces (G, D) = person + expression; pictures have a mean of their own."""
    size, people = faces.shape[1], int(owner.max()) + 1
    for chosen in (still, ~still):
        if chosen.any():
            faces = faces - np.where(chosen[:, None], faces[chosen].mean(0), 0.0)
    within = scatter / max(weights[~still].sum(), 0.1)
    within = within + np.eye(size) * np.trace(within) / size * 1e-4
    total = faces.T @ faces / len(faces)
    values, vectors = np.linalg.eigh(total - within / 2)
    between = (vectors * np.maximum(values, np.trace(total) / size * 1e-4)) @ vectors.T
    number = np.bincount(owner, counts, people)
    sums = _sums(faces * counts[:, None], owner, people)
    kinds, kind = np.unique(number.round(3), return_inverse=True)
    share = np.bincount(kind, minlength=len(kinds)) / people
    latent = _Latent(np.zeros((people, size)), np.zeros((size, size)))
    for _ in range(rounds):
        # Both covariances are diagonal in one basis: within = A Aᵀ, between = A diag(ratio) Aᵀ with A = within basis.
        ratio, basis = scipy.linalg.eigh(between, within)
        inner = within @ basis
        spread = 1.0 / (1.0 / np.maximum(ratio, 1e-8)[None] + kinds[:, None])
        mean = ((sums @ basis) * spread[kind]) @ inner.T
        doubt = (inner * (np.bincount(kind[owner], weights, len(kinds)) @ spread)) @ inner.T
        latent = _Latent(mean, doubt)
        rest = faces - mean[owner]
        within = scatter + (rest * weights[:, None]).T @ rest + doubt
        between = mean.T @ mean / people + (inner * (share @ spread)) @ inner.T
    return within, between, latent
