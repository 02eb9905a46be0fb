"""The classifier of talking faces: its data, both steps of its training, and what it extracts from a clip."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import Clip, Shard, ShardWriter
from flowvqtalker.errors import UserError
from flowvqtalker.face.alignment import face_template
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import RIGID
from flowvqtalker.train.config import LoopConfig
from flowvqtalker.train.loop import fit
from flowvqtalker.train.release import add_weights
from flowvqtalker_eval.evaluators.emotion import EmotionClassifier, EmotionExtractor, EmotionScores, load_emotion
from flowvqtalker_eval.evaluators.emotion_data import FaceClips, FaceItems, augment, centre_crop, load_faces
from flowvqtalker_eval.evaluators.emotion_faces import Faces, PrepareEmotionFaces
from flowvqtalker_eval.evaluators.emotion_training import (
    Config,
    EmotionStage,
    ExpressionStage,
    cross_validate,
    fit_temperature,
)
from flowvqtalker_eval.evaluators.folds import Labelled
from flowvqtalker_eval.evaluators.motion_emotion import MIRRORED
from flowvqtalker_eval.metrics.accuracy import CLASSES

TINY = LoopConfig(steps=3, batch_size=4, lr=1e-3, log_every=1, validate_every=0, save_every=9, device="cpu", ema=0)


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


class Painted:
    """Faces whose colour says the emotion and whose brightness says the person."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels

    def face(self, number: int) -> np.ndarray:
        picture = np.full((144, 144, 3), 90, np.uint8)
        row, column = divmod(int(self.labels[number]), 3)
        picture[20 + 36 * row : 50 + 36 * row, 20 + 36 * column : 50 + 36 * column] = 250
        return picture


def painted(people: int = 6, per_clip: int = 4) -> FaceClips:
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
    return FaceClips(
        Painted(np.array(of_face)),
        shapes,
        tuple(numbers),
        Labelled(np.array(labels), tuple(who), np.zeros(len(labels), bool), np.ones(len(labels), bool)),
        ([free[:8], free[8:16]], [free[16:]]),
        free[:3],
    )


@pytest.fixture(scope="module")
def start() -> dict[str, torch.Tensor]:
    """State of an untrained first step."""
    first = ExpressionStage(Config(), painted(), None)
    return {key: value.clone() for key, value in first.module.state_dict().items()}


def test_the_classifier_fits_the_package():
    net = EmotionClassifier()
    count = sum(v.numel() for v in net.state_dict().values())
    assert 2 * count < 4.5 * 2**20
    assert torch.isfinite(net.eval()(torch.rand(1, 2, 3, 112, 112))).all()
    with pytest.raises(UserError, match="faces of shape"):
        net.frames(torch.rand(1, 3, 96, 96))


def test_augmentation_keeps_the_size_and_is_a_pure_function():
    faces = [Painted(np.array([4])).face(0)] * 2
    for seed in range(20):
        first, second = (augment(faces, np.random.default_rng(seed)) for _ in range(2))
        assert first[0].shape == (2, 3, 112, 112) and 0 <= first[0].min() <= first[0].max() <= 1
        assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_mirrored_items_have_mirrored_blendshapes():
    clips = painted()
    shapes = np.tile(np.arange(52, dtype=np.float32), (len(clips.shapes), 1))
    items = FaceItems(replace(clips, shapes=shapes), 0)
    seen = {tuple(items[i]["shapes"][0].tolist()) for i in range(20)}
    assert seen == {tuple(range(52)), tuple(float(n) for n in MIRRORED)}


