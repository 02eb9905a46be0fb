"""The stages of the region of interest: codebook and generator learn on toy shards, and resume to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from flowvqtalker.data.gaps import eye_gap, feature_centres, lip_gap
from flowvqtalker.data.pairs import PairDataset, PairMix
from flowvqtalker.data.regions import RegionDataset, RegionViews
from flowvqtalker.data.shards import Clip, Shard, ShardWriter
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS, LEFT_EYE, RIGHT_EYE
from flowvqtalker.render.region import RegionConfig
from flowvqtalker.render.region_vqvae import RegionCodebookConfig, RegionVQVAE
from flowvqtalker.render.warp import WarpConfig
from flowvqtalker.train import codebook, vqig
from flowvqtalker.train.config import ConfigError, LoopConfig
from flowvqtalker.train.gan import discriminator_loss
from flowvqtalker.train.image_stage import make_views, shut_lips
from flowvqtalker.train.loop import fit
from flowvqtalker.train.region_codebook import CodeAverages, RegionCodebookTraining, kmeans
from flowvqtalker.train.region_losses import (
    RegionDiscriminator,
    backward_through,
    balanced_gradient,
    band_loss,
    detail_loss,
    feature_weights,
    mouth_crop,
)
from flowvqtalker.train.region_vqig import RegionVQIGTraining
from tests.render.test_generator import face

__all__ = ["face"]

ROI = (208, 208, 96, 96)
BOOK = RegionCodebookConfig(roi=ROI, channels=(4, 8, 8, 16), bottleneck=8, codes=24, dim=16)
MODEL = RegionConfig(
    codebook=BOOK,
    warp=WarpConfig(prior="mesh", input_size=64, flow_size=64, width=4, max_width=8),
    transformer_layers=1,
    transformer_mlp=16,
)


def _landmarks(frames: int, seed: int) -> np.ndarray:
    """Faces whose lips open and whose eyes shut from frame to frame, the first with open eyes and shut lips."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(200, 312, (1, 478, 3)).repeat(frames, 0).astype(np.float32)
    for rim, centre, width in ((INNER_LIPS, (256, 290), 40), (RIGHT_EYE, (232, 230), 24), (LEFT_EYE, (280, 230), 24)):
        angle = np.pi + np.arange(len(rim)) * 2 * np.pi / len(rim)
        for t in range(frames):
            height = width * (0.3 * t / max(1, frames - 1) if rim is INNER_LIPS else 0.3 - 0.26 * (t % 2))
            points[t, list(rim), 0] = centre[0] + width / 2 * np.cos(angle)
            points[t, list(rim), 1] = centre[1] + height / 2 * np.sin(angle)
    return points


