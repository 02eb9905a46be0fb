"""Mixtures of emotions, emotions over time, head motion from elsewhere, streams of samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowvqtalker import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode
from flowvqtalker.io.atomic import sample_paths
from flowvqtalker.io.coefficients import Coefficients, Motion
from flowvqtalker.loading import load_flows
from flowvqtalker.motion.emotion import BLEND, EmotionKey, EmotionTrack, parse_emotion, smoothstep
from flowvqtalker.motion.head_pose import PoseTrack
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.motion.stream import MotionStream
from flowvqtalker.pipeline import Talker
from flowvqtalker.speech.features import COLUMNS, MELS
from flowvqtalker.speech.features import windows as windows_of

from ..conftest import babble, write_wav

HAPPY, NEUTRAL, SURPRISED = (EMOTIONS.index(name) for name in ("happy", "neutral", "surprised"))


@pytest.fixture(scope="module")
def talker(tiny_weights):
    return Talker.load(tiny_weights, device="cpu", parts=("face", "motion"))


@pytest.fixture(scope="module")
def trained():
    """The packaged flows: only they have learnt what normal motion is."""
    return load_flows()


def joined(blocks):
    motion = Motion.join(blocks)
    return motion.expression, motion.pose


# ----------------------------------------------------------------------------------------------- emotions as text


def test_a_label_and_a_mixture():
    assert parse_emotion("happy") == tuple(float(name == "happy") for name in EMOTIONS)
    mixture = parse_emotion(" happy : 1.4 , surprised:0.6")
    assert mixture[HAPPY] == pytest.approx(0.7) and mixture[SURPRISED] == pytest.approx(0.3)
    assert sum(mixture) == pytest.approx(1)
    assert parse_emotion("happy+surprised") == parse_emotion("happy:2,surprised:2")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("joy", f"unknown emotion 'joy'; choose one of {', '.join(EMOTIONS)}"),
        ("", "unknown emotion ''; choose one of angry"),
        ("happy:0.5,", "unknown emotion ''"),
        ("happy:0.5,happy:0.5", "names happy twice"),
        ("happy:x", "weight of happy must be a number above 0, got 'x'"),
        ("happy:0,sad:1", "weight of happy must be a number above 0, got '0'"),
        ("happy:-1", "above 0"),
        ("happy:nan", "above 0"),
    ],
)
def test_wrong_emotions_are_named(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        parse_emotion(spec)
    assert "\n" not in str(caught.value)


def test_smoothstep_is_flat_at_its_ends():
    assert [smoothstep(x) for x in (-1, 0, 0.5, 1, 2)] == [0, 0, 0.5, 1, 1]
    assert smoothstep(0.01) < 0.001


# ------------------------------------------------------------------------------------------------ emotions over time


def track(*keys, blend=BLEND):
    return EmotionTrack(tuple(EmotionKey(*key) for key in keys), blend)


def test_a_key_holds_until_the_next_and_changes_take_their_time():
    course = track((1.0, "happy"), (2.0, "sad"), (2.2, "angry", 0.5))
    assert course.at(0.0) == (0, 0, 1.0) == course.at(1.99)
    assert course.at(2.0) == (0, 1, 0.0)
    assert course.at(2.1) == (0, 1, pytest.approx(0.5))  # the next key comes after 0.2 s, so the change is as short
    assert course.at(2.2) == (1, 2, 0.0)
    assert course.at(2.4) == (1, 2, pytest.approx(0.5))
    assert course.at(2.7) == (1, 2, 1.0) == course.at(1e6)
    assert track((0, "sad"), (1, "happy"), blend=0).at(1) == (0, 1, 1.0)


def test_a_file_with_and_without_names(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('time,emotion,intensity\n0,neutral,\n1.5,"happy:0.7,surprised:0.3",1.2\n\n3, sad\n', "utf-8")
    expected = (EmotionKey(0, "neutral"), EmotionKey(1.5, "happy:0.7,surprised:0.3", 1.2), EmotionKey(3, "sad"))
    assert EmotionTrack.load(file).keys == expected
    file.write_text("\ufeff0;neutral\n".replace(";", ",") + "1.5,happy:0.7+surprised:0.3,1.2\n", "utf-8")
    assert EmotionTrack.load(file, blend=0.2).keys[1] == EmotionKey(1.5, "happy:0.7+surprised:0.3", 1.2)
    file.write_text("intensity,time,emotion\n0.5,0,happy\n", "utf-8")
    assert EmotionTrack.load(file).keys == (EmotionKey(0, "happy", 0.5),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no row"),
        ("time,emotion\n", "holds no row"),
        ("when,what\n0,happy\n", "has the columns when, what"),
        ("time,emotion\n0,happy\nsoon,sad\n", "line 3: 'soon' is not a time"),
        ("0,happy\n1,joy\n", "line 2: unknown emotion 'joy'; choose one of angry"),
        ("0,happy\n0,sad\n", "must rise, got 0 after 0"),
        ("-1,happy\n", "must be seconds from 0, got -1"),
        ("0,happy,3\n", "intensity must be between 0 and 2, got 3"),
        ("0,happy,much\n", "line 1: 'much' is not an intensity"),
        ("time,emotion\n0,happy:0.7,sad:0.3\n", "put a mixture in quotes"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "does not exist"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    file = tmp_path / "a.csv"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        EmotionTrack.load(file)
    assert "\n" not in str(caught.value)


def make(flows, **settings):
    given = {"beta0": torch.zeros(64), "pose0": torch.zeros(6), **settings}
    return MotionGenerator(*flows, **given)


def windows(frames, seed=3):
    return (
        torch.randn(frames, MELS, COLUMNS, generator=torch.Generator().manual_seed(seed)).cumsum(0).div(3).clamp(-4, 4)
    )


@pytest.fixture(scope="module")
def tiny(talker):
    return talker._expflow, talker._poseflow, talker._bank


def test_a_mixture_of_one_is_the_label_and_others_lie_between(tiny):
    heard = windows(12)
    happy, sad, one, half = (
        make(tiny, emotion=spec, temperature=0.0)(heard, last=True).expression
        for spec in ("happy", "sad", "happy:3", "happy:0.5,sad:0.5")
    )
    assert torch.equal(happy, one)
    gap = (happy - sad).norm()
    assert (half - happy).norm() < gap and (half - sad).norm() < gap
    assert make(tiny, emotion="sad:0.2,happy:0.8").emotion == "happy"
    with pytest.raises(UserError, match="not with the mixture"):
        make(tiny, emotion="sad,happy", reference=torch.zeros(2, 64))


def test_intensity_goes_straight_from_neutral_through_the_emotion(tiny):
    """Up to one, frame by frame; beyond it, by the slow course of the difference."""
    heard = windows(80)
    neutral, half, full, double = (
        make(tiny, emotion="happy", intensity=intensity, blink_rate=0)(heard, last=True).expression
        for intensity in (0.0, 0.5, 1.0, 2.0)
    )
    assert torch.equal(neutral, make(tiny, emotion="neutral", blink_rate=0)(heard, last=True).expression)
    assert torch.equal(full, make(tiny, emotion="happy", blink_rate=0)(heard, last=True).expression)
    torch.testing.assert_close(half, (neutral + full) / 2)
    way = (full - neutral)[40:].mean(0)
    along = [float((beta[40:].mean(0) - neutral[40:].mean(0)) @ way / way.square().sum()) for beta in (half, double)]
    assert along[0] == pytest.approx(0.5, abs=1e-3)
    assert 1.2 < along[1] < 2.5


def test_a_track_of_one_key_is_that_emotion(tiny):
    heard = windows(12)
    plain = make(tiny, emotion="happy", intensity=0.7)(heard, last=True)
    for keys in [((0, "happy"),), ((0, "happy"), (0.2, "happy"))]:
        tracked = make(tiny, emotion=None, track=track(*keys), intensity=0.7)(heard, last=True)
        assert torch.equal(tracked.expression, plain.expression) and torch.equal(tracked.pose, plain.pose)
    other = make(tiny, emotion=None, track=track((0, "happy", 0.7)), intensity=2.0)(heard, last=True)
    assert torch.equal(other.expression, plain.expression)


def test_a_track_changes_nothing_before_its_key_and_the_emotion_after(tiny):
    heard = windows(60)
    happy = make(tiny, emotion="happy")(heard, last=True).expression
    generator = make(tiny, emotion=None, track=track((0, "happy"), (1, "sad")))
    changed = generator(heard, last=True).expression
    assert generator.emotion == "sad"
    assert torch.equal(changed[:26], happy[:26])  # the change begins at frame 25, with nothing of it done
    assert not torch.equal(changed[26], happy[26])
    assert (changed[36:] - happy[36:]).norm(dim=1).min() > 0.1
    assert generator._rollout.condition.weights.tolist() == [list(parse_emotion("sad"))]


@pytest.mark.parametrize("seed", range(3))
def test_a_track_is_the_same_however_the_stream_is_cut(tiny, seed):
    heard = windows(70)
    course = track((0, "happy"), (0.7, "angry:0.6,sad:0.4", 1.4), (1.1, "neutral"), (2, "surprised", 0.3))
    whole = make(tiny, emotion=None, track=course)(heard, last=True)
    sizes = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    generator, parts, at = make(tiny, emotion=None, track=course), [], 0
    for size in sizes:
        parts.append(generator(heard[at : at + size]))
        at += size
    parts.append(generator(heard[at:], last=True))
    cut = Motion.join(parts)
    assert torch.equal(cut.expression, whole.expression) and torch.equal(cut.pose, whole.pose)


def test_a_change_of_emotion_is_no_jump(trained, sample_speech):
    """Speed from frame to frame during a change lies within that of the unchanged emotions; a cut's does not."""
    heard = windows_of(decode.load(sample_speech)[: 16_000 * 3], trained[0].audio.config.frontend)

    def speed(part):
        return part.diff(dim=0).norm(dim=1)

    def draw(**choice):
        return make(trained, blink_rate=0, **choice)(heard, last=True).expression

    before, after = draw(emotion="neutral"), draw(emotion="surprised")
    normal = torch.cat([speed(before)[25:], speed(after)[25:]])
    changed, cut = (
        draw(emotion=None, track=track((0, "neutral"), (2, "surprised"), blend=blend)) for blend in (BLEND, 0.0)
    )
    assert torch.equal(changed[:51], before[:51])
    assert speed(changed)[49:61].max() < normal.max() < speed(cut)[49:61].max()
    gone, left = ((changed[60:] - other[60:]).mean(0).norm() for other in (before, after))
    assert left < 0.6 * gone


