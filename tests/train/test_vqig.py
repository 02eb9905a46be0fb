"""The image generator's training stage and its pairs of pictures, on a made-up shard."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowvqtalker.data.pairs import PairDataset, PairMix, window
from flowvqtalker.data.shards import Clip, Shard, ShardWriter
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.vqvae import VQAutoencoder
from flowvqtalker.train.config import LoopConfig, from_dict
from flowvqtalker.train.loop import fit
from flowvqtalker.train.vqig import Config, Data, build
from tests.render.test_codebook import TINY
from tests.render.test_generator import SMALL, face

__all__ = ["face"]


def _clip(name: str, identity: str, frames: int, seed: int) -> Clip:
    rng = np.random.default_rng(seed)
    pose = np.tile(np.array([0, 0, 0, 0, 0, 16], np.float32), (frames, 1))
    pose[:, :5] += rng.normal(0, 0.05, (frames, 5)).astype(np.float32)
    pictures = []
    for t in range(frames):
        small = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        code = cv2.imencode(".jpg", cv2.resize(small, (512, 512), interpolation=cv2.INTER_CUBIC))[1]
        pictures.append((t, code.tobytes()))
    return Clip(
        name=name, source="test", identity=identity, split=split_of(identity), emotion=5, speech=False,
        is_image=frames == 1, identity_shape=np.zeros(80, np.float32),
        expression=rng.normal(0, 1, (frames, 64)).astype(np.float32), pose=pose,
        blendshapes=np.zeros((frames, 52), np.float32), landmarks=np.full((frames, 478, 3), 256, np.float32),
        residual=np.zeros(frames, np.float32), audio=None, crop=np.eye(2, 3),
        valid=np.array([[0, 0], [512, 0], [512, 512], [0, 512]], np.float32), native=512.0, images=pictures,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vqig") / "shard"
    people = {split: next(f"p{i}" for i in range(999) if split_of(f"p{i}") == split) for split in ("train", "val")}
    with ShardWriter(path) as writer:
        for number, (split, frames) in enumerate([("train", 4), ("val", 3), ("train", 1), ("train", 1)]):
            writer.add(_clip(f"clip{number}", people[split], frames, number))
    return path


def test_windows_repeat_the_ends_of_a_clip() -> None:
    frames = np.arange(5)[:, None]
    assert window(frames, 0, 2)[:, 0].tolist() == [0, 0, 0, 1, 2]
    assert window(frames, 4, 2)[:, 0].tolist() == [2, 3, 4, 4, 4]


def test_pairs_are_reproducible_and_of_their_split(shard: Path) -> None:
    first, second = (PairDataset(Shard(shard), "train", seed=3) for _ in range(2))
    for i in (0, 7, 12345):
        a, b = first[i], second[i]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    made = [float(first[i]["synthetic"]) for i in range(24)]
    assert 0 < sum(made) < 24
    item = first[made.index(1.0)]
    assert torch.equal(item["source"], item["target"])
    assert not torch.equal(item["source_expression"], item["target_expression"])
    hard = PairDataset(Shard(shard), "train", PairMix(synthetic=0.0, hard_candidates=6), seed=3)
    easy = PairDataset(Shard(shard), "train", PairMix(synthetic=0.0), seed=3)

    def change(data: PairDataset) -> float:
        items = (data[i] for i in range(12))
        return float(np.mean([(x["source_expression"] - x["target_expression"]).norm() for x in items]))

    assert change(hard) > change(easy)
    val = PairDataset(Shard(shard), "val")
    assert len(val) == 2
    assert torch.equal(val[0]["source"], val[1]["source"])
    with pytest.raises(UserError, match="too few"):
        PairDataset(Shard(shard), "train", PairMix(min_native=1000))
    with pytest.raises(ValueError, match="hard_candidates must be at least 1"):
        from_dict(Config, {"data": {"pairs": {"hard_candidates": 0}}})


def test_both_stages_of_training_run_and_leave_the_codebook_alone(shard: Path, face: FaceModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(VQAutoencoder(TINY).state_dict(), tmp_path / "codebook.safetensors")
    face.save(tmp_path / "face.safetensors")
    config = Config(
        data=Data(shard, tmp_path / "codebook.safetensors", tmp_path / "face.safetensors", validation=1),
        model=SMALL,
        loop=LoopConfig(steps=6, batch_size=2, lr=1e-3, log_every=1, ema=0.5, threads=1, validate_every=0),
        code_steps=2,
        adversarial_start=4,
        perceptual="none",
        patch=64,
        discriminator_width=4,
    )
    stage = build(config)
    before = {name: p.clone() for name, p in stage.module.named_parameters()}
    result = fit(stage, config.loop, tmp_path / "run")
    moved = {name for name, p in stage.module.named_parameters() if not torch.equal(p, before[name])}
    assert not any(".autoencoder." in name for name in moved)
    parts = ("mapping", "warping", "encoder", "fuse", "attention", "transformer", "modulation")
    for part in parts:
        assert any(name.startswith(f"generator.{part}.") for name in moved), part
    assert any(name.startswith("discriminator.") for name in moved)
    assert {"l1", "warp_l1", "copy_l1", "ssim"} <= result.keys()
    with pytest.raises(UserError, match="does not fit"):
        build(replace(config, model=replace(SMALL, codebook=replace(TINY, codes=16))))