def _clip(name: str, identity: str, frames: int, seed: int, source: str = "sitting") -> Clip:
    rng = np.random.default_rng(seed)
    pose = np.tile(np.array([0, 0, 0, 0, 0, 16], np.float32), (frames, 1))
    pose[:, :5] += rng.normal(0, 0.02, (frames, 5)).astype(np.float32)
    small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
    image = cv2.resize(small, (512, 512), interpolation=cv2.INTER_CUBIC)
    stored = [(t, cv2.imencode(".webp", np.roll(image, 6 * t, 1))[1].tobytes()) for t in range(frames)]
    return Clip(
        name=name, source=source, identity=identity, split=split_of(identity), emotion=5, speech=False,
        is_image=frames == 1, identity_shape=np.zeros(80, np.float32),
        expression=rng.normal(0, 1, (frames, 64)).astype(np.float32), pose=pose,
        blendshapes=np.zeros((frames, 52), np.float32), landmarks=_landmarks(frames, seed),
        residual=np.zeros(frames, np.float32), audio=None, crop=np.eye(2, 3),
        valid=np.array([[0, 0], [512, 0], [512, 512], [0, 512]], np.float32), native=512.0, images=stored,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("region") / "shard"
    people = {split: next(f"p{i}" for i in range(999) if split_of(f"p{i}") == split) for split in ("train", "val")}
    with ShardWriter(path) as writer:
        for number, (split, frames) in enumerate([("train", 4), ("val", 2), ("train", 3), ("train", 1)]):
            writer.add(_clip(f"clip{number}", people[split], frames, number))
    return path


def _losses(run: Path, column: str) -> list[float]:
    rows = (run / "log.csv").read_text().splitlines()
    place = rows[0].split(",").index(column)
    return [float(row.split(",")[place]) for row in rows[1:]]


def _seeded(module: Any, config: Any) -> Any:
    """The stage of a configuration, always with the same first weights."""
    torch.manual_seed(0)
    return module.build(config)


def test_gaps_are_fractions_of_the_width() -> None:
    points = _landmarks(3, 0)
    assert lip_gap(points) == pytest.approx([0, 0.15, 0.3], abs=0.01)
    assert eye_gap(points) == pytest.approx([0.3, 0.04, 0.3], abs=0.01)


def test_views_of_a_region_keep_the_features_in_place(shard: Path) -> None:
    data = RegionDataset(Shard(shard), "train", ROI, RegionViews(colour=0.0), seed=1)
    marked = np.zeros((512, 512, 3), np.uint8)
    centres = feature_centres(_landmarks(1, 0))[0]
    for x, y in centres:
        cv2.circle(marked, (round(x), round(y)), 3, (255, 255, 255), -1)
    for seed in range(4):
        view, points = data._view(marked, centres, np.random.default_rng(seed))
        for x, y in points:
            assert view[round(y - 0.5), round(x - 0.5)].min() > 128
    a, b = data[5], RegionDataset(Shard(shard), "train", ROI, RegionViews(colour=0.0), seed=1)[5]
    assert all(torch.equal(a[key], b[key]) for key in a) and a["image"].shape == (3, 96, 96)
    with pytest.raises(UserError, match="no tracked image"):
        RegionDataset(Shard(shard), "train", ROI, RegionViews(), min_native=1000)


def test_pairs_span_the_clips_of_a_sitting_and_open_lips_and_eyes(shard: Path) -> None:
    stored = Shard(shard)
    apart = PairDataset(stored, "train", PairMix(synthetic=0.0))
    together = PairDataset(stored, "train", PairMix(synthetic=0.0, sessions=("sitting",)))
    assert sorted(map(len, apart.groups)) == [3, 4] and list(map(len, together.groups)) == [8]
    items = [
        PairDataset(stored, "train", PairMix(synthetic=1.0, shut_lips=0.5, shut_eyes=0.5), seed=2)[i] for i in range(16)
    ]
    assert 0 < sum(float(item["shut_lips"]) for item in items) < 16
    plain = [PairDataset(stored, "train", PairMix(synthetic=1.0), seed=2)[i] for i in range(16)]
    assert not any(bool(item["shut_lips"]) for item in plain)
    with pytest.raises(ValueError, match="shut_lips must be in"):
        PairMix(shut_lips=2)


def test_synthetic_sources_have_shut_lips(shard: Path, face: FaceModel) -> None:
    from flowvqtalker.render.mesh_flow import MeshFlow

    expression = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    closed = face.shape(torch.zeros(2, 80), shut_lips(face, torch.zeros(2, 80), expression))
    half = len(INNER_LIPS) // 2
    upper, lower = list(INNER_LIPS[1:half]), list(INNER_LIPS[half + 1 :])[::-1]
    gaps = (closed[:, lower, 1] - closed[:, upper, 1]).abs()
    open_gaps = (face.shape(torch.zeros(2, 80), expression)[:, lower, 1] - closed[:, upper, 1]).abs()
    assert gaps.max() < 0.1 * open_gaps.max()
    data = PairDataset(Shard(shard), "train", PairMix(synthetic=1.0, shut_lips=1.0))
    batch = {key: torch.stack([data[0][key], data[1][key]]) for key in data[0]}
    source, prior, vertices = make_views(face, MeshFlow(face, 128, apertures=True), batch)
    assert source.shape == (2, 3, 512, 512) and prior.shape == (2, 13, 128, 128) and vertices.shape == (2, 478, 3)
    assert not torch.equal(source, batch["target"]) and source.abs().max() <= 1


def test_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 32, 32, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    l1, band = band_loss(a, b)
    assert l1.item() == pytest.approx((a - b).abs().mean().item())
    assert band_loss(a, a)[1] == 0 and band_loss(a, a + 0.5)[1].item() == pytest.approx(0.5, abs=1e-6) and band > 0
    checks = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).float().expand(2, 3, 32, 32)
    assert detail_loss(checks, checks.flip(-1)).item() == pytest.approx(0, abs=1e-6)  # as much of it elsewhere
    assert detail_loss(0.25 * checks + 3, checks).item() == pytest.approx(0.75, abs=1e-3)
    points = torch.tensor([[[16.0, 20.0], [8.0, 8.0], [24.0, 8.0]]])
    weights = feature_weights(points, 64, 64)
    assert weights.argmax() // 64 < 32 and weights.min() >= 1 and weights[0, 0, 19, 15] > weights[0, 0, 63, 63]
    image = torch.rand(1, 3, 96, 160, generator=generator)
    assert mouth_crop(image, points, 1.5).shape == (1, 3, 144, 216)
    seen = a.clone().requires_grad_()
    gradient, weight = balanced_gradient(seen, (seen - b).square().mean(), seen.sum(), 0.5, 10.0)
    (alone,) = torch.autograd.grad((seen - b).square().mean(), seen)
    assert (gradient - alone).norm().item() == pytest.approx(0.5 * alone.norm().item(), rel=1e-4) and weight < 1
    loss = backward_through(seen, gradient, torch.tensor(3.0))
    loss.backward()
    assert loss.item() == 3 and torch.allclose(seen.grad, gradient)


