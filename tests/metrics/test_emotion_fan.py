"""Emotion-FAN: attentions against loops, the names of the published file, chips, extractors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker import EMOTIONS
from flowvqtalker_eval.metrics.accuracy import CLASSES
from flowvqtalker_eval.metrics.emotion_fan import (
    EmotionFan,
    EmotionFanExtractor,
    EmotionFanScores,
    face_chips,
    load_emotion_fan,
    to_project_order,
)


def test_classes_are_the_projects_without_natural():
    assert tuple(name for name in EMOTIONS if name != "natural") == CLASSES


# Attention, Emotion-FAN


def test_attention_equals_loops():
    """v = Σ α f / Σ α, then Σ α [f; v] / Σ α β, as EAT's repository has it."""
    torch.manual_seed(0)
    model = EmotionFan().eval()
    f, alpha = torch.randn(2, 5, 512), torch.rand(2, 5)
    logits = model.classify(f, alpha)
    for b in range(2):
        v = sum(alpha[b, t] * f[b, t] for t in range(5)) / alpha[b].sum()
        pairs = [torch.cat([f[b, t], v]) for t in range(5)]
        below = sum(alpha[b, t] * model.beta(pairs[t])[0] for t in range(5))
        related = sum(alpha[b, t] * pairs[t] for t in range(5)) / below
        assert torch.allclose(logits[b], model.pred_fc2(related), atol=1e-5)


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
    net = EmotionFan()
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
    empty = {
        "emotion_fan_features": np.full((2, 512), np.nan, np.float32),
        "emotion_fan_alpha": np.full(2, np.nan, np.float32),
    }
    assert np.isnan(EmotionFanScores(published[1])(empty, None)["emotion_fan"]).all()
