"""The codebook's scores: closed forms, brute force, files of codebooks, held-out people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from flowvqtalker.data.shards import Shard
from flowvqtalker.data.splits import split_of
from flowvqtalker.errors import UserError
from flowvqtalker.face.topology import LEFT_EYE, LIPS, RIGHT_EYE
from flowvqtalker.render.vqvae import CodebookConfig, VQAutoencoder
from flowvqtalker.train.codebook import Config, Data, build
from flowvqtalker_eval.metrics import codebook_scores
from flowvqtalker_eval.metrics.codebook_scores import (
    CodebookScores,
    Portrait,
    code_bits,
    load_codebook,
    perplexity,
    rebuild,
    reduced,
    spread,
    still_portraits,
    stored_portraits,
    usage,
    webp_within,
)
from flowvqtalker_eval.metrics.regions import EYES, MOUTH, cut, distances, regions
from flowvqtalker_eval.metrics.ssim import psnr
from tests.test_render_codebook import TINY
from tests.test_train_vqig import shard

__all__ = ["shard"]


class Taps(torch.nn.Module):
    """A perceptual network of two taps, with the loss's own formula."""

    def __init__(self, *unused: object) -> None:
        super().__init__()

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image + 2, F.avg_pool2d(image, 4) * 3 + 1]

    def forward(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        pairs = zip(self.features(image), self.features(target), strict=True)
        return sum((a - b).square().mean() / (b.square().mean() + 1e-6) for a, b in pairs) / 2


def _noise(seed: int, side: int = 512) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def test_usage_and_perplexity_have_closed_forms() -> None:
    assert usage(np.array([3, 0, 1, 0])) == 0.5
    assert perplexity(np.array([7, 7, 7, 0, 7])) == pytest.approx(4)
    assert perplexity(np.array([0, 9])) == pytest.approx(1)
    assert perplexity(np.array([3, 1])) == pytest.approx(2 ** (-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25)))
    for bad in (np.zeros(4, int), np.array([1, -1]), np.ones((2, 2), int), np.array([], int)):
        with pytest.raises(UserError, match="counts of codes"):
            usage(bad)


def test_bits_of_the_codes() -> None:
    assert code_bits(CodebookConfig.lite()) == code_bits(CodebookConfig.paper()) == 16 * 16 * 10
    assert code_bits(TINY) == 256 * 5 and code_bits(replace(TINY, codes=33)) == 256 * 6


def test_regions_are_centred_and_stay_in_the_picture() -> None:
    points = np.zeros((478, 3), np.float32)
    points[list(LIPS)] = [250.2, 400, 9]
    points[[*RIGHT_EYE, *LEFT_EYE]] = [256, 240, 9]
    boxes = regions(points)
    assert boxes == {"mouth": (186, 336, *MOUTH), "eyes": (144, 208, *EYES)}
    points[list(LIPS)] = [500, 520, 0]
    assert regions(points)["mouth"] == (512 - MOUTH[0], 512 - MOUTH[1], *MOUTH)
    points[0] = np.nan
    assert regions(points) == {}
    with pytest.raises(UserError, match=r"got \(68, 2\)"):
        regions(np.zeros((68, 2)))


def test_distances_are_those_of_the_loss() -> None:
    target, a, b = (_noise(i, 64) for i in range(3))
    network = Taps()

    def tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]

    found = distances(network, target, {"a": a, "b": b, "same": target})
    assert found["a"] == pytest.approx(float(network(tensor(a), tensor(target))), rel=1e-5)
    assert found["b"] == pytest.approx(float(network(tensor(b), tensor(target))), rel=1e-5) and found["same"] == 0
    box = (8, 24, 32, 16)
    small = [F.interpolate(tensor(cut(x, box)), scale_factor=2) for x in (a, target)]
    assert small[0].shape[-2:] == (32, 64)
    assert distances(network, target, {"a": a}, box=box)["a"] == pytest.approx(float(network(*small)), rel=1e-5)