def test_discriminators_soon_tell_faint_detail_from_its_absence() -> None:
    torch.manual_seed(0)
    discriminator = RegionDiscriminator(width=16, layers=2)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-3, (0.8, 0.98))
    points = torch.tensor([[48.0, 70], [30, 30], [66, 30]]).expand(4, -1, -1)
    for _ in range(25):
        smooth = F.interpolate(torch.rand(4, 3, 6, 6) * 2 - 1, (96, 96), mode="bicubic")
        sharp = smooth + 0.02 * torch.randn_like(smooth)
        pairs = zip(*(discriminator(image, smooth, points) for image in (sharp, smooth)), strict=True)
        losses = torch.stack([discriminator_loss(real, fake) for real, fake in pairs])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert losses.max() < 0.5  # 1 is chance, and what the image alone reaches


def test_kmeans_finds_clusters_and_dead_codes_restart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    found = kmeans(points, 12, torch.Generator().manual_seed(3))
    assert torch.cdist(centres, found).min(1).values.max() < 0.2
    assert torch.cdist(points, found).min(1).values.max() < 0.4
    averages = CodeAverages(3, 2)
    averages.start(centres, 5.0)
    z = centres[:2].t().reshape(1, 2, 2, 1)  # no latent chooses the third code
    for step in range(200):
        codes, restarted = averages.update(z, torch.arange(2).view(1, 2, 1), 0.9, step < 150)
    assert torch.cdist(centres[:2], codes).min(1).values.max() < 1e-3
    assert not restarted and torch.isfinite(codes).all()
    assert torch.cdist(codes, centres[:2]).min(1).values.max() < 1e-3  # the dead code restarted at a latent


