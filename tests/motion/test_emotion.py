"""Emotions: labels, mixtures and tracks, and the motion they make."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker import EMOTIONS
from flowvqtalker.errors import UserError
from flowvqtalker.io import audio as decode
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.motion.emotion import BLEND, EmotionKey, EmotionTrack, parse_emotion, smoothstep
from flowvqtalker.speech.features import windows as windows_of

from .conftest import make, windows

HAPPY, NEUTRAL, SURPRISED = (EMOTIONS.index(name) for name in ("happy", "neutral", "surprised"))


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


def test_cue_sheets(tmp_path):
    file = tmp_path / "cues.txt"
    file.write_text(
        "Act one\n0:00 [neutral] Good evening.\n0:03.5 [Sad:0.5] Rain.\n1:00:02,25 [happy + sad] Sun!\n", "utf-8"
    )
    keys = EmotionKey(0, "neutral"), EmotionKey(3.5, "sad", 0.5), EmotionKey(3602.25, "happy+sad")
    assert EmotionTrack.load(file).keys == keys
    spans = (
        "1\n00:00:01,000 --> 00:00:03,000\n[happy] Good day!\n\n2\n00:00:04.0 --> 00:00:06.0\nA day[sad:1.2]\nof rain\n"
    )
    file.write_text(spans, "utf-8")  # "A day" are 5 of the 12 characters of its two lines
    happy, sad = EmotionTrack.load(file).keys
    assert happy == EmotionKey(1, "happy") and sad == EmotionKey(pytest.approx(4 + 2 * 5 / 12), "sad", 1.2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0 [happy]\n[sad]\n", r"line 2 begins with no time; write one tag after a time, for instance 0:03.5 \[sad"),
        ("0 [happy] now [sad]\n", "line 1 holds two tags"),
        ("0 [happy]\n1 [joy]\n", "line 2: unknown emotion 'joy'; choose one of angry"),
        ("0 [happy:much]\n", "line 1: 'much' is not an intensity"),
        ("0 [happy:3]\n", "intensity must be between 0 and 2, got 3"),
        ("2 [happy]\n1 [sad]\n", "must rise, got 1 after 2"),
        ("0 [...]\n", "holds no row"),
    ],
)
def test_wrong_cues_are_named(tmp_path, content, message):
    (tmp_path / "cues.txt").write_text(content, "utf-8")
    with pytest.raises(UserError, match=message) as caught:
        EmotionTrack.load(tmp_path / "cues.txt")
    assert "\n" not in str(caught.value)


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


@pytest.fixture(scope="module")
def three_seconds(trained, sample_speech):
    return windows_of(decode.load(sample_speech)[: 16_000 * 3], trained[0].audio.config.frontend)


def four_seeds(trained, heard, **choice):
    """Expressions (4, T, 64): one seed is noisy."""
    drawn = [make(trained, blink_rate=0, seed=n, **choice)(heard, last=True).expression for n in range(4)]
    return torch.stack(drawn)


@pytest.fixture(scope="module")
def calm(trained, three_seconds):
    """What the neutral face does at those seconds, by four seeds."""
    return four_seeds(trained, three_seconds, emotion="neutral")


def test_a_change_of_emotion_is_no_jump(trained, three_seconds, calm):
    """Speed from frame to frame during a change lies within that of the unchanged emotions; a cut's does not."""
    heard = three_seconds

    def speed(part):
        return part.diff(dim=0).norm(dim=1)

    def draw(**choice):
        return make(trained, blink_rate=0, **choice)(heard, last=True).expression

    before, after = calm[0], draw(emotion="surprised")
    normal = torch.cat([speed(before)[25:], speed(after)[25:]])
    changed, cut = (
        draw(emotion=None, track=track((0, "neutral"), (2, "surprised"), blend=blend)) for blend in (BLEND, 0.0)
    )
    assert torch.equal(changed[:51], before[:51])
    assert speed(changed)[49:61].max() < 1.15 * normal.max() < speed(cut)[49:61].max()
    gone, left = ((changed[60:] - other[60:]).mean(0).norm() for other in (before, after))
    assert left < 0.6 * gone


def test_close_keys_move_one_rollout(tiny):
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


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, 40])
def test_a_reference_shows_its_difference_from_its_own_calm_face(trained, three_seconds, calm, frames):
    """Whatever z_ref does by itself, and without what parts the lips."""
    wanted = torch.randn(64, generator=torch.Generator().manual_seed(0)) / 2
    opening = trained[0].opening / trained[0].opening.norm()
    reference = (wanted + 0.3).expand(frames, -1)
    shown = four_seeds(trained, three_seconds, emotion=None, reference=reference, calm=torch.full((1, 64), 0.3))
    difference, wanted = (shown - calm).mean((0, 1)), wanted - (wanted @ opening) * opening
    assert float(torch.cosine_similarity(difference, wanted, dim=0)) > 0.7
    assert 0.6 < float(difference @ wanted / wanted.square().sum()) < 1.4
