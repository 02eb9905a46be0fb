"""Emotion classifiers: accuracy over folds of people, motion, pictures, and the published Emotion-FAN."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker import EMOTIONS, weights
from flowvqtalker.data.shards import Clip, Shard, ShardWriter
from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.alignment import align_faces, face_template, similarity, warp
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import RIGID
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loop import fit
from flowvqtalker_eval.evaluators import emotion_training as emotion_stage
from flowvqtalker_eval.evaluators import motion_emotion_training as stage
from flowvqtalker_eval.evaluators.emotion import (
    EmotionClassifier,
    EmotionExtractor,
    EmotionScores,
    accuracy_of,
    load_emotion,
)
from flowvqtalker_eval.evaluators.emotion_data import FaceItems, draw_look, plain
from flowvqtalker_eval.evaluators.emotion_faces import Faces, FacesConfig, write_faces
from flowvqtalker_eval.evaluators.folds import Labelled, cross_validate, fit_temperature, spread_out
from flowvqtalker_eval.evaluators.motion_emotion import (
    MIRRORED,
    MotionEmotion,
    MotionEmotionConfig,
    load_motion_emotion,
)
from flowvqtalker_eval.metrics.accuracy import CLASSES, grouped_folds, score
from flowvqtalker_eval.metrics.emotion_fan import (
    EmotionFan,
    EmotionFanExtractor,
    EmotionFanScores,
    clip_vector,
    face_chips,
    find_emotion_fan,
    load_emotion_fan,
    related,
    to_project_order,
)

LOOP = LoopConfig(steps=25, batch_size=16, lr=5e-3, log_every=10, validate_every=0, save_every=100, device="cpu", ema=0)


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


def test_classes_are_the_projects_without_natural():
    assert tuple(name for name in EMOTIONS if name != "natural") == CLASSES


# Attention, Emotion-FAN


def test_attention_equals_loops():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(2, 5, 6, generator=generator)
    alpha, beta = (torch.rand(2, 5, generator=generator) for _ in range(2))
    clip = clip_vector(f, alpha)
    for b in range(2):
        v = sum(alpha[b, t] * f[b, t] for t in range(5)) / sum(alpha[b, t] for t in range(5))
        assert torch.allclose(clip[b], v, atol=1e-6)
        pairs = [torch.cat([f[b, t], v]) for t in range(5)]
        below = sum(alpha[b, t] * beta[b, t] for t in range(5))
        paper = sum(alpha[b, t] * beta[b, t] * pairs[t] for t in range(5)) / below
        eat = sum(alpha[b, t] * pairs[t] for t in range(5)) / below
        assert torch.allclose(related(f, clip, alpha, beta)[b], paper, atol=1e-5)
        assert torch.allclose(related(f, clip, alpha, beta, protocol="eat")[b], eat, atol=1e-5)


def test_attention_ignores_masked_frames():
    f, alpha, beta = torch.randn(1, 5, 6), torch.rand(1, 5), torch.rand(1, 5)
    mask = torch.tensor([[True, True, True, False, False]])
    clip = clip_vector(f, alpha, mask)
    assert torch.allclose(clip, clip_vector(f[:, :3], alpha[:, :3]), atol=1e-6)
    short = related(f[:, :3], clip, alpha[:, :3], beta[:, :3])
    assert torch.allclose(related(f, clip, alpha, beta, mask), short, atol=1e-6)


def test_equal_frames_need_no_attention():
    frame = torch.randn(1, 1, 6)
    f = frame.expand(1, 4, 6)
    clip = clip_vector(f, torch.rand(1, 4))
    assert torch.allclose(clip, frame[:, 0], atol=1e-6)
    assert torch.allclose(related(f, clip, torch.rand(1, 4), torch.rand(1, 4))[0, :6], frame[0, 0], atol=1e-5)


def test_published_order_becomes_the_projects():
    scores = torch.arange(8.0)  # Happy, Angry, Disgust, Fear, Sad, Neutral, Surprised, Contempt
    ours = dict(zip(CLASSES, to_project_order(scores).tolist(), strict=True))
    assert ours == {
        "happy": 0, "angry": 1, "disgusted": 2, "fear": 3, "sad": 4, "neutral": 5, "surprised": 6, "contempt": 7,
    }  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[EmotionFan, Path]:
    """A checkpoint laid out as the published one: under ``state_dict``, names with ``module.``, the old layer left."""
    torch.manual_seed(0)
    net = EmotionFan("eat")
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    state |= {"module.fc.weight": torch.zeros(7, 512), "module.fc.bias": torch.zeros(7)}
    path = tmp_path_factory.mktemp("fan") / "fan.pth.tar"
    torch.save({"epoch": 3, "state_dict": state, "accuracy": torch.tensor(84.37), "name": "x"}, path)
    return net.eval(), path


def test_published_names_are_those_of_resnet18_with_two_attentions(published):
    names = set(published[0].state_dict())
    assert {
        "conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer1.1.bn2.bias", "layer2.0.downsample.0.weight",
        "layer4.0.downsample.1.running_mean", "alpha.0.weight", "beta.0.bias", "pred_fc1.weight", "pred_fc2.bias",
    } <= names  # fmt: skip
    assert not any(name.startswith("layer1.0.downsample") for name in names)
    weights_of_resnet = 11_176_512  # torchvision's ResNet-18 without its last layer
    assert (
        sum(p.numel() for p in published[0].parameters()) == weights_of_resnet + 513 + 1025 + 512 * 8 + 8 + 1024 * 8 + 8
    )


def test_published_checkpoint_loads_and_counts_alike(published):
    net, path = published
    loaded = load_emotion_fan(path)
    faces = torch.rand(1, 2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(loaded(faces), net(faces), atol=1e-5)
        features, alpha = loaded.frames(faces[0])
        assert features.shape == (2, 512) and alpha.shape == (2,)
        assert torch.allclose(loaded.classify(features[None], alpha[None]), net(faces), atol=1e-5)
        assert not torch.allclose(load_emotion_fan(path, "paper")(faces), net(faces), atol=1e-5)


def test_checkpoints_that_do_not_fit_say_why(published, tmp_path):
    net, _ = published
    file = tmp_path / "other.pth"
    state = dict(net.state_dict())
    torch.save({**state, "pred_fc2.weight": torch.zeros(7, 1024), "pred_fc2.bias": torch.zeros(7)}, file)
    with pytest.raises(UserError, match=r"pred_fc2.weight has shape \(7, 1024\), not \(8, 1024\)"):
        load_emotion_fan(file)
    del state["beta.0.weight"]
    torch.save({**state, "gamma": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"beta\.0\.weight is missing; gamma is unknown"):
        load_emotion_fan(file)
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="holds no state dict"):
        load_emotion_fan(file)
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        load_emotion_fan(file)
    with pytest.raises(UserError, match="not found"):
        load_emotion_fan(tmp_path / "none.pth")


def test_finding_the_checkpoint(published, tmp_path, monkeypatch):
    monkeypatch.delenv("FLOWVQTALKER_EMOTION_FAN", raising=False)
    with pytest.raises(MissingDependency, match="no Emotion-FAN checkpoint was named"):
        find_emotion_fan()
    with pytest.raises(MissingDependency, match="not found at"):
        find_emotion_fan(tmp_path / "none")
    monkeypatch.setenv("FLOWVQTALKER_EMOTION_FAN", str(published[1]))
    path, digest = find_emotion_fan()
    assert path == published[1] and digest == weights.sha256(path)
    with pytest.raises(MissingDependency, match="not 0123"):
        find_emotion_fan(path, "0123")


def test_chips_put_the_eyes_where_dlib_does():
    frame = np.zeros((300, 300, 3), np.uint8)
    places = (np.array([(0.8595674595992, 0.2134981538014), (0.1205750620789, 0.2137274526848)]) + 0.25) / 1.5 * 224
    points = np.full((68, 2), 100.0)
    chip = [(0.8595674595992, 0.2134981538014), (0.6460604764104, 0.2289674387677)]
    chip += [(0.1205750620789, 0.2137274526848), (0.3340850613712, 0.2290642403242), (0.4901123135679, 0.6277975316475)]
    points[[45, 42, 36, 39, 33]] = np.array(chip) * 120 + [80, 60]
    for number in (45, 36):
        x, y = points[number].astype(int)
        frame[y - 3 : y + 4, x - 3 : x + 4] = 255
    chips = face_chips(np.stack([frame, frame]), np.stack([points, np.full((68, 2), np.nan)]))
    assert chips.shape == (2, 224, 224, 3) and not chips[1].any()
    for x, y in places:
        assert chips[0, round(float(y)), round(float(x))].min() > 200


def test_fan_extractors_give_probabilities_and_nan_without_a_face(published):
    frames = np.random.default_rng(0).integers(0, 255, (3, 90, 80, 3), dtype=np.uint8)
    points = np.random.default_rng(1).uniform(20, 60, (3, 68, 2)).astype(np.float32)
    points[1] = np.nan
    known = {"landmarks68": points}
    known |= EmotionFanExtractor(published[1])(frames, known)
    assert np.isfinite(known["emotion_fan_features"]).all(1).tolist() == [True, False, True]
    scores = EmotionFanScores(published[1])(known, None)["emotion_fan"]
    assert scores.shape == (8,) and scores.sum() == pytest.approx(1, abs=1e-5)
    empty = {"emotion_fan_features": np.full((2, 512), np.nan), "emotion_fan_alpha": np.full(2, np.nan)}
    assert np.isnan(EmotionFanScores(published[1])(empty, None)["emotion_fan"]).all()


# Faces


def test_similarity_finds_a_known_map_and_keeps_nan():
    points = np.random.default_rng(0).normal(size=(1, 7, 2)) * 30
    angle, scale, shift = 0.4, 1.7, np.array([5.0, -3.0])
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = similarity(points, points[0] @ turn.T + shift)
    assert np.allclose(matrix[0], np.concatenate([turn, shift[:, None]], 1))
    assert np.isnan(similarity(points * np.nan, points[0])).all()
    nothing = similarity(points, np.zeros_like(points[0]))[0]  # all points in one place
    assert not warp(np.full((9, 9, 3), 255, np.uint8), nothing, 8).any()


@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0, 2.0])
def test_warp_keeps_places_at_every_scale(scale):
    side = round(112 / scale)
    y, x = np.mgrid[:side, :side] + 0.5
    frame = np.stack([x, y, x], 2) * (200 / side)
    matrix = np.array([[scale, 0, 0], [0, scale, 0]], float)
    small = warp(frame.astype(np.uint8), matrix, 112).astype(float)
    wanted = (np.arange(112) + 0.5) * 200 / 112
    assert np.abs(small[56, 5:-5, 0] - wanted[5:-5]).max() < 3
    assert np.abs(small[5:-5, 56, 1] - wanted[5:-5]).max() < 3


def test_aligned_faces_put_bone_points_on_the_template(face):
    template = face_template(face).numpy()
    mesh = np.zeros((2, 478, 3), np.float32)
    mesh[0, list(RIGID), :2] = template * 3 + [40, 20]
    mesh[1] = np.nan
    frame = np.zeros((400, 400, 3), np.uint8)
    x, y = (template[0] * 3 + [40, 20]).astype(int)
    frame[max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5] = 255
    for size in (112, 144):
        crops = align_faces([frame, frame], mesh, template, size)
        assert crops.shape == (2, size, size, 3) and not crops[1].any()
        u, v = np.floor(template[0] + (size - 112) / 2).astype(int)
        if 0 <= u < size and 0 <= v < size and 0 <= x < 400 and 0 <= y < 400:
            assert crops[0, v, u].max() > 100
    with pytest.raises(UserError, match="mesh of shape"):
        align_faces([frame], mesh, template)


# Our classifier of faces


class Painted:
    """Faces whose colour says the emotion and whose brightness says the person."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def face(self, number: int) -> np.ndarray:
        picture = np.full((144, 144, 3), 90, np.uint8)
        row, column = divmod(int(self.labels[number]), 3)
        picture[20 + 36 * row : 50 + 36 * row, 20 + 36 * column : 50 + 36 * column] = 250
        return picture


