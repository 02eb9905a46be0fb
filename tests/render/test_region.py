"""The generator on a region of interest: its codebook, its parts, and what the bundled weights draw with them."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import convolve
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowvqtalker import weights
from flowvqtalker.face.topology import INNER_LIPS
from flowvqtalker.loading import build_generator, load_generator
from flowvqtalker.pipeline import Talker
from flowvqtalker.render.layers import take_over
from flowvqtalker.render.mesh_flow import PRIOR, MeshFlow, aperture_maps, warp
from flowvqtalker.render.region import RegionConfig, RegionPrediction, RegionVQIG, feather
from flowvqtalker.render.region_vqvae import ChannelNorm, Codes, RegionCodebookConfig, RegionVQVAE
from flowvqtalker.render.vqig import ABLATION
from flowvqtalker.render.warp import WarpConfig

TINY = RegionConfig(
    RegionCodebookConfig((192, 128, 256, 256), channels=(8, 8, 8, 16), bottleneck=8, codes=32, dim=16),
    WarpConfig(input_size=64, flow_size=64, width=8, max_width=8, descriptor=16),
    transformer_layers=1, transformer_heads=2, transformer_mlp=16,
)  # fmt: skip


def _inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 512, 512, generator=chance) * 2 - 1
    prior = torch.randn(batch, PRIOR, 128, 128, generator=chance) * 0.01
    return image, torch.randn(batch, 70, generator=chance), prior


@pytest.fixture
def tiny() -> RegionVQIG:
    torch.manual_seed(0)
    return RegionVQIG(TINY).eval()


def test_nearest_and_expected_codes() -> None:
    torch.manual_seed(0)
    book = Codes(20, 6)
    z = torch.randn(2, 6, 3, 4)
    found = book.nearest(z)
    brute = torch.cdist(z.movedim(1, -1).reshape(-1, 6), book.weight).argmin(1).view(2, 3, 4)
    assert torch.equal(found, brute)
    logits = torch.nn.functional.one_hot(found.flatten(1), 20).float() * 100
    assert torch.allclose(book.expect(logits, (3, 4)), book.lookup(found), atol=1e-5)
    assert torch.allclose(book.expect(torch.zeros(1, 12, 20), (3, 4))[0, :, 0, 0], book.weight.mean(0), atol=1e-6)


def test_channel_norm_is_local() -> None:
    norm, x = ChannelNorm(8), torch.randn(1, 8, 4, 4)
    y = norm(x)
    assert torch.allclose(y.mean(1), torch.zeros(1, 4, 4), atol=1e-5)
    assert torch.allclose(y.var(1, unbiased=False), torch.ones(1, 4, 4), atol=1e-3)
    x[..., 0, 0] += 100
    assert torch.equal(norm(x)[..., 1:, 1:], y[..., 1:, 1:])


@pytest.mark.parametrize("roi", [(8, 112, 320, 288), (160, 112, 368, 288), (-16, 0, 64, 64), (0, 0, 0, 64)])
def test_bad_regions_are_refused(roi: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must lie in 512x512 pixels, in steps of 16"):
        RegionCodebookConfig(roi)


def test_bad_strengths_and_temperatures_are_refused() -> None:
    for wrong in ({"strength": 1.5}, {"strength": -0.1}, {"temperature": 0.0}, {"fine_band": -1.0}, {"colour": 2.0}):
        with pytest.raises(ValueError, match="strength and colour are from 0 to 1"):
            replace(TINY, **wrong)


def test_configurations_round_trip_and_name_their_generator() -> None:
    values = json.loads(json.dumps(TINY.to_dict()))
    assert RegionConfig.from_dict(values) == TINY
    assert isinstance(build_generator(values), RegionVQIG)


def test_codebook_rebuilds_the_region_s_shape() -> None:
    book = RegionVQVAE(TINY.codebook).eval()
    region = book.cut(_inputs()[0])
    z, indices = book.encode(region)
    assert region.shape == (1, 3, 256, 256) and z.shape == (1, 16, 16, 16) and indices.shape == (1, 16, 16)
    assert book(region).shape == region.shape
    assert torch.equal(book(region), book.decode(indices))
    maps = torch.arange(128.0).view(1, 1, 1, 128).expand(1, 1, 128, 128)
    assert torch.equal(book.cut(maps)[0, 0, 0], torch.arange(32.0, 96.0))


def test_only_the_region_is_drawn_and_its_border_fades(tiny: RegionVQIG) -> None:
    image, motion, prior = _inputs(2)
    with torch.no_grad():
        found = tiny(tiny.prepare(image).expand(2), motion, prior)
    change = (found.image - found.warped).abs().amax(1)
    assert found.image.shape == (2, 3, 512, 512) and found.region.shape == (2, 3, 256, 256)
    outside = torch.ones(512, 512, dtype=torch.bool)
    outside[192:448, 128:384] = False
    assert change[:, outside].max() == 0 and change[:, 220:420, 160:350].max() > 0
    weight = feather(256, 256)[0, 0]
    assert weight[24:-24, 24:-24].min() == 1 and weight[0].max() < 0.01 and (weight[:24, 128].diff() > 0).all()
    assert torch.allclose(tiny.cut(found.image), torch.lerp(tiny.cut(found.warped), found.region, weight), atol=1e-5)


def test_windows_count_by_their_middle_frame(tiny: RegionVQIG) -> None:
    image, motion, prior = _inputs()
    window = torch.randn(1, 27, 70)
    window[:, 13] = motion
    with torch.no_grad():
        source = tiny.prepare(image)
        assert torch.equal(tiny(source, motion, prior).image, tiny(source, window, prior).image)
    with pytest.raises(ValueError, match="needs a mesh flow with apertures"):
        tiny(source, motion, prior[:, :2])


def test_strength_scales_the_modulation_alone(tiny: RegionVQIG) -> None:
    image, motion, prior = _inputs()
    with torch.no_grad():
        source = tiny.prepare(image)
        assert torch.equal(tiny(source, motion, prior, 0.0).region, tiny(source, motion, prior, 1.0).region)
        for block in tiny.modulation.values():
            block.out.weight.normal_(std=0.3)
        none, half, full = (tiny(source, motion, prior, w).region for w in (0.0, 0.5, 1.0))
        assert torch.equal(half, tiny(source, motion, prior).region)  # the configuration's
    assert 0 < (half - none).abs().mean() < (full - none).abs().mean()


def _refined(drawn: Tensor, warped: Tensor, mask: float | Tensor, **values: float) -> Tensor:
    return RegionVQIG(replace(TINY, **values)).refine(torch.cat([drawn, mask + 0 * drawn[:, :1]], 1), warped)


def test_the_fine_band_is_the_warped_picture_s() -> None:
    drawn, warped = torch.rand(2, 2, 3, 256, 256)
    assert torch.equal(RegionVQIG(TINY).refine(drawn, warped), drawn)
    kernel = np.outer([1, 2, 1], [1, 2, 1])[None, None] / 16

    def low(x: Tensor) -> Tensor:
        return torch.from_numpy(convolve(x.numpy(), kernel, mode="nearest"))

    refined = low(drawn) + 1.5 * (warped - low(warped))
    assert torch.allclose(_refined(drawn, warped, 3.0, fine_band=1.5), refined, atol=1e-5)
    assert torch.allclose(_refined(drawn, warped, 0.0, fine_band=1.5), (drawn + refined) / 2, atol=1e-5)
    assert torch.equal(_refined(drawn, warped, -3.0, fine_band=1.5), drawn)
    assert torch.allclose(_refined(drawn, warped, -3.0, fine_band=1.5, mask_bias=6.0), refined, atol=1e-5)


def test_the_colour_is_the_warped_picture_s_where_the_mask_is_1() -> None:
    drawn, warped = torch.rand(2, 1, 3, 256, 256)
    mask = torch.where(torch.arange(256) < 128, 3.0, -3.0).expand(1, 1, 256, 256)
    refined = _refined(drawn, warped, mask, colour=1.0)
    given, wanted, found = (cv2.cvtColor(x[0].permute(1, 2, 0).numpy(), cv2.COLOR_RGB2YCrCb)
                            for x in (drawn, warped, refined))  # fmt: skip
    assert np.allclose(found[..., 0], given[..., 0], atol=1e-3)
    assert np.allclose(found[:, :128, 1:], wanted[:, :128, 1:], atol=1e-3)
    assert np.array_equal(found[:, 128:], given[:, 128:])


def test_frames_are_refined(tiny: RegionVQIG) -> None:
    image, motion, prior = _inputs()
    fine = RegionVQIG(replace(TINY, fine_band=1.5, colour=0.5)).eval()
    assert take_over(fine, tiny.state_dict()) == list(tiny.state_dict())
    with torch.no_grad():
        plain, found = (model(model.prepare(image), motion, prior) for model in (tiny, fine))
    mask = torch.full_like(plain.region[:, :1], 2.0)  # an untrained one
    drawn = torch.cat([plain.region, mask], 1)
    assert torch.allclose(found.region, fine.refine(drawn, fine.cut(plain.warped)), atol=1e-6)
    assert not torch.allclose(found.region, plain.region, atol=1e-3)


def test_a_smaller_decoder_starts_from_the_codebook_s() -> None:
    model = RegionVQIG(replace(TINY, decoder_attention=False, decoder_blocks=(1, 2), colour=0.5))
    model.load_codebook(RegionVQVAE(TINY.codebook).state_dict())
    frozen, own = model.autoencoder.decoder.state_dict(), model.decoder.state_dict()
    assert set(frozen) - set(own) == {k for k in frozen if k.startswith(("attention.", "level8.1."))}
    assert all(torch.equal(own[k][: len(frozen[k])], frozen[k]) for k in own)
    assert own["out.bias"][12:].eq(2).all() and not own["out.weight"][12:].any()


def test_a_low_temperature_picks_the_likeliest_code(tiny: RegionVQIG) -> None:
    logits, rest = torch.randn(1, 256, 32), torch.empty(0)
    found = RegionPrediction(rest, logits, *[rest] * 3)
    sharp = RegionVQIG(replace(TINY, temperature=1e-4)).eval()
    expected = sharp.autoencoder.codes.lookup(logits.argmax(-1).view(1, 16, 16))
    assert torch.allclose(sharp.codes(found), expected, atol=1e-4)
    assert not torch.allclose(tiny.codes(found), expected, atol=1e-2)


@torch.inference_mode()
def test_the_portrait_s_map_moves_with_the_flow() -> None:
    torch.manual_seed(0)
    generator = RegionVQIG(replace(TINY, warped_map=True)).eval()
    image, motion, prior = _inputs()
    generator.flow = lambda *_: prior[:, :2]  # type: ignore[method-assign]
    prior[:] = 0
    source = generator.prepare(image)
    still = generator.predict(source, motion, prior).fine
    assert torch.allclose(still, generator.cut(generator.encoder.features(image)[2]), atol=1e-5)
    prior[:, 0] = 16 / 256  # a code's width, in halves of the crop
    moved = generator.predict(source, motion, prior).fine
    assert torch.allclose(moved[..., :-4], still[..., 4:], atol=1e-5)
    assert not torch.allclose(moved, still, atol=0.1)


@pytest.mark.parametrize("variant", ABLATION)
def test_a_variant_of_the_ablation_uses_its_parts_alone(variant: str) -> None:
    torch.manual_seed(0)
    model = RegionVQIG(TINY.ablated(variant)).eval()
    for parameter in model.parameters():  # layers that start at zero have no effect
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    image, motion, prior = _inputs()
    found = model(model.prepare(image), motion, prior)
    found.region.square().mean().backward()
    used = {part for part in ("warping", "mapping", "fuse", "attention", "transformer")
            if any(p.grad is not None and p.grad.any() for p in getattr(model, part).parameters())}  # fmt: skip
    parts = {"W": {"warping", "mapping"}, "phi": {"fuse"}, "M": {"attention"}, "C": {"transformer"}}
    present = list(ABLATION)[1 : list(ABLATION).index(variant) + 1]
    assert used == set().union(*(parts[name] for name in present))
    with torch.no_grad():
        other = model(model.prepare(image), motion + 1, prior + 0.01)
    assert torch.equal(found.region, other.region) == (variant == "B")


def test_everything_learns_but_the_codebook() -> None:
    torch.manual_seed(0)
    model = RegionVQIG(TINY)
    model.load_codebook({**RegionVQVAE(TINY.codebook).state_dict()})
    for mine, theirs in ((model.encoder, model.autoencoder.encoder), (model.decoder, model.autoencoder.decoder)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    for parameter in model.parameters():  # layers that start at zero hide the gradients of those before them
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    image, motion, prior = _inputs(2)
    found = model(model.prepare(image).expand(2), motion, prior)
    ((found.image - 1).square().mean() + found.logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith("autoencoder.")
        assert (parameter.grad is None) == frozen, name
        assert frozen or parameter.grad.abs().sum() > 0 or name.endswith("key_value.bias"), name


def test_the_default_stays_within_its_budget() -> None:
    model = RegionVQIG(RegionConfig()).train()  # torch's fused attention of eval() is not counted
    image, motion, prior = _inputs()
    with torch.no_grad():
        source = model.prepare(image)
        with FlopCounterMode(display=False) as counter:
            model(source, motion, prior)
    assert counter.get_total_flops() <= 12e9


# ------------------------------------------------------------------------------------------------ the bundled weights

bundled = pytest.mark.skipif(
    "roi" not in weights.manifest().get("codebook.safetensors", weights.Entry("", "")).config,
    reason="the package was built without its default weights",
)


@pytest.fixture(scope="module")
def influence() -> ModuleType:
    """The benchmark that replaces codes."""
    file = Path(__file__).parents[2] / "benchmarks" / "code_influence.py"
    spec = importlib.util.spec_from_file_location("code_influence", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["code_influence"] = module
    spec.loader.exec_module(module)
    return module


class _Pair:
    """The astronaut, and a mesh-made view of her with shut lips and a turned head, from which she is drawn again."""

    def __init__(self, astronaut: np.ndarray) -> None:
        talker = Talker.from_pretrained(components=("face",))
        portrait, face = talker.portrait(astronaut), talker.face_model
        self.generator = load_generator()
        self.target = torch.from_numpy(portrait.image).permute(2, 0, 1)[None].float().div(127.5).sub(1)
        self.motion = torch.cat([portrait.expression, portrait.pose])[None]
        shut = portrait.expression + _shutting(
            face.project(portrait.identity, portrait.expression, portrait.pose), face
        )
        turned = portrait.pose + torch.tensor([0.0, 0.12, 0.0, 0.0, 0.0, 0.0])
        here = face.project(portrait.identity, portrait.expression, portrait.pose)[None]
        there = face.project(portrait.identity, shut, turned)[None]
        mesh = MeshFlow(face, 128, apertures=True)
        back = mesh(here, there)
        self.image = warp(self.target, back[:, :2], back)
        self.prior = mesh(there, here)
        self.opening = aperture_maps(here, 512)[:, :1] > 0
        self.shut_opening = aperture_maps(there, 512)[:, :1] > 0
        with torch.inference_mode():
            self.source = self.generator.prepare(self.image)


def _shutting(vertices: Tensor, face: object) -> Tensor:
    """Change of the expression (64,) that brings the inner lips together."""
    half = len(INNER_LIPS) // 2
    upper, lower = list(INNER_LIPS[1:half]), list(INNER_LIPS[half + 1 :])[::-1]
    gap = face.expression[:, lower, 1] - face.expression[:, upper, 1]  # type: ignore[attr-defined]
    flat = vertices[lower, 1] - vertices[upper, 1]
    scale = (vertices[33, :2] - vertices[263, :2]).norm() / (face.mean[33, :2] - face.mean[263, :2]).norm()  # type: ignore[attr-defined]
    basis = gap.T * scale
    ridge = torch.eye(basis.shape[1]) * 1e-2 * basis.square().sum() / basis.shape[1]
    return torch.linalg.solve(basis.T @ basis + ridge, -basis.T @ flat)


@pytest.fixture(scope="module")
def pair(astronaut: np.ndarray) -> _Pair:
    return _Pair(astronaut)


@bundled
def test_the_codes_draw_the_face(pair: _Pair, influence: ModuleType) -> None:
    found = influence.regions(pair.generator, pair.source, pair.motion, pair.prior)
    changes = {name: influence.change(found[name], found["normal"])[0] for name in influence.VARIANTS}
    assert changes["random_codes"] >= 5 and changes["no_codes"] >= 2
    target = pair.generator.cut(pair.target)
    distances = {name: float((image - target).abs().mean()) for name, image in found.items()}
    assert distances["normal"] < 0.9 * distances["source_codes"]
    assert distances["normal"] < 0.5 * distances["random_codes"]


@bundled
def test_a_generator_that_copies_the_warped_portrait_would_fail(pair: _Pair, influence: ModuleType) -> None:
    found = influence.regions(pair.generator, pair.source, pair.motion, pair.prior)
    assert influence.change(found["warp_only"], found["warp_only"]) == (0, 0)
    assert influence.change(found["warp_only"], found["normal"])[0] > 1


@bundled
def test_shut_lips_open(pair: _Pair) -> None:
    assert pair.shut_opening.sum() < 0.2 * pair.opening.sum()
    with torch.inference_mode():
        found = pair.generator(pair.source, pair.motion, pair.prior)
    where = pair.opening.expand(1, 3, -1, -1)
    drawn, warped = ((image - pair.target).abs()[where].mean() for image in (found.image, found.warped))
    assert drawn < 0.9 * warped
