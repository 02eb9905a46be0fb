"""Folds of labelled clips in which nobody is in two."""

from __future__ import annotations

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker_eval.evaluators.folds import Labelled, grouped_folds, limit_per_person


def labelled(labels, people) -> Labelled:
    return Labelled(np.array(labels), tuple(people), np.zeros(len(labels), bool), np.ones(len(labels), bool))


def test_folds_never_share_a_person_and_spread_the_classes():
    random = np.random.default_rng(0)
    people = [f"p{n}" for n in random.integers(30, size=200)]
    labels = random.integers(8, size=200)
    folds = grouped_folds(labelled(labels, people), 5)
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(200))
    for train, held in folds:
        assert not {people[n] for n in train} & {people[n] for n in held}
        assert sorted([*train, *held]) == list(range(200))
        for label in range(8):
            assert (labels[held] == label).sum() < 0.5 * (labels == label).sum()


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_folds_that_cannot_be(folds):
    with pytest.raises(UserError, match="folds must be at least 2 and at most the number of people"):
        grouped_folds(labelled([0, 1, 2], "abc"), folds)


def test_measured_clips_of_a_person_are_limited():
    keep = limit_per_person(np.array([5, 5, 5, 4, 5]), ["a", "a", "a", "a", "b"], 2)
    assert keep.tolist() == [True, True, False, True, True]


def test_only_measured_clips_count():
    data = Labelled(np.array([0, 4, 5]), ("a", "b", "c"), np.zeros(3, bool), np.array([True, True, False]))
    logits = np.eye(8)[[0, 0, 0]]
    assert data.score(logits, np.arange(3)).accuracy == 0.5
    assert data.score(logits, np.array([0, 2])).clips == 1