def _codebook(shard: Path, **loop: Any) -> codebook.Config:
    return codebook.Config(
        data=codebook.Data(validation=2),
        region=RegionCodebookTraining(BOOK, shard, quantise_from=0.25, kmeans_images=4),
        loop=LoopConfig(**{"steps": 16, "batch_size": 2, "lr": 3e-3, "ema": 0.5, "threads": 1, "log_every": 1,
                           "workers": 0, "validate_every": 0, "overfit": True, **loop}),
        perceptual="none",
        discriminator_width=4,
    )  # fmt: skip


def test_the_codebook_learns_and_resumes_to_the_last_bit(shard: Path, tmp_path: Path) -> None:
    config = _codebook(shard)
    result = fit(_seeded(codebook, config), config.loop, tmp_path / "whole")
    losses = _losses(tmp_path / "whole", "generator/l1")
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert 0 < result["codes_used"] <= 1 and result["perplexity"] >= 1
    for steps in (4, 9, 16):  # stop before k-means, and between k-means and the discriminator
        fit(_seeded(codebook, config), replace(config.loop, steps=steps), tmp_path / "parts", resume=True)
    whole, parts = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_a_codebook_can_start_from_another(shard: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = RegionVQVAE(BOOK)
    save_file(given.state_dict(), tmp_path / "start.safetensors")
    config = _codebook(shard, steps=1)
    stage = codebook.build(replace(config, data=replace(config.data, start=tmp_path / "start.safetensors")))
    fit(stage, config.loop, tmp_path / "run")
    moved = load_file(tmp_path / "run" / "weights.safetensors")["codes.weight"].float()
    distance = (moved - given.codes.weight).abs().mean()
    assert 0 < distance < 0.2
    other = replace(config.region, model=replace(BOOK, codes=8))
    with pytest.raises(UserError, match="does not hold a codebook of this size"):
        codebook.build(replace(config, data=codebook.Data(start=tmp_path / "start.safetensors"), region=other))


@pytest.mark.slow
def test_the_generator_learns_and_resumes_to_the_last_bit(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(RegionVQVAE(BOOK).state_dict(), tmp_path / "codebook.safetensors")
    face.save(tmp_path / "face.safetensors")
    mix = PairMix(synthetic=0.5, shut_lips=0.5, shut_eyes=0.5, hard_candidates=3, sessions=("sitting",))
    config = vqig.Config(
        data=vqig.Data(shard, tmp_path / "codebook.safetensors", tmp_path / "face.safetensors", None, mix, 1),
        region=RegionVQIGTraining(MODEL, image_from=0.25, adversarial_from=0.6),
        loop=LoopConfig(steps=12, batch_size=2, lr=3e-3, ema=0.5, threads=1, log_every=1, workers=0, validate_every=0,
                        overfit=True),
        perceptual="none",
        discriminator_width=4,
    )  # fmt: skip
    stage = _seeded(vqig, config)
    before = {name: p.clone() for name, p in stage.module.named_parameters()}
    result = fit(stage, config.loop, tmp_path / "whole")
    moved = {name for name, p in stage.module.named_parameters() if not torch.equal(p, before[name])}
    assert not any(".autoencoder." in name for name in moved)
    parts = ("mapping", "warping", "encoder", "fuse", "attention", "transformer", "modulation", "decoder", "aperture")
    for part in parts:
        assert any(name.startswith(f"generator.{part}.") for name in moved), part
    for part in ("region", "mouth", "eyes"):
        assert any(name.startswith(f"discriminator.{part}.") for name in moved), part
    assert {"l1", "warp_l1", "copy_l1", "codes_l1", "ssim"} <= result.keys()
    codes = _losses(tmp_path / "whole", "generator/code")
    assert np.mean(codes[-3:]) < np.mean(codes[:3])
    for steps in (5, 12):
        fit(_seeded(vqig, config), replace(config.loop, steps=steps), tmp_path / "parts", resume=True)
    whole, again = (load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
    with pytest.raises(UserError, match="does not fit"):
        vqig.build(replace(config, region=RegionVQIGTraining(replace(MODEL, codebook=replace(BOOK, codes=8)))))


def _generator(shard: Path, face: FaceModel, folder: Path, region: RegionVQIGTraining) -> vqig.Config:
    """Four steps of the generator on a random codebook, whose file and the face model's are put into the folder."""
    torch.manual_seed(0)
    save_file(RegionVQVAE(BOOK).state_dict(), folder / "codebook.safetensors")
    face.save(folder / "face.safetensors")
    return vqig.Config(
        data=vqig.Data(shard, folder / "codebook.safetensors", folder / "face.safetensors", None, PairMix(), 1),
        region=region,
        loop=LoopConfig(steps=4, batch_size=2, lr=3e-3, ema=0.5, threads=1, workers=0, validate_every=0),
        perceptual="none",
        discriminator_width=4,
    )


def test_chosen_parts_alone_learn(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    region = RegionVQIGTraining(
        replace(MODEL, warped_map=True), ("aperture", "transformer"), image_from=0.5, adversarial_from=0.5
    )
    config = _generator(shard, face, tmp_path, region)
    stage = _seeded(vqig, config)
    before = {name: p.clone() for name, p in stage.module.named_parameters()}
    fit(stage, config.loop, tmp_path / "run")
    moved = {name.split(".")[1] for name, p in stage.module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"aperture", "transformer", "region", "mouth", "eyes"}
    with pytest.raises(ConfigError, match=r"region.only: 'lips' is no part; allowed: aperture, attention"):
        vqig.build(replace(config, region=replace(region, only=("lips",))))


def test_discriminators_can_learn_first(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    region = RegionVQIGTraining(MODEL, image_from=0, adversarial_from=0, ramp=0)
    config = _generator(shard, face, tmp_path, region)
    for first, learned in ((1.0, {"discriminator"}), (0.5, {"discriminator", "generator"})):
        stage = _seeded(vqig, replace(config, region=replace(region, discriminators_first=first)))
        before = {name: p.clone() for name, p in stage.module.named_parameters()}
        fit(stage, config.loop, tmp_path / str(first))
        moved = {name.split(".")[0] for name, p in stage.module.named_parameters() if not torch.equal(p, before[name])}
        assert moved == learned


def test_a_variant_without_codes_learns_to_draw_latents(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    region = RegionVQIGTraining(replace(MODEL, warped_map=True).ablated("M"), image_from=0, adversarial_from=1)
    config = _generator(shard, face, tmp_path, region)
    stage = _seeded(vqig, config)
    before = {name: p.clone() for name, p in stage.generator.named_parameters()}
    batch = {key: value[None] for key, value in stage.data["train"][0].items()}
    _, logs = stage.loss("generator", batch, 0)
    assert "code" not in logs and logs["hits"] == 0 and logs["l1"] > 0
    fit(stage, config.loop, tmp_path / "run")
    moved = {name.split(".")[0] for name, p in stage.generator.named_parameters() if not torch.equal(p, before[name])}
    assert {"encoder", "attention", "decoder"} <= moved and "transformer" not in moved


@pytest.mark.parametrize("stage", ["codebook", "vqig"])
def test_the_region_can_be_set_on_the_command_line(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flowvqtalker.cli import main

    configs = Path(__file__).parents[2] / "configs"
    assert main(["train", stage, "--config", str(configs / f"{stage}.yaml"), "--help"]) == 0
    assert "--region.adversarial-from" in capsys.readouterr().out


def test_bad_fractions_are_named() -> None:
    with pytest.raises(ConfigError, match=r"quantise_from must be in \[0, 1\]"):
        RegionCodebookTraining(quantise_from=2)
    with pytest.raises(ConfigError, match="adversarial_from must not come before image_from"):
        RegionVQIGTraining(image_from=0.9)