def test_changes_that_come_too_thick_move_one_course(tiny):
    """A slow rise of intensity: no second course is drawn, and each frame's emotion lies a little further."""
    ramp = track(*((0.2 * k, "happy", 0.1 * k) for k in range(11)))
    generator, weights = make(tiny, emotion=None, track=ramp), []
    heard = windows(75)
    for window in heard:
        generator(window[None])
        assert generator._next is None
        weights.append(generator._rollout.condition.intensity)
    assert weights == sorted(weights)
    assert weights[0] == 0 and weights[-1] == 1
    assert max(np.diff(weights)) < 0.05


# ------------------------------------------------------------------------------------------------------ head motion


def test_head_motion_is_taken_as_it_is_around_its_mean():
    poses = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    course = PoseTrack(poses)
    got = torch.cat([course.at(i) for i in range(35)])
    torch.testing.assert_close(got, (poses - poses.mean(0))[:35])


def test_a_short_course_is_repeated_without_a_jump():
    time = torch.arange(100)[:, None] / 25
    poses = torch.cat([torch.sin(time * (1 + k)) * 0.1 + 0.02 * time for k in range(6)], dim=1)
    course = PoseTrack(poses)
    assert course.period == 75
    long = torch.cat([course.at(i) for i in range(1000)])
    normal = poses.diff(dim=0).abs().amax(0)
    assert (long.diff(dim=0).abs() < 2 * normal).all()
    bend = poses.diff(n=2, dim=0).abs().amax(0)
    assert (long.diff(n=2, dim=0).abs() < bend + 0.02).all()  # nor does the speed
    torch.testing.assert_close(long[75 + 25 : 150], long[25:75])
    single = PoseTrack(torch.ones(1, 6))
    assert not any(single.at(i).any() for i in (0, 1, 500))


