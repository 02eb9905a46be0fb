"""Fréchet distances of Gaussians with a closed form, features, and the loaders of their weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torch.nn import functional as F

from flowvqtalker.errors import MissingDependency, UserError
from flowvqtalker_eval.metrics import frechet, inception
from flowvqtalker_eval.metrics.frechet import (
    Gaussian,
    GaussianFit,
    InceptionFeatures,
    MobileNetFeatures,
    frechet_distance,
    note,
)


def fit_gaussian(*batches: np.ndarray) -> Gaussian:
    fit = GaussianFit()
    for batch in batches:
        fit.update(batch)
    return fit.result()


def random_gaussian(generator: np.random.Generator, size: int, samples: int) -> Gaussian:
    return fit_gaussian(generator.normal(size=(samples, size)) @ generator.normal(size=(size, size)))


# ----------------------------------------------------------------------------------------------------------- distance


def test_equal_covariances_leave_the_means() -> None:
    a = random_gaussian(np.random.default_rng(0), 12, 300)
    b = Gaussian(a.mean + np.arange(12), a.covariance, 300)
    assert frechet_distance(a, b) == pytest.approx(np.square(np.arange(12)).sum(), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_commuting_covariances_have_a_closed_form() -> None:
    one, two = np.array([4.0, 9.0, 0.0]), np.array([1.0, 25.0, 16.0])
    a, b = (Gaussian(np.zeros(3), np.diag(v), 10) for v in (one, two))
    assert frechet_distance(a, b) == pytest.approx(np.square(np.sqrt(one) - np.sqrt(two)).sum())
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    a, b = (Gaussian(np.zeros(3), turn @ np.diag(v) @ turn.T, 10) for v in (one, two))
    assert frechet_distance(a, b) == pytest.approx(np.square(np.sqrt(one) - np.sqrt(two)).sum())


@pytest.mark.parametrize("samples", [200, 15])
def test_equals_the_matrix_square_root(samples: int) -> None:
    generator = np.random.default_rng(1)
    a, b = (random_gaussian(generator, 30, samples) for _ in range(2))
    root = np.trace(sqrtm(a.covariance @ b.covariance + 1e-12 * np.eye(30)).real)
    wanted = np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))


def test_batches_give_the_same_gaussian() -> None:
    features = np.random.default_rng(2).normal(50, 3, (100, 5)).astype(np.float32)
    whole = fit_gaussian(features)
    assert np.allclose(whole.mean, features.mean(0, dtype=np.float64))
    assert np.allclose(whole.covariance, np.cov(features.astype(np.float64), rowvar=False))
    with_gaps = np.concatenate([features[:7], np.full((3, 5), np.nan, np.float32), features[7:]])
    parts = fit_gaussian(*np.split(with_gaps, [1, 2, 9, 9, 60]))
    assert parts.n_images == whole.n_images == 100
    assert np.allclose(parts.covariance, whole.covariance)


def test_few_images_are_noted() -> None:
    assert note("FID", 2048, 5000) == ()
    assert note("FID", 40, 2048) == ("FID on 40 real and 2048 generated images, fewer than 2048: biased upwards",)


def test_bad_features_are_named() -> None:
    good = np.ones((4, 3))
    with pytest.raises(UserError, match="got 0"):
        fit_gaussian(np.full((4, 3), np.nan))
    with pytest.raises(UserError, match="got 1"):
        fit_gaussian(good[:1])
    fit = GaussianFit()
    fit.update(good)
    with pytest.raises(UserError, match=r"\(n, 3\), got \(4, 2\)"):
        fit.update(good[:, :2])
    with pytest.raises(UserError, match="3 and 2"):
        frechet_distance(fit.result(), fit_gaussian(good[:, :2]))


# ---------------------------------------------------------------------------------------------------------- MobileNet


@pytest.fixture(scope="module")
def crops(astronaut: np.ndarray) -> np.ndarray:
    """The astronaut's face, nothing, and another part of the image: (3, 128, 128, 3)."""
    return np.stack([astronaut[60:188, 150:278], np.zeros((128, 128, 3), np.uint8), astronaut[300:428, 100:228]])


