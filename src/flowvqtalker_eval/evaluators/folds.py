"""Cross-validation for the emotion classifiers: few people are labelled, so everybody is held out once.

Each fold trains the same stage from scratch on the other folds' people and classifies its own; the predictions of all
folds are pooled into one accuracy, whose interval comes from a bootstrap over people.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flowvqtalker.errors import UserError
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loop import fit
from flowvqtalker.train.state import replace_file
from flowvqtalker_eval.metrics.accuracy import CLASSES, Accuracy, grouped_folds, score

__all__ = [
    "NEUTRAL",
    "BalancedDraw",
    "Labelled",
    "by_person",
    "cross_validate",
    "draw",
    "fit_temperature",
    "held_out_logits",
    "held_out_numbers",
    "spread_out",
    "write_report",
]

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NEUTRAL = CLASSES.index("neutral")


@dataclass(frozen=True)
class Labelled:
    """The clips with a label, those that are measured among them.

    Attributes:
        labels: (n,) class numbers.
        identities: (n,) who it is.
        measured: (n,) bool; accuracies count these alone.
    """

    labels: Ints
    identities: tuple[str, ...]
    measured: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if not (len(self.labels) == len(self.identities) == len(self.measured)):
            raise ValueError("labels, identities and measured must have one entry for each clip")


class BalancedDraw:
    """Draws clips class by class and person by person.

    Arguments:
        data: all labelled clips.
        numbers: those to draw from.
        natural: (n,) bool; clips of natural speech, which have the label neutral.
        balance: classes are drawn by the number of their people to the power of one minus this; 1: all alike.
        natural_share: share of the neutral draws that are natural speech.
    """

    def __init__(
        self,
        data: Labelled,
        numbers: Ints,
        natural: npt.NDArray[np.bool_],
        balance: float = 1.0,
        natural_share: float = 0.5,
    ) -> None:
        labels, own = data.labels[numbers], natural[numbers]
        self.groups = {
            int(label): by_person(numbers[(labels == label) & ~own], data.identities)
            for label in np.unique(labels[~own])
        }
        if not self.groups:
            raise UserError("no labelled clips to train on; check the split and the labels")
        self.natural = by_person(numbers[own], data.identities)
        self.natural_share = natural_share
        weight = np.array([len(group) for group in self.groups.values()], np.float64) ** (1 - balance)
        self._classes, self._shares = list(self.groups), np.cumsum(weight / weight.sum())

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        """Number and label of a clip."""
        chosen = int(np.searchsorted(self._shares, random.random(), side="right"))
        label = self._classes[min(chosen, len(self._classes) - 1)]
        people = self.groups[label]
        if label == NEUTRAL and self.natural and random.random() < self.natural_share:
            people = self.natural
        return draw(people, random), label


def by_person(numbers: Ints, identities: Sequence[str]) -> list[Ints]:
    """Numbers of clips, in one array a person."""
    people: dict[str, list[int]] = {}
    for number in numbers:
        people.setdefault(identities[number], []).append(int(number))
    return [np.array(group, np.int64) for group in people.values()]


def draw(people: Sequence[Ints], random: np.random.Generator) -> int:
    """A number of a person."""
    group = people[int(random.integers(len(people)))]
    return int(group[int(random.integers(len(group)))])


class Classifier(Protocol):
    """A stage that can classify clips of its data."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over what it exported."""

    def logits(self, numbers: Ints) -> Tensor:
        """Logits (k, 8) of clips."""


def spread_out(labels: Ints, identities: Sequence[str], per_person: int) -> npt.NDArray[np.bool_]:
    """Which clips are measured: at most ``per_person`` of each person and class, so that nobody counts for many."""
    seen: dict[tuple[str, int], int] = {}
    keep = np.zeros(len(labels), bool)
    for number, key in enumerate(zip(identities, labels.tolist(), strict=True)):
        seen[key] = seen.get(key, 0) + 1
        keep[number] = seen[key] <= per_person
    return keep


