"""Emotion classifiers: accuracy over folds of people, motion, pictures, and the published Emotion-FAN."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowvqtalker.errors import UserError
from flowvqtalker_eval.evaluators.folds import spread_out
from flowvqtalker_eval.metrics.accuracy import grouped_folds, score

# Accuracy and folds


def test_folds_never_share_a_person_and_spread_the_classes():
    random = np.random.default_rng(0)
    people = [f"p{n}" for n in random.integers(30, size=200)]
    labels = random.integers(8, size=200)
    labels[np.array(people) == "p3"] = 1
    fold = grouped_folds(labels, people, 5)
    assert set(fold) == set(range(5))
    for who in set(people):
        assert len(set(fold[np.array(people) == who])) == 1
    for label in range(8):
        shares = np.bincount(fold[labels == label], minlength=5) / (labels == label).sum()
        assert shares.max() < 0.5
    assert np.array_equal(fold, grouped_folds(labels, people, 5))


def test_a_rare_class_is_in_as_many_folds_as_it_has_people():
    people = [f"p{n}" for n in range(40)]
    labels = np.array([5] * 37 + [1] * 3)
    fold = grouped_folds(labels, people, 3)
    assert set(fold[labels == 1]) == {0, 1, 2}


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_folds_that_cannot_be(folds):
    with pytest.raises(UserError, match="folds must be at least 2 and at most the number of people"):
        grouped_folds(np.array([0, 1, 2]), ["a", "b", "c"], folds)


def test_score_of_a_known_table():
    labels = np.array([0] * 8 + [4] * 2)
    predicted = np.array([0] * 8 + [4, 0])
    result = score(labels, predicted, [f"p{n}" for n in range(10)])
    assert result.accuracy == pytest.approx(0.9)
    assert result.balanced == pytest.approx(0.75)
    assert result.confusion[4, 0] == 1 and result.confusion.sum() == 10
    assert result.interval[0] <= 0.9 <= result.interval[1] <= 1
    assert "| happy | 1 |" in result.text()
    assert json.dumps(result.to_dict())


def test_interval_grows_when_clips_are_of_few_people():
    random = np.random.default_rng(1)
    labels = np.zeros(200, int)
    right = np.repeat(random.random(10) < 0.5, 20)  # each person is all right or all wrong
    predicted = np.where(right, 0, 4)
    few = score(labels, predicted, [f"p{n // 20}" for n in range(200)])
    many = score(labels, predicted, [f"p{n}" for n in range(200)])
    assert few.accuracy == many.accuracy
    assert np.diff(few.interval) > 2 * np.diff(many.interval)


def test_score_refuses_what_does_not_fit():
    with pytest.raises(UserError, match="as many labels"):
        score(np.array([0, 1]), np.array([0]), ["a", "b"])
    with pytest.raises(UserError, match="labels must be class numbers from 0 to 7"):
        score(np.array([8]), np.array([0]), ["a"])
    with pytest.raises(UserError, match="at least one"):
        score(np.array([], int), np.array([], int), [])


def test_measured_clips_of_a_person_are_limited():
    keep = spread_out(np.array([5, 5, 5, 4, 5]), ["a", "a", "a", "a", "b"], 2)
    assert keep.tolist() == [True, True, False, True, True]