def painted(people: int = 6, per_clip: int = 4) -> emotion_stage.FaceClips:
    labels, who, of_face, numbers = [], [], [], []
    for person in range(people):
        for label in (0, 4, 5, 7):
            numbers.append(np.arange(len(of_face), len(of_face) + per_clip))
            of_face += [label] * per_clip
            labels.append(label)
            who.append(f"person {person}")
    count = len(of_face)
    shapes = np.zeros((count, 52), np.float32)
    shapes[:, 25] = np.array(of_face) / 8
    free = np.arange(count)
    return emotion_stage.FaceClips(
        Painted(np.array(of_face)),
        shapes,
        tuple(numbers),
        Labelled(np.array(labels), tuple(who), np.ones(len(labels), bool)),
        np.zeros(len(labels), bool),
        ([free[:8], free[8:16]], [free[16:]]),
        free[:3],
    )


@pytest.fixture(scope="module")
def start() -> dict[str, torch.Tensor]:
    """State of an untrained first step."""
    first = emotion_stage.ExpressionStage(emotion_stage.Config(), painted(), None)
    return {key: value.clone() for key, value in first.module.state_dict().items()}


TINY = LoopConfig(steps=3, batch_size=4, lr=1e-3, log_every=1, validate_every=0, save_every=9, device="cpu", ema=0)


