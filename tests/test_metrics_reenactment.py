"""Cross-identity animation and the eyes' crop: transfer by hand, who drives whom, scores with closed forms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowvqtalker.data.shards import ShardWriter
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LIPS
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics import cross, reenactment
from flowvqtalker_eval.metrics.cross import COPY, DRIVER, CrossAnimation, CrossClip, CrossScores, transfer
from flowvqtalker_eval.metrics.reenactment import Pair, Reenactment, Scores
from flowvqtalker_eval.metrics.regions import EYES, regions
from flowvqtalker_eval.metrics.stability import drive, motion_of, takes
from tests.test_render_generator import SMALL, face
from tests.test_train_vqig import _clip, shard

__all__ = ["face", "shard"]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three held-out people: one with two clips, one with a clip, one with a still; and somebody to train on."""
    path = tmp_path_factory.mktemp("cross") / "shard"
    held = [f"p{i}" for i in range(999) if split_of(f"p{i}") == "val"][:3]
    train = next(f"p{i}" for i in range(99) if split_of(f"p{i}") == "train")
    with ShardWriter(path) as writer:
        for number, (who, frames) in enumerate([(held[0], 4), (held[0], 3), (held[1], 3), (held[2], 1), (train, 3)]):
            writer.add(_clip(f"clip{number}", who, frames, number))
    return path


def test_transfer_adds_the_drivers_change() -> None:
    start = np.zeros(70, np.float32)
    start[[0, 64, 69]] = [1.0, 0.1, 15.0]
    driver = np.zeros((3, 70), np.float32)
    driver[:, 0], driver[:, 64], driver[:, 69] = [2, 2.5, 9], [0.3, 0.2, -0.9], [20, 22, 40]
    moved = transfer(start, driver)
    assert np.allclose(moved[0], start)
    assert moved[:, 0] == pytest.approx([1, 1.5, 5])  # 8 is beyond what faces do
    assert moved[:, 64] == pytest.approx([0.1, 0, -0.35], abs=1e-6)
    assert moved[:, 69] == pytest.approx([15, 15 * 1.1, 15 * 1.15])
    with pytest.raises(UserError, match=r"got \(69,\)"):
        transfer(start[:69], driver)
    with pytest.raises(UserError, match=r"\(0, 70\)"):
        transfer(start, driver[:0])


def test_nobody_drives_themselves(crowd: Path, shard: Path, face: FaceModel) -> None:
    torch.manual_seed(0)
    model = VQIG(SMALL).eval()
    clips = CrossAnimation(crowd, face, {"V": model}, pairs=9, frames=2, warped=("V",), dtype=torch.float32)
    data = clips.shard
    owners = [(data.identity[data.image_clip[n]], data.identity[clip]) for n, clip in clips.pairs]
    assert len(clips) == 3 and clips.people == 3 and all(a != b for a, b in owners)
    assert all(split_of(str(name)) == "val" for pair in owners for name in pair)
    clip = next(iter(clips))
    assert tuple(clip.images) == clips.methods == (COPY, "I_w of V", "V")
    assert all(len(images) == 2 for images in clip.images.values()) and len(clip.driver[0]) == 2
    assert clip.commanded.shape == (2, 70) and np.array_equal(clip.images[COPY][1], clip.portrait)
    assert not np.array_equal(clip.images["V"][0], clip.images["V"][1])
    with pytest.raises(UserError, match="two held-out people"):
        CrossAnimation(shard, face, {"V": model})
    with pytest.raises(UserError, match="no image generator"):
        CrossAnimation(crowd, face, {})
    with pytest.raises(UserError, match="got 0 and 8"):
        CrossAnimation(crowd, face, {"V": model}, pairs=0)


def test_some_frames_are_those_of_the_whole_video(crowd: Path, face: FaceModel) -> None:
    torch.manual_seed(0)
    model = VQIG(SMALL).eval()
    take = next(t for t in takes(CrossAnimation(crowd, face, {"V": model}).shard) if len(t.expression) > 3)
    motion = motion_of("tracked", face, take)
    everything = [f.image for f in drive(model, face, take, motion, batch_size=1, dtype=torch.float32)]
    some = list(drive(model, face, take, motion, frames=[3, 1], batch_size=1, dtype=torch.float32))
    assert len(everything) == 4 and len(some) == 2
    assert np.array_equal(some[0].image, everything[3]) and np.array_equal(some[1].image, everything[1])


