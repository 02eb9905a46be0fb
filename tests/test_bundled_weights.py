"""The weights in the package do what they ship for: a still copy, a jittering mouth or a stranger's face would fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.constants import SAMPLE_RATE
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.topology import INNER_LIPS
from flowvqtalker.face.tracker import FaceTracker
from flowvqtalker.io import audio
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.video import read_video
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.pipeline import Talker

from .conftest import write_wav

pytestmark = pytest.mark.skipif(
    {f"{name}.safetensors" for name in weights.NAMES} - set(weights.manifest()) != set(),
    reason="the package was built without its default weights",
)

SAMPLES = SAMPLE_RATE // 25


@pytest.fixture(scope="module")
def talker():
    return Talker.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def portrait(talker, astronaut):
    return talker.portrait(astronaut)


@pytest.fixture(scope="module")
def draw(talker, portrait, sample_speech):
    """(emotion, seed, frames) -> motion for the beginning of the bundled speech, drawn once."""
    wave, known = audio.load(sample_speech), {}

    def motion(emotion: str, seed: int = 0, frames: int = 250, **options: object) -> Motion:
        key = (emotion, seed, frames, *options.items())
        if key not in known:
            stream = talker.stream(portrait, MotionOptions(emotion=emotion, seed=seed, **options))
            known[key] = Motion.join(stream.run([wave[: frames * SAMPLES]]))
        return known[key]

    return motion


def gap(points: np.ndarray) -> np.ndarray:
    """Height of the gap between the lips (T,) of points (T, 478, 2 or 3), as a part of the mouth's width."""
    rim = points[:, list(INNER_LIPS)]
    return np.linalg.norm(rim[:, 5] - rim[:, 15], axis=-1) / np.linalg.norm(rim[:, 0] - rim[:, 10], axis=-1)


def lips(talker, portrait, motion: Motion) -> np.ndarray:
    """The same of the face model."""
    return gap(talker.face_model.shape(portrait.identity.expand(len(motion), -1), motion.expression).numpy())


@pytest.mark.slow
def test_lips_open_with_the_speech(talker, portrait, draw, sample_speech):
    """Opening against loudness, averaged over seeds; the control is the same opening shifted by 1 to 9 seconds."""
    wave = audio.load(sample_speech)[: 250 * SAMPLES].reshape(250, SAMPLES)
    loudness = np.convolve(np.log(np.sqrt((wave**2).mean(1)) + 1e-3), np.ones(3) / 3, "same")
    opening = np.mean([lips(talker, portrait, draw("neutral", seed)) for seed in range(6)], axis=0)
    right = np.corrcoef(opening, loudness)[0, 1]
    shifted = [np.corrcoef(np.roll(opening, 5 * k), loudness)[0, 1] for k in range(5, 45)]
    assert right > 0.2
    assert right > np.max(shifted)


def test_seeds_differ_but_not_in_what_is_said(talker, portrait, draw):
    first, other = (draw("neutral", seed) for seed in (0, 1))
    assert (first.expression - other.expression).norm(dim=1).mean() > 1.5
    assert (first.pose - other.pose)[:, :3].abs().mean() > np.radians(0.3)
    again = np.corrcoef(lips(talker, portrait, first), lips(talker, portrait, other))[0, 1]
    assert again > 0.4


def test_motion_is_that_of_a_face(draw):
    motion = draw("neutral", 3)
    assert len(motion) == 250
    assert 0.2 < motion.expression.std() < 3  # coefficients are in standard deviations
    assert motion.pose[:, :3].abs().max() < 0.6  # radians


