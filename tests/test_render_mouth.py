"""The painter of the mouth's inside, the pairs it learns from, and its stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flowvqtalker.data.pairs import PairDataset, lip_gap
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS, RIGHT_EYE
from flowvqtalker.loading import load_face_model
from flowvqtalker.render.mesh_flow import openings
from flowvqtalker.render.refiner import HEIGHT, WIDTH, MouthPainter, corners, crops, inside
from flowvqtalker.render.vqig import VQIG
from flowvqtalker.train.config import ConfigError, LoopConfig
from flowvqtalker.train.loop import fit
from flowvqtalker.train.mouth import Config, Data, MouthCrops, build, shut
from flowvqtalker.train.release import add_weights
from tests.test_render_generator import SMALL, face
from tests.test_train_vqig import shard

__all__ = ["face", "shard"]


def _vertices(x: float, y: float, width: float, height: float) -> torch.Tensor:
    """Vertices whose inner lips are an ellipse; the others lie far away."""
    out = torch.full((1, 478, 3), -900.0)
    angle = torch.arange(20) / 20 * 2 * torch.pi
    rim = torch.stack([x - width / 2 * torch.cos(angle), y - height / 2 * torch.sin(angle)], 1)
    out[0, list(INNER_LIPS), :2] = rim
    return out


@pytest.mark.parametrize(("x", "y", "width", "height"), [(256, 380, 100, 60), (200, 360, 90, 2), (300, 400, 60, 0.2)])
def test_crops_are_around_open_and_shut_mouths(x: float, y: float, width: float, height: float) -> None:
    ((left, top),) = corners(openings(_vertices(x, y, width, height), 128)[:, 0])
    assert left % 4 == top % 4 == 0
    assert abs(left + WIDTH / 2 - x) <= 4 and abs(top + HEIGHT / 2 - y) <= 4


def test_crops_stay_in_the_picture_and_hold_the_same_place_at_every_size() -> None:
    for x, y in ((3, 505), (510, 4)):
        ((left, top),) = corners(openings(_vertices(x, y, 60, 30), 128)[:, 0])
        assert 0 <= left <= 512 - WIDTH and 0 <= top <= 512 - HEIGHT
    rows, columns = torch.meshgrid(torch.arange(512.0), torch.arange(512.0), indexing="ij")
    picture = torch.stack([columns, rows])[None]
    found = crops(picture, [(120, 300)])
    assert found.shape == (1, 2, HEIGHT, WIDTH)
    assert found[0, 0, 0, 0] == 120 and found[0, 1, 0, 0] == 300
    assert torch.equal(crops(picture[..., ::4, ::4], [(120, 300)]), found[..., ::4, ::4])


def test_paint_is_allowed_in_the_opening_alone() -> None:
    maps = openings(_vertices(256, 380, 80, 40), 128)[:, :1]
    places = corners(maps[:, 0])
    where = inside(crops(maps.expand(-1, 2, -1, -1), places))[0, 0]
    (left, top), *_ = places
    y, x = torch.meshgrid(torch.arange(HEIGHT) + top + 0.5, torch.arange(WIDTH) + left + 0.5, indexing="ij")
    radius = torch.hypot((x - 256) / 40, (y - 380) / 20)
    assert where[radius < 1].min() > 0.99
    outside = torch.hypot((x - 256) / 52, (y - 380) / 32) > 1
    assert where[outside].max() < 0.01
    assert where[0].max() < 0.02 and where[:, -1].max() < 0.02


def test_an_untrained_painter_adds_nothing_and_a_trained_one_only_to_the_opening() -> None:
    torch.manual_seed(0)
    painter = MouthPainter(16).eval()
    image, warped = torch.rand(2, 2, 3, 512, 512) * 2 - 1
    told = openings(_vertices(256, 380, 80, 40), 128).repeat(2, 2, 1, 1)
    with torch.no_grad():
        out = painter(image, warped, told)
        assert torch.equal(out, image)
        torch.nn.init.constant_(painter.out.bias, 0.5)
        painted = painter(image, warped, told)
    assert torch.allclose(painted[..., 370:390, 230:282], image[..., 370:390, 230:282] + 0.5, atol=1e-4)
    changed = (painted - image).abs().amax((0, 1)) > 0
    rows, columns = torch.nonzero(changed).T
    assert rows.min() >= 345 and rows.max() <= 415 and columns.min() >= 200 and columns.max() <= 312


def test_every_weight_of_the_painter_learns() -> None:
    torch.manual_seed(0)
    painter = MouthPainter(16)
    torch.nn.init.normal_(painter.out.weight, std=0.1)
    painter.paint(torch.rand(2, 3, HEIGHT, WIDTH), torch.rand(2, 2, 32, 40)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in painter.parameters())


def test_a_generator_paints_the_mouth() -> None:
    config = replace(SMALL, openings=True, painter_width=16)
    torch.manual_seed(0)
    model = VQIG(config).eval()
    plain = VQIG(replace(config, painter_width=0)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("painter.")})
    assert model.painter is not None and all(not p.requires_grad for p in model.painter.parameters())
    torch.nn.init.constant_(model.painter.out.bias, 0.5)
    image, motion = torch.rand(1, 3, 512, 512) * 2 - 1, torch.randn(1, 27, 70)
    maps = openings(_vertices(256, 380, 80, 40), 32)
    prior = torch.cat([torch.zeros(1, 2, 32, 32), maps, maps, torch.zeros(1, 5, 32, 32)], 1)
    with torch.no_grad():
        without, found = (m(m.prepare(image), motion, prior) for m in (plain, model))
    change = (found.image - without.image)[0]
    assert torch.allclose(change[:, 375:385, 240:270], torch.tensor(0.5), atol=1e-4)
    assert change[:, :330].abs().max() == 0
    with pytest.raises(ValueError, match="needs openings"):
        replace(config, openings=False)


def test_gap_between_lips() -> None:
    for height in (0.0, 10.0, 40.0):
        assert lip_gap(_vertices(256, 380, 80, height).numpy())[0] == pytest.approx(height / 80, abs=1e-6)


@pytest.fixture(scope="module")
def talking(shard: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard with landmarks: lips shut in the first row of each clip, open in the others; all stills open."""
    import shutil

    folder = tmp_path_factory.mktemp("talking") / "shard"
    shutil.copytree(shard, folder)
    found = Shard(folder)
    gaps = np.full(len(found.expression), 0.3)
    gaps[[int(s) for s, n in zip(found.start, found.length, strict=True) if n > 1]] = 0.01
    points = np.concatenate([_vertices(256, 380, 80, 80 * gap).numpy() for gap in gaps])
    stored = np.clip((points - 256) * 32, -32767, 32767).round().astype(np.int16)
    np.save(folder / "landmarks.npy", stored)
    return folder


