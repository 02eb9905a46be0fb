"""Accuracy of an emotion classifier: folds that never share a person, intervals over people, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.errors import UserError

__all__ = ["CLASSES", "Accuracy", "grouped_folds", "score"]

#: The classes of every emotion classifier here: MEAD's eight, in the project's order (``natural`` is a way of
#: recording, not an emotion).
CLASSES: tuple[str, ...] = EMOTIONS[:8]

Ints = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Accuracy:
    """How often a classifier is right.

    Attributes:
        accuracy: share of the clips that are classified as labelled.
        interval: its 95 % interval, from a bootstrap over people (the clips of one person are not independent).
        balanced: mean over the classes that occur of the share of each that is classified right.
        balanced_interval: the same for it.
        confusion: (8, 8) counts, row the label, column the prediction.
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
        """Plain values, for JSON."""
        recall = {
            name: float(row[number] / row.sum())
            for number, (name, row) in enumerate(zip(CLASSES, self.confusion, strict=True))
            if row.sum()
        }
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "balanced": self.balanced,
            "balanced_interval": list(self.balanced_interval),
            "recall": recall,
            "classes": list(CLASSES),
            "confusion": self.confusion.tolist(),
            "clips": self.clips,
            "people": self.people,
        }

    def text(self) -> str:
        """A sentence and a Markdown table of the confusion (row: label, column: prediction)."""
        plain, balanced = (f"{low:.1%} to {high:.1%}" for low, high in (self.interval, self.balanced_interval))
        first = (
            f"accuracy {self.accuracy:.1%} (95 % interval over people {plain}), balanced over the classes "
            f"{self.balanced:.1%} ({balanced}); {self.clips} clips of {self.people} people, chance 12.5%"
        )
        lines = [first, "", "| label | " + " | ".join(CLASSES) + " | right |", "|---" * (len(CLASSES) + 2) + "|"]
        for number, (name, row) in enumerate(zip(CLASSES, self.confusion, strict=True)):
            right = f"{row[number] / row.sum():.0%}" if row.sum() else "-"
            lines.append(f"| {name} | " + " | ".join(str(count) for count in row) + f" | {right} |")
        return "\n".join(lines) + "\n"


def score(
    labels: Ints, predicted: Ints, identities: Sequence[str], *, resamples: int = 2000, seed: int = 0
) -> Accuracy:
    """Accuracy of predictions, with intervals from a bootstrap over people.

    Arguments:
        labels, predicted: (n,) class numbers in :data:`CLASSES`.
        identities: who each clip shows.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UserError: if there is no clip, lengths differ or a class number is out of range.
    """
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    if not len(labels) or labels.shape != predicted.shape or len(labels) != len(identities):
        raise UserError(
            f"as many labels, predictions and identities are needed, and at least one; got {len(labels)}, "
            f"{len(predicted)} and {len(identities)}"
        )
    for name, values in (("labels", labels), ("predictions", predicted)):
        if values.min() < 0 or values.max() >= len(CLASSES):
            raise UserError(f"{name} must be class numbers from 0 to {len(CLASSES) - 1} ({', '.join(CLASSES)})")
    people, who = np.unique(np.asarray(identities), return_inverse=True)
    tables = np.zeros((len(people), len(CLASSES), len(CLASSES)), np.int64)
    np.add.at(tables, (who, labels, predicted), 1)
    whole = tables.sum(0)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(people), np.full(len(people), 1 / len(people)), size=resamples)
    spread = np.array([_rates(table) for table in np.tensordot(drawn, tables, axes=1)])
    low, high = np.percentile(spread, [2.5, 97.5], axis=0)
    accuracy, balanced = _rates(whole)
    return Accuracy(
        accuracy,
        (float(low[0]), float(high[0])),
        balanced,
        (float(low[1]), float(high[1])),
        whole,
        int(whole.sum()),
        len(people),
    )


def _rates(table: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy and balanced accuracy of a confusion table."""
    right, rows = np.diag(table), table.sum(1)
    there = rows > 0
    return float(right.sum() / rows.sum()), float((right[there] / rows[there]).mean())


def grouped_folds(labels: Ints, identities: Sequence[str], folds: int) -> npt.NDArray[np.int64]:
    """Number of the fold of each clip, such that nobody is in two folds and every fold has its share of every class.

    The people with most of the rare classes are dealt first, each to the fold that lacks their classes most.

    Raises:
        UserError: if there are fewer people than folds, or fewer than two folds.
    """
    labels = np.asarray(labels)
    people, who = np.unique(np.asarray(identities), return_inverse=True)
    if folds < 2 or len(people) < folds:
        raise UserError(f"folds must be at least 2 and at most the number of people ({len(people)}), got {folds}")
    counts = np.zeros((len(people), int(labels.max()) + 1))
    np.add.at(counts, (who, labels), 1)
    counts /= np.maximum(counts.sum(0), 1)
    filled = np.zeros((folds, counts.shape[1]))
    chosen = np.zeros(len(people), np.int64)
    for person in np.argsort(-counts.sum(1), kind="stable"):
        worse = np.square(filled + counts[person]).sum(1) - np.square(filled).sum(1)
        fold = np.lexsort((filled.sum(1), worse))[0]
        chosen[person] = fold
        filled[fold] += counts[person]
    return chosen[who]
