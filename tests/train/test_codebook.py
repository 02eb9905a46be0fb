"""The codebook stage can begin with the weights of another codebook."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flowvqtalker.errors import UserError
from flowvqtalker.render.vqvae import VQAutoencoder
from flowvqtalker.train.codebook import Config, Data, build
from tests.render.test_codebook import TINY


def _noise(seed: int, side: int = 512) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def test_the_stage_can_begin_with_a_codebook(tmp_path: Path) -> None:
    torch.manual_seed(2)
    given = VQAutoencoder(TINY)
    save_file(given.state_dict(), tmp_path / "start.safetensors")
    images = tmp_path / "faces"
    images.mkdir()
    for i in range(3):
        cv2.imwrite(str(images / f"p{i}.png"), _noise(i, 64))
    config = Config(data=Data(images, start=tmp_path / "start.safetensors"), model=TINY, perceptual="none")
    stage = build(config)
    stage.on_start(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in stage.autoencoder.state_dict().items())
    fresh = build(replace(config, data=Data(images)))
    before = fresh.autoencoder.codebook.weight.clone()
    fresh.on_start(torch.rand(1, 3, 64, 64))
    assert not torch.equal(fresh.autoencoder.codebook.weight, before)
    with pytest.raises(UserError, match=r"no\.safetensors not found"):
        build(replace(config, data=Data(images, start=tmp_path / "no.safetensors")))
    with pytest.raises(UserError, match="does not hold a codebook of this size"):
        build(replace(config, model=replace(TINY, codes=16)))
