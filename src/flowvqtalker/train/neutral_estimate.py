"""Estimate of people's neutral faces, also without a neutral clip: a mixed model of the clips' mean expressions.

One angry face does not tell anger and person apart, and a mean over people without a neutral clip holds their faces as
well as the emotion. So the mean expression of a clip is modelled, each coefficient for itself, as

    x = mean of the emotion + person + residual,    person ~ N(0, σ_u²), residual ~ N(0, σ_n²).

People with clips of several emotions separate the two. Of a person with one clip, the model attributes the share
σ_u² / (σ_u² + σ_n²) of the deviation to the person (Henderson's best linear unbiased prediction).

References:
    Henderson, Best Linear Unbiased Estimation and Prediction under a Selection Model, Biometrics 31, 1975.
    Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977, section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError

__all__ = ["NeutralEstimate", "estimate_neutral"]

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class NeutralEstimate:
    """A fitted mixed model.

    Attributes:
        emotions: class number -> mean expression (D,) of the class, without any person's share.
        people: name -> difference (D,) of the person to the mean of all.
        person, rest: (D,) variances σ_u² between people and σ_n² between clips of one person and emotion.
    """

    emotions: dict[int, Array]
    people: dict[str, Array]
    person: Array
    rest: Array

    def face(self, identity: str, emotion: int) -> Array:
        """Expected mean expression (D,) of a person in an emotion; means of all replace what is unknown."""
        known = list(self.emotions.values())
        expected = self.emotions[emotion] if emotion in self.emotions else np.mean(known, axis=0)
        result: Array = expected + self.people[identity] if identity in self.people else expected
        return result


def estimate_neutral(
    means: Array, emotions: Sequence[int], identities: Sequence[str], rounds: int = 50
) -> NeutralEstimate:
    """Fit the mixed model by expectation and maximisation.

    Arguments:
        means: (N, D) mean expression of each clip.
        emotions: class of each clip.
        identities: person of each clip.
        rounds: iterations for the variances; given these, the rest has a closed form.

    Raises:
        UserError: if the lengths differ or there is no clip.
    """
    x = np.asarray(means, np.float64)
    if x.ndim != 2 or not len(x) == len(emotions) == len(identities) > 0:
        raise UserError(f"one emotion and one name per clip are needed: {x.shape}, {len(emotions)}, {len(identities)}")
    labels, label = np.unique(np.asarray(emotions), return_inverse=True)
    names, who = np.unique(np.asarray(identities), return_inverse=True)
    classes = np.eye(len(labels))[label]  # N C
    count = np.bincount(who).astype(np.float64)  # P
    seen, total = _sum(classes, who), _sum(x, who)  # P C, P D: sums over each person's clips
    gram, right = classes.T @ classes, classes.T @ x
    least = np.maximum(1e-6 * x.var(0), 1e-12)
    person = rest = np.maximum(x.var(0) / 2, least)
    for number in range(rounds + 1):
        keep = 1 / (count[:, None] + rest / person)  # P D: (n + λ)⁻¹
        left = gram - np.einsum("pc,pd,pe->dce", seen, keep, seen)
        effect = np.linalg.solve(left, (right - seen.T @ (keep * total)).T[..., None])[..., 0].T  # C D
        people = keep * (total - seen @ effect)
        if number == rounds:  # effects and people must belong to the returned variances
            break
        spread = rest * keep  # variance of each person's difference, given the data
        residual = x - classes @ effect - people[who]
        person = np.maximum((people**2 + spread).mean(0), least)
        rest = np.maximum((residual**2 + spread[who]).mean(0), least)
    return NeutralEstimate(
        {int(one): effect[i] for i, one in enumerate(labels)},
        {str(name): people[i] for i, name in enumerate(names)},
        person,
        rest,
    )


def _sum(values: Array, groups: npt.NDArray[np.int64]) -> Array:
    result = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(result, groups, values)
    return result
