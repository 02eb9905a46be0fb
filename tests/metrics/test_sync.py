"""Confidence, distance and offset from embeddings of lips and sound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics.sync import distance_curve, score_curve, sync_score


def embeddings(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim))


@pytest.mark.parametrize("reach", [0, 3, 15])
def test_curve_equals_brute_force(reach):
    """The plain definition: pad the sound with zeros, torch's pairwise distance of each frame to each shift."""
    video, audio = embeddings(20), embeddings(20, seed=1)
    padded = torch.nn.functional.pad(torch.tensor(audio), (0, 0, reach, reach))
    rows = []
    for i, frame in enumerate(torch.tensor(video)):
        rows.append(torch.nn.functional.pairwise_distance(frame[None], padded[i : i + 2 * reach + 1]))
    mean = torch.stack(rows).mean(0)
    assert np.allclose(distance_curve(video, audio, reach), mean.numpy(), atol=1e-12)
    score = sync_score(video, audio, reach)
    assert score.distance == pytest.approx(float(mean.min()))
    assert score.confidence == pytest.approx(float(mean.median() - mean.min()))
    assert score.offset == reach - int(mean.argmin())


@pytest.mark.parametrize("padding", ["zeros", "none"])
@pytest.mark.parametrize("late", [-15, -4, 0, 1, 9])
def test_offset_of_a_shifted_signal_is_found(late, padding):
    whole = embeddings(120, 32)
    video, audio = whole[30:90], whole[30 - late : 90 - late]  # the sound of frame t comes at t + late
    score = sync_score(video, audio, padding=padding)
    assert score.offset == -late
    assert score.confidence > 1


def test_equal_embeddings_have_no_distance():
    same = embeddings(30)
    assert sync_score(same, same).distance == pytest.approx(1e-6 * math.sqrt(8))
    far = sync_score(np.zeros((30, 4)), np.full((30, 4), 3.0), padding="none")
    assert far.distance == pytest.approx(6.0, abs=1e-5)
    assert far.confidence == pytest.approx(0.0, abs=1e-12)


def test_frames_without_a_face_take_no_part():
    video, audio = embeddings(40), embeddings(40, seed=1)
    some = video.copy()
    some[[0, 7, 39]] = np.nan
    seen = np.isfinite(some).all(1)
    padded = np.pad(audio, ((15, 15), (0, 0)))
    wanted = [np.linalg.norm(video - padded[s : s + 40] + 1e-6, axis=1)[seen].mean() for s in range(31)]
    assert np.allclose(distance_curve(some, audio), wanted)


def test_without_padding_only_the_overlap_counts():
    video, audio = embeddings(18), embeddings(18, seed=1)
    curve = distance_curve(video, audio, 15, "none")
    for shift in range(-15, 16):
        t = [t for t in range(18) if 0 <= t + shift < 18]
        if len(t) < 5:
            assert np.isnan(curve[15 + shift])
        else:
            wanted = np.mean([np.linalg.norm(video[i] - audio[i + shift] + 1e-6) for i in t])
            assert curve[15 + shift] == pytest.approx(wanted)
    assert np.isfinite(sync_score(video, audio, padding="none").confidence)


def test_bad_embeddings_are_refused():
    good = embeddings(10)
    with pytest.raises(UserError, match=r"must both be \(n, D\)"):
        distance_curve(good, good[:9])
    with pytest.raises(UserError, match="none of 10 frames has a face"):
        distance_curve(np.full((10, 8), np.nan), good)
    with pytest.raises(UserError, match="finite"):
        distance_curve(good, np.full((10, 8), np.inf))
    with pytest.raises(UserError, match="negative"):
        distance_curve(good, good, -1)
    with pytest.raises(UserError, match="odd length"):
        score_curve(np.zeros(4))