@pytest.mark.slow
def test_frames_show_the_motion_and_the_person(talker, portrait, sample_speech, tmp_path):
    """A tracker sees in the video the lips that the motion asked for; the background rests; the person is the same."""
    speech = write_wav(tmp_path / "speech.wav", audio.load(sample_speech)[16_000:48_000])
    asked = Motion.join(talker.motion(speech, portrait, emotion="happy"))
    result = talker.animate(portrait, speech, tmp_path / "out.mp4", emotion="happy")
    frames = np.stack(list(read_video(tmp_path / "out.mp4")))
    assert frames.shape == (50, 512, 512, 3)
    assert result.frames == 50

    with FaceTracker() as tracker:
        faces = [tracker.detect(frame) for frame in frames[::2]]
    assert all(len(found) == 1 for found in faces)
    seen = gap(np.stack([found[0].landmarks for found in faces]))
    wanted = lips(talker, portrait, asked)[::2]
    assert seen.std() > 0.4 * wanted.std()  # a still copy does not move
    assert np.corrcoef(seen, wanted)[0, 1] > 0.8  # a jittering mouth moves otherwise

    corner = frames[:, :60, :60].astype(float)
    assert np.abs(corner - portrait.image[:60, :60]).mean() < 6
    assert corner.std(0).mean() < 2
    assert distance(frames[::16], portrait.image) < 0.45


def distance(frames: np.ndarray, portrait: np.ndarray) -> float:
    """Mean distance of dlib's embeddings between frames and a portrait; dlib speaks of one person below 0.6."""
    pytest.importorskip("dlib")
    embed = pytest.importorskip("flowvqtalker_eval.metrics.identity").FaceIdentity().portrait
    own = embed(portrait)
    return float(np.mean([np.linalg.norm(embed(frame) - own) for frame in frames]))


#: Emotion -> ARKit blendshapes that it raises over the same take in neutral (EMFACS), and by how much at least.
DIRECTIONS = {
    "happy": (("mouthSmileLeft", "mouthSmileRight"), 0.2),
    "surprised": (("browInnerUp", "browOuterUpLeft", "browOuterUpRight"), 0.2),
    "angry": (("browDownLeft", "browDownRight"), 0.08),
    "disgusted": (("browDownLeft", "browDownRight", "noseSneerLeft", "noseSneerRight"), 0.05),
    "fear": (("browInnerUp", "eyeWideLeft", "eyeWideRight"), 0.05),
    "sad": (("mouthFrownLeft", "mouthFrownRight", "browInnerUp"), 0.005),
}


@pytest.mark.parametrize("emotion", DIRECTIONS)
def test_emotion_moves_the_face_in_its_direction(talker, draw, emotion):
    names, least = DIRECTIONS[emotion]
    columns = [ARKIT_NAMES.index(name) for name in names]

    def mean(label: str) -> float:
        known = 250 if label == "neutral" else 125  # frames; the neutral ones have been drawn
        drawn = [draw(label, seed, known).expression[:125] for seed in range(3)]
        return float(np.mean([talker.face_model.blendshapes(one)[:, columns].mean() for one in drawn]))

    assert mean(emotion) - mean("neutral") > least


def test_motion_has_the_first_frame_of_the_portrait(draw, portrait):
    motion = draw("neutral", 0)
    assert (motion.pose[0, :3] - portrait.pose[:3]).abs().max() < np.radians(6)
    assert torch.isfinite(motion.expression).all()


def test_eyes_are_open_from_the_first_frame(talker, portrait, draw):
    """They used to open from half shut during the first frames: the flow's history was empty."""
    ratios = []
    for seed in range(6):
        motion = draw("neutral", seed, 25, blink_rate=0.0)
        points = talker.face_model.shape(portrait.identity.expand(25, -1), motion.expression)
        lids = (points[:, [159, 386]] - points[:, [145, 374]]).norm(dim=-1).mean(1)
        ratios.append(float(lids[0] / lids.median()))
    assert 0.85 < np.median(ratios) < 1.15, ratios
    assert min(ratios) > 0.6, ratios


@pytest.mark.skipif("speech_encoder_live.safetensors" not in weights.manifest(), reason="without the live encoder")
def test_the_live_encoder_gives_the_same_lips_sooner(portrait, sample_speech):
    live = Talker.from_pretrained(device="cpu", components=("face", "motion", "live"))
    assert live.stream(portrait, live=True).latency_ms == pytest.approx(92.5)
    wave = audio.load(sample_speech)[: 100 * SAMPLES]
    beta = [Motion.join(live.stream(portrait, live=short).run([wave])).expression for short in (False, True)]
    rim = live.face_model.expression[:, 14, 1] - live.face_model.expression[:, 13, 1]
    opening = torch.stack(beta) @ rim
    assert torch.corrcoef(opening)[0, 1] > 0.85
