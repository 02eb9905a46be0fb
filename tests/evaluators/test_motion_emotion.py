"""The classifier of expression coefficients: features, fit, weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.data.shards import ShardWriter
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import FaceModel
from flowvqtalker.train.release import add_weights
from flowvqtalker_eval.evaluators import motion_emotion as stage
from flowvqtalker_eval.evaluators.motion_emotion import MIRRORED, Config, Labelled, load_motion_emotion, statistics
from flowvqtalker_eval.metrics.accuracy import CLASSES

from ..data.test_shards import make_clip


@pytest.fixture(scope="module")
def face() -> FaceModel:
    generator = torch.Generator().manual_seed(0)
    triangles = torch.zeros(2, 3, dtype=torch.int64)
    return FaceModel(
        mean=torch.randn(478, 3, generator=generator),
        identity=torch.zeros(80, 478, 3),
        expression=torch.randn(64, 478, 3, generator=generator),
        arkit=torch.randn(52, 65, generator=generator) * 0.1,
        triangles=triangles,
        mouth_triangles=triangles,
        eye_triangles=triangles,
    )


def test_mirror_swaps_left_and_right_and_nothing_else():
    for number, other in enumerate(MIRRORED):
        assert MIRRORED[other] == number
        plain = [name.replace("Left", "").replace("Right", "") for name in (ARKIT_NAMES[number], ARKIT_NAMES[other])]
        assert plain[0] == plain[1]
    assert sum(number != other for number, other in enumerate(MIRRORED)) > 30


def test_statistics_equal_the_definition():
    random = np.random.default_rng(0)
    beta, basis, bias = random.normal(size=(17, 64)), random.normal(size=(64, 52)), random.normal(size=52)
    found = statistics(beta, basis, bias).reshape(5, 52)
    shapes = beta @ basis + bias
    assert np.allclose(found[0], shapes.sum(0) / 17)
    assert np.allclose(found[1] ** 2, (shapes**2).mean(0) - found[0] ** 2)
    assert np.allclose(found[3], np.sort(shapes, axis=0)[8])  # the median of 17
    assert np.isfinite(statistics(beta[:1], basis, bias)).all()
    for shape in ((0, 64), (4, 63), (1, 4, 64)):
        with pytest.raises(UserError, match=r"expression of shape \(T, 64\)"):
            statistics(np.zeros(shape), basis, bias)


def emotional_shard(folder: Path, people: int = 20) -> Path:
    """Clips whose mean says the emotion; every person shows four emotions and speaks naturally once."""
    random = np.random.default_rng(0)
    centres = 3 * random.normal(size=(9, 64))
    with ShardWriter(folder) as writer:
        for person in range(people):
            offset = 0.5 * random.normal(size=64)
            for turn, label in enumerate([*((person + 2 * k) % 8 for k in range(4)), 8]):
                clip = make_clip(f"{person}-{turn}.mp4", 20 + person, person)
                walk = np.cumsum(0.1 * random.normal(size=clip.expression.shape), axis=0)
                beta = (centres[5 if label == 8 else label] + offset + walk).astype(np.float32)
                writer.add(replace(clip, identity=f"person {person}", emotion=label, expression=beta))
    return folder


def test_folds_never_share_a_person_and_spread_the_classes():
    random = np.random.default_rng(0)
    people, labels = random.integers(30, size=200), random.integers(8, size=200)
    folds = Labelled(labels, people, np.ones(200, bool)).folds(5)
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(200))
    for train, held in folds:
        assert not set(people[train]) & set(people[held])
        assert sorted([*train, *held]) == list(range(200))
        for label in range(8):
            assert (labels[held] == label).sum() < 0.5 * (labels == label).sum()


@pytest.mark.parametrize("folds", [0, 1, 4])
def test_folds_that_cannot_be(folds):
    with pytest.raises(UserError, match="folds must be at least 2 and at most the number of people"):
        Labelled(np.arange(3), np.array(list("abc")), np.ones(3, bool)).folds(folds)


def test_clips_of_a_person_are_limited(tmp_path):
    with ShardWriter(tmp_path / "shard") as writer:
        for number in range(5):
            emotion = 4 if number == 3 else 5
            writer.add(replace(make_clip(f"{number}.mp4", 20, number), identity="a", emotion=emotion))
    assert stage.load_clips((tmp_path / "shard",))[1].labels.tolist() == [5, 5, 4]


def test_stage_learns_and_its_weights_load(face, tmp_path):
    shard = emotional_shard(tmp_path / "shard")
    face.save(tmp_path / "face.safetensors")
    config = Config(shards=(shard,), face_model=tmp_path / "face.safetensors", folds=3)
    results = stage.run(config, tmp_path / "run")
    assert results["pooled"] > 0.7  # chance is an eighth
    assert "| happy |" in (tmp_path / "run" / "report.md").read_text()
    add_weights(tmp_path / "run", "motion_emotion", path=tmp_path / "weights")
    classifier = load_motion_emotion(tmp_path / "weights")
    clips, data = stage.load_clips((shard,))
    assert len(clips) == 100 and (~data.measured).sum() == 20
    assert set(data.labels[~data.measured]) == {CLASSES.index("neutral")}
    chances = np.stack([classifier.classify(clip) for clip in clips])
    assert np.allclose(chances.sum(1), 1)
    assert (chances.argmax(1) == data.labels).mean() > 0.8


def test_mirrored_motion_is_classified_alike(face, tmp_path):
    """The classifier is fitted to both, so its coefficients are symmetric."""
    shard = emotional_shard(tmp_path / "shard")
    clips, data = stage.load_clips((shard,))
    features = np.stack([statistics(clip, face.arkit[:, :-1].mT.numpy(), face.arkit[:, -1].numpy()) for clip in clips])
    coefficients = stage.fit(features, data.labels, 0.05).steps[-1][1].coef_.reshape(8, 5, 52)
    assert np.allclose(coefficients, coefficients[:, :, MIRRORED], atol=1e-3)


def test_shards_without_emotions_are_refused(tmp_path):
    with ShardWriter(tmp_path / "shard") as writer:
        writer.add(replace(make_clip("a.mp4", 20, 0), emotion=5))
    with pytest.raises(UserError, match="fewer than two emotions"):
        stage.load_clips((tmp_path / "shard",))


def test_bundled_classifier_knows_the_classes():
    classifier = load_motion_emotion()
    assert classifier.coef.shape == (len(CLASSES), 260)
    chances = classifier.classify(np.zeros((3, 64), np.float32))
    assert chances.shape == (8,) and chances.sum() == pytest.approx(1)