def test_opening_pairs_begin_shut_and_end_open(talking: Path) -> None:
    opened = Shard(talking)
    gap = lip_gap(opened.landmarks(slice(None)))
    shut_faces = opened.expression[gap < 0.04]
    for stills in (0.0, 1.0):
        pairs = PairDataset(opened, "train", stills=stills)
        kinds = set()
        for seed in range(8):
            item = pairs.opening(np.random.default_rng(seed))
            again = pairs.opening(np.random.default_rng(seed))
            assert all(torch.equal(item[key], again[key]) for key in item)
            kinds.add(float(item["still"]))
            shut = item["source_expression"].numpy()
            assert np.isclose(shut_faces, shut, atol=1e-6).all(1).any()
            place = np.isclose(opened.expression, item["target_expression"].numpy(), atol=1e-6).all(1)
            assert (gap[place] > 0.12).any()
        assert kinds == {stills}


def test_opening_pairs_are_refused_without_such_pictures(shard: Path) -> None:
    with pytest.raises(UserError, match="both shut and open lips"):
        PairDataset(Shard(shard), "train").opening(np.random.default_rng(0))


def test_shut_lips_touch_and_little_else_moves() -> None:
    model = load_face_model()
    torch.manual_seed(0)
    identity, expression = torch.randn(3, 80), torch.randn(3, 64)
    found = shut(model, identity, expression)
    upper, lower = list(INNER_LIPS[1:10]), list(INNER_LIPS[:10:-1])
    pose = torch.tensor([[0.0, 0, 0, 0, 0, 16]]).expand(3, -1)
    before, after = (model.project(identity, beta, pose) for beta in (expression, found))
    gaps = [(v[:, lower, 1] - v[:, upper, 1]).abs() for v in (before, after)]
    assert gaps[1].mean() < 0.1 * gaps[0].mean() and gaps[1].max() < 1.0
    eyes = list(RIGHT_EYE)
    assert (after - before)[:, eyes].abs().mean() < 0.2 * (after - before)[:, lower].abs().mean()


