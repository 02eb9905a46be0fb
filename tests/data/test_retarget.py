"""Emotional versions of neutral clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.retarget import (
    PROTOTYPES,
    RetargetConfig,
    Retargeter,
    acted_differences,
    envelope,
    solve_expression,
)
from flowvqtalker.errors import UserError
from flowvqtalker.face.arkit import ARKIT_NAMES, arkit_index
from flowvqtalker.face.model import FaceModel
from flowvqtalker.train.flow_stage import lip_gap


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return FaceModel.load(weights.folder() / "face_model.safetensors")


def test_solved_expression_shows_the_blendshapes_and_moves_the_vertices(face: FaceModel) -> None:
    target = np.zeros(52)
    target[[arkit_index("browDownLeft"), arkit_index("browDownRight")]] = 0.8
    beta = torch.from_numpy(solve_expression(face, target, {}, ridge=0.004))
    shown = (face.arkit[:, :-1] @ beta).numpy()
    assert shown[arkit_index("browDownLeft")] == pytest.approx(0.8, abs=0.15)
    assert abs(shown[arkit_index("mouthSmileLeft")]) < 0.1
    down = torch.from_numpy(solve_expression(face, np.zeros(52), {61: (0.0, 0.05), 291: (0.0, 0.05)}))
    moved = torch.einsum("k,kvc->vc", down, face.expression)
    assert moved[61, 1] == pytest.approx(0.05, abs=0.02)


def test_prototypes_are_symmetric_but_contempt(face: FaceModel) -> None:
    retarget = Retargeter(face, None)
    for name in retarget.emotions():
        moved = torch.einsum("k,kvc->vc", torch.from_numpy(retarget.difference(name)), face.expression)
        apart = float((moved[61, 1] - moved[291, 1]).abs())
        assert apart > 0.02 if name == "contempt" else apart < 0.02, name


def test_differences_part_the_lips_by_a_small_fixed_distance_or_not_at_all(face: FaceModel) -> None:
    gap = lip_gap(face.expression).numpy()
    retarget = Retargeter(face, gap)
    for name in retarget.emotions():
        opening = float(retarget.difference(name) @ gap)
        assert (
            opening == pytest.approx(0, abs=1e-5) if name in ("contempt", "disgusted", "sad") else 0.02 < opening < 0.07
        ), name
        ratio = float(retarget.difference(name, np.random.default_rng(2)) @ gap) / (opening or 1)
        assert opening < 1e-5 or 1.1 <= ratio <= 1.6, "only the strength changes it"


def test_fear_and_surprise_widen_the_eyes_and_neutral_lowers_the_corners_of_the_mouth(face: FaceModel) -> None:
    retarget = Retargeter(face, lip_gap(face.expression).numpy())
    moved = {
        name: torch.einsum("k,kvc->vc", torch.from_numpy(retarget.difference(name)), face.expression)[:, 1]
        for name in (*retarget.emotions(), "neutral")
    }
    for name, move in moved.items():
        wider = float(move[145] - move[159])  # of the eye left in the image
        assert (wider > 0.02) == (name in ("fear", "surprised")), name
    assert float(moved["neutral"][[61, 291]].min()) > 0.01
    assert float(moved["sad"][[61, 291]].min()) > 1.2 * float(moved["neutral"][[61, 291]].max())
    assert float(moved["happy"][[61, 291]].max()) < -0.02


def test_each_clip_draws_its_own_and_the_seed_repeats_it(face: FaceModel) -> None:
    retarget = Retargeter(face, None)
    first, again, other = (retarget.difference("sad", np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert 0.05 < np.linalg.norm(first - other) / np.linalg.norm(first) < 1
    drawn = np.stack([retarget.difference("sad", np.random.default_rng(seed)) for seed in range(40)])
    prototype, mean = retarget.difference("sad"), drawn.mean(0)
    assert prototype @ mean / np.linalg.norm(prototype) / np.linalg.norm(mean) > 0.95


def test_emotion_is_added_to_the_clip(face: FaceModel) -> None:
    frames = np.random.default_rng(3).normal(size=(40, 64)).astype(np.float32)
    made = Retargeter(face, None)(frames, "angry", np.random.default_rng(0))
    added = made - frames
    directions = added[np.linalg.norm(added, axis=1) > 0.1]
    assert np.linalg.matrix_rank(directions, tol=1e-3) == 1, "one difference, of a strength that varies"


def test_envelope_rises_smoothly_and_follows_the_voice() -> None:
    quiet_then_loud = np.repeat([0.0, 1.0], 50).astype(np.float32)
    strengths = np.stack([envelope(100, quiet_then_loud, np.random.default_rng(seed)) for seed in range(50)])
    assert strengths.min() >= 0
    assert strengths.max() <= 1.2
    assert np.abs(np.diff(strengths, axis=1)).max() < 0.2, "no jump"
    steady = strengths[(strengths[:, 20] > 0.8) & (strengths[:, 80] > 0.8)]
    assert (steady[:, 80] > steady[:, 20]).all()


def test_every_emotion_but_neutral_and_natural_has_a_prototype() -> None:
    assert set(PROTOTYPES) == set(EMOTIONS) - {"neutral", "natural"}
    assert {name for shapes in PROTOTYPES.values() for name in shapes} <= {
        name.removesuffix("Left").removesuffix("Right") for name in ARKIT_NAMES
    } | set(ARKIT_NAMES)


def test_acted_differences_are_relative_to_the_actors_neutral(tmp_path: Path) -> None:
    names = np.array(["AU04_r", "AU12_r", "AU45_r"])
    clips = np.array(["01-01-01-01-01-01-07", "01-01-05-02-01-01-07", "01-01-03-01-01-01-07"])
    means = np.array([[1.0, 0, 0], [2.5, 0, 3], [1, 3, 0]])
    path = tmp_path / "means.npz"
    np.savez(path, names=names, clips=clips, means=means)
    found = acted_differences(path)
    assert found["angry"].shape == (1, 52)
    assert found["angry"][0, arkit_index("browDownLeft")] == pytest.approx(0.5)
    assert found["happy"][0, arkit_index("mouthSmileRight")] == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"clip_means\.npz"):
        acted_differences(tmp_path / "none.npz")


def test_acted_share_moves_the_difference(face: FaceModel, tmp_path: Path) -> None:
    path = tmp_path / "means.npz"
    np.savez(
        path,
        names=np.array(["AU12_r"]),
        clips=np.array(["01-01-01-01-01-01-01", "01-01-05-01-01-01-01"]),
        means=np.array([[0.0], [5.0]]),
    )
    plain = Retargeter(face, None).difference("angry", np.random.default_rng(0))
    mixed = Retargeter(face, None, RetargetConfig(action_units=path, acted=0.5)).difference(
        "angry", np.random.default_rng(0)
    )
    smile = face.arkit[arkit_index("mouthSmileLeft"), :-1].numpy()
    assert mixed @ smile != pytest.approx(plain @ smile, abs=1e-3)