def test_reduced_pictures_and_small_files() -> None:
    flat = np.full((512, 512, 3), 90, np.uint8)
    assert np.array_equal(reduced(flat, 10), flat)
    image = _noise(1)
    assert psnr(image, reduced(image, 32)) > psnr(image, reduced(image, 10)) + 3
    mean = reduced(image, 1)
    assert (mean == mean[0, 0]).all() and np.allclose(mean[0, 0], image.mean((0, 1)), atol=1)
    few, few_bytes = webp_within(image, 200)
    many, many_bytes = webp_within(image, 2000)
    assert few_bytes <= 200 < many_bytes <= 2000 and psnr(image, many) > psnr(image, few)
    assert few.shape == image.shape and few.dtype == np.uint8
    # Brute force over the quality at one side.
    small = np.ascontiguousarray(cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA)[..., ::-1])
    sizes = {q: len(cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, q])[1]) for q in range(1, 101)}
    best = codebook_scores._largest_fitting(small, 900)
    assert best is not None and len(best) == max(s for s in sizes.values() if s <= 900)
    with pytest.raises(UserError, match="as small as 10 bytes"):
        webp_within(image, 10)
    with pytest.raises(UserError, match="got 0"):
        reduced(image, 0)


def test_people_come_in_turn() -> None:
    groups = ["a"] * 10 + ["b"] * 2 + ["c"] * 5
    chosen = spread(groups, 8)
    assert chosen == sorted(set(chosen)) and Counter(groups[i] for i in chosen) == {"a": 3, "b": 2, "c": 3}
    assert spread(groups, 0) == spread(groups, 99) == list(range(17))
    assert Counter(groups[i] for i in spread(groups, 2)) == {"a": 1, "b": 1}
    assert spread([], 5) == []
    with pytest.raises(UserError, match="got -1"):
        spread(groups, -1)


def test_only_held_out_people_are_measured(shard: Path, tmp_path: Path) -> None:
    calls = stored_portraits(Shard(shard), "frames")
    assert [call().name for call in calls] == ["clip1/0", "clip1/1", "clip1/2"]
    portrait = stored_portraits(Shard(shard), "frames", 1)[0]()
    assert split_of(portrait.identity) == "val" and portrait.image.shape == (512, 512, 3)
    assert portrait.boxes["mouth"] == (192, 192, *MOUTH)  # its landmarks all lie in the middle
    assert stored_portraits(Shard(shard), "stills") == []
    with pytest.raises(UserError, match="choose stills or frames"):
        stored_portraits(Shard(shard), "clips")
    who = next(f"p{i}" for i in range(99) if split_of(f"p{i}") == "train")
    cv2.imwrite(str(tmp_path / f"{who}.png"), _noise(0, 64))
    with pytest.raises(UserError, match="validation split"):
        next(still_portraits(tmp_path))


