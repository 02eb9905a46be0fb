"""Statistics of the face model: the covariance between people, and of the expressions within a person."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.linalg

from flowvqtalker.face.geometry import Floats, align

__all__ = ["Covariances", "Group", "remove_rigid", "rigid_objects", "separate"]


@dataclass(frozen=True)
class Group:
    """Aligned faces of one clip or image: D coordinates of a face and B blendshapes side by side.

    Attributes:
        person: number of the person.
        mean: (D + B,) mean over the frames.
        scatter: (D + B, D + B) covariance of the frames around their mean, or None for an image.
        count: effective number of faces; neighbouring frames are not independent.
        weight: weight of each of them in the covariance of expressions (balances the sources).
        is_image: whether it is a single image.
    """

    person: int
    mean: Floats
    scatter: Floats | None
    count: float
    weight: float
    is_image: bool


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
    a forehead is not mistaken for a turn of the head. Each frame has its own scale, as it has in a pose.

    Arguments:
        points: (N, V, 3), see geometry.unproject.
        owner: (N,) number of the person in each frame, 0 to P - 1.
        rigid: (V,) weights of the vertices in the alignment.

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
    """Remove from basis columns (K, V * 3) the motion that their rigid vertices share.

    A small rotation, shift or scaling of the whole head in a column belongs to the pose. The common span of basis and
    pose does not change.

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
    """Covariances between people and within people.

    An image shows a person only once, often smiling. Two steps separate person and expression:

    * the linear effect of the tracker's blendshapes, which hardly depend on the person, is learned from the changes
      within people and removed from every clip and image;
    * expectation-maximisation fits the rest, face = mean + person + expression with two Gaussian covariances
      (probabilistic linear discriminant analysis; Ioffe 2006, Prince and Elder 2007).

    Arguments:
        groups: clips and images.
        size: D, number of columns that hold the face.
        rounds: iterations of expectation-maximisation.
        ridge: added to the variances of the blendshapes in the regression.
    """
    owner = np.array([group.person for group in groups])
    people = int(owner.max()) + 1
    counts = np.array([group.count for group in groups])
    weights = np.array([group.weight for group in groups]) * counts
    weights = weights / weights.sum()
    means = np.stack([group.mean for group in groups])
    image = np.array([group.is_image for group in groups])
    scatter = np.zeros((means.shape[1],) * 2)
    for group, weight in zip(groups, weights, strict=True):
        if group.scatter is not None:
            scatter += weight * group.scatter
    # Within people: frames around their clip's mean, clips and images around their person's mean.
    number = np.bincount(owner, counts, people)
    centres = _sums(means * counts[:, None], owner, people) / number[:, None]
    around = means - centres[owner]
    together = scatter + (around * weights[:, None]).T @ around
    shapes = together[size:, size:] + ridge * np.eye(len(together) - size)
    effect = np.linalg.solve(shapes, together[size:, :size])
    moving = np.average(means[~image], axis=0, weights=weights[~image])
    shown = (means - moving)[:, size:] @ _reliability(means[:, size:], owner, image, scatter[size:, size:]) @ effect
    rest_scatter = scatter[:size, :size] - effect.T @ scatter[size:, :size]
    rest_scatter = rest_scatter - (effect.T @ scatter[size:, :size]).T + effect.T @ scatter[size:, size:] @ effect
    faces = means[:, :size] - moving[:size]
    within, between, latent = _two_covariances(faces - shown, rest_scatter, owner, counts, weights, image, rounds)
    expression = faces - latent.mean[owner]
    expression -= np.where(image[:, None], np.average(expression[image], axis=0) if image.any() else 0.0, 0.0)
    within = scatter[:size, :size] + (expression * weights[:, None]).T @ expression + latent.doubt
    return Covariances(moving[:size], between, within)


def _reliability(shapes: Floats, owner: npt.NDArray[np.int64], image: npt.NDArray[np.bool_], scatter: Floats) -> Floats:
    """Matrix (B, B) that keeps, multiplied from the right, the part of blendshapes (G, B) that is expression.

    The tracker reads narrow eyes as a squint. People with several clips or images show how much of a blendshape belongs
    to the person.
    """
    size = shapes.shape[1]
    several = np.bincount(owner)[owner] > 1
    if several.sum() < 2 * size:
        return np.eye(size)
    _, chosen = np.unique(owner[several], return_inverse=True)
    count = np.ones(int(several.sum()))
    within, between, _ = _two_covariances(
        shapes[several], scatter, chosen, count, count / len(count), image[several], 20
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
    image: npt.NDArray[np.bool_],
    rounds: int,
) -> tuple[Floats, Floats, _Latent]:
    """Expectation-maximisation for faces (G, D) = person + expression; images have their own mean."""
    size, people = faces.shape[1], int(owner.max()) + 1
    for chosen in (image, ~image):
        if chosen.any():
            faces = faces - np.where(chosen[:, None], faces[chosen].mean(0), 0.0)
    within = scatter / max(weights[~image].sum(), 0.1)
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
