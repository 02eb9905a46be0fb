"""Accuracy of emotion classifiers."""

from __future__ import annotations

import json

import numpy as np
import pytest

from flowvqtalker_eval.metrics.accuracy import CLASSES, accuracy_of, score


def test_accuracy_of_scores():
    scores = [np.eye(8)[CLASSES.index(name)] for name in ("happy", "sad", "fear")]
    assert accuracy_of([*scores, np.full(8, np.nan)], ["happy", "angry", None, "sad"]) == (pytest.approx(1 / 3), 3)
    value, count = accuracy_of([], [])
    assert np.isnan(value) and count == 0


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