def plain_mobilenet(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """MobileNetV2 written down from its table of layers, one operation at a time."""

    def conv(x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1, act: bool = True) -> torch.Tensor:
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)
        parts = (state[f"{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, *parts)
        return x.clamp(0, 6) if act else x

    x = conv(x, "features.0.0", "features.0.1", 2)
    index, channels = 1, 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, out, times, stride in table:
        for i in range(times):
            name, step = f"features.{index}.conv", stride if i == 0 else 1
            y, k = x, 0
            if expand > 1:
                y, k = conv(y, f"{name}.0.0", f"{name}.0.1"), 1
            y = conv(y, f"{name}.{k}.0", f"{name}.{k}.1", step, channels * expand)
            y = conv(y, f"{name}.{k + 1}", f"{name}.{k + 2}", act=False)
            x = x + y if step == 1 and channels == out else y
            index, channels = index + 1, out
    return conv(x, "features.18.0", "features.18.1").mean((2, 3))


def test_mobilenet_features(crops: np.ndarray, astronaut: np.ndarray) -> None:
    try:
        from flowvqtalker.render.perceptual import find_weights

        path = find_weights("mobilenet")
    except MissingDependency:
        pytest.skip("no MobileNetV2 weights")
    extractor = MobileNetFeatures()
    found = extractor(np.zeros((3, 9, 9, 3), np.uint8), {"aligned": crops})["mobilenet"]
    assert found.shape == (3, 1280)
    assert np.isnan(found).all(1).tolist() == [False, True, False]
    state = torch.load(path, weights_only=True)
    image = torch.from_numpy(crops[:1]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert np.allclose(found[:1], plain_mobilenet(state, (image - mean) / std), atol=1e-3)
    whole = MobileNetFeatures("frame")
    assert whole(astronaut[None], {})["mobilenet512"].shape == (1, 1280)
    assert whole.needs == ()
    assert whole.settings() != extractor.settings()


# ---------------------------------------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the form of the published one: random weights, with a classifier, without the norms' counters."""
    torch.manual_seed(0)
    model = inception.InceptionV3()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_inception_has_the_published_names() -> None:
    """Numbers of weights and names that are known of the public network."""
    with torch.device("meta"):
        state = inception.InceptionV3().state_dict()
    trained = {k: v for k, v in state.items() if k.endswith(("weight", "bias"))}
    assert sum(v.numel() for v in trained.values()) == 21_785_568  # torchvision's, without classifier and AuxLogits
    assert sum(k.endswith("conv.weight") for k in state) == 94
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch1x1.conv.weight": (320, 2048, 1, 1),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


def test_inception_sizes_and_pools() -> None:
    """17x17 and 8x8 at 299 pixels; averages leave the padding out; the last block takes maxima."""
    sizes = {}
    model = inception.InceptionV3().eval()
    for name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"):
        getattr(model, name).register_forward_hook(
            lambda _m, _i, out, name=name: sizes.__setitem__(name, tuple(out.shape[1:]))
        )
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 40, 60)).shape == (1, 2048)
    assert sizes == {
        "Conv2d_2b_3x3": (64, 147, 147),
        "Conv2d_4a_3x3": (192, 71, 71),
        "Mixed_5d": (288, 35, 35),
        "Mixed_6e": (768, 17, 17),
        "Mixed_7c": (2048, 8, 8),
    }
    seen: dict[str, torch.Tensor] = {}
    blocks = {"a": (inception._a(4, 2), 4), "c": (inception._c(4, 2), 4), "mean": (inception._e(4, False), 4)}
    for name, (block, channels) in {**blocks, "max": (inception._e(4, True), 4)}.items():
        block.branch_pool.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0]))
        x = torch.zeros(1, channels, 3, 3)
        x[..., 0, 0] = 9
        block.eval()(x)
    assert [float(seen[name][0, 0, 0, 0]) for name in ("a", "c", "mean", "max")] == [9 / 4, 9 / 4, 9 / 4, 9]


def test_inception_features(published: Path, crops: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "WEIGHTS", replace(inception.WEIGHTS, digest=""))
    extractor = InceptionFeatures(published)
    found = extractor(crops, {"aligned": crops})["inception"]
    assert np.isnan(found).all(1).tolist() == [False, True, False]
    model = inception.load_inception(published)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(crops[:1]).permute(0, 3, 1, 2) / 255)
    assert np.allclose(found[:1], wanted, atol=1e-4)
    assert found[0].std() > 0
    assert len(str(extractor.settings()["sha256"])) == 16