def _config(shard: Path, face: FaceModel, folder: Path) -> Config:
    """A configuration, and a folder of weights with a small generator."""
    if not (folder / "weights").is_dir():
        torch.manual_seed(0)
        generator = VQIG(replace(SMALL, openings=True))
        whole = generator.state_dict()
        parts = {
            "codebook": {k.removeprefix("autoencoder."): v for k, v in whole.items() if k.startswith("autoencoder.")},
            "vqig": {k: v for k, v in whole.items() if not k.startswith("autoencoder.")},
        }
        face.save(folder / "face.safetensors")
        add_weights(folder / "face.safetensors", "face_model", path=folder / "weights")
        for name, config in (("codebook", SMALL.codebook), ("vqig", generator.config)):
            save_file({k: v.contiguous() for k, v in parts[name].items()}, str(folder / f"{name}.safetensors"))
            add_weights(folder / f"{name}.safetensors", name, path=folder / "weights", config=config.to_dict())
    data = Data(shard, folder / "weights", pool=5, validation=2)
    loop = LoopConfig(steps=4, batch_size=2, lr=1e-3, log_every=1, ema=0.5, threads=1, validate_every=0)
    return Config(data, width=16, loop=loop, perceptual="none", adversarial_start=2, discriminator_width=4)


def test_crops_are_a_function_of_seed_and_number_and_can_be_kept(
    talking: Path, face: FaceModel, tmp_path: Path
) -> None:
    stage = build(_config(talking, face, tmp_path))
    first, second = (stage.dataset("train") for _ in range(2))
    second[3]  # another order of filling
    kept = replace(stage.config.data, cache=tmp_path / "cache")
    stage.config = replace(stage.config, data=kept)
    stage.dataset("train")[7]
    third = stage.dataset("train")
    assert third.filled.any()
    for i in (7, 1, 7):
        items = [data[i] for data in (first, second, third)]
        for key in items[0]:
            assert torch.equal(items[0][key], items[1][key]) and torch.equal(items[0][key], items[2][key])
    assert items[0]["warped"].shape == items[0]["target"].shape == (3, HEIGHT, WIDTH)
    assert items[0]["told"].shape == (2, 8, 10) and float(items[0]["warped"].abs().max()) <= 1
    assert not torch.equal(items[0]["warped"], items[0]["target"])
    stage.config = replace(stage.config, data=replace(kept, pool=6))
    with pytest.raises(UserError, match="other settings"):
        stage.dataset("train")


def test_stage_trains_the_painter_and_exports_it_with_its_generator(
    talking: Path, face: FaceModel, tmp_path: Path
) -> None:
    config = _config(talking, face, tmp_path)
    stage = build(config)
    before = {name: p.clone() for name, p in stage.module.named_parameters()}
    scores = fit(stage, config.loop, tmp_path / "run")
    moved = {name for name, p in stage.module.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("painter.") for name in moved)
    assert any(name.startswith("discriminator.") for name in moved)
    assert {"l1", "warp_l1", "opening_l1", "opening_warp_l1"} <= scores.keys()
    written = load_file(str(tmp_path / "run" / "weights.safetensors"))
    whole = VQIG(replace(SMALL, openings=True, painter_width=16))
    assert written.keys() == {k for k in whole.state_dict() if not k.startswith("autoencoder.")}
    entry = add_weights(tmp_path / "run", "vqig", path=tmp_path / "weights", data="x")
    assert entry.stage == "vqig" and entry.config["painter_width"] == 16
    again = build(replace(config, width=24))  # a generator that has a painter gets another one
    assert any(key.startswith("painter.") for key in again.export()[0]) and again.export()[1]["painter_width"] == 24


def test_only_the_opening_is_painted_in_training(talking: Path, face: FaceModel, tmp_path: Path) -> None:
    stage = build(_config(talking, face, tmp_path))
    torch.nn.init.constant_(stage.painter.out.bias, 1.0)
    data = stage.dataset("val")
    assert isinstance(data, MouthCrops) and len(data) == 2
    batch = {key: value[None] for key, value in data[0].items()}
    image, where = stage.painted(batch)
    assert torch.allclose(image - batch["warped"], where.expand_as(image), atol=1e-5)


def test_bad_configurations_are_refused(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    config = _config(shard, face, tmp_path)
    for change, message in (
        ({"width": 30}, "multiple of 8"),
        ({"l1_weight": -1.0}, "l1_weight must not be negative"),
        ({"data": replace(config.data, pool=0)}, "data.pool must be positive"),
        ({"data": replace(config.data, opening=2.0)}, "data.opening must be in"),
    ):
        with pytest.raises((ValueError, ConfigError), match=message):
            replace(config, **change)
    with pytest.raises(UserError, match="does not exist"):
        build(replace(config, data=replace(config.data, weights=tmp_path / "no")))
    about = json.loads((tmp_path / "weights" / "manifest.json").read_text())
    about["vqig.safetensors"]["config"]["openings"] = False
    (tmp_path / "weights" / "manifest.json").write_text(json.dumps(about))
    with pytest.raises(UserError):
        build(config)
