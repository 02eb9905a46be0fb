"""Scores of generated motion: landmark distances by hand, the real clip itself, means over samples, the baseline."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.loading import load_face_model
from flowvqtalker_eval.metrics.align import TEMPLATE
from flowvqtalker_eval.metrics.landmarks68 import MESH68

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import motion_scores as scores


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return load_face_model()


@pytest.fixture(scope="module")
def clip() -> Coefficients:
    rng = np.random.default_rng(3)
    rho = np.zeros((30, 6), np.float32)
    rho[:, :3] = np.cumsum(rng.standard_normal((30, 3)) * 0.01, axis=0)
    rho[:, 5] = 20.0
    beta = np.cumsum(rng.standard_normal((30, 64)) * 0.2, axis=0).astype(np.float32)
    return Coefficients(beta, rho, (0.5 * rng.standard_normal(80)).astype(np.float32))


def test_speed_correlation_opening_and_closure_by_hand(face, clip) -> None:
    line = np.outer(np.arange(100), [3.0, 4.0])
    assert scores.speed(line) == pytest.approx(5 * 25)
    assert math.isnan(scores.speed(line[:1]))
    a = clip.expression[:, 0]
    assert scores.correlation(a, -2 * a + 1) == pytest.approx(-1)
    assert scores.correlation(a, np.ones(30)) == 0
    beta = clip.expression
    plain = np.einsum("tk,kvc->tvc", beta, face.expression.numpy())
    assert np.allclose(scores.lip_opening(face, beta), plain[:, 14, 1] - plain[:, 13, 1], atol=1e-5)
    shut, lids = np.linspace(0, 1, 30), face.arkit[[9, 10], :-1].mean(0).numpy()
    beta = (shut[:, None] - scores.eye_closure(face, np.zeros((1, 64)))) * lids / (lids @ lids)
    assert scores.eye_closure(face, beta) == pytest.approx(shut, abs=1e-5)


def test_coefficient_lmd_by_hand(face, clip) -> None:
    rng = np.random.default_rng(0)
    made = clip.expression + 0.5 * rng.standard_normal((30, 64)).astype(np.float32)
    found = scores.coefficient_lmd(face, clip.identity, clip.pose, clip.expression, made)
    mouth, whole = [], []
    for t in range(30):
        points = []
        for beta in (clip.expression[t], made[t]):
            tensors = (torch.from_numpy(x) for x in (clip.identity, beta, clip.pose[t]))
            seen = face.project(*tensors).numpy()[MESH68, :2].astype(np.float64)
            # The similarity that brings points 27..44 of the template closest, by plain least squares; inverted.
            (x, y), (u, v) = seen[27:45].T, TEMPLATE[27:45].T
            one, none = np.ones(18), np.zeros(18)
            system = np.concatenate([np.stack([u, -v, one, none], 1), np.stack([v, u, none, one], 1)])
            a, b, c, d = np.linalg.lstsq(system, np.concatenate([x, y]), rcond=None)[0]
            points.append((seen - [c, d]) @ np.linalg.inv([[a, -b], [b, a]]).T)
        for part, kept in ((slice(48, 68), mouth), (slice(0, 68), whole)):
            p, q = (x[part] - x[part].mean(0) for x in points)
            kept.append(np.linalg.norm(p - q, axis=1).mean())
    assert found == pytest.approx((np.mean(mouth), np.mean(whole)), rel=1e-4)
    assert 0 < found[1] < found[0]


def test_equal_expression_has_no_landmark_distance_and_neither_has_a_shifted_face(face, clip) -> None:
    assert scores.coefficient_lmd(face, clip.identity, clip.pose, clip.expression, clip.expression) == (0, 0)
    shifted = FaceModel.from_tensors({**face.state_dict(), "expression": face.expression.clone()})
    shifted.expression[0] = torch.tensor([0.1, 0.05, 0.0])  # the first coefficient moves all vertices alike
    still = np.zeros((30, 6), np.float32)
    still[:, 5] = 1e4  # from afar, where perspective does not tell near from far
    made = clip.expression.copy()
    made[:, 0] += 1
    found = scores.coefficient_lmd(shifted, clip.identity, still, clip.expression, made)
    assert max(found) < 0.01
    with pytest.raises(UserError, match="equally long"):
        scores.coefficient_lmd(face, clip.identity, clip.pose, clip.expression, made[:-1])


def test_scores_of_the_real_clip_itself(face, clip) -> None:
    pytest.importorskip("librosa")
    wave = np.random.default_rng(0).standard_normal(30 * 640).astype(np.float32) * 0.1
    found = scores.motion_scores(face, clip, [clip, clip], wave)
    for name in ("M-LMD", "F-LMD", "lip-vertex error (%)", "AED", "AED L2", "APD angles (deg)", "APD translation"):
        assert found[name] == 0
    for name in ("diversity expression", "diversity pose", "diversity eyes"):
        assert found[name] == 0
    assert found["opening generated-real"] == pytest.approx(1)
    assert found["opening range generated/real"] == found["speed generated/real"] == 1
    pairs = [name for name in found if name.endswith(" generated") or " generated," in name]
    assert len(pairs) >= 8
    for name in pairs:
        assert found[name] == pytest.approx(found[name.replace("generated", "real")], nan_ok=True)
    assert found["head angle std generated (deg)"] == found["head angle std real (deg)"]


def test_scores_are_means_over_the_samples(face, clip) -> None:
    samples = [
        Coefficients(clip.expression + np.float32(change), clip.pose, clip.identity) for change in (0.0, 0.1, -0.3)
    ]
    found = scores.motion_scores(face, clip, samples, None)
    assert found["AED"] == pytest.approx((0.1 + 0.3) / 3, rel=1e-4)
    assert found["diversity expression"] == pytest.approx(8 * (0.1 + 0.3 + 0.4) / 3, rel=1e-4)
    assert found["diversity pose"] == 0
    assert not any("beat" in name or "loudness" in name for name in found)  # nothing was heard
    assert math.isnan(scores.motion_scores(face, clip, samples[:1], None)["diversity expression"])
    with pytest.raises(UserError, match="no sample"):
        scores.motion_scores(face, clip, [], None)


def test_nearest_speech_finds_what_it_has_heard() -> None:
    rng = np.random.default_rng(0)
    clips = []
    for _ in range(4):
        envelope = np.repeat(rng.uniform(0, 1, 60), 320)  # sounds that differ every 20 ms
        wave = (rng.standard_normal(30 * 640) * 0.1 * envelope).astype(np.float32)
        clips.append((wave, rng.standard_normal((30, 64)).astype(np.float32)))
    nearest = scores.NearestSpeech(clips, step=1)
    for wave, expression in clips:
        assert np.allclose(nearest(wave), expression, atol=1e-5)
    short = nearest(clips[0][0][: 640 * 3 + 5])
    assert short.shape == (4, 64)
    with pytest.raises(UserError, match="8 frames"):
        scores.NearestSpeech([(clips[0][0][:640], clips[0][1][:1])])
