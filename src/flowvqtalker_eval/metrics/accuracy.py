"""Accuracy of an emotion classifier, with intervals over people and a confusion table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import EMOTIONS

__all__ = ["CLASSES", "Accuracy", "accuracy_of", "score"]

#: The classes of every emotion classifier here: MEAD's eight, in the project's order (``natural`` is a way of
#: recording, not an emotion).
CLASSES: tuple[str, ...] = EMOTIONS[:8]

Ints = npt.NDArray[np.integer[Any]]


def accuracy_of(
    scores: Iterable[npt.NDArray[Any]], emotions: Iterable[str | None], classes: Sequence[str] = CLASSES
) -> tuple[float, int]:
    """Acc_emo: the share of clips whose highest score is that of their label, and the number of labelled clips.

    A clip without a face (NaN scores) counts as wrong: a video without a visible face shows no emotion.

    Arguments:
        scores: (C,) logits or probabilities of each clip, in the order of ``classes``.
        emotions: label of each clip; clips without one of these labels do not count.
        classes: what the classifier knows.
    """
    right = [
        bool(np.isfinite(one).all()) and classes[int(one.argmax())] == emotion
        for one, emotion in zip(scores, emotions, strict=True)
        if emotion in classes
    ]
    return (sum(right) / len(right) if right else float("nan")), len(right)


@dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right.

    Attributes:
        accuracy: share of the clips that are classified as labelled.
        interval: its 95 % interval from a bootstrap over people, because clips of one person are not independent.
        balanced: mean recall over the classes that occur.
        balanced_interval: its 95 % interval.
        confusion: (8, 8) counts; rows are labels, columns predictions.
        clips, people: how many were classified.
    """

    accuracy: float
    interval: tuple[float, float]
    balanced: float
    balanced_interval: tuple[float, float]
    confusion: npt.NDArray[np.int64]
    clips: int
    people: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "classes": list(CLASSES), "confusion": self.confusion.tolist()}

    def text(self) -> str:
        """A sentence and a Markdown table of the confusion."""
        plain, balanced = (f"{low:.1%} to {high:.1%}" for low, high in (self.interval, self.balanced_interval))
        lines = [
            f"accuracy {self.accuracy:.1%} (95 % interval over people {plain}), balanced over the classes "
            f"{self.balanced:.1%} ({balanced}); {self.clips} clips of {self.people} people, chance 12.5%",
            "",
            f"| label | {' | '.join(CLASSES)} | right |",
            "|---" * (len(CLASSES) + 2) + "|",
        ]
        for number, (name, row) in enumerate(zip(CLASSES, self.confusion, strict=True)):
            recall = f"{row[number] / row.sum():.0%}" if row.sum() else "-"
            lines.append(f"| {name} | {' | '.join(map(str, row))} | {recall} |")
        return "\n".join(lines) + "\n"


def score(
    labels: Ints, predicted: Ints, identities: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> Accuracy:
    """Accuracy of predictions, with intervals from a bootstrap over people.

    Arguments:
        labels, predicted: (n,) class numbers in :data:`CLASSES`.
        identities: who each clip shows.
        resamples, seed: of the bootstrap.
    """
    from sklearn.metrics import confusion_matrix

    people, who = np.unique(np.asarray(identities), return_inverse=True)
    tables = np.stack(
        [
            confusion_matrix(labels[who == one], predicted[who == one], labels=range(len(CLASSES)))
            for one in range(len(people))
        ]
    )
    uniform = np.full(len(people), 1 / len(people))
    drawn = np.random.default_rng(seed).multinomial(len(people), uniform, size=resamples)
    low, high = np.percentile(_rates(np.tensordot(drawn, tables, axes=1)), [2.5, 97.5], axis=0).tolist()
    accuracy, balanced = _rates(tables.sum(0)).tolist()
    return Accuracy(
        accuracy=accuracy,
        interval=(low[0], high[0]),
        balanced=balanced,
        balanced_interval=(low[1], high[1]),
        confusion=tables.sum(0),
        clips=len(labels),
        people=len(people),
    )


def _rates(confusion: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Accuracy and balanced accuracy (..., 2) of confusion tables (..., 8, 8)."""
    right, count = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1)
    recall = np.divide(right, count, out=np.full(right.shape, np.nan), where=count > 0)
    return np.stack([right.sum(-1) / count.sum(-1), np.nanmean(recall, axis=-1)], axis=-1)
