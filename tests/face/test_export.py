"""Motion for other programs: Live Link Face's csv and glTF, read back by others' code and by the formats' rules."""

from __future__ import annotations

import csv
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.export import COLUMNS, GAZE, export_motion, head_angles, load_motion, save_live_link
from flowvqtalker.face.gltf import METRES, glb
from flowvqtalker.face.model import FaceModel, rotation_matrix
from flowvqtalker.io.coefficients import Coefficients
from flowvqtalker.loading import load_face_model


@pytest.fixture(scope="module")
def model() -> FaceModel:
    return load_face_model()


@pytest.fixture(scope="module")
def motion() -> Coefficients:
    generator = np.random.default_rng(0)
    expression = generator.standard_normal((6, 64)).astype(np.float32)
    pose = (generator.standard_normal((6, 6)) * 0.2 + [0, 0, 0, 0, 0, 13]).astype(np.float32)
    return Coefficients(expression, pose, (generator.standard_normal(80) * 0.5).astype(np.float32))


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------- csv


def test_columns_are_those_of_the_app():
    """61 values: Apple's 52 in its own order (the left eye, the right eye, jaw, mouth, ...), then three turns each."""
    assert len(COLUMNS) == 61 == len(set(COLUMNS))
    shapes = {name[0].lower() + name[1:] for name in COLUMNS[:52]}
    assert shapes == {*ARKIT_NAMES[1:], "tongueOut"}
    assert COLUMNS[:3] == ("EyeBlinkLeft", "EyeLookDownLeft", "EyeLookInLeft")
    assert COLUMNS[7] == "EyeBlinkRight"
    assert COLUMNS[14:19] == ("JawForward", "JawRight", "JawLeft", "JawOpen", "MouthClose")
    assert COLUMNS[51:55] == ("TongueOut", "HeadYaw", "HeadPitch", "HeadRoll")
    assert COLUMNS[-1] == "RightEyeRoll"


def test_values_stand_in_their_columns(tmp_path, motion):
    shapes = np.random.default_rng(1).random((6, 52)).astype(np.float32)
    save_live_link(tmp_path / "a.csv", motion, shapes)
    rows = rows_of(tmp_path / "a.csv")
    assert len(rows) == 6
    for row, values in zip(rows, shapes, strict=True):
        assert row["BlendshapeCount"] == "61"
        for name, value in zip(ARKIT_NAMES[1:], values[1:], strict=True):
            assert float(row[name[0].upper() + name[1:]]) == pytest.approx(float(value), abs=1e-6)
        assert float(row["TongueOut"]) == 0  # MediaPipe has none; its first column is no shape
    look = {name: shapes[2, ARKIT_NAMES.index(name)] for name in ARKIT_NAMES if name.startswith("eyeLook")}
    expected = -GAZE * (look["eyeLookOutRight"] - look["eyeLookInRight"])
    assert float(rows[2]["RightEyeYaw"]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("fps", "frame", "timecode"),
    [
        (25, 0, "00:00:00:00.000"),
        (25, 24, "00:00:00:24.000"),
        (25, 25, "00:00:01:00.000"),
        (60, 59, "00:00:00:59.000"),
        (60, 60 * 3725 + 7, "01:02:05:07.000"),
        (29.97, 30, "00:00:01:00.030"),
    ],
)
def test_timecodes(fps, frame, timecode):
    from flowvqtalker.face.export import _timecode

    assert _timecode(frame, fps) == timecode


def test_head_angles_turn_the_way_that_they_say():
    """Our camera sees x to the right, y down, z away; a face looks along -z, its own left is at the right."""
    for column, index in ((0, 1), (1, 0), (2, 2)):
        pose = np.zeros((1, 6), np.float32)
        pose[0, index] = 0.3
        angles = head_angles(pose)[0]
        assert abs(angles[column]) == pytest.approx(0.3, abs=1e-6)
        assert np.abs(np.delete(angles, column)).max() < 1e-6
    gaze = torch.tensor([0.0, 0.0, -1.0])
    left = head_angles(np.array([[0, -0.3, 0, 0, 0, 0]], np.float32))[0]
    assert float((rotation_matrix(torch.tensor([0, -0.3, 0])) @ gaze)[0]) > 0 and left[0] > 0
    down = head_angles(np.array([[0.3, 0, 0, 0, 0, 0]], np.float32))[0]
    assert float((rotation_matrix(torch.tensor([0.3, 0, 0])) @ gaze)[1]) > 0 and down[1] > 0


