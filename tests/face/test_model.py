"""The morphable model, fitting and smoothing, on the model in the package and motion made with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowvqtalker import weights
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES, arkit_index, fit_arkit
from flowvqtalker.face.fit import Fit, fast_directions, fit, smooth_clip
from flowvqtalker.face.geometry import align, angles_of, rodrigues, rotation_vectors, unproject
from flowvqtalker.face.model import CENTRE, FOCAL, FaceModel, rotation_matrix
from flowvqtalker.face.topology import EYE_CORNERS, INNER_LIPS, LEFT_EYE, RIGHT_EYE, strip, surface_triangles
from flowvqtalker.train.identity_split import Pair, find_leak, smile_share

MODEL = weights.folder() / "face_model.safetensors"


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return FaceModel.load(MODEL)


def made_clip(model: FaceModel, frames: int, seed: int = 0) -> tuple[Fit, np.ndarray]:
    """Smooth random motion of a random person: the truth, and landmarks with z as MediaPipe gives it."""
    generator = np.random.default_rng(seed)
    alpha = generator.standard_normal(80).astype(np.float32)
    time = np.arange(frames)[:, None] / 25
    beta = np.sin(2 * np.pi * generator.uniform(0.3, 4, 64) * time + generator.uniform(0, 6, 64))
    pose = 0.15 * np.sin(2 * np.pi * generator.uniform(0.2, 0.8, 6) * time + generator.uniform(0, 6, 6))
    pose += [0, 0, 0, 0, 0.1, 13]
    beta, pose = beta.astype(np.float32), pose.astype(np.float32)
    return Fit(alpha, beta, pose, np.zeros(frames, np.float32)), landmarks_of(model, alpha, beta, pose)


def landmarks_of(model: FaceModel, alpha: np.ndarray, beta: np.ndarray, pose: np.ndarray) -> np.ndarray:
    seen = model.project(*map(torch.from_numpy, (alpha, beta, pose))).numpy()
    depth = seen[..., 2:] * FOCAL / pose[:, None, 5:] - FOCAL
    return np.concatenate([seen[..., :2], depth], axis=-1)


def test_units_and_projection(model: FaceModel) -> None:
    zero = torch.zeros(80), torch.zeros(64)
    mean = model.shape(*zero)
    corners = mean[list(EYE_CORNERS)]
    assert torch.linalg.norm(corners[0] - corners[1]).item() == pytest.approx(1, abs=1e-3)
    assert corners[0, 0] < corners[1, 0]  # x to the right of the picture
    assert mean[152, 1] > mean[10, 1]  # y down: the chin below the forehead
    assert mean[4, 2] < mean[234, 2]  # z away from the camera: the nose before the ear
    rho = torch.tensor([0.0, 0.0, 0.0, 0.5, -0.25, 10.0])
    seen = model.project(*zero, rho)
    expected = FOCAL * (mean[:, 0] + 0.5) / (mean[:, 2] + 10) + CENTRE
    assert torch.allclose(seen[:, 0], expected, atol=1e-3)
    assert torch.allclose(seen[:, 2], mean[:, 2] + 10)


def test_yaw_and_pitch_turn_as_documented(model: FaceModel) -> None:
    def nose(rho: list[float]) -> torch.Tensor:
        return model.project(torch.zeros(80), torch.zeros(64), torch.tensor(rho))[4]

    front = nose([0, 0, 0, 0, 0, 13.0])
    assert nose([0, 0.3, 0, 0, 0, 13.0])[0] < front[0]  # Ry carries -z towards -x
    assert nose([0.3, 0, 0, 0, 0, 13.0])[1] > front[1]  # Rx carries -z towards +y
    rotation = rotation_matrix(torch.tensor([[0.1, -0.4, 0.7]], dtype=torch.float64))
    x, y, z = (rotation_matrix(row) for row in torch.diag(torch.tensor([0.1, -0.4, 0.7], dtype=torch.float64)))
    assert torch.allclose(rotation[0], z @ y @ x)
    assert np.allclose(angles_of(rotation.numpy()), [[0.1, -0.4, 0.7]])


def test_shape_is_linear_and_broadcasts(model: FaceModel) -> None:
    alpha, beta = torch.randn(2, 1, 80), torch.randn(5, 64)
    both = model.shape(alpha, beta)
    assert both.shape == (2, 5, 478, 3)
    parts = model.shape(alpha, torch.zeros(64)) + model.shape(torch.zeros(80), beta) - model.mean
    assert torch.allclose(both, parts, atol=1e-5)
    assert model.project(alpha, beta, torch.tensor([0, 0, 0, 0, 0, 13.0])).shape == (2, 5, 478, 3)


def test_save_and_load(model: FaceModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model.safetensors")
    again = FaceModel.load(tmp_path / "model.safetensors")
    alpha, beta = torch.randn(80), torch.randn(64)
    assert torch.allclose(model.shape(alpha, beta), again.shape(alpha, beta), atol=2e-4)
    assert torch.equal(model.triangles, again.triangles)
    assert (tmp_path / "model.safetensors").stat().st_size < 450_000
    model.save(tmp_path / "exact.safetensors", half=False)
    exact = FaceModel.load(tmp_path / "exact.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), exact.state_dict().values(), strict=True))


def test_load_fails_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        FaceModel.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="not a readable"):
        FaceModel.load(tmp_path / "text.safetensors")
    tensors = load_file(str(MODEL))
    save_file({**tensors, "mean": tensors["mean"][:468].contiguous()}, str(tmp_path / "old.safetensors"))
    with pytest.raises(UserError, match=r"mean must have shape \(478, 3\), got \(468, 3\)"):
        FaceModel.load(tmp_path / "old.safetensors")
    del tensors["arkit"]
    save_file(tensors, str(tmp_path / "less.safetensors"))
    with pytest.raises(UserError, match="has no arkit"):
        FaceModel.load(tmp_path / "less.safetensors")


def test_triangles_close_the_face(model: FaceModel) -> None:
    assert np.array_equal(model.triangles.numpy(), surface_triangles())
    rims = [strip(ring) for ring in (INNER_LIPS, RIGHT_EYE, LEFT_EYE)]
    assert np.array_equal(model.mouth_triangles.numpy(), rims[0])
    assert np.array_equal(model.eye_triangles.numpy(), np.concatenate(rims[1:]))
    whole = np.concatenate([model.triangles.numpy(), *rims])
    edges = np.concatenate([whole[:, [0, 1]], whole[:, [1, 2]], whole[:, [2, 0]]])
    assert len(np.unique(edges, axis=0)) == len(edges)  # all turn the same way
    _, counts = np.unique(np.sort(edges, axis=1), axis=0, return_counts=True)
    assert (counts == 1).sum() == 36  # what is left open is the outline
    # In the mean face every triangle of the skin's front turns as those of the mouth do.
    a, b, c = (model.mean.numpy()[model.mouth_triangles[:, i], :2] for i in range(3))
    assert (np.linalg.det(np.stack([b - a, c - a], 1)) < 0).all()


def test_geometry_round_trips() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(50, 3)) * np.geomspace(1e-7, 1.5, 50)[:, None]
    assert np.allclose(rotation_vectors(rodrigues(vectors)), vectors, atol=1e-9)
    target = generator.normal(size=(30, 3))
    rotation = rodrigues(generator.normal(size=(4, 3)))
    scale, shift = generator.uniform(0.5, 3, 4), generator.normal(size=(4, 3))
    points = scale[:, None, None] * target @ np.swapaxes(rotation, 1, 2) + shift[:, None]
    points[:, -1] = 99  # not used
    found = align(points, target, np.r_[np.ones(29), 0])
    for got, wanted in zip(found, (scale, rotation, shift), strict=True):
        assert np.allclose(got, wanted)
    landmarks = generator.uniform(0, 512, (2, 478, 3))
    space = unproject(landmarks)
    assert np.allclose(space[..., :2] / space[..., 2:] * FOCAL + CENTRE, landmarks[..., :2])


def test_fit_finds_a_known_person(model: FaceModel) -> None:
    truth, landmarks = made_clip(model, 40)
    found = fit(model, landmarks)
    assert found.residual.max() < 1e-3
    assert found.identity.shape == (80,)
    assert found.identity.dtype == found.expression.dtype == found.pose.dtype == np.float32
    assert np.abs(found.pose[:, :3] - truth.pose[:, :3]).max() < 0.03
    assert np.corrcoef(found.expression[:, :10].ravel(), truth.expression[:, :10].ravel())[0, 1] > 0.9
    alone = fit(model, landmarks, identity=truth.identity)
    assert np.array_equal(alone.identity, truth.identity)
    assert np.abs(alone.expression - truth.expression)[:, :20].max() < 0.1
    assert np.abs(alone.pose - truth.pose).max() < 0.02


def test_fit_of_frames_does_not_depend_on_their_neighbours(model: FaceModel) -> None:
    truth, landmarks = made_clip(model, 12)
    whole = fit(model, landmarks, identity=truth.identity)
    part = fit(model, landmarks[4:6], identity=truth.identity)
    assert np.allclose(whole.expression[4:6], part.expression, atol=1e-3)


def test_long_clips_are_fitted_in_blocks(model: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, landmarks = made_clip(model, 30)
    whole = fit(model, landmarks)
    monkeypatch.setattr("flowvqtalker.face.fit._BLOCK", 8)
    parts = fit(model, landmarks)
    assert parts.pose.shape == (30, 6)
    assert parts.residual.max() < 1e-3
    assert np.abs(parts.pose - whole.pose)[:, :3].max() < 0.02


def test_a_smile_in_one_picture_is_expression(model: FaceModel) -> None:
    """The person is the same with and without the smile; the smile is found in β."""
    generator = np.random.default_rng(1)
    alpha = generator.standard_normal(80).astype(np.float32)
    smile = model.arkit[arkit_index("mouthSmileLeft"), :64] + model.arkit[arkit_index("mouthSmileRight"), :64]
    beta = torch.stack([-smile, smile]).numpy() / float(smile.norm()) * 3
    pose = np.tile(np.float32([0.1, -0.1, 0, 0, 0.1, 13]), (2, 1))
    landmarks = landmarks_of(model, alpha, beta, pose)
    sober, happy = (fit(model, picture) for picture in landmarks)
    moved = np.linalg.norm(model.shape(torch.zeros(80), torch.from_numpy(beta[1] - beta[0])) - model.mean)
    person = torch.from_numpy(happy.identity - sober.identity)
    assert np.linalg.norm(model.shape(person, torch.zeros(64)) - model.mean) < 0.4 * moved
    index = arkit_index("mouthSmileLeft")
    weights = [float(model.blendshapes(torch.from_numpy(f.expression))[0, index]) for f in (sober, happy)]
    assert weights[1] > weights[0] + 0.25


def test_gaps_are_interpolated(model: FaceModel) -> None:
    _, landmarks = made_clip(model, 20)
    broken = landmarks.copy()
    broken[[0, 7, 8, 19]] = np.nan
    found = fit(model, broken)
    assert np.isfinite(found.expression).all()
    assert np.isfinite(found.pose).all()
    assert np.flatnonzero(np.isnan(found.residual)).tolist() == [0, 7, 8, 19]
    assert np.allclose(found.pose[7], (2 * found.pose[6] + found.pose[9]) / 3, atol=1e-5)
    assert np.array_equal(found.expression[0], found.expression[1])


def test_fit_fails_with_a_reason(model: FaceModel) -> None:
    with pytest.raises(UserError, match="no frame has landmarks"):
        fit(model, np.full((3, 478, 3), np.nan))
    with pytest.raises(UserError, match=r"\(T, 478, 3\) are needed, got \(3, 468, 3\)"):
        fit(model, np.zeros((3, 468, 3)))
    with pytest.raises(UserError, match=r"identity must have shape \(80,\), got \(64,\)"):
        fit(model, made_clip(model, 1)[1], identity=np.zeros(64, np.float32))


def test_smoothing_spares_lips_and_lids(model: FaceModel) -> None:
    truth, _ = made_clip(model, 60)
    generator = np.random.default_rng(2)
    pose = truth.pose + generator.normal(0, 0.01, truth.pose.shape).astype(np.float32)
    beta = truth.expression + generator.normal(0, 0.3, truth.expression.shape).astype(np.float32)
    noisy = Fit(truth.identity, beta, pose, truth.residual)
    smooth = smooth_clip(model, noisy)

    def openings(clip: Fit) -> np.ndarray:
        shape = model.shape(torch.from_numpy(clip.identity), torch.from_numpy(clip.expression)).numpy()
        return np.stack([shape[:, 14, 1] - shape[:, 13, 1], shape[:, 145, 1] - shape[:, 159, 1]], axis=1)

    assert np.abs(openings(smooth) - openings(noisy)).max() < 0.01
    assert np.allclose(openings(smooth).std(0), openings(noisy).std(0), rtol=0.05)
    jitter = [np.abs(np.diff(clip.pose, 2, axis=0)).mean() for clip in (noisy, smooth)]
    assert jitter[1] < 0.4 * jitter[0]
    assert np.abs(smooth.pose - truth.pose).mean() < 0.75 * np.abs(pose - truth.pose).mean()
    fast = fast_directions(model)
    assert np.allclose(fast.T @ fast, np.eye(fast.shape[1]), atol=1e-4)
    slow = beta - beta @ fast @ fast.T
    smoothed = smooth.expression - smooth.expression @ fast @ fast.T
    assert np.abs(np.diff(smoothed, 2, axis=0)).mean() < 0.4 * np.abs(np.diff(slow, 2, axis=0)).mean()


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6])
def test_short_clips_can_be_smoothed(model: FaceModel, frames: int) -> None:
    _, landmarks = made_clip(model, frames)
    assert fit(model, landmarks, smooth=True).pose.shape == (frames, 6)


def test_arkit_names_match_mediapipe() -> None:
    from mediapipe.tasks.python.vision.face_landmarker import Blendshapes

    given = [shape.name.replace("_", "").lower() for shape in Blendshapes]
    assert [name.replace("_", "").lower() for name in ARKIT_NAMES] == given
    assert arkit_index("jawOpen") == 25
    with pytest.raises(KeyError, match="jawOpen"):
        arkit_index("jaw")


def test_arkit_map(model: FaceModel) -> None:
    generator = np.random.default_rng(3)
    beta = generator.standard_normal((500, 64))
    true = generator.standard_normal((52, 65)) * 0.1
    found = fit_arkit(beta, beta @ true[:, :64].T + true[:, 64], np.ones(500), ridge=1e-9)
    assert np.allclose(found, true, atol=1e-6)
    shapes = model.blendshapes(torch.from_numpy(beta).float() * 5)
    assert shapes.shape == (500, 52)
    assert shapes.min() >= 0
    assert shapes.max() <= 1


def test_real_portrait(model: FaceModel, astronaut: np.ndarray) -> None:
    """The astronaut smiles with open eyes and looks into the camera."""
    from flowvqtalker.face.crop import crop_box
    from flowvqtalker.face.tracker import FaceTracker

    with FaceTracker() as tracker:
        face = tracker.detect(astronaut)[0]
    found = fit(model, crop_box(face.landmarks).points(face.landmarks))
    assert found.residual[0] < 0.015
    assert np.abs(found.pose[0, :3]).max() < 0.3
    shapes = model.blendshapes(torch.from_numpy(found.expression))[0]
    assert shapes[arkit_index("mouthSmileLeft")] > 0.4
    assert shapes[arkit_index("eyeBlinkLeft")] < 0.3


def test_smile_leak_keeps_smiles_out_of_a_single_pictures_identity(model: FaceModel, tmp_path: Path) -> None:
    model = FaceModel.load(MODEL)
    model.smile_leak = torch.zeros(0, 80)
    smile = model.arkit[arkit_index("mouthSmileLeft"), :64] + model.arkit[arkit_index("mouthSmileRight"), :64]
    smile = (smile / smile.norm() * 5).numpy()
    pose = np.tile(np.float32([0.1, -0.1, 0, 0, 0.1, 13]), (2, 1))
    pairs = []
    for n in range(12):
        alpha = np.random.default_rng(n).standard_normal(80).astype(np.float32)
        neutral, smiling = landmarks_of(model, alpha, np.stack([0 * smile, smile]), pose)
        pairs.append(Pair(f"p{n}", "train", neutral, smiling))
    before = np.mean([smile_share(model, pair) for pair in pairs[8:]])
    model.smile_leak = find_leak(model, pairs[:8], count=4)
    assert np.mean([smile_share(model, pair) for pair in pairs[8:]]) < 0.6 * before
    model.save(tmp_path / "model.safetensors")
    assert torch.equal(FaceModel.load(tmp_path / "model.safetensors").smile_leak, model.smile_leak)
    with pytest.raises(UserError, match="neutral and smiling"):
        find_leak(model, pairs[:2])
