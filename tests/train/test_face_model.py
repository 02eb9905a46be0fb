"""The stage ``face-model`` on made faces: what it learns, what it reads, what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.fit import Fitter
from flowvqtalker.face.geometry import tangents
from flowvqtalker.face.model import FOCAL, FaceModel
from flowvqtalker.face.topology import RIGID
from flowvqtalker.train.face_model import Config, evaluate, learn, run
from flowvqtalker.train.face_statistics import Group, remove_rigid, rigid_objects, separate
from flowvqtalker.train.face_tracks import Track, read_tracks

PEOPLE, IMAGES, MODES, SHAPES = 18, 50, 8, 6


@pytest.fixture(scope="module")
def truth() -> FaceModel:
    """A model with few modes."""
    model = FaceModel.load(weights.folder() / "face_model.safetensors")
    model.identity[MODES:] = 0
    model.expression[SHAPES:] = 0
    return model


def see(model: FaceModel, alpha: np.ndarray, beta: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Landmarks (T, 478, 3) in a picture, with some noise."""
    pose = np.concatenate([generator.normal(0, 0.1, (len(beta), 5)), generator.uniform(12, 14, (len(beta), 1))], axis=1)
    seen = model.project(*(torch.from_numpy(a).float() for a in (alpha, beta, pose))).numpy()
    seen[..., 2] = seen[..., 2] * FOCAL / pose[:, 5:] - FOCAL
    return (seen + generator.normal(0, 0.2, seen.shape)).astype(np.float32)


def shapes_of(beta: np.ndarray) -> np.ndarray:
    """Blendshapes (T, 52) of a tracker that knows the expression."""
    shapes = np.zeros((len(beta), 52), np.float32)
    shapes[:, 20 : 20 + SHAPES] = 0.5 + 0.1 * beta[:, :SHAPES]
    return shapes