def test_first_step_lowers_its_loss(tmp_path):
    clips = painted()
    config = Config(pretrain=replace(TINY, steps=8, batch_size=6, overfit=True))
    first = ExpressionStage(config, clips, None)
    assert set(first.dataset("train")[3]) == {"faces", "shapes"}
    fit(first, config.pretrain, tmp_path)
    with open(tmp_path / "log.csv", newline="") as file:
        losses = [float(row["backbone/loss"]) for row in csv.DictReader(file)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


def test_second_step_lowers_its_loss_and_leaves_the_first_blocks_alone(start, face, tmp_path):
    clips = painted()
    config = Config(loop=replace(TINY, steps=8, overfit=True, lr=2e-3))
    second = EmotionStage(config, clips, np.arange(16), np.arange(16, 24), start, face_template(face), temperature=1.5)
    item = second.dataset("train")[0]
    assert item["faces"].shape == (3, 3, 112, 112) and item["shapes"].shape == (3, 52)
    numbers = fit(second, config.loop, tmp_path / "run")
    assert 0 <= numbers["accuracy"] <= 1
    with open(tmp_path / "run" / "log.csv", newline="") as file:
        losses = [float(row["classifier/cross_entropy"]) for row in csv.DictReader(file)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    state = second.model.backbone.state_dict()
    for key, value in state.items():
        if int(key.split(".")[0]) < 7 and not key.endswith("num_batches_tracked"):
            assert torch.equal(value, start[f"backbone.{key}"]), key
    assert torch.equal(state["17.conv.3.running_mean"], start["backbone.17.conv.3.running_mean"])  # norms are fixed

    add_weights(tmp_path / "run", "emotion", path=tmp_path / "weights")
    loaded = load_emotion(tmp_path / "weights")
    assert float(loaded.temperature) == 1.5
    second.module.eval()
    with torch.no_grad():
        wanted = torch.from_numpy(second.logits([0]))
        faces = torch.stack([centre_crop(clips.faces.face(int(n))) for n in clips.numbers[0]])
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


def test_a_shard_without_faces_says_how_to_make_them(tmp_path):
    with pytest.raises(UserError, match=r"has no emotion_faces.npz; make it with `flowvqtalker prepare-emotion-faces"):
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
                    emotion=EMOTIONS.index(emotion) if emotion else -1, speech=False, is_image=length == 1,
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
    command = PrepareEmotionFaces(
        data=data, shard=out, frames=3, neutral=2, stored=2, face_model=tmp_path / "face.safetensors"
    )
    assert command.run() == 3 + 2 * 3 + 2 + 1
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

    clips = load_faces(out)
    assert [len(numbers) for numbers in clips.numbers] == [3, 3, 3, 2]
    assert [CLASSES[label] for label in clips.data.labels] == ["happy", "neutral", "neutral", "neutral"]
    assert clips.data.measured.tolist() == [True, True, True, False]
    assert clips.data.natural.tolist() == [False, False, False, True]
    held = {str(shard.identity[faces.clip[n]]) for people in clips.unlabelled for group in people for n in group}
    held |= {str(shard.identity[faces.clip[n]]) for n in clips.validation}
    assert held == {"bob", "carl"}  # nobody with an emotion is in the first step
    assert np.allclose(clips.shapes[1], (faces.row[1] - shard.rows(0).start) / 10, atol=1e-3)


def test_faces_of_missing_clips_are_an_error(face, tmp_path):
    face.save(tmp_path / "face.safetensors")
    data, out = shard_with_faces(tmp_path, face_template(face).numpy())
    text = (data / "clips.csv").read_text().replace("happy.mkv,test,anna,happy,no\n", "")
    (data / "clips.csv").write_text(text)
    with pytest.raises(UserError, match=r"1 clips of the shard are not in .*, the first: happy\.mkv"):
        PrepareEmotionFaces(data=data, shard=out, face_model=tmp_path / "face.safetensors").run()


def test_bad_configuration():
    with pytest.raises(UserError, match="folds must be 0 or at least 2"):
        Config(folds=1)


def test_folds_hold_people_out_and_are_kept(start, face, tmp_path):
    clips, template = painted(per_clip=1), face_template(face)
    seen: list[set[str]] = []

    def make(train, held):
        people = [{clips.data.identities[n] for n in part} for part in (train, held)]
        assert not people[0] & people[1]
        seen.append(people[1])
        return EmotionStage(Config(), clips, train, held, start, template)

    logits = cross_validate(make, clips.data, TINY, tmp_path, 2, resume=False)
    assert seen[0] | seen[1] == set(clips.data.identities) and not seen[0] & seen[1]
    assert np.abs(logits).sum(1).all()
    again = cross_validate(make, clips.data, TINY, tmp_path, 2, resume=True)  # nothing is trained again
    assert np.array_equal(again, logits)


def test_temperature_undoes_a_known_overconfidence():
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 8))
    labels = np.array([random.choice(8, p=np.exp(row) / np.exp(row).sum()) for row in logits])
    data = Labelled(labels, ("x",) * 4000, np.zeros(4000, bool), np.ones(4000, bool))
    assert fit_temperature(data, (3 * logits).astype(np.float32)) == pytest.approx(3, rel=0.1)
    with pytest.raises(UserError, match="not finite"):
        fit_temperature(data, np.full((4000, 8), np.nan, np.float32))