def test_the_classifier_fits_the_package():
    net = EmotionClassifier()
    count = sum(v.numel() for v in net.state_dict().values())
    assert 2 * count < 4.5 * 2**20
    assert torch.isfinite(net.eval()(torch.rand(1, 2, 3, 112, 112))).all()
    with pytest.raises(UserError, match="faces of shape"):
        net.frames(torch.rand(1, 3, 96, 96))


def test_looks_keep_size_and_are_pure_functions():
    for seed in range(20):
        first, second = (
            draw_look(random).apply(Painted(np.array([4])).face(0), random)
            for random in (np.random.default_rng(seed), np.random.default_rng(seed))
        )
        assert first.shape == (112, 112, 3) and first.dtype == np.uint8 and np.array_equal(first, second)


def test_mirrored_items_have_mirrored_blendshapes():
    clips = painted()
    shapes = np.tile(np.arange(52, dtype=np.float32), (len(clips.shapes), 1))
    items = FaceItems(clips.faces, shapes, clips.free, 0.5, 0)
    seen = {tuple(items[i]["shapes"].tolist()) for i in range(20)}
    assert seen == {tuple(range(52)), tuple(float(n) for n in MIRRORED)}


def test_first_step_lowers_its_loss(tmp_path):
    clips = painted()
    config = emotion_stage.Config(pretrain=replace(TINY, steps=8, batch_size=6, overfit=True))
    first = emotion_stage.ExpressionStage(config, clips, None)
    assert set(first.dataset("train")[3]) == {"face", "shapes"}
    fit(first, config.pretrain, tmp_path)
    with open(tmp_path / "log.csv", newline="") as file:
        losses = [float(row["backbone/loss"]) for row in csv.DictReader(file)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_second_step_lowers_its_loss_and_leaves_the_first_blocks_alone(start, face, tmp_path):
    clips = painted()
    config = emotion_stage.Config(loop=replace(TINY, steps=8, overfit=True, lr=2e-3), frozen=3)
    second = emotion_stage.EmotionStage(
        config, clips, np.arange(16), np.arange(16, 24), start, face_template(face), temperature=1.5
    )
    item = second.dataset("train")[0]
    assert item["faces"].shape == (3, 3, 112, 112) and item["shapes"].shape == (3, 52)
    numbers = fit(second, config.loop, tmp_path / "run")
    assert 0 <= numbers["accuracy"] <= 1
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        losses = [float(row["classifier/cross_entropy"]) for row in csv.DictReader(file)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    state = second.model.backbone.state_dict()
    for key, value in state.items():
        if int(key.split(".")[0]) < 3 and not key.endswith("num_batches_tracked"):
            assert torch.equal(value, start[f"backbone.{key}"]), key
    assert torch.equal(state["17.conv.3.running_mean"], start["backbone.17.conv.3.running_mean"])  # norms are fixed

    weights.add(tmp_path / "run", "emotion", path=tmp_path / "weights")
    loaded = load_emotion(tmp_path / "weights")
    assert float(loaded.temperature) == 1.5
    second.module.eval()
    with torch.no_grad():
        wanted = second.logits(np.array([0]))
        faces = torch.stack([plain(clips.faces.face(int(n))) for n in clips.numbers[0]])
        assert torch.allclose(loaded(faces[None]) * 1.5, wanted, atol=0.05)

    frames = np.random.default_rng(0).integers(0, 255, (3, 60, 60, 3), dtype=np.uint8)
    mesh = np.random.default_rng(1).uniform(5, 55, (3, 478, 3)).astype(np.float32)
    mesh[2] = np.nan
    known = {"mesh": mesh}
    known |= EmotionExtractor(tmp_path / "weights")(frames, known)
    assert np.isfinite(known["emotion_features"]).all(1).tolist() == [True, True, False]
    scores = EmotionScores(tmp_path / "weights")(known, None)["emotion"]
    assert scores.sum() == pytest.approx(1, abs=1e-5)
    nothing = EmotionScores(tmp_path / "weights")({"emotion_features": np.full((2, 320), np.nan)}, None)
    assert np.isnan(nothing["emotion"]).all()
    assert (
        EmotionScores(tmp_path / "weights").settings()["weights"]
        == weights.sha256(tmp_path / "weights" / "emotion.safetensors")[:16]
    )


def test_accuracy_of_scores():
    scores = [np.eye(8)[CLASSES.index(name)] for name in ("happy", "sad", "fear")]
    assert accuracy_of([*scores, np.full(8, np.nan)], ["happy", "angry", None, "sad"]) == (pytest.approx(1 / 3), 3)
    value, count = accuracy_of([], [])
    assert np.isnan(value) and count == 0


def test_a_shard_without_faces_says_how_to_make_them(tmp_path):
    with pytest.raises(
        UserError, match=r"has no emotion_faces.npz; make it with `python -m flowvqtalker.data.emotion_"
    ):
        Faces(tmp_path)


def write_levels(path: Path, levels: list[int]) -> None:
    """A lossless clip of 64x64 at 25 fps whose frames are of one grey level each."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        for number, level in enumerate(levels):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shard_with_faces(folder: Path, template: np.ndarray) -> tuple[Path, Path]:
    """A folder of clips and its shard: a happy clip, four neutral ones, natural speech and a picture."""
    data, out = folder / "data", folder / "shard"
    (data / "clips").mkdir(parents=True)
    rows = [("happy.mkv", "anna", "happy"), *((f"neutral{n}.mkv", "anna", "neutral") for n in range(4))]
    rows += [("natural.mkv", "bob", "natural"), ("still.png", "carl", "")]
    with open(data / "clips.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "source", "identity", "emotion", "speech"])
        writer.writerows((name, "test", who, emotion, "no") for name, who, emotion in rows[:-1])
    _, jpeg = cv2.imencode(".jpg", np.full((512, 512, 3), 200, np.uint8))
    with ShardWriter(out, about="{}") as writer:
        for name, who, emotion in rows:
            length = 1 if name.endswith("png") else 10
            if length > 1:
                write_levels(data / "clips" / name, [20 * t + 30 for t in range(length)])
            mesh = np.zeros((length, 478, 3), np.float32)
            mesh[:, list(RIGID), :2] = template * 512 / 112  # the face fills the crop
            if name == "happy.mkv":
                mesh[4] = np.nan
            zeros = np.zeros((length, 64), np.float32)
            writer.add(
                Clip(
                    name=name, source="test", identity=who, split="train",
                    emotion=EMOTIONS.index(emotion) if emotion else -1, speech=False, picture=length == 1,
                    identity_shape=np.zeros(80, np.float32), expression=zeros, pose=zeros[:, :6],
                    blendshapes=np.tile(np.arange(length, dtype=np.float32)[:, None] / 10, (1, 52)), landmarks=mesh,
                    residual=zeros[:, 0], audio=None, crop=np.array([[8.0, 0, 0], [0, 8.0, 0]]),
                    valid=np.array([[0, 0], [512, 0], [512, 512], [0, 512]], np.float32), native=64.0,
                    images=[(t, jpeg.tobytes()) for t in range(length)] if emotion in ("natural", "") else (),
                )
            )  # fmt: skip
    return data, out


def test_faces_are_cut_from_clips_and_stored_pictures(face, tmp_path):
    template = face_template(face).numpy()
    face.save(tmp_path / "face.safetensors")
    data, out = shard_with_faces(tmp_path, template)
    config = FacesConfig(data, out, frames=3, neutral=2, stored=2, face_model=tmp_path / "face.safetensors")
    assert write_faces(config) == 3 + 2 * 3 + 2 + 1
    faces, shard = Faces(out), Shard(out)
    names = [str(shard.name[clip]) for clip in faces.clip]
    assert names == ["happy.mkv"] * 3 + ["neutral0.mkv"] * 3 + ["neutral1.mkv"] * 3 + ["natural.mkv"] * 2 + [
        "still.png"
    ]
    for number in range(9):  # the level of a decoded face tells the frame that it was cut from
        tick = int(faces.row[number]) - shard.rows(int(faces.clip[number])).start
        assert abs(float(faces.face(number)[72, 72].mean()) - (20 * tick + 30)) < 4
    assert faces.face(11)[72, 72, 0] > 195 and faces.face(11).shape == (144, 144, 3)
    assert faces.face(0)[0, 0, 0] < 10  # the border lies outside of the frame

    clips = emotion_stage.load_faces(out, per_person=1)
    assert [len(numbers) for numbers in clips.numbers] == [3, 3, 3, 2]
    assert [CLASSES[label] for label in clips.data.labels] == ["happy", "neutral", "neutral", "neutral"]
    assert clips.data.measured.tolist() == [True, True, False, False] and clips.natural.tolist() == [False] * 3 + [True]
    held = {str(shard.identity[faces.clip[n]]) for people in clips.free for group in people for n in group}
    held |= {str(shard.identity[faces.clip[n]]) for n in clips.validation}
    assert held == {"bob", "carl"}  # nobody with an emotion is in the first step
    assert np.allclose(clips.shapes[1], (faces.row[1] - shard.rows(0).start) / 10, atol=1e-3)


def test_faces_of_missing_clips_are_an_error(face, tmp_path):
    face.save(tmp_path / "face.safetensors")
    data, out = shard_with_faces(tmp_path, face_template(face).numpy())
    text = (data / "clips.csv").read_text().replace("happy.mkv,test,anna,happy,no\n", "")
    (data / "clips.csv").write_text(text)
    with pytest.raises(UserError, match=r"1 clips of the shard are not in .*, the first: happy\.mkv"):
        write_faces(FacesConfig(data, out, face_model=tmp_path / "face.safetensors"))


def test_configuration_lists_what_is_wrong():
    with pytest.raises(UserError, match=r"frozen must be in 0 to 17.*folds must be 0 or at least 2"):
        emotion_stage.Config(frozen=18, folds=1)
    with pytest.raises(UserError, match="folds must be 0 or at least 2"):
        stage.Config(folds=1)
