"""The whole path with tiny weights: lengths, seeds, memory, and every bad input by name."""

from __future__ import annotations

import math
import tracemalloc

import av
import numpy as np
import pytest
import torch
from PIL import Image

from flowvqtalker import EMOTIONS, weights
from flowvqtalker.errors import UserError
from flowvqtalker.face.portrait import load_portrait, track
from flowvqtalker.face.tracker import Face, FaceTracker
from flowvqtalker.io import audio as decode
from flowvqtalker.io.coefficients import Coefficients, Motion
from flowvqtalker.io.video import VideoWriter, read_video
from flowvqtalker.loading import choose_device, choose_dtype
from flowvqtalker.pipeline import Talker
from flowvqtalker.train.release import add_weights

from .conftest import babble, write_wav


@pytest.fixture(scope="module")
def talker(tiny_weights):
    return Talker.load(tiny_weights, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def portrait(talker, astronaut):
    return talker.portrait(astronaut)


def joined(blocks):
    motion = Motion.join(blocks)
    return motion.expression, motion.pose


# ---------------------------------------------------------------------------------------------------- portraits


def test_portrait_is_found_and_fitted(portrait, astronaut):
    assert portrait.image.shape == (512, 512, 3)
    assert np.array_equal(portrait.picture, astronaut)
    assert (portrait.identity.shape, portrait.expression.shape, portrait.pose.shape) == ((80,), (64,), (6,))
    nose = portrait.crop.points(portrait.landmarks)[1, :2]
    assert np.all(np.abs(nose - 256) < 120)
    assert abs(math.degrees(float(portrait.pose[1]))) < 40


def test_a_picture_without_a_face_is_refused(talker, tmp_path):
    Image.fromarray(np.full((200, 200, 3), 90, np.uint8)).save(tmp_path / "wall.png")
    with pytest.raises(UserError, match=r"no face found in .*wall\.png"):
        talker.portrait(tmp_path / "wall.png")


def test_a_small_face_is_refused(talker, astronaut):
    small = np.asarray(Image.fromarray(astronaut).resize((300, 300)))
    with pytest.raises(UserError, match=r"is 5\d pixels wide, 64 are needed"):
        talker.portrait(small)


def test_of_several_faces_the_largest_is_taken_and_said(talker, astronaut, caplog):
    both = astronaut.copy()
    both[300:500, 300:500] = np.asarray(Image.fromarray(astronaut[:260, 90:350]).resize((200, 200)))
    found = talker.portrait(both)
    assert found.landmarks[:, 1].mean() < 200
    assert "shows 2 faces; the largest is taken (at 22" in caplog.text
    assert "--face 1 takes the other" in caplog.text
    other = talker.portrait(both, face=1)
    assert other.landmarks[:, 1].mean() > 300
    with pytest.raises(UserError, match=r"--face 2: the image has 2 face"):
        talker.portrait(both, face=2)


def test_a_face_that_is_small_beside_the_picture_is_found(talker, astronaut):
    wide = np.concatenate([np.full((512, 1024, 3), 90, np.uint8), astronaut], axis=1)
    found = talker.portrait(wide)
    np.testing.assert_allclose(
        found.landmarks[:, 0].mean() - 1024, talker.portrait(astronaut).landmarks[:, 0].mean(), atol=3
    )


def test_a_profile_is_refused(talker, astronaut, monkeypatch):
    """The real face's landmarks, turned in space."""
    with FaceTracker() as tracker:
        face = tracker.detect(astronaut)[0]

    def turned(degrees: float) -> list[Face]:
        angle = math.radians(degrees)
        points = face.landmarks - face.landmarks.mean(0)
        turn = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
        return [Face((points @ turn.T).astype(np.float32) * 2 + 256, face.blendshapes)]

    monkeypatch.setattr(FaceTracker, "detect", lambda self, image: turned(70))
    with pytest.raises(UserError, match=r"turned by \d\d degrees, at most 50"):
        talker.portrait(astronaut)
    monkeypatch.setattr(FaceTracker, "detect", lambda self, image: turned(25))
    assert talker.portrait(astronaut).image.shape == (512, 512, 3)


# ------------------------------------------------------------------------------------------------------- motion


def test_one_frame_of_motion_for_each_frame_of_speech(talker, portrait, tmp_path):
    for seconds in (0.05, 1.0, 2.01):
        path = write_wav(tmp_path / "a.wav", babble(seconds))
        beta, pose = joined(talker.motion(path, portrait))
        frames = decode.scan(path).frames
        assert (beta.shape, pose.shape) == ((frames, 64), (frames, 6))
        assert frames == math.ceil(round(seconds * 16_000) / 640)
        assert torch.isfinite(beta).all()
        assert torch.isfinite(pose).all()


def test_seed_decides(talker, portrait, speech):
    first, again, other = (joined(talker.motion(speech, portrait, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.allclose(first[0], other[0])


def test_emotion_intensity_and_temperature_reach_the_flow(talker, portrait, speech):
    plain, _ = joined(talker.motion(speech, portrait, emotion="happy"))
    assert not torch.allclose(plain, joined(talker.motion(speech, portrait, emotion="angry"))[0])
    assert not torch.allclose(plain, joined(talker.motion(speech, portrait, emotion="happy", temperature=0.2))[0])
    none, _ = joined(talker.motion(speech, portrait, emotion="happy", intensity=0))
    torch.testing.assert_close(none, joined(talker.motion(speech, portrait, emotion="neutral"))[0], atol=2.0, rtol=0)
    assert not torch.allclose(none, plain)


def test_head_moves_by_the_factor(talker, portrait, speech):
    poses = [joined(talker.motion(speech, portrait, pose_scale=scale))[1] for scale in (0.0, 0.5, 1.0)]
    assert torch.equal(poses[0], portrait.pose.expand(25, -1))
    torch.testing.assert_close(poses[1] - portrait.pose, (poses[2] - portrait.pose) / 2, atol=1e-5, rtol=1e-4)
    assert (poses[2] - portrait.pose).abs().max() > 1e-4


def test_without_a_portrait_the_face_looks_ahead(talker, speech):
    pose = talker.front_pose()
    seen = talker.face_model.project(torch.zeros(80), torch.zeros(64), pose)[:, :2].numpy()
    from flowvqtalker.face.crop import crop_box

    assert crop_box(seen).scale == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(joined(talker.motion(speech))[1][0], pose, atol=1e-4, rtol=0)


def test_reference_may_be_a_picture_or_a_clip(talker, portrait, speech, portrait_file, astronaut, tmp_path):
    assert talker.reference(portrait_file).shape == (1, 64)
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for shift in range(4):
            writer.write(np.roll(astronaut, shift, axis=1))
    reference = talker.reference(tmp_path / "clip.mp4")
    assert reference.shape == (4, 64)
    plain, _ = joined(talker.motion(speech, portrait))
    led, _ = joined(talker.motion(speech, portrait, emotion_reference=tmp_path / "clip.mp4"))
    assert led.shape == plain.shape
    assert not torch.allclose(led, plain)
    torch.testing.assert_close(led, joined(talker.motion(speech, portrait, emotion_reference=reference))[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emotion": "jolly"}, f"unknown emotion 'jolly'; choose one of {', '.join(EMOTIONS)}"),
        ({"intensity": 3.0}, "intensity must be between 0 and 2"),
        ({"temperature": -1.0}, "temperature must be between 0 and 2"),
        ({"pose_scale": 5.0}, "pose_scale must be between 0 and 2"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**70}, "seed must be"),
        ({"emotion_reference": "nowhere.mp4"}, "does not exist"),
    ],
)
def test_wrong_options_are_refused_at_once(talker, portrait, speech, options, message):
    with pytest.raises(UserError, match=message):
        talker.motion(speech, portrait, **options)


@pytest.mark.slow
def test_memory_of_motion_does_not_grow_with_the_speech(talker, portrait, tmp_path):
    """The path to two hours of speech, at small scale: decoding, features, flows."""

    def peak(seconds: int) -> int:
        path = write_wav(tmp_path / f"{seconds}.wav", np.tile(babble(2.0), seconds // 2))
        tracemalloc.start()
        count = sum(map(len, talker.motion(path, portrait)))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == seconds * 25
        return top

    peak(2)
    assert peak(30) < 1.3 * peak(4) + 100_000


# ------------------------------------------------------------------------------------------------------ pictures


def test_frames_come_one_for_one(talker, portrait):
    blocks = [Motion(torch.zeros(count, 64), portrait.pose.expand(count, -1)) for count in (3, 2)]
    frames = list(talker.render(portrait, blocks))
    assert len(frames) == 5
    assert {(frame.shape, frame.dtype) for frame in frames} == {((512, 512, 3), np.dtype(np.uint8))}


def test_full_picture_keeps_what_is_outside_the_face(talker, portrait, astronaut):
    blocks = [Motion(torch.zeros(1, 64), portrait.pose[None])]
    frame = next(iter(talker.render(portrait, blocks, full=True)))
    assert frame.shape == astronaut.shape
    assert np.array_equal(frame[400:], astronaut[400:])  # the suit
    assert not np.array_equal(frame, astronaut)


@pytest.mark.parametrize("full", [False, True])
def test_animation_is_as_long_as_the_speech(talker, portrait_file, tmp_path, full):
    path = write_wav(tmp_path / "speech.wav", babble(0.5))
    steps = []
    result = talker.animate(
        portrait_file, path, tmp_path / "out.mp4", emotion="sad", full=full, progress=lambda *at: steps.append(at)
    )
    assert (result.frames, result.width, result.height) == (13, 512, 512)
    assert steps[-1] == (13, 13)
    with av.open(str(tmp_path / "out.mp4")) as container:
        video, sound = container.streams.video[0], container.streams.audio[0]
        assert float(video.duration * video.time_base) == pytest.approx(0.5, abs=0.04)
        assert float(sound.duration * sound.time_base) == pytest.approx(0.5, abs=0.04)
    assert len(list(read_video(tmp_path / "out.mp4"))) == 13
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "speech.wav"]


def test_an_interrupted_animation_leaves_nothing(talker, portrait, speech, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talker.animate(portrait, speech, tmp_path / "out.mp4", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["speech.wav"]


def test_an_input_is_not_overwritten(talker, portrait, astronaut, tmp_path):
    with VideoWriter(tmp_path / "a.mp4", write_wav(tmp_path / "a.wav", babble(0.2))) as writer:
        for _ in range(5):
            writer.write(astronaut)
    with pytest.raises(UserError, match="also an input"):
        talker.animate(portrait, tmp_path / "a.mp4", tmp_path / "a.mp4")


def test_stored_motion_moves_the_portrait(talker, portrait, astronaut, tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for shift in range(4):
            writer.write(np.roll(astronaut, 2 * shift, axis=1))
    found = talker.track(tmp_path / "clip.mp4")
    assert len(found) == 4
    assert np.diff(found.pose[:, 3]).min() > 0  # to the right
    result = talker.reenact(portrait, found, tmp_path / "out.mp4")
    assert result.frames == 4

    seen: list[torch.Tensor] = []
    original = talker.render

    def recorded(given, blocks, *, full=False, **options):
        blocks = list(blocks)
        seen.append(Motion.join(blocks).pose)
        return original(given, blocks, full=full, **options)

    talker.render = recorded
    try:
        talker.reenact(portrait, found, tmp_path / "out.mp4")
        talker.reenact(portrait, found, tmp_path / "out.mp4", absolute=True)
    finally:
        del talker.render
    torch.testing.assert_close(seen[0][0], portrait.pose)
    torch.testing.assert_close(seen[0] - seen[0][0], seen[1] - seen[1][0], atol=1e-5, rtol=1e-4)
    assert np.array_equal(seen[1].numpy(), found.pose)


# ------------------------------------------------------------------------------------------------------ tracking


def test_track_of_a_picture(talker, portrait_file, portrait, tmp_path):
    found = talker.track(portrait_file)
    assert len(found) == 1
    np.testing.assert_allclose(found.landmarks[0], portrait.landmarks, atol=3)  # a portrait is looked at twice
    np.testing.assert_allclose(found.crop, portrait.crop.matrix, atol=1e-3)
    assert found.blendshapes.shape == (1, 52)
    found.save(tmp_path / "a.npz")
    assert np.array_equal(Coefficients.load(tmp_path / "a.npz").expression, found.expression)


def test_frames_without_a_face_are_bridged(talker, astronaut, tmp_path, caplog):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for index in range(5):
            writer.write(np.zeros_like(astronaut) if index == 2 else astronaut)
    found = talker.track(tmp_path / "clip.mp4", smooth=False)
    assert np.isnan(found.landmarks[2]).all()
    assert np.isfinite(found.expression).all()
    np.testing.assert_allclose(found.pose[2], (found.pose[1] + found.pose[3]) / 2, atol=1e-4)
    assert "no face in 1 of 5 frames" in caplog.text


def test_landmarks_alone_need_no_model(portrait_file, portrait):
    found = track(None, portrait_file)
    np.testing.assert_allclose(found.landmarks[0], portrait.landmarks, atol=3)  # a portrait is looked at twice
    assert not found.expression.any()


def test_a_clip_without_a_face_is_refused(talker, tmp_path):
    with VideoWriter(tmp_path / "clip.mp4") as writer:
        for _ in range(3):
            writer.write(np.full((128, 128, 3), 90, np.uint8))
    with pytest.raises(UserError, match="no face found"):
        talker.track(tmp_path / "clip.mp4")


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "unknown device"), ("cuda:99", "is not available"), ("cpu:x", "unknown device")]
)
def test_devices_that_are_not_there_are_named(device, message):
    with pytest.raises(UserError, match=message):
        choose_device(device)


def test_names_of_types():
    assert choose_dtype("auto") is None
    assert choose_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UserError, match="choose one of auto, float32, bfloat16"):
        choose_dtype("int8")


def test_parts_that_were_not_loaded_are_named(tiny_weights, portrait, speech):
    part = Talker.load(tiny_weights, "cpu", parts=("face",))
    with pytest.raises(UserError, match="without 'motion'"):
        part.motion(speech, portrait)
    with pytest.raises(UserError, match="without 'render'"):
        part.render(portrait, [])


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("expflow", "steps", 3, "do not fit"),
        ("expflow", "colour", 1, "unknown settings of a flow: colour"),
        ("vqig", "adain_width", 16, "do not fit their configuration: modulation"),
        ("vqig", "colour", 1, "do not fit"),
        ("codebook", "codes", 64, "codebook of another configuration"),
    ],
)
def test_weights_of_another_configuration_are_named_by_hash(tiny_weights, tmp_path, name, key, value, message):
    import json
    import shutil

    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[f"{name}.safetensors"]["config"][key] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as caught:
        Talker.load(folder, "cpu")
    named = "vqig" if name == "codebook" else name
    assert weights.sha256(folder / f"{named}.safetensors") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_face_model_of_another_kind_is_refused(tiny_weights, tmp_path):
    import shutil

    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    add_weights(folder / "poseflow.safetensors", "face_model", path=folder, config={})
    with pytest.raises(UserError, match="not a face model"):
        Talker.load(folder, "cpu", parts=("face",))


def test_load_portrait_takes_an_image_in_memory(talker, astronaut, portrait):
    assert torch.equal(load_portrait(talker.face_model, astronaut).pose, portrait.pose)