@pytest.mark.parametrize("paper", [False, True])
def test_scores_of_small_codebooks(monkeypatch: pytest.MonkeyPatch, paper: bool) -> None:
    """Both kinds of layers; the codes, the means and the missing regions by brute force."""
    monkeypatch.setattr(codebook_scores, "PerceptualLoss", Taps)
    torch.manual_seed(0)
    config = replace(TINY, attention=True, full_resolution=True, upsample_kernel=3) if paper else TINY
    model = VQAutoencoder(config)
    scores = CodebookScores({"book": model}, fid=False)
    with pytest.raises(UserError, match="no picture was measured"):
        scores.table("nothing")
    boxes = {"mouth": (200, 300, *MOUTH), "eyes": (100, 200, *EYES)}
    pictures = [Portrait("a", "A", _noise(0), boxes), Portrait("b", "B", _noise(1), {})]
    made = [scores.add(p) for p in pictures]
    table = scores.table("title")
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [
        "book", "book, no codes", "WebP of as many bits", "7x7 pixels", "32x32 pixels",
    ]  # fmt: skip
    codes = []
    for picture, found in zip(pictures, made, strict=True):
        with torch.no_grad():
            image = torch.from_numpy(picture.image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
            _, indices = model.encode(image)
            decoded = ((model.decode(indices)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
        codes.append(indices.flatten())
        assert np.abs(found["book"].astype(float) - decoded).max() <= 1
    counts = np.bincount(torch.cat(codes).numpy(), minlength=32)
    assert np.array_equal(scores.counts["book"], counts)
    book = rows["book"].values
    assert book["usage"] == usage(counts) and book["perplexity"] == perplexity(counts) and book["bits"] == 1280
    assert rows["WebP of as many bits"].values["bits"] <= 1280 and rows["7x7 pixels"].values["bits"] == 49 * 24
    assert rows["book, no codes"].values["bits"] is None
    expected = [float(psnr(p.image, m["book"])[0]) for p, m in zip(pictures, made, strict=True)]
    assert book["psnr"] == pytest.approx(np.mean(expected))
    # The second picture has no face: the regions are the first one's alone.
    own = cut(pictures[0].image, boxes["mouth"]), cut(made[0]["book"], boxes["mouth"])
    assert book["mouth_psnr"] == pytest.approx(float(psnr(*own)[0]))
    assert rows["book"].clips == 2 and rows["book"].frames == 2
    assert "512 codes in 2 pictures, out of a codebook of 32" in " ".join(table.notes)
    with pytest.raises(UserError, match="c: pictures must be"):
        scores.add(Portrait("c", "C", _noise(0, 256), {}))
    with pytest.raises(UserError, match="no codebook"):
        CodebookScores({}, fid=False)


def test_codebooks_load_from_weights_and_from_runs(tiny_weights: Path, tmp_path: Path) -> None:
    packed = load_codebook(tiny_weights)
    assert packed.config.codes == 32 and not packed.training
    torch.manual_seed(1)
    model = VQAutoencoder(TINY).eval()
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="holds neither"):
        load_codebook(run)
    save_file(model.state_dict(), run / "weights.safetensors")
    about = {"stage": "codebook", "step": 3, "config": TINY.to_dict()}
    (run / "config.json").write_text(json.dumps(about))
    image = _noise(3)
    for a, b in zip(rebuild(load_codebook(run), image), rebuild(model, image), strict=True):
        assert np.array_equal(a, b)
    for text, message in (
        (json.dumps(about | {"stage": "vqig"}), "a run of stage vqig"),
        (json.dumps(about | {"config": replace(TINY, codes=16).to_dict()}), "cannot be read"),
        (json.dumps({"stage": "codebook"}), "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
    ):
        (run / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_codebook(run)


def test_the_stage_can_begin_with_a_codebook(tmp_path: Path) -> None:
    torch.manual_seed(2)
    given = VQAutoencoder(TINY)
    save_file(given.state_dict(), tmp_path / "start.safetensors")
    pictures = tmp_path / "faces"
    pictures.mkdir()
    for i in range(3):
        cv2.imwrite(str(pictures / f"p{i}.png"), _noise(i, 64))
    config = Config(data=Data(pictures, start=tmp_path / "start.safetensors"), model=TINY, perceptual="none")
    stage = build(config)
    stage.on_start(torch.rand(1, 3, 64, 64))
    assert all(torch.equal(v, given.state_dict()[k]) for k, v in stage.autoencoder.state_dict().items())
    fresh = build(replace(config, data=Data(pictures)))
    before = fresh.autoencoder.codebook.weight.clone()
    fresh.on_start(torch.rand(1, 3, 64, 64))
    assert not torch.equal(fresh.autoencoder.codebook.weight, before)
    with pytest.raises(UserError, match=r"no\.safetensors not found"):
        build(replace(config, data=Data(pictures, start=tmp_path / "no.safetensors")))
    with pytest.raises(UserError, match="does not hold a codebook of this size"):
        build(replace(config, model=replace(TINY, codes=16)))