@pytest.fixture(scope="module")
def folder(truth: FaceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tracked clips of some people and smiling images of others, with their table."""
    folder = tmp_path_factory.mktemp("tracks")
    generator = np.random.default_rng(0)
    rows = []
    for i in range(PEOPLE + IMAGES):
        alpha = np.where(np.arange(80) < MODES, generator.standard_normal(80), 0)
        clip = i < PEOPLE
        for take in range(2 if clip else 1):
            beta = np.where(np.arange(64) < SHAPES, generator.standard_normal((24 if clip else 1, 64)), 0)
            if not clip:
                beta[:, 1] += 2  # everybody who poses shows the second mode
            landmarks = see(truth, alpha, beta, generator)
            name = f"{i}_{take}.mp4" if clip else f"{i}.png"
            if clip and take:
                landmarks[3] = np.nan
                np.savez(folder / f"clip_{name}.npz", lm=landmarks, bs=shapes_of(beta).astype(np.float16), fps=25)
            else:
                stem = Path(name).stem
                np.savez(folder / f"{stem}.npz", landmarks=landmarks, blendshapes=shapes_of(beta), fps=25)
            rows.append({"file": name, "identity": f"person {i}", "source": "film" if clip else "photo", "fps": 25})
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> Config:
    return Config((folder,), (folder / "table.csv",), dimensions=80, rounds=0, max_yaw=60)


@pytest.fixture(scope="module")
def trained(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("run")
    return out, run(config, out)


def test_run_meets_the_gates_on_held_out_people(trained: tuple[Path, dict[str, float]]) -> None:
    out, report = trained
    held = [i for i in range(PEOPLE + IMAGES) if split_of(f"person {i}") == "val"]
    assert report["people"] == len(held)
    assert report["people_in_clips"] == sum(i < PEOPLE for i in held) > 0
    assert report["explained_expression_variance"] > 0.97  # the rest is noise
    assert report["reprojection_error"] < 0.005
    assert json.loads((out / "report.json").read_text()) == report
    assert json.loads((out / "config.json").read_text())["stage"] == "face-model"
    assert str(out.parent) not in (out / "config.json").read_text()  # says nothing about this machine
    model = FaceModel.load(out / "face_model.safetensors")
    assert all(map(torch.equal, model.state_dict().values(), FaceModel.load(out / "weights.safetensors").buffers()))


def test_identity_and_expression_are_told_apart(trained: tuple[Path, dict[str, float]], truth: FaceModel) -> None:
    """Two images of somebody new, with opposite expressions, give nearly the same person."""
    model = FaceModel.load(trained[0] / "face_model.safetensors")
    generator = np.random.default_rng(5)
    same, different = [], []
    fitter = Fitter(model)
    for _ in range(6):
        alpha = np.where(np.arange(80) < MODES, generator.standard_normal(80), 0)
        beta = np.where(np.arange(64) == 1, 2.0, np.zeros((2, 64))) * [[1], [-1]]
        people = [fitter.run(face[None], None)[1] for face in see(truth, alpha, beta, generator)]
        shape = [model.shape(torch.from_numpy(person), torch.zeros(64)).numpy() for person in people]
        same.append(np.linalg.norm(shape[0] - shape[1]))
        moved = truth.shape(torch.zeros(80), torch.from_numpy(beta[0] - beta[1]).float()) - truth.mean
        different.append(moved.norm().item())
    assert np.mean(same) < 0.35 * np.mean(different)


def test_coefficients_are_standard_deviations(trained: tuple[Path, dict[str, float]], config: Config) -> None:
    model = FaceModel.load(trained[0] / "face_model.safetensors")
    tracks = [t for t in read_tracks(config.tracks, config.tables, max_yaw=60) if not t.is_image and t.split == "train"]
    fitter = Fitter(model)
    beta = np.concatenate([fitter.run(track.landmarks, None)[0].beta for track in tracks])[:, : SHAPES - 1]
    assert beta.std(0).min() > 0.6
    assert beta.std(0).max() < 1.5
    assert np.abs(beta.mean(0)).max() < 0.5


def test_bases_leave_the_pose_alone(config: Config, truth: FaceModel) -> None:
    rigid = np.zeros(478)
    rigid[list(RIGID)] = 1
    directions = tangents(truth.mean.numpy().astype(float))
    basis = np.random.default_rng(0).normal(size=(5, 1434)) + 3 * directions[:5]
    clean = remove_rigid(basis, directions, rigid)
    assert np.abs((clean * np.repeat(rigid, 3)) @ directions.T).max() < 1e-9
    change = basis - clean
    left = change - change @ np.linalg.pinv(directions) @ directions
    assert np.abs(left).max() < 1e-9  # nothing but motion of the whole head was taken


def test_rigid_alignment_removes_the_pose(truth: FaceModel) -> None:
    generator = np.random.default_rng(1)
    rigid = np.zeros(478)
    rigid[list(RIGID)] = 1
    shape = truth.mean.numpy().astype(float)
    turns = np.linalg.qr(generator.normal(size=(6, 3, 3)))[0]
    turns *= np.sign(np.linalg.det(turns))[:, None, None]
    points = generator.uniform(50, 200, (6, 1, 1)) * shape @ turns + generator.normal(size=(6, 1, 3))
    aligned = rigid_objects(points, np.array([0, 0, 0, 1, 1, 1]), rigid)
    assert np.abs(aligned - aligned[0]).max() < 1e-9


def test_separation_without_repeated_people() -> None:
    """One clip each and no picture: nothing shows what stays with a person, and nothing breaks."""
    generator = np.random.default_rng(2)
    groups = []
    for person in range(30):
        faces = generator.normal(size=(20, 9)) * [0.1, 0.1, 0.1, 1, 1, 0.1, 0.3, 0.3, 0.3]
        faces[:, :2] += 3 * generator.normal(size=2)
        groups.append(Group(person, faces.mean(0), np.cov(faces.T), 4.0, 1.0, False))
    found = separate(groups, 6)
    assert np.linalg.eigh(found.between)[1][:2, -2:].__abs__().max() > 0.7
    assert np.allclose(np.linalg.eigh(found.within)[1][[0, 1, 2, 5], -2:], 0, atol=0.2)
    assert (np.linalg.eigvalsh(found.within) > 0).all()


def test_reading(folder: Path, config: Config) -> None:
    tracks = read_tracks(config.tracks, config.tables, max_yaw=60)
    assert len(tracks) == 2 * PEOPLE + IMAGES
    clips = [track for track in tracks if not track.is_image]
    assert {track.source for track in clips} == {"film"}
    assert all(len(track.frames) == len(track.landmarks) == len(track.blendshapes) for track in tracks)
    assert all(np.isfinite(track.landmarks).all() for track in tracks)
    assert any(len(track.landmarks) == 23 for track in clips)  # the frame without a face is left out
    assert all(track.split == split_of(track.identity) for track in tracks)
    few = read_tracks(config.tracks, config.tables, frames=6, clips=5, max_yaw=60)
    assert sum(not track.is_image for track in few) == 5
    pairs = [np.diff(track.frames) == 1 for track in few if not track.is_image]
    assert all(pair[0] and len(pair) <= 5 for pair in pairs)


def test_unknown_people_are_trained_on_only(folder: Path, tmp_path: Path) -> None:
    text = (folder / "table.csv").read_text()
    for i in range(PEOPLE):
        text = text.replace(f",person {i},film", ",tv_unknown,film")
    (tmp_path / "table.csv").write_text(text)
    tracks = [track for track in read_tracks([folder], [tmp_path / "table.csv"], max_yaw=60) if not track.is_image]
    assert {track.split for track in tracks} == {"train"}
    assert len({track.identity for track in tracks}) == 2 * PEOPLE


def test_reading_fails_with_a_reason(folder: Path, tmp_path: Path) -> None:
    table = folder / "table.csv"
    with pytest.raises(UserError, match="no folder"):
        read_tracks([tmp_path / "none"], [table])
    with pytest.raises(UserError, match="no table"):
        read_tracks([folder], [tmp_path / "none.csv"])
    with pytest.raises(UserError, match="no file in"):
        read_tracks([tmp_path], [table])
    (tmp_path / "short.csv").write_text("file,identity\n")
    with pytest.raises(UserError, match="no column source"):
        read_tracks([folder], [tmp_path / "short.csv"])
    np.savez(tmp_path / "0_0.npz", points=np.zeros(3))
    with pytest.raises(UserError, match="landmarks and blendshapes are needed"):
        read_tracks([tmp_path], [table])


def test_configuration_collects_its_problems() -> None:
    with pytest.raises(UserError, match=r"frames must be positive, got 0; noise must be positive"):
        Config(frames=0, noise=-1)
    track = Track("a", "b", "c", np.zeros((2, 478, 3), np.float32), np.zeros((2, 52)), np.arange(2), False, "train")
    with pytest.raises(UserError, match="too few"):
        learn([track], Config())


def test_evaluation_sees_what_a_model_lacks(config: Config, truth: FaceModel) -> None:
    tracks = [track for track in read_tracks(config.tracks, config.tables, max_yaw=60) if track.split == "val"]
    good = evaluate(truth, tracks)
    poor = FaceModel(**dict(truth.named_buffers()))
    poor.expression = poor.expression.clone()
    poor.expression[1] = 0
    worse = evaluate(poor, tracks)
    assert good["explained_expression_variance"] > 0.97 > worse["explained_expression_variance"]
    assert good["reprojection_error"] < 0.5 * worse["reprojection_error"]