def test_head_angles_give_the_rotation_back():
    from scipy.spatial.transform import Rotation

    pose = np.random.default_rng(0).uniform(-0.8, 0.8, (20, 6)).astype(np.float32)
    ours = rotation_matrix(torch.from_numpy(pose[:, :3])).numpy()
    flip = np.diag([1, -1, -1])
    back = Rotation.from_euler("YXZ", head_angles(pose)).as_matrix()
    np.testing.assert_allclose(flip @ back @ flip, ours, atol=1e-5)


def test_rates(tmp_path, motion, model):
    for fps, count in ((None, 6), (30.0, 7), (60.0, 14)):
        assert len(export_motion(tmp_path / "a.csv", motion, model, fps)) == count
        assert len(rows_of(tmp_path / "a.csv")) == count
    assert rows_of(tmp_path / "a.csv")[13]["Timecode"] == "00:00:00:13.000"
    export_motion(tmp_path / "a.npz", motion, model, 50.0)
    assert Coefficients.load(tmp_path / "a.npz").fps == 50
    for fps in (0.0, -1.0, 1000.0):
        with pytest.raises(UserError, match="fps must be between 1 and 240"):
            export_motion(tmp_path / "a.csv", motion, model, fps)
    with pytest.raises(UserError, match=r"must end in one of \.npz, \.csv, \.glb"):
        export_motion(tmp_path / "a.fbx", motion, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.npz"]


# ------------------------------------------------------------------------------------------------------------ glTF


class Reader:
    """A glTF reader from the specification's words, for what no loader of meshes gives: targets and animation."""

    def __init__(self, content: bytes) -> None:
        magic, version, length = struct.unpack_from("<4sII", content)
        assert (magic, version, length) == (b"glTF", 2, len(content))
        size, kind = struct.unpack_from("<I4s", content, 12)
        assert kind == b"JSON" and size % 4 == 0
        self.json = json.loads(content[20 : 20 + size])
        rest, kind = struct.unpack_from("<I4s", content, 20 + size)
        assert kind == b"BIN\0" and rest % 4 == 0 and 28 + size + rest == length
        self.binary = content[28 + size :]

    def array(self, number: int) -> np.ndarray:
        accessor = self.json["accessors"][number]
        view = self.json["bufferViews"][accessor["bufferView"]]
        kind = {5126: "<f4", 5123: "<u2"}[accessor["componentType"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        assert view["byteOffset"] % 4 == 0
        found = np.frombuffer(self.binary, kind, accessor["count"] * width, view["byteOffset"])
        assert found.nbytes == view["byteLength"]
        found = found.reshape(-1, width)
        for name, edge in (("min", found.min(0)), ("max", found.max(0))):
            np.testing.assert_allclose(accessor.get(name, edge), edge, rtol=1e-6)
        return found

    def track(self, path: str) -> np.ndarray:
        (animation,) = self.json["animations"]
        (channel,) = [c for c in animation["channels"] if c["target"]["path"] == path]
        return self.array(animation["samplers"][channel["sampler"]]["output"])


def test_animated_vertices_are_the_face_models(motion, model):
    """Base + weights x targets, turned and moved by the node: the model's own vertices, in glTF's axes and metres."""
    from scipy.spatial.transform import Rotation

    file = Reader(glb(motion, model))
    skin = file.json["meshes"][0]["primitives"][0]
    base = file.array(skin["attributes"]["POSITION"])
    targets = np.stack([file.array(target["POSITION"]) for target in skin["targets"]])
    weights = file.track("weights").reshape(6, 64)
    np.testing.assert_array_equal(weights, motion.expression)
    turns, places = Rotation.from_quat(file.track("rotation")), file.track("translation")
    rho = torch.from_numpy(motion.pose)
    shape = model.shape(torch.from_numpy(motion.identity), torch.from_numpy(motion.expression))
    camera = (shape @ rotation_matrix(rho[:, :3]).mT + (rho[:, 3:] - rho[:, 3:].mean(0))[:, None]).numpy()
    for frame in range(6):
        moved = turns[frame].apply(base + np.tensordot(weights[frame], targets, 1)) + places[frame]
        np.testing.assert_allclose(moved, camera[frame] * [1, -1, -1] * METRES, atol=2e-5)
    times = file.array(file.json["animations"][0]["samplers"][0]["input"])[:, 0]
    np.testing.assert_allclose(times, np.arange(6) / 25, rtol=1e-6)


def test_quaternions_take_the_short_way(motion, model):
    pose = np.zeros((40, 6), np.float32)
    pose[:, 2] = np.linspace(-3.0, 3.0, 40)  # past half a turn, where the sign of a quaternion flips
    turning = Coefficients(np.zeros((40, 64), np.float32), pose, motion.identity)
    found = Reader(glb(turning, model)).track("rotation")
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert ((found[1:] * found[:-1]).sum(1) > 0.9).all()


def test_a_loader_reads_the_face(tmp_path, motion, model):
    trimesh = pytest.importorskip("trimesh")
    export_motion(tmp_path / "a.glb", motion, model)
    scene = trimesh.load(tmp_path / "a.glb")
    skin, mouth, eyes, irises = scene.geometry.values()
    assert [len(part.faces) for part in (skin, mouth, eyes, irises)] == [852, 18, 28, 8]
    assert all(part.is_winding_consistent for part in (skin, mouth, eyes, irises))
    assert len(skin.vertices) == 478
    width = np.linalg.norm(np.subtract(*skin.vertices[[33, 263], :2]))
    assert 0.06 < width < 0.12  # metres between the outer eye corners
    assert skin.vertices[152, 1] < skin.vertices[10, 1]  # the chin below the forehead
    assert skin.vertices[1, 2] > skin.vertices[[127, 356], 2].max()  # the nose in front of the ears
    assert skin.vertex_normals[1, 2] > 0.5 and skin.area_faces @ skin.face_normals[:, 2] > 0
    stored = Reader((tmp_path / "a.glb").read_bytes())
    normals = stored.array(stored.json["meshes"][0]["primitives"][0]["attributes"]["NORMAL"])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert normals[1, 2] > 0.5


def test_one_frame_and_no_numbers(motion, model):
    still = Coefficients(motion.expression[:1], motion.pose[:1], motion.identity)
    assert len(Reader(glb(still, model)).track("translation")) == 1
    broken = Coefficients(np.full((2, 64), np.nan, np.float32), motion.pose[:2], motion.identity)
    with pytest.raises(UserError, match="not numbers"):
        glb(broken, model)


def test_nothing_is_left_after_a_failure(tmp_path, motion, model, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        export_motion(tmp_path / "a.glb", motion, model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [25.0, 60.0])
def test_our_own_csv_is_read_back(model, tmp_path, fps):
    """The angles exactly, the mouth and lids nearly: what the blendshapes hold of them."""
    time = np.arange(75) / 25
    beta = (model.arkit[:, :-1].T.numpy() * np.sin(2 * np.pi * time)[:, None, None]).sum(-1).astype(np.float32)
    beta *= 1.5 / np.abs(beta).max()
    pose = np.stack([0.1 * np.sin(time), 0.2 * np.cos(time), 0.05 * time], axis=1)
    moved = Coefficients(beta, np.hstack([pose, np.zeros((75, 3))]).astype(np.float32), np.zeros(80, np.float32))
    written = export_motion(tmp_path / "a.csv", moved, model, fps)
    read = load_motion(tmp_path / "a.csv", model)
    assert (read.fps, len(read)) == (fps, len(written))
    np.testing.assert_allclose(read.pose[:, :3], written.pose[:, :3], atol=1e-5)
    assert np.all(read.pose[:, 5] > 5)
    given, found = (np.einsum("tk,kvc->tvc", one.expression, model.expression.numpy()) for one in (written, read))
    for lower, upper in ((14, 13), (145, 159)):  # lips and a lid
        opening = [vertices[:, lower, 1] - vertices[:, upper, 1] for vertices in (given, found)]
        assert np.corrcoef(*opening)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column"),
        ("", "no column|no motion"),
        ("Timecode," + ",".join(COLUMNS) + "\n0:0,x\n", "not a csv"),
    ],
)
def test_other_csv_files_say_what_is_allowed(model, tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_motion(tmp_path / "a.csv", model)
    assert "Live Link Face" in str(caught.value)
