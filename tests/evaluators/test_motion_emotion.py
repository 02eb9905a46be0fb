"""Emotion classifiers: accuracy over folds of people, motion, pictures, and the published Emotion-FAN."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import FaceModel
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loop import fit
from flowvqtalker_eval.evaluators import motion_emotion_training as stage
from flowvqtalker_eval.evaluators.folds import Labelled, cross_validate, fit_temperature
from flowvqtalker_eval.evaluators.motion_emotion import (
    MIRRORED,
    MotionEmotion,
    MotionEmotionConfig,
    load_motion_emotion,
)

LOOP = LoopConfig(steps=25, batch_size=16, lr=5e-3, log_every=10, validate_every=0, save_every=100, device="cpu", ema=0)


# Motion


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


def motion_clips(people: int = 16) -> stage.MotionClips:
    """Clips whose mean says the emotion; every person shows four."""
    random = np.random.default_rng(0)
    centres = 2 * random.normal(size=(9, 64))
    frames, labels, who = [], [], []
    for person in range(people):
        offset = 0.5 * random.normal(size=64)
        for turn in range(4):
            label = (person + 2 * turn) % 8
            walk = np.cumsum(0.1 * random.normal(size=(20 + person, 64)), axis=0)
            frames.append((centres[label] + offset + walk).astype(np.float32))
            labels.append(label)
            who.append(f"person {person}")
    count = len(frames)
    natural = np.zeros(count, bool)
    data = Labelled(np.array(labels), tuple(who), np.ones(count, bool))
    return stage.MotionClips(tuple(frames), data, natural, np.arange(count) % 2 == 0)


def model(width: int = 0) -> MotionEmotion:
    torch.manual_seed(0)
    net = MotionEmotion(MotionEmotionConfig(width=width)).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    net.basis.normal_()
    net.scale.uniform_(0.5, 2)
    return net


def test_mirror_swaps_left_and_right_and_nothing_else():
    for number, other in enumerate(MIRRORED):
        assert MIRRORED[other] == number
        plain = [name.replace("Left", "").replace("Right", "") for name in (ARKIT_NAMES[number], ARKIT_NAMES[other])]
        assert plain[0] == plain[1]
    assert sum(number != other for number, other in enumerate(MIRRORED)) > 30


def test_statistics_equal_numpy():
    net = model()
    x = torch.randn(3, 17, 52)
    found = net.statistics(x) * net.scale + net.centre
    values = x.numpy()
    wanted = np.concatenate([values.mean(1), values.std(1), *np.quantile(values, (0.1, 0.5, 0.9), axis=1)], axis=1)
    assert np.allclose(found.numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("width", [0, 8])
def test_masked_frames_do_not_count(width):
    net = model(width)
    x = torch.randn(2, 12, 64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 8:] = False
    whole = net(x, mask)
    other = x.clone()
    other[0, 8:] = 100
    assert torch.allclose(whole, net(other, mask), atol=1e-4)
    assert torch.allclose(whole[1], net(x[1:])[0], atol=1e-4)
    if not width:  # a convolution sees the end of the sequence as zeros either way
        assert torch.allclose(whole[0], net(x[:1, :8])[0], atol=1e-4)


def test_classify_gives_probabilities_with_gradients():
    net = model(8)
    x = torch.randn(9, 64, requires_grad=True)
    probabilities = net.classify(x)
    assert probabilities.shape == (8,) and float(probabilities.sum().detach()) == pytest.approx(1, abs=1e-5)
    probabilities[4].log().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
    assert torch.allclose(net.classify(x[None])[0], probabilities)
    assert net.classify(torch.randn(1, 64)).shape == (8,)


def test_temperature_flattens():
    net = model()
    x = torch.randn(1, 10, 64)
    sharp = net.classify(x)
    net.temperature.fill_(4)
    assert net.classify(x).max() < sharp.max()


def test_motion_of_a_wrong_shape_is_refused():
    for shape in ((4, 64), (1, 0, 64), (1, 4, 63)):
        with pytest.raises(UserError, match=r"expression of shape \(B, T, 64\)"):
            model()(torch.zeros(shape))
    with pytest.raises(UserError, match="mask must have shape"):
        model()(torch.zeros(1, 4, 64), torch.ones(1, 5, dtype=torch.bool))


def test_varied_motion_is_a_pure_function_and_keeps_the_shape():
    clips, lips = motion_clips(), np.eye(64, dtype=np.float32)
    config = stage.Config()
    first, second = (stage.VariedMotion(clips, np.arange(64), config, lips) for _ in range(2))
    for i in (0, 5, 10**9):
        a, b = first[i], second[i]
        assert torch.equal(a["expression"], b["expression"]) and a["label"] == b["label"]
        assert a["expression"].shape == (48, 64) and torch.isfinite(a["expression"]).all()
    assert {first[i]["label"] for i in range(200)} == set(range(8))


def test_without_variation_an_item_is_the_clip():
    clips = motion_clips()
    config = stage.Config(
        variation=stage.Variation(frames=48, shortest=48, speech=0, identity=0, strength=(1, 1), noise=0, mirror=False)
    )
    data = stage.VariedMotion(clips, np.arange(64), config, np.eye(64, dtype=np.float32))
    x = data.vary(clips.frames[2], np.random.default_rng(0))
    length = len(clips.frames[2])
    assert np.allclose(x[:length], clips.frames[2], atol=1e-5)
    assert np.allclose(x[length], clips.frames[2][-2], atol=1e-5)


def test_training_learns_and_folds_hold_people_out(face, tmp_path):
    clips = motion_clips()
    config = stage.Config(loop=LOOP)
    seen: list[set[str]] = []

    def make(train, held, fold):
        assert not {clips.data.identities[n] for n in train} & {clips.data.identities[n] for n in held}
        seen.append({clips.data.identities[n] for n in held})
        return stage.MotionEmotionStage(config, clips, train, held, face)

    accuracy, logits = cross_validate(make, clips.data, LOOP, tmp_path, 2)
    assert seen[0] | seen[1] == set(clips.data.identities) and not seen[0] & seen[1]
    assert accuracy.clips == 64 and accuracy.accuracy > 0.6  # chance is an eighth
    assert 1 / 8 <= fit_temperature(clips.data, logits) <= 8
    again, same = cross_validate(make, clips.data, LOOP, tmp_path, 2, resume=True)  # nothing is trained again
    assert np.array_equal(same, logits) and again.accuracy == accuracy.accuracy


def test_exported_motion_classifier_loads_with_its_temperature(face, tmp_path):
    clips = motion_clips(8)
    config = stage.Config(loop=replace(LOOP, steps=2), model=MotionEmotionConfig(width=4))
    trained = stage.MotionEmotionStage(config, clips, np.arange(32), np.arange(0), face, temperature=2.0)
    fit(trained, config.loop, tmp_path / "run")
    weights.add(tmp_path / "run", "motion_emotion", path=tmp_path / "weights")
    loaded = load_motion_emotion(tmp_path / "weights")
    assert float(loaded.temperature) == 2 and loaded.config.width == 4
    x = torch.from_numpy(clips.frames[0])[None]
    trained.module.eval()
    assert torch.allclose(loaded(x) * 2, trained.logits(np.array([0])), atol=2e-2)