def test_wrong_head_motion_is_refused():
    for poses in (torch.zeros(0, 6), torch.zeros(3, 5), torch.full((3, 6), math.nan)):
        with pytest.raises(UserError, match="head motion must be"):
            PoseTrack(poses)


def test_borrowed_motion_starts_at_the_portrait_and_moves_around_it(tiny):
    poses = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).cumsum(0) * 0.01 + 3
    here = torch.linspace(-1, 1, 6)
    drawn = make(tiny, emotion="happy", pose0=here)
    lent = make(tiny, emotion="happy", pose0=here, poses=PoseTrack(poses))
    heard = windows(120)
    own, lent_motion = drawn(heard, last=True), lent(heard, last=True)
    pose = lent_motion.pose
    assert torch.equal(own.expression, lent_motion.expression)  # the face does not depend on the head
    torch.testing.assert_close(pose[0], here)
    torch.testing.assert_close(pose[90:], (poses - poses.mean(0) + here)[90:120], atol=0.02, rtol=0)


def test_still_and_pose_scale_and_pose_from(talker, speech, tmp_path):
    pose0 = talker.front_pose()
    moved, still, scaled = (
        joined(talker.motion(speech, blink_rate=40, **choice))
        for choice in ({}, {"fixed_pose": True}, {"pose_scale": 0.0})
    )
    assert torch.equal(still[1], pose0.expand(25, -1))
    assert torch.equal(scaled[1], still[1])
    assert torch.equal(still[0], moved[0])  # blinks and all
    poses = (np.random.default_rng(0).standard_normal((40, 6)) * 0.1).astype(np.float32)
    stored = Coefficients(np.zeros((40, 64), np.float32), poses, np.zeros(80, np.float32))
    stored.save(tmp_path / "pose.npz")
    first, second = (
        joined(talker.motion(speech, pose_from=source, pose_scale=scale))[1]
        for source, scale in ((tmp_path / "pose.npz", 1.0), (stored, 0.5))
    )
    torch.testing.assert_close(second - pose0, (first - pose0) / 2, atol=1e-5, rtol=0)
    assert (first - pose0).abs().max() > 0.05


