"""Labelled clips and cross-validation of the emotion classifiers: nobody is in two folds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.accuracy import CLASSES, Accuracy, score

__all__ = ["NEUTRAL", "PER_PERSON", "Labelled", "grouped_folds", "limit_per_person", "write_report"]

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NEUTRAL = CLASSES.index("neutral")
#: Largest number of clips of one person and class that are measured.
PER_PERSON = 2


@dataclass(frozen=True)
class Labelled:
    """Clips with a label.

    Attributes:
        labels: (n,) class numbers.
        identities: (n,) who each clip shows.
        natural: (n,) natural speech: it has the label neutral in training and is never measured.
        measured: (n,) the clips that accuracies count.
    """

    labels: Ints
    identities: tuple[str, ...]
    natural: Bools
    measured: Bools

    def __post_init__(self) -> None:
        if not len(self.labels) == len(self.identities) == len(self.natural) == len(self.measured):
            raise ValueError("labels, identities, natural and measured must have one entry for each clip")

    def score(self, logits: npt.NDArray[np.floating[Any]], numbers: Ints) -> Accuracy:
        """Accuracy of the measured ones among some clips; logits (n, 8) are of all clips."""
        chosen = numbers[self.measured[numbers]]
        return score(self.labels[chosen], logits[chosen].argmax(1), [self.identities[n] for n in chosen])


def limit_per_person(labels: Ints, identities: Sequence[str], most: int) -> Bools:
    """Mark at most ``most`` clips of each person and class, so that nobody dominates an accuracy."""
    seen: dict[tuple[str, int], int] = {}
    keep = np.zeros(len(labels), bool)
    for number, key in enumerate(zip(identities, labels.tolist(), strict=True)):
        seen[key] = seen.get(key, 0) + 1
        keep[number] = seen[key] <= most
    return keep


def grouped_folds(data: Labelled, folds: int) -> list[tuple[Ints, Ints]]:
    """Numbers of the clips to train on and to test on, for each fold; classes are spread evenly, people never split.

    Raises:
        UserError: if there are fewer people than folds, or fewer than two folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    people = len(set(data.identities))
    if not 2 <= folds <= people:
        raise UserError(f"folds must be at least 2 and at most the number of people ({people}), got {folds}")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    return list(splitter.split(data.labels, data.labels, data.identities))


def write_report(out: Path, title: str, accuracy: Accuracy, **more: Any) -> None:
    """Write ``report.json`` and ``report.md`` into a run's folder."""
    extra = "".join(f"- {key}: {value}\n" for key, value in more.items())
    text = f"# {title}\n\nPooled over the folds; nobody is in the training data of the model that classifies them.\n\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(f"{text}{accuracy.text()}\n{extra}", encoding="utf-8")
    (out / "report.json").write_text(json.dumps({**accuracy.to_dict(), **more}, indent=1) + "\n", encoding="utf-8")