def cross_validate(
    make: Callable[[Ints, Ints, int], Any],
    data: Labelled,
    loop: LoopConfig,
    out: Path,
    folds: int,
    resume: bool = False,
) -> tuple[Accuracy, Floats]:
    """Train and test on every fold.

    Arguments:
        make: (numbers to train on, numbers held out, fold) -> a new stage that is a :class:`Classifier`.
        data: the labelled clips.
        loop: how each fold is trained.
        out: folder of the runs; fold k is trained in ``out/fold-k``.
        folds: how many.
        resume: keep the folds that are done.

    Returns:
        the pooled accuracy of the measured clips, and the logits (n, 8) of all clips: of the measured ones by the model
        that has not seen their person, of the others zeros.
    """
    fold = grouped_folds(data.labels, data.identities, folds)
    logits = np.zeros((len(fold), len(CLASSES)), np.float32)
    for number in range(folds):
        held = fold == number
        folder = out / f"fold-{number}"
        stage: Any = make(np.flatnonzero(~held), np.flatnonzero(held), number)
        if not (resume and (folder / "done").is_file()):
            fit(stage, loop, folder, resume)
            (folder / "done").touch()
        stage.restore(_floats(folder / "weights.safetensors"))
        keep = data.measured & held
        if not keep.any():
            continue
        logits[keep] = held_out_logits(stage, np.flatnonzero(keep))
        part = _score(data, logits, keep)
        logger.info("fold %d of %d: %d clips, accuracy %.3f", number + 1, folds, keep.sum(), part.accuracy)
    return _score(data, logits, data.measured), logits


def _floats(path: Path) -> dict[str, Tensor]:
    return {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}


def held_out_logits(stage: Any, numbers: Ints) -> Floats:
    """Logits of clips in evaluation mode."""
    stage.module.eval()
    with torch.no_grad():
        values: Floats = stage.logits(numbers).float().cpu().numpy()
    return values


def _score(data: Labelled, logits: Floats, keep: npt.NDArray[np.bool_]) -> Accuracy:
    chosen = np.flatnonzero(keep)
    return score(data.labels[chosen], logits[chosen].argmax(1), [data.identities[n] for n in chosen])


def held_out_numbers(data: Labelled, logits: Floats, numbers: Ints) -> dict[str, float]:
    """What a stage's validation logs about the measured ones of some clips, whose logits are given."""
    keep = data.measured[numbers]
    if not keep.any():
        return {}
    labels, values = data.labels[numbers][keep], torch.from_numpy(logits[keep])
    truth = torch.from_numpy(labels)
    rates = [(values.argmax(1) == truth)[truth == int(label)].float().mean() for label in np.unique(labels)]
    return {
        "nll": float(nn.functional.cross_entropy(values, truth)),
        "accuracy": float((values.argmax(1) == truth).float().mean()),
        "balanced": float(torch.stack(rates).mean()),
    }


def fit_temperature(data: Labelled, logits: Floats) -> float:
    """The number to divide logits by so that the balanced likelihood of held-out people is greatest (Guo et al. 2017).

    Found on a grid from 1/8 to 8.
    """
    chosen = np.flatnonzero(data.measured)
    values, truth = torch.from_numpy(logits[chosen]), torch.from_numpy(data.labels[chosen])
    weight = 1 / torch.bincount(truth, minlength=len(CLASSES)).clamp_min(1)
    grid = [2 ** (step / 8) for step in range(-24, 25)]
    losses = [float(nn.functional.cross_entropy(values / t, truth, weight=weight)) for t in grid]
    best = grid[int(np.argmin(losses))]
    if not math.isfinite(min(losses)):
        raise UserError("the logits of the folds are not finite; lower loop.lr")
    return best


def write_report(out: Path, title: str, accuracy: Accuracy, more: dict[str, Any]) -> None:
    """Write ``report.json`` and ``report.md`` into a run's folder."""
    extra = "".join(f"- {key}: {value}\n" for key, value in more.items())
    text = f"# {title}\n\nPooled over the folds; nobody is in the training data of the model that classifies them.\n\n"
    _write(out / "report.md", text + accuracy.text() + "\n" + extra)
    _write(out / "report.json", json.dumps({**accuracy.to_dict(), **more}, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda beside: _put(beside, text))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
