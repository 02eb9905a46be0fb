"""Measures of motion and beats: closed forms, frames without a face, bad input."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import EYE_CORNERS, LIPS, RIGID
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.loading import load_face_model
from flowvqtalker_eval.metrics import beats, motion
from flowvqtalker_eval.metrics import motion_scores as scores
from flowvqtalker_eval.metrics.align import TEMPLATE
from flowvqtalker_eval.metrics.landmarks68 import MESH68


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return load_face_model()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------ coefficients


def test_expression_distance_is_the_mean_absolute_difference(rng) -> None:
    real = rng.standard_normal((7, 64))
    assert motion.expression_distance(real, real) == 0
    assert motion.expression_distance(real, real - 0.25) == pytest.approx(0.25)
    assert motion.expression_distance(real, real - 0.25, norm=2) == pytest.approx(0.25 * 8)


def test_pose_distance_takes_angles_and_lengths_apart() -> None:
    real = np.zeros((4, 6))
    made = real + np.array([0.1, -0.1, 0.1, 0.02, 0.04, -0.06])
    found = motion.pose_distance(real, made)
    assert found.angles == pytest.approx(math.degrees(0.1))
    assert found.translation == pytest.approx(0.04)
    turned = real + np.array([2 * math.pi - 0.1, 0, 0, 0, 0, 0])
    assert motion.pose_distance(real, turned).angles == pytest.approx(math.degrees(0.1) / 3)


def test_frames_without_a_face_are_left_out(rng) -> None:
    real = rng.standard_normal((5, 64))
    made = real + 0.5
    made[2] = np.nan
    real[4] = np.nan
    assert motion.expression_distance(real, made) == pytest.approx(0.5)
    assert math.isnan(motion.expression_distance(np.full((3, 64), np.nan), np.zeros((3, 64))))
    pose = rng.standard_normal((50, 6))
    assert np.allclose(motion.head_deviation(pose), motion.head_deviation(np.insert(pose, 9, np.nan, axis=0)))


@pytest.mark.parametrize("shapes", [((5, 64), (6, 64)), ((5, 63), (5, 63)), ((0, 64), (0, 64))])
def test_motion_that_does_not_fit_together_is_refused(shapes) -> None:
    with pytest.raises(UserError, match="pair the frames"):
        motion.expression_distance(*map(np.zeros, shapes))


def test_head_deviation_and_speed_of_known_motion() -> None:
    t = np.arange(1000)
    pose = np.zeros((1000, 6))
    pose[:, 1] = 0.2 * np.sin(2 * np.pi * t / 100)
    assert motion.head_deviation(pose) == pytest.approx([0, math.degrees(0.2) / math.sqrt(2), 0])
    line = np.outer(t, [3.0, 4.0])
    assert motion.speed(line) == pytest.approx(5 * 25)
    assert math.isnan(motion.speed(line[:1]))


def test_diversity(rng) -> None:
    take = rng.standard_normal((20, 6))
    moved = take + np.array([3, 4, 0, 0, 0, 0])
    assert motion.diversity([take] * 4) == 0
    assert motion.diversity([take, moved]) == pytest.approx(5)
    assert motion.diversity([take, moved[:12]]) == pytest.approx(5)  # what both have
    assert motion.diversity([np.zeros(9), np.ones(9), np.zeros(9)]) == pytest.approx(2 / 3)  # of closures (T,)
    assert math.isnan(motion.diversity([take]))


def test_correlation_of_what_does_not_move_is_zero(rng) -> None:
    a = rng.standard_normal(30)
    assert motion.correlation(a, -2 * a + 1) == pytest.approx(-1)
    assert motion.correlation(a, np.ones(30)) == 0


# ---------------------------------------------------------------------------------------------------------- vertices


def test_lip_vertex_error_of_a_known_displacement(face) -> None:
    real = np.repeat(motion.shape(face, np.zeros((1, 64))), 6, axis=0)
    eyes = np.linalg.norm(real[0, EYE_CORNERS[0]] - real[0, EYE_CORNERS[1]])
    made = real.copy()
    made[:, LIPS[3]] += np.array([0, 0.03, 0.04]) * eyes
    made[:, LIPS[8]] += np.array([0.01, 0, 0]) * eyes  # smaller, so it does not count
    made[:, RIGID[0]] += 1.0  # not of the lips
    assert motion.lip_vertex_error(real, real) == 0
    assert motion.lip_vertex_error(real, made) == pytest.approx(5.0, rel=1e-5)
    made[:3] = real[:3]
    assert motion.lip_vertex_error(real, made) == pytest.approx(2.5, rel=1e-5)
    assert motion.lip_vertex_error(7 * real, 7 * made) == pytest.approx(2.5, rel=1e-5)  # whatever the unit
    with pytest.raises(UserError, match="478"):
        motion.lip_vertex_error(real[:, :68], real[:, :68])


def test_shape_has_the_true_identity(face, rng) -> None:
    beta, alpha = rng.standard_normal((3, 64)).astype(np.float32), rng.standard_normal(80).astype(np.float32)
    brute = face.mean.numpy() + np.einsum("i,ivc->vc", alpha, face.identity.numpy())
    brute = brute + np.einsum("tk,kvc->tvc", beta, face.expression.numpy())
    assert np.allclose(motion.shape(face, beta, alpha), brute, atol=1e-5)
    opening = motion.lip_opening(face, beta)
    plain = motion.shape(face, beta) - face.mean.numpy()
    assert np.allclose(opening, plain[:, 14, 1] - plain[:, 13, 1], atol=1e-5)


def test_constant_and_uniform_motion_have_no_jitter(rng) -> None:
    still = np.repeat(rng.standard_normal((1, 10, 3)), 8, axis=0)
    assert astuple(motion.jitter(still)) == (0, 0)
    moving = still + np.arange(8)[:, None, None] * 0.3
    assert astuple(motion.jitter(moving)) == pytest.approx((0, 0), abs=1e-8)


def test_jitter_of_a_parabola_is_its_acceleration() -> None:
    t = np.arange(12) / 25
    points = np.zeros((12, 5, 2))
    points[:, :, 0] = (0.5 * 3.0 * t**2)[:, None]
    found = motion.jitter(points)
    assert found.acceleration == pytest.approx(3.0)
    assert found.jerk == pytest.approx(0, abs=1e-6)
    assert motion.jitter(points, scale=2.0).acceleration == pytest.approx(1.5)
    points[6] = np.nan
    assert motion.jitter(points).acceleration == pytest.approx(3.0)
    assert math.isnan(motion.jitter(points[:2]).acceleration)


# --------------------------------------------------------------------------------------------------------- landmarks


@pytest.fixture(scope="module")
def mesh(face) -> np.ndarray:
    """(40, 478, 3) landmarks of a face that turns, moves and grows in the picture plane, in pixels."""
    base = face.mean.numpy()[None, :, :2] * 150
    t = np.arange(40)[:, None]
    angle, size = 0.2 * np.sin(t / 5), 1 + 0.1 * np.cos(t / 7)
    x = size * (np.cos(angle) * base[..., 0] - np.sin(angle) * base[..., 1]) + 250 + 10 * np.sin(t / 6)
    y = size * (np.sin(angle) * base[..., 0] + np.cos(angle) * base[..., 1]) + 240 + 8 * np.cos(t / 4)
    return np.stack([x, y, np.zeros_like(x)], axis=-1)


def test_a_head_that_moves_in_the_plane_is_still_in_its_own_frame(mesh) -> None:
    found = motion.landmark_jitter(mesh)
    assert astuple(found["face"]) == pytest.approx((0, 0), abs=1e-6)
    assert astuple(found["static"]) == pytest.approx((0, 0), abs=1e-6)
    assert found["head"].acceleration > 0.5
    frame = motion.face_frame(mesh)
    assert np.linalg.norm(frame[:, 33] - frame[:, 263], axis=-1) == pytest.approx(np.ones(40))


def test_noise_on_the_static_region_is_found_and_gaps_are_left_out(mesh, rng) -> None:
    noisy = mesh + rng.normal(0, 0.5, mesh.shape)
    noisy[17] = np.nan
    found = motion.landmark_jitter(noisy)
    # Second differences of noise of variance s² have variance 6 s² a coordinate; the length of two is Rayleigh's.
    sigma = 0.5 / 150 * math.sqrt(6) * 25**2  # the mean eye distance is 150 pixels
    assert found["face"].acceleration == pytest.approx(sigma * math.sqrt(math.pi / 2), rel=0.12)
    assert math.isfinite(found["static"].jerk)
    with pytest.raises(UserError, match="no frame has a face"):
        motion.landmark_jitter(np.full((4, 478, 3), np.nan))


def test_eye_aspect_ratio_of_a_drawn_eye() -> None:
    points = np.zeros((2, 478, 2))
    for outer, upper, upper2, inner, lower2, lower in (motion.EYES[0], motion.EYES[1]):
        points[:, outer], points[:, inner] = (0, 0), (40, 0)
        points[0, upper], points[0, lower] = (12, -6), (12, 6)
        points[0, upper2], points[0, lower2] = (28, -6), (28, 6)
        points[1, upper], points[1, lower] = (12, 0), (12, 0)
        points[1, upper2], points[1, lower2] = (28, 0), (28, 0)
    assert motion.eye_aspect_ratio(points) == pytest.approx([0.3, 0.0])


# ------------------------------------------------------------------------------------------------------------ blinks


def closure(places: list[int], length: int) -> np.ndarray:
    """(T,) with a blink at each place."""
    t = np.arange(length)
    return 0.1 + sum((0.8 * np.exp(-0.5 * ((t - place) / 1.2) ** 2) for place in places), np.zeros(length))


def test_blinks_are_counted_in_the_time_in_which_they_can_be_seen() -> None:
    assert motion.blink_rate([closure([100, 300, 450], 512)]) == pytest.approx(3 / (500 / 25 / 60))
    # The same minutes in pieces of which each shows one blink less than it should at its ends.
    pieces = [closure([12], 24), closure([], 24), np.zeros(5)]
    assert motion.blink_rate(pieces) == pytest.approx(1 / (24 / 25 / 60))
    assert motion.blink_rate([closure([], 100)]) == 0
    assert math.isnan(motion.blink_rate([np.zeros(12)]))


def test_blinks_of_landmarks_and_of_coefficients(face, mesh) -> None:
    points = np.repeat(mesh[:1], 200, axis=0)
    shut = closure([50, 120], 200)
    for eye in motion.EYES:
        _, upper, upper2, _, lower2, lower = eye
        for high, low in ((upper, lower), (upper2, lower2)):
            points[:, high, 1] = points[:, low, 1] - (1 - shut) * 12
    points[80] = np.nan
    assert motion.blink_rate([motion.shut_from_landmarks(points)]) == pytest.approx(2 / (188 / 25 / 60))
    lids = face.arkit[[9, 10], :-1].mean(0).numpy()
    beta = (shut[:, None] - motion.eye_closure(face, np.zeros((1, 64)))) * lids / (lids @ lids)
    assert motion.eye_closure(face, beta) == pytest.approx(shut, abs=1e-5)
    with pytest.raises(UserError, match="no frame has a face"):
        motion.shut_from_landmarks(np.full((4, 478, 3), np.nan))


# ------------------------------------------------------------------------------------------------------------- beats


def test_beats_on_each_other_align_and_others_do_not() -> None:
    exact = np.array([10.0, 35.0, 61.5])
    assert beats.beat_alignment(exact, exact) == 1
    assert beats.beat_alignment(exact, exact + 100) == pytest.approx(0, abs=1e-12)
    assert beats.beat_alignment(exact, exact + beats.TOLERANCE) == pytest.approx(math.exp(-0.5))
    assert beats.beat_alignment(exact, np.append(exact, [20.0, 50.0])) == 1  # further motion costs nothing
    assert beats.beat_alignment(exact, exact[:1]) == pytest.approx(1 / 3)
    assert beats.beat_alignment(exact, np.zeros(0)) == 0
    assert math.isnan(beats.beat_alignment(np.zeros(0), exact))
    with pytest.raises(ValueError, match="tolerance"):
        beats.beat_alignment(exact, exact, 0)


def test_the_definition_is_bailandos_at_25_frames_a_second() -> None:
    assert pytest.approx(1.25) == beats.TOLERANCE
    assert pytest.approx(25 / 12) == beats.SMOOTHING


def test_motion_beats_are_where_the_motion_rests() -> None:
    t = np.arange(200)
    speed = 1 - np.cos(2 * np.pi * (t + 0.5 - 10) / 40)  # of the interval t to t + 1; at rest at 10, 50, 90, ...
    found = beats.motion_beats(speed)
    assert found == pytest.approx([10, 50, 90, 130, 170], abs=0.51)
    speed[[60, 61]] = np.nan
    assert len(beats.motion_beats(speed)) == 5
    assert len(beats.motion_beats(np.zeros(50))) == 0  # a head that never moves has no beat
    for bad in (np.zeros(0), np.full(5, np.nan), np.zeros((5, 2))):
        with pytest.raises(UserError, match="speed"):
            beats.motion_beats(bad)


def test_chance_is_the_mean_over_all_shifts() -> None:
    audio, moved = np.array([5.0, 40.0]), np.array([20.0])
    brute = np.mean([beats.beat_alignment(audio, np.array([float(shift)])) for shift in range(80)])
    assert beats.chance(audio, moved, 80) == pytest.approx(brute)
    assert beats.chance(audio, np.zeros(0), 80) == 0


def test_head_speed_leaves_the_lips_out(face) -> None:
    pose = np.zeros((5, 6), np.float32)
    pose[:, 3] = np.arange(5) * 0.02
    assert beats.head_speed(face, pose) == pytest.approx(np.full(4, 0.02), rel=1e-4)


def test_audio_beats_are_the_onsets_of_clicks() -> None:
    pytest.importorskip("librosa")
    rng = np.random.default_rng(0)
    wave = 1e-4 * rng.standard_normal(16000 * 4).astype(np.float32)
    places = np.array([0.5, 1.3, 2.2, 3.1])
    burst = rng.standard_normal(800).astype(np.float32) * np.exp(-np.arange(800) / 150)
    for place in places:
        start = int(place * 16000)
        wave[start : start + 800] += 0.5 * burst
    found = beats.audio_beats(wave)
    assert found == pytest.approx(places * 25, abs=1.0)  # 40 ms
    assert beats.beat_alignment(found, places * 25) > 0.7
    assert len(beats.audio_beats(np.zeros(16000))) == 0


def test_loudness_and_pitch_of_a_tone() -> None:
    pytest.importorskip("librosa")
    t = np.arange(16000 + 100) / 16000
    wave = 0.5 * np.sin(2 * np.pi * 130 * t) + 0.2 * np.sin(2 * np.pi * 260 * t)
    wave[:6400] = 0
    level = beats.loudness(wave)
    assert len(level) == 26
    assert level[12:24] == pytest.approx(np.full(12, 10 * math.log10(0.145)), abs=0.3)
    assert level[:10].max() == pytest.approx(level.max() - 40)
    tone = beats.pitch(wave)
    assert len(tone) == 26
    assert np.isnan(tone[:8]).all()
    assert np.nanmedian(tone[14:22]) == pytest.approx(12, abs=0.3)  # an octave above 65 Hz


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros((5, 2)), np.full(700, np.nan)])
def test_bad_speech_is_refused(wave) -> None:
    with pytest.raises(UserError, match="speech"):
        beats.loudness(wave)


def test_a_missing_librosa_is_named(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(MissingDependency, match=r"pip install 'flowvqtalker\[eval\]'"):
        beats.audio_beats(np.ones(1000))


# ----------------------------------------------------------------------------------------- scores of coefficients


@pytest.fixture(scope="module")
def clip() -> Coefficients:
    rng = np.random.default_rng(3)
    rho = np.zeros((30, 6), np.float32)
    rho[:, :3] = np.cumsum(rng.standard_normal((30, 3)) * 0.01, axis=0)
    rho[:, 5] = 20.0
    beta = np.cumsum(rng.standard_normal((30, 64)) * 0.2, axis=0).astype(np.float32)
    return Coefficients(beta, rho, (0.5 * rng.standard_normal(80)).astype(np.float32))


def test_coefficient_lmd_by_hand(face, clip, rng) -> None:
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
    assert found.mouth == pytest.approx(np.mean(mouth), rel=1e-4)
    assert found.face == pytest.approx(np.mean(whole), rel=1e-4)
    assert 0 < found.face < found.mouth


def test_equal_expression_has_no_landmark_distance_and_neither_has_a_shifted_face(face, clip) -> None:
    same = scores.coefficient_lmd(face, clip.identity, clip.pose, clip.expression, clip.expression)
    assert (same.mouth, same.face) == (0, 0)
    shifted = FaceModel.from_tensors({**face.state_dict(), "expression": face.expression.clone()})
    shifted.expression[0] = torch.tensor([0.1, 0.05, 0.0])  # the first coefficient moves all vertices alike
    still = np.zeros((30, 6), np.float32)
    still[:, 5] = 1e4  # from afar, where perspective does not tell near from far
    made = clip.expression.copy()
    made[:, 0] += 1
    found = scores.coefficient_lmd(shifted, clip.identity, still, clip.expression, made)
    assert found.mouth < 0.01 and found.face < 0.01
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


def test_scores_are_means_over_the_takes(face, clip) -> None:
    takes = [
        Coefficients(clip.expression + np.float32(change), clip.pose, clip.identity) for change in (0.0, 0.1, -0.3)
    ]
    found = scores.motion_scores(face, clip, takes, None)
    assert found["AED"] == pytest.approx((0.1 + 0.3) / 3, rel=1e-4)
    assert found["diversity expression"] == pytest.approx(8 * (0.1 + 0.3 + 0.4) / 3, rel=1e-4)
    assert found["diversity pose"] == 0
    assert not any("beat" in name or "loudness" in name for name in found)  # nothing was heard
    assert math.isnan(scores.motion_scores(face, clip, takes[:1], None)["diversity expression"])
    with pytest.raises(UserError, match="no take"):
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