def test_scores_of_a_face_that_does_what_it_is_told(face: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames are numbers here; the tracker and the fit know what each of them shows."""
    rng = np.random.default_rng(0)
    alpha = np.zeros(80, np.float32)
    start = np.concatenate([np.zeros(64), [0, 0, 0, 0, 0, 16]]).astype(np.float32)
    commanded = np.repeat(start[None], 3, axis=0)
    commanded[:, :64] = rng.normal(0, 1, (3, 64))
    commanded[:, 65] = 0.1

    def vertices(rows: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(np.atleast_2d(rows))
        return face.project(torch.zeros(len(values), 80), values[:, :64], values[:, 64:]).numpy()

    known = [vertices(start)[0], *vertices(commanded)]
    frames = [np.full((512, 512, 3), i, np.uint8) for i in range(6)]
    vectors = np.array([[1, 0], [1, 0], [1, 0], [1, 1], [0, 1], [np.nan, np.nan]])
    known += [known[0], np.full((478, 3), np.nan)]

    def track(images: list[np.ndarray]) -> np.ndarray:
        return np.stack([known[image[0, 0, 0]] for image in images])

    def embed(images: list[np.ndarray]) -> np.ndarray:
        return np.stack([vectors[image[0, 0, 0]] for image in images])

    def fit(model: FaceModel, landmarks: np.ndarray, *, identity: np.ndarray) -> SimpleNamespace:
        shown = [int(np.abs(np.stack(known[:4]) - one).sum((1, 2)).argmin()) for one in landmarks]
        found = np.stack([start, *commanded])[shown]
        return SimpleNamespace(expression=found[:, :64], pose=found[:, 64:])

    monkeypatch.setattr(cross, "fit", fit)
    images = {COPY: [frames[0]] * 3, "good": frames[1:4], "lost": [frames[5]] * 3}
    driver = ([frames[1], frames[2], frames[3]], alpha, commanded)
    scores = CrossScores(face, track, embed)
    with pytest.raises(UserError, match="no clip was measured"):
        scores.table("nothing")
    scores.add(CrossClip("a by b", frames[0], alpha, start, commanded, driver, images))
    rows = {row.name: row.values for row in scores.table("title").rows}
    assert list(rows) == [COPY, "good", "lost", DRIVER]
    assert rows[COPY]["csim"] == 1 and rows["good"]["csim"] == pytest.approx((1 + 1 + np.sqrt(0.5)) / 3)
    assert rows["good"]["same"] == pytest.approx(2 / 3) and rows["lost"]["csim"] is None
    assert rows["good"]["face"] == pytest.approx(0, abs=1e-3) and rows["good"]["lips"] == pytest.approx(0, abs=1e-3)
    moved = vertices(commanded)[..., :2] - vertices(start)[..., :2]
    assert rows[COPY]["face"] == pytest.approx(
        np.linalg.norm(moved - moved.mean(1, keepdims=True), axis=-1).mean(), rel=1e-4
    )
    lips = moved[:, list(LIPS)]
    assert rows[COPY]["lips"] == pytest.approx(
        np.linalg.norm(lips - lips.mean(1, keepdims=True), axis=-1).mean(), rel=1e-4
    )
    assert rows["good"]["apd"] == rows["good"]["aed"] == rows[DRIVER]["aed"] == 0
    assert rows[COPY]["apd"] == pytest.approx(np.degrees(0.1) / 3)
    assert rows[COPY]["aed"] == pytest.approx(np.abs(commanded[:, :64]).mean())
    assert rows["lost"]["found"] == 0 and rows["lost"]["aed"] is None and rows["lost"]["face"] is None
    assert rows[DRIVER]["face"] == pytest.approx(0, abs=1e-3)


class _Distance(torch.nn.Module):
    """In place of a perceptual network."""

    def __init__(self, *unused: object) -> None:
        super().__init__()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.shape[-2:] in {(512, 512), (256, 256), (2 * EYES[1], 2 * EYES[0])}
        return (a - b).abs().mean() * 127.5


def test_the_eyes_are_judged_on_their_own_crop(shard: Path, face: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reenactment, "PerceptualLoss", _Distance)
    target = np.full((512, 512, 3), 100, np.uint8)
    wrong = target.copy()
    wrong[200:264, 144:368] = 130  # the eyes' crop alone
    pair = Pair("a/1", target, target, {"wrong": wrong, "same": target}, (256, 400), (144, 200, *EYES))
    scores = Scores(fid=False)
    scores.add(pair)
    table = scores.table("title")
    values = {row.name: row.values for row in table.rows}
    assert values["wrong"]["eyes"] == pytest.approx(30) and values["wrong"]["mouth"] == 0
    assert values["same"]["eyes"] == 0 and table.columns[-1].key == "eyes"
    scores.add(replace(pair, name="a/2", eyes=None))  # not judged, and not counted
    assert {row.name: row.values for row in scores.table("t").rows}["wrong"]["eyes"] == pytest.approx(30)
    torch.manual_seed(0)
    first = next(iter(Reenactment(shard, face, {"V": VQIG(SMALL).eval()}, dtype=torch.float32)))
    assert first.eyes is not None and first.eyes[2:] == EYES
    item = Reenactment(shard, face, {"V": VQIG(SMALL)}, dtype=torch.float32).data[0]
    end = face.project(item["identity"], item["target_expression"], item["target_pose"]).numpy()
    assert first.eyes == regions(end)["eyes"]