# --------------------------------------------------------------------------------------------------------- options


def test_options_by_name_and_as_one(talker, speech):
    options = MotionOptions(emotion="sad", seed=4)
    named = joined(talker.motion(speech, emotion="sad", seed=4))
    assert torch.equal(named[0], joined(talker.motion(speech, options=options))[0])
    mixed = joined(talker.motion(speech, options=options, emotion="happy"))
    assert torch.equal(mixed[0], joined(talker.motion(speech, emotion="happy", seed=4))[0])
    with pytest.raises(TypeError, match="emotoin"):
        talker.motion(speech, emotoin="sad")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"emotion": "happy", "emotion_track": "a.csv"}, "emotion and emotion_track exclude each other"),
        ({"emotion_reference": "a.png", "emotion_track": "a.csv"}, "emotion_reference and emotion_track exclude"),
        ({"emotion": "happy,sad", "emotion_reference": "a.png"}, "leave the mixture out"),
        ({"fixed_pose": True, "pose_from": "a.npz"}, "fixed_pose and pose_from exclude each other"),
        ({"blink_rate": 61}, "blink_rate must be between 0 and 60, got 61"),
        ({"emotion_track": "none.csv"}, "none.csv does not exist"),
        ({"pose_from": "none.npz"}, "none.npz does not exist"),
    ],
)
def test_choices_that_do_not_go_together(talker, speech, choices, message):
    with pytest.raises(UserError, match=message):
        talker.motion(speech, **choices)


def test_names_of_samples(tmp_path):
    assert sample_paths("a.mp4", 1)[0].name == "a.mp4"
    assert [path.name for path in sample_paths(tmp_path / "a.b.mp4", 3)] == ["a.b_1.mp4", "a.b_2.mp4", "a.b_3.mp4"]
    for count in (0, -1, 1001):
        with pytest.raises(UserError, match="num_samples must be from 1 to 1000"):
            sample_paths("a.mp4", count)


# --------------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_of_any_blocks_equals_the_file(talker, tmp_path, seed):
    path = write_wav(tmp_path / "speech.wav", babble(2.0))
    whole = joined(talker.motion(path, emotion="happy:0.6,angry:0.4", seed=5))
    wave = decode.load(path)
    generator = np.random.default_rng(seed)
    stream, parts, at = talker.stream(options=MotionOptions(emotion="happy:0.6,angry:0.4", seed=5)), [], 0
    while at < len(wave):
        size = int(generator.integers(640, 4000)) if seed else int(generator.integers(0, 700))
        parts.append(stream.push(wave[at : at + size]))
        at += size
    parts.append(stream.finish())
    beta, pose = joined(parts)
    assert torch.equal(beta, whole[0]) and torch.equal(pose, whole[1])
    assert stream.frames == len(whole[0]) == 50


def test_frames_come_within_the_latency_and_not_sooner(talker):
    stream = talker.stream()
    assert isinstance(stream, MotionStream)
    given = []  # samples heard when a frame came
    for heard in range(160, 16_000 * 2, 160):
        given += [heard] * len(stream.push(np.full(160, 0.01, np.float32)))
    delays = [heard / 16 - 40 * frame for frame, heard in enumerate(given)]
    assert max(delays) <= stream.latency_ms + 10  # blocks of 10 ms
    assert min(delays[10:]) > stream.latency_ms - 25
    assert stream.latency_ms == pytest.approx(stream._generator.lookahead * 40 + 137.5)


def test_samples_of_other_types(talker):
    wave = (babble(0.6) * 20_000).astype(np.int16)
    whole = joined(talker.stream().run([wave]))[0]
    scaled = wave.astype(np.float64) / 32768
    assert torch.equal(whole, joined(talker.stream().run([torch.from_numpy(scaled)]))[0])
    for samples, message in ((np.zeros((5, 2), np.float32), "one channel"), (np.zeros(5, np.int32), "float in")):
        with pytest.raises(ValueError, match=message):
            talker.stream().push(samples)
    assert len(talker.stream().finish()) == 0
