"""Painters of mouth and eyes, and the stage that trains them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowvqtalker import weights
from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE
from flowvqtalker.render.generator import VQIG
from flowvqtalker.render.mesh import OPENINGS
from flowvqtalker.render.regions import REGIONS, RegionPainter, RegionUNet, corners, crops, places
from flowvqtalker.train.config import ConfigError, LoopConfig
from flowvqtalker.train.loop import fit
from flowvqtalker.train.regions import Config, Data, RegionCrops, build
from tests.test_render_generator import SMALL, face
from tests.test_train_vqig import shard

__all__ = ["face", "shard"]


def test_places_are_the_means_of_lips_and_rims() -> None:
    vertices = torch.randn(2, 478, 3) * 50 + 256
    found = places(vertices)
    for k, names in enumerate((LIPS, RIGHT_EYE, LEFT_EYE)):
        assert torch.allclose(found[:, k], vertices[:, list(names), :2].mean(1))


def test_crops_hold_the_region_and_stay_in_the_picture() -> None:
    y, x = torch.meshgrid(torch.arange(512.0), torch.arange(512.0), indexing="ij")
    picture = torch.stack([x, y])[None].expand(3, -1, -1, -1)
    middles = torch.tensor([[[250.0, 380], [180, 220], [330, 221]], [[3, 510], [0, 0], [511, 511]], [[300, 300]] * 3])
    for number, region in enumerate(REGIONS):
        boxes = corners(middles, number)
        found = crops(picture, boxes, number)
        assert found.shape == (3, 2, region.height, region.width)
        for k, (left, top) in enumerate(boxes):
            assert left % 4 == top % 4 == 0
            assert 0 <= left <= 512 - region.width and 0 <= top <= 512 - region.height
            columns = found[k, 0, 0].flip(0) if region.mirrored else found[k, 0, 0]
            assert torch.equal(columns, torch.arange(left, left + region.width).float())
            assert torch.equal(found[k, 1, :, 0], torch.arange(top, top + region.height).float())
        middle = torch.tensor(boxes[0]) + torch.tensor([region.width, region.height]) / 2
        assert (middle - middles[0, number]).abs().max() <= 2
    quarter = crops(picture[..., ::4, ::4], corners(middles, 0), 0)  # a map of a quarter of the size: the same place
    assert torch.equal(quarter, crops(picture, corners(middles, 0), 0)[..., ::4, ::4])


def test_painter_begins_with_the_warped_picture_and_paints_only_its_regions() -> None:
    torch.manual_seed(0)
    painter = RegionPainter(20).eval()
    image, warped = torch.rand(2, 2, 3, 512, 512) * 2 - 1
    told, middles = torch.rand(2, 2 * OPENINGS, 128, 128), torch.tensor([[[256.0, 380], [180, 220], [330, 220]]] * 2)
    with torch.no_grad():
        out = painter(warped, warped, told, middles)
        assert torch.allclose(out, warped, atol=1e-6)
        out = painter(image, warped, told, middles)
        inside = torch.zeros(512, 512, dtype=torch.bool)
        for number, region in enumerate(REGIONS):
            left, top = corners(middles, number)[0]
            inside[top : top + region.height, left : left + region.width] = True
            core = (..., slice(top + 20, top + region.height - 20), slice(left + 20, left + region.width - 20))
            assert torch.allclose(out[core], warped[core], atol=1e-6)
        assert torch.equal(out[..., ~inside], image[..., ~inside])
        # Both eyes are one painter's: mirrored pictures give mirrored paint.
        for part in painter.parameters():
            torch.nn.init.normal_(part, std=0.05)
        mirrored = middles[:, [0, 2, 1]].clone()
        mirrored[..., 0] = 512 - mirrored[..., 0]
        a = painter(image, warped, told, middles)
        b = painter(image.flip(-1), warped.flip(-1), told.flip(-1), mirrored).flip(-1)
    eyes = (..., slice(180, 260), slice(100, 420))
    assert not torch.allclose(a[eyes], out[eyes], atol=1e-3)
    assert torch.allclose(a[eyes], b[eyes], atol=1e-4)


def test_every_weight_of_a_painter_learns() -> None:
    torch.manual_seed(0)
    net = RegionUNet(20)
    torch.nn.init.normal_(net.out.weight, std=0.1)
    net(torch.rand(2, 3, 64, 96), torch.rand(2, 2 * OPENINGS, 16, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_generator_paints_where_it_is_told_the_places() -> None:
    config = replace(SMALL, openings=True, painter_width=20)
    torch.manual_seed(0)
    model = VQIG(config).eval()
    assert model.painter is not None
    torch.nn.init.constant_(model.painter.mouth.out.bias, 0.5)
    source, motion = model.prepare(torch.rand(1, 3, 512, 512) * 2 - 1), torch.randn(1, 27, 70)
    prior = torch.zeros(1, config.prior_channels, 32, 32)
    middles = torch.tensor([[[256.0, 380], [180, 220], [330, 220]]])
    with torch.no_grad():
        plain = model(source, motion, prior).image
        painted = model(source, motion, prior, middles).image
    change = (painted - plain)[0]
    assert torch.allclose(change[:, 360:400, 236:276], torch.tensor(0.5), atol=1e-4)
    assert change[:, 190:250, 100:400].abs().max() < 1e-5
    assert all(not p.requires_grad for p in model.painter.parameters())


def _config(shard: Path, face: FaceModel, folder: Path) -> Config:
    face.save(folder / "face.safetensors")
    data = Data(shard, folder / "face.safetensors", pool=5, validation=2)
    loop = LoopConfig(steps=4, batch_size=2, lr=1e-3, log_every=1, ema=0.5, threads=1, validate_every=0)
    return Config(data, width=20, loop=loop, perceptual="none", adversarial_start=2, discriminator_width=4)


def test_crops_are_a_function_of_seed_and_number(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    data = _config(shard, face, tmp_path).data
    first, second = (RegionCrops(PairDataset(Shard(shard), "train", seed=1), face, data, 1) for _ in range(2))
    second[3]  # another order of filling
    for i in (7, 1, 7):
        a, b = first[i], second[i]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert a["mouth"].shape == a["mouth_target"].shape == (3, 128, 128) and a["mouth_openings"].shape == (6, 32, 32)
    assert a["eye"].shape == (3, 64, 96) and a["eye_openings"].shape == (6, 16, 24)
    assert not torch.equal(a["mouth"], a["mouth_target"]) and float(a["mouth"].abs().max()) <= 1
    val = RegionCrops(PairDataset(Shard(shard), "val"), face, data, 1)
    assert len(val) == 2
    target, middle = val.pairs[0]["target"], val[0]["mouth_target"]
    from skimage.feature import match_template

    score = match_template(target.numpy().transpose(1, 2, 0), middle.numpy().transpose(1, 2, 0))
    assert score.max() > 0.999  # unchanged crops of the picture


def test_stage_trains_both_painters_and_exports_them_with_their_generator(
    shard: Path, face: FaceModel, tmp_path: Path
) -> None:
    config = _config(shard, face, tmp_path)
    generator = VQIG(replace(SMALL, openings=True))
    state = {k: v for k, v in generator.state_dict().items() if not k.startswith("autoencoder.")}
    (tmp_path / "vqig").mkdir()
    file = tmp_path / "vqig" / "weights.safetensors"
    save_file(state, str(file))
    about = {"stage": "vqig", "config": generator.config.to_dict()}
    (tmp_path / "vqig" / "config.json").write_text(json.dumps(about))
    config = replace(config, data=replace(config.data, generator=file))
    stage = build(config)
    before = {name: p.clone() for name, p in stage.module.named_parameters()}
    scores = fit(stage, config.loop, tmp_path / "run")
    moved = {name for name, p in stage.module.named_parameters() if not torch.equal(p, before[name])}
    for part in ("painter.mouth", "painter.eye", "discriminators.mouth", "discriminators.eye"):
        assert any(name.startswith(part) for name in moved), part
    assert {"mouth_l1", "warp_mouth_l1", "eye_l1", "warp_eye_l1"} <= scores.keys()
    written = load_file(str(tmp_path / "run" / "weights.safetensors"))
    whole = VQIG(replace(generator.config, painter_width=20))
    assert written.keys() == {k for k in whole.state_dict() if not k.startswith("autoencoder.")}
    entry = weights.add(tmp_path / "run", "vqig", path=tmp_path / "w", data="x")
    assert entry.stage == "vqig" and entry.config["painter_width"] == 20 and entry.config["openings"] is True


def test_bad_configurations_are_refused(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    config = _config(shard, face, tmp_path)
    for change, message in (
        ({"width": 30}, "multiple of 20"),
        ({"l1_weight": -1.0}, "l1_weight must not be negative"),
        ({"data": replace(config.data, pool=0)}, "data.pool must be positive"),
        ({"data": replace(config.data, stills=2.0)}, "data.stills must be in"),
    ):
        with pytest.raises((ValueError, ConfigError), match=message):
            replace(config, **change)
    with pytest.raises(UserError, match="face_model"):
        build(replace(config, data=replace(config.data, face_model=tmp_path / "no")))
    with pytest.raises(UserError, match="are needed; give weights of stage vqig"):
        build(replace(config, data=replace(config.data, generator=tmp_path / "no.safetensors")))
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"))
    (tmp_path / "other.json").write_text(json.dumps({"stage": "codebook", "config": {}}))
    with pytest.raises(UserError, match="no image generator with openings"):
        build(replace(config, data=replace(config.data, generator=tmp_path / "other.safetensors")))
