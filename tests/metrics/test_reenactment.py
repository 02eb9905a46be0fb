"""Scores of reenacted pairs: closed forms, the mouth's and the eyes' crops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE
from flowvqtalker.render.vqig import VQIG
from flowvqtalker_eval.metrics import reenactment
from flowvqtalker_eval.metrics.reenactment import Pair, Reenactment, Scores
from flowvqtalker_eval.metrics.regions import SIZES, crop, perceptual_distances, regions
from tests.render.test_generator import SMALL, face
from tests.train.test_vqig import shard

__all__ = ["face", "shard"]

MOUTH, EYES = SIZES["mouth"], SIZES["eyes"]


class Taps(torch.nn.Module):
    """A perceptual network of two taps, with the loss's own formula."""

    def __init__(self, *unused: object) -> None:
        super().__init__()

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image + 2, F.avg_pool2d(image, 4) * 3 + 1]

    def forward(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.features(image), self.features(target), strict=True)
        return sum((a - b).square().mean() / (b.square().mean() + 1e-6) for a, b in pairs) / 2


def test_regions_are_centred_and_stay_in_the_image() -> None:
    points = np.zeros((478, 3), np.float32)
    points[list(LIPS)] = [250.2, 400, 9]
    points[[*RIGHT_EYE, *LEFT_EYE]] = [256, 240, 9]
    assert regions(points) == {"mouth": (186, 336, *MOUTH), "eyes": (144, 208, *EYES)}
    points[list(LIPS)] = [500, 520, 0]
    assert regions(points)["mouth"] == (512 - MOUTH[0], 512 - MOUTH[1], *MOUTH)
    points[0] = np.nan
    assert regions(points) == {}
    with pytest.raises(UserError, match=r"got \(68, 2\)"):
        regions(np.zeros((68, 2)))


def test_distances_are_those_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    target, a, b = (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3))
    network = Taps()

    def tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

    found = perceptual_distances(network, target, {"a": a, "b": b, "same": target})
    assert found["a"] == pytest.approx(float(network(tensor(a), tensor(target))), rel=1e-5)
    assert found["b"] == pytest.approx(float(network(tensor(b), tensor(target))), rel=1e-5) and found["same"] == 0
    box = (8, 24, 32, 16)
    small = [F.interpolate(tensor(crop(x, box)), scale_factor=2) for x in (a, target)]
    assert small[0].shape[-2:] == (32, 64)
    distance = perceptual_distances(network, target, {"a": a}, box)["a"]
    assert distance == pytest.approx(float(network(*small)), rel=1e-5)


def test_each_region_is_judged_on_its_own(shard: Path, face: FaceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reenactment, "PerceptualLoss", Taps)
    target = np.full((512, 512, 3), 100, np.uint8)
    wrong = target.copy()
    wrong[200:264, 144:368] = 130  # the eyes' crop alone
    boxes = {"eyes": (144, 200, *EYES), "mouth": (192, 336, *MOUTH)}
    pair = Pair("a/1", target, target, {"wrong": wrong, "same": target}, boxes)
    scores = Scores(fid=False)
    scores.add(pair)
    values = {row.name: row.values for row in scores.table("title").rows}
    assert values["wrong"]["eyes"] > 0 and values["wrong"]["mouth"] == 0 and values["same"]["eyes"] == 0
    assert values["wrong"]["eyes_psnr"] == pytest.approx(20 * np.log10(255 / 30))
    assert values["wrong"]["mouth_ssim"] == pytest.approx(1)
    scores.add(replace(pair, name="a/2", boxes={}))  # not judged, and not counted
    again = {row.name: row.values for row in scores.table("t").rows}
    assert again["wrong"]["eyes"] == values["wrong"]["eyes"]
    torch.manual_seed(0)
    pairs = Reenactment(shard, face, {"V": VQIG(SMALL).eval()}, dtype=torch.float32)
    item = pairs.data[0]
    end = face.project(item["identity"], item["target_expression"], item["target_pose"]).numpy()
    assert next(iter(pairs)).boxes == regions(end)
