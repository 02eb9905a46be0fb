"""Mesh flow, warping, VQIG, its training data and the renderer."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS, IRISES, LEFT_EYE, RIGHT_EYE
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_face_model
from flowvqtalker.render.mesh_flow import APERTURES, PRIOR, MeshFlow, aperture_maps, upsample_flow, warp
from flowvqtalker.render.renderer import Renderer, _windows
from flowvqtalker.render.vqig import ABLATION, VQIG, SpatialAdaIN, VQIGConfig
from flowvqtalker.render.warp import MappingNetwork, WarpConfig, WarpingNetwork
from tests.render.test_codebook import TINY

SMALL = VQIGConfig(
    codebook=TINY,
    warp=WarpConfig(input_size=64, flow_size=32, width=4, max_width=8),
    transformer_dim=16, transformer_layers=1, transformer_heads=2, transformer_mlp=16, adain_width=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def face() -> FaceModel:
    """A half ellipsoid with a fan of triangles; the bases are small random fields."""
    generator = torch.Generator().manual_seed(0)
    n = 478
    k = torch.arange(n) + 0.5
    radius, angle = torch.sqrt(k / n), k * 2.399963
    x, y = 0.7 * radius * torch.cos(angle), 0.9 * radius * torch.sin(angle)
    mean = torch.stack([x, y, -0.5 * torch.sqrt((1 - radius**2).clamp(min=0))], 1)
    from scipy.spatial import Delaunay

    triangles = torch.from_numpy(Delaunay(mean[:, :2].numpy()).simplices.astype(np.int64))
    return FaceModel(
        mean,
        torch.randn(80, n, 3, generator=generator) * 0.002,
        torch.randn(64, n, 3, generator=generator) * 0.002,
        torch.zeros(52, 65),
        triangles,
        triangles[:18],
        triangles[18:46],
    )


def _pose(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float32)


def test_no_motion_is_no_flow_and_a_shift_is_that_shift(face: FaceModel) -> None:
    mesh = MeshFlow(face, 64)
    zero = torch.zeros(1, 80), torch.zeros(1, 64)
    start = face.project(*zero, _pose(0, 0, 0, 0, 0, 16))
    assert mesh(start, start).abs().max() < 1e-6
    end = start + torch.tensor([20.0, -12.0, 0.0])
    flow = mesh(start, end)
    inside = end[0, :, :2].mean(0) / 8
    x, y = int(inside[0]), int(inside[1])
    assert flow[0, :, y, x].tolist() == pytest.approx([-20 / 256, 12 / 256], abs=1e-4)
    assert flow[0, :, 0, 0].abs().max() < 0.25 * 20 / 256  # fades away from the face


def test_warped_picture_follows_the_mesh(face: FaceModel) -> None:
    """A picture whose colours are the vertices' own coordinates shows them at the target's places after warping."""
    mesh = MeshFlow(face, 128)
    zero = torch.zeros(1, 80), torch.zeros(1, 64)
    start = face.project(*zero, _pose(0, 0, 0, 0, 0, 16))
    end = face.project(*zero, _pose(0.1, 0.25, 0.1, 0.2, 0.1, 17))
    y, x = torch.meshgrid(torch.arange(512) + 0.5, torch.arange(512) + 0.5, indexing="ij")
    out = warp(torch.stack([x, y])[None], mesh(start, end))[0]
    normal_ok = start[0, :, :2].sub(start[0, :, :2].mean(0)).norm(dim=1) < 60  # the middle: not near the silhouette
    places = end[0, normal_ok, :2].round().long()
    seen = out[:, places[:, 1], places[:, 0]].T
    assert (seen - start[0, normal_ok, :2]).norm(dim=1).median() < 1.5


def test_zero_flow_is_the_identity_and_small_flows_are_enlarged() -> None:
    image = torch.rand(2, 3, 40, 40)
    assert torch.allclose(warp(image, torch.zeros(2, 2, 10, 10)), image, atol=1e-5)
    shift = torch.zeros(1, 2, 10, 10)
    shift[:, 0] = 2 * 3 / 40
    moved = warp(image[:1], shift)
    assert torch.allclose(moved[..., :-3], image[:1, ..., 3:], atol=1e-4)


def test_untrained_warping_network_returns_the_prior() -> None:
    config = WarpConfig(input_size=64, flow_size=32, width=4, max_width=8)
    prior = torch.randn(2, 2, 32, 32) * 0.1
    sigma = MappingNetwork()(torch.randn(2, 27, 70))
    image = torch.rand(2, 3, 128, 128)
    assert sigma.shape == (2, 256)
    assert torch.equal(WarpingNetwork(config)(image, sigma, prior), prior)
    assert WarpingNetwork(replace(config, prior="none"))(image, sigma).abs().sum() == 0
    with pytest.raises(ValueError, match="needs the mesh flow"):
        WarpingNetwork(config)(image, sigma)
    with pytest.raises(ValueError, match="multiple of flow_size"):
        WarpConfig(input_size=100, flow_size=64)
    with pytest.raises(ValueError, match="27, 70"):
        MappingNetwork()(torch.zeros(1, 26, 70))


def test_image_level_adain_starts_as_the_identity() -> None:
    x = torch.randn(1, 8, 4, 4)
    assert torch.equal(SpatialAdaIN(8, 6, 4)(x, torch.randn(1, 6, 4, 4)), x)


def _run(config: VQIGConfig) -> tuple[VQIG, torch.Tensor]:
    torch.manual_seed(0)
    model = VQIG(config)
    source = model.prepare(torch.rand(1, 3, 512, 512) * 2 - 1).expand(2)
    prior = torch.zeros(2, 2, 32, 32) if config.warp.prior == "mesh" else None
    out = model(source, torch.randn(2, 27, 70), prior)
    loss = (out.image - 1).square().mean() + (out.warped - 1).square().mean() + out.latent.square().mean()
    if out.logits is not None:
        loss = loss + out.logits.square().mean()
    loss.backward()
    return model, out.image


#: Parts of each variant beside E_w, the image-level AdaIN and the frozen E_h, C, D_h, which every one has.
PARTS = {
    "B": set(),
    "W": {"mapping", "warping"},
    "phi": {"mapping", "warping", "fuse"},
    "M": {"mapping", "warping", "fuse", "attention"},
    "C": {"mapping", "warping", "fuse", "attention", "transformer"},
}


@pytest.mark.parametrize("variant", ABLATION)
def test_every_ablation_learns_what_it_has_and_has_nothing_else(variant: str) -> None:
    model, image = _run(SMALL.ablated(variant))
    assert image.shape == (2, 3, 512, 512)
    assert {name for name, _ in model.named_children()} == {"autoencoder", "encoder", "modulation"} | PARTS[variant]
    for name, parameter in model.named_parameters():
        if name.startswith("autoencoder."):
            assert parameter.grad is None, name
        elif name.endswith("hidden.weight") or name.endswith("hidden.bias") or name.startswith(("mapping", "warping")):
            assert parameter.grad is not None, name  # zero at the start, behind a layer that begins at zero
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("variant", ABLATION)
def test_every_ablation_is_rebuilt_from_its_weights_and_configuration(variant: str) -> None:
    torch.manual_seed(0)
    first = VQIG(SMALL.ablated(variant)).eval()
    second = VQIG(VQIGConfig.from_dict(json.loads(json.dumps(first.config.to_dict())))).eval()
    second.load_state_dict(first.state_dict())
    image, motion = torch.rand(1, 3, 512, 512) * 2 - 1, torch.randn(1, 27, 70)
    prior = torch.randn(1, 2, 32, 32) * 0.01
    with torch.no_grad():
        pictures = [model(model.prepare(image), motion, prior).image for model in (first, second)]
    assert torch.equal(*pictures)


def test_the_last_ablation_is_the_whole_generator_and_defaults_are_as_before() -> None:
    for config in (VQIGConfig(), VQIGConfig.lite(), VQIGConfig.paper()):
        assert config.ablated("C") == config
    old = VQIGConfig.lite().to_dict()  # a file from before the switches had none
    for switch in ("use_warp", "use_fuse", "use_attention", "use_codes"):
        assert old.pop(switch) is True
    assert VQIGConfig.from_dict(old) == VQIGConfig.lite()
    with pytest.raises(UserError, match=r"unknown variant '\+W' of the image generator; choose one of B, W, phi, M, C"):
        VQIGConfig().ablated("+W")


def test_without_the_mesh_the_warp_begins_as_the_identity() -> None:
    """``warp.prior: none`` is the paper's W, which finds all of the flow."""
    config = replace(SMALL, warp=replace(SMALL.warp, prior="none"))
    model, _ = _run(config)
    assert model.warping.out.weight.grad.abs().sum() > 0
    image = torch.rand(1, 3, 512, 512) * 2 - 1
    with torch.no_grad():
        found = model.predict(model.prepare(image), torch.randn(1, 27, 70))[0]
    assert torch.allclose(found.warped, image, atol=1e-5)


def test_configurations_round_trip() -> None:
    for config in (VQIGConfig.paper(), VQIGConfig.lite(), SMALL):
        assert VQIGConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["paper", "lite"])
def test_configurations_build_and_lite_keeps_the_budget(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = getattr(VQIGConfig, name)()
    with torch.device("meta"):
        model = VQIG(config).eval()
        source = model.prepare(torch.empty(1, 3, 512, 512))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = model.predict(source, torch.empty(1, 27, 70), torch.empty(1, 2, 128, 128))[0]
    assert out.logits is not None and out.logits.shape == (1, 256, 1024)
    if name == "lite":
        assert counter.get_total_flops() <= 14e9  # E_w <= 8 and the rest <= 6 GFLOP; D_h has its own test


def test_windows_are_clamped_and_do_not_depend_on_the_blocks() -> None:
    motion = torch.randn(40, 70)
    whole = torch.stack(list(_windows([Motion(motion[:, :64], motion[:, 64:])], 13)))
    places = (torch.arange(40)[:, None] + torch.arange(-13, 14)).clamp(0, 39)
    assert torch.equal(whole, motion[places])
    cuts = [0, 1, 14, 15, 33, 40]
    parts = [Motion(motion[a:b, :64], motion[a:b, 64:]) for a, b in pairwise(cuts)]
    assert torch.equal(torch.stack(list(_windows(parts, 13))), whole)
    for reach in (0, 13):
        counts = [len(list(_windows([Motion(motion[:n, :64], motion[:n, 64:])], reach))) for n in (0, 1, 5)]
        assert counts == [0, 1, 5]


def test_renderer_makes_a_frame_for_every_coefficient(face: FaceModel) -> None:
    portrait = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    zero, rho = torch.zeros(80), torch.tensor([0.0, 0, 0, 0, 0, 16])

    def frames(batch_size: int) -> np.ndarray:
        torch.manual_seed(0)
        renderer = Renderer(
            VQIG(SMALL), face, portrait, zero, torch.zeros(64), rho, batch_size=batch_size, dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(1)
        beta = torch.randn(5, 64, generator=generator)
        return np.stack(list(renderer.render([Motion(beta[:2], rho.expand(2, 6)), Motion(beta[2:], rho.expand(3, 6))])))

    one, three = frames(1), frames(3)
    assert one.shape == (5, 512, 512, 3) and one.dtype == np.uint8
    assert np.abs(one.astype(int) - three).max() <= 1
    with pytest.raises(ValueError, match="512, 512, 3"):
        Renderer(VQIG(SMALL), face, portrait[:100], zero, torch.zeros(64), rho)


def test_openings_are_signed_distances_to_the_rims() -> None:
    """Against the nearest of dense samples of the rims; the mouth is no convex polygon."""
    from matplotlib.path import Path as Polygon
    from scipy.spatial import KDTree

    rng = np.random.default_rng(0)
    vertices = torch.zeros(1, 478, 3)
    for rim, (x, y) in ((INNER_LIPS, (256, 380)), (RIGHT_EYE, (180, 220)), (LEFT_EYE, (330, 220))):
        angle = torch.linspace(0, 2 * torch.pi, len(rim) + 1)[:-1]
        radius = torch.from_numpy(rng.uniform(12, 30, len(rim))).float()
        vertices[0, list(rim), 0], vertices[0, list(rim), 1] = x + radius * angle.cos(), y + radius * angle.sin()
    for (centre, *rim), x in zip(IRISES, (180, 330), strict=True):
        vertices[0, centre, :2] = torch.tensor([x, 220.0])
        vertices[0, rim, :2] = torch.tensor([x, 220.0]) + 9 * torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    size = 64
    found = aperture_maps(vertices, size)[0].numpy()
    assert found.shape == (APERTURES, size, size)
    place = (np.arange(size) + 0.5) * 8
    grid = np.stack(np.meshgrid(place, place), -1).reshape(-1, 2)

    def sampled(rim: tuple[int, ...]) -> np.ndarray:
        corners = vertices[0, list(rim), :2].numpy()
        share = np.linspace(0, 1, 200, endpoint=False)[:, None, None]
        dense = (corners * (1 - share) + np.roll(corners, -1, 0) * share).reshape(-1, 2)
        distance = KDTree(dense).query(grid)[0]
        sign = np.where(Polygon(corners).contains_points(grid), 1, -1)
        return (sign * distance / 12).clip(-1, 1).reshape(size, size)

    assert np.abs(found[0] - sampled(INNER_LIPS)).max() < 0.02
    assert np.abs(found[1] - np.maximum(sampled(RIGHT_EYE), sampled(LEFT_EYE))).max() < 0.02
    discs = [9 - np.linalg.norm(grid - [x, 220], axis=1) for x in (180, 330)]
    assert np.abs(found[2] - (np.maximum(*discs) / 12).clip(-1, 1).reshape(size, size)).max() < 1e-4


def test_mesh_flow_carries_both_views_openings(face: FaceModel) -> None:
    """The source's openings, moved by a shift's flow, lie where the target's are."""
    zero = torch.zeros(1, 80), torch.zeros(1, 64)
    start = face.project(*zero, _pose(0, 0, 0, 0, 0, 16))
    end = start + torch.tensor([16.0, -8.0, 0.0])
    flow = MeshFlow(face, 64)(start, end)
    both = MeshFlow(face, 64, apertures=True)(start, end)
    assert both.shape == (1, PRIOR, 64, 64) and torch.equal(both[:, :2], flow)
    theirs, ours = both[:, 2 : 2 + 2 * APERTURES].chunk(2, dim=1)
    inside = theirs > 0
    assert inside.any() and (theirs - ours)[inside].abs().mean() < 0.1


def _shut(face: FaceModel, rim: tuple[int, ...], start: torch.Tensor, pose: torch.Tensor) -> torch.Tensor:
    """Vertices (1, 478, 3) with the least expression that brings the two sides of a rim together."""
    half = len(rim) // 2
    pairs = [list(rim[1:half]), list(rim[half + 1 :])[::-1]]

    def gaps(vertices: torch.Tensor) -> torch.Tensor:
        return vertices[:, pairs[1], 1] - vertices[:, pairs[0], 1]

    moved = face.project(torch.zeros(64, 80), torch.eye(64), pose.expand(64, -1))
    beta = -torch.linalg.lstsq((gaps(moved) - gaps(start)).T, gaps(start).T, driver="gelsd").solution
    return face.project(torch.zeros(1, 80), beta.T, pose)


@pytest.mark.parametrize("rim", [LEFT_EYE, RIGHT_EYE, INNER_LIPS])
def test_what_shuts_shows_no_slit(rim: tuple[int, ...]) -> None:
    """Just above and below a seam the skin of that side is seen, where the small flow alone still sees the opening."""
    model = load_face_model()
    pose = _pose(0.05, 0.1, -0.1, 0, 0, 16)
    neutral = model.project(torch.zeros(1, 80), torch.zeros(1, 64), pose)
    shut = _shut(model, rim, neutral, pose)
    height = (neutral[:, list(rim), 1].amax() - neutral[:, list(rim), 1].amin()).item()
    wide = neutral + 3 * (neutral - shut) if height < 12 else neutral  # the mean face's lips are nearly shut
    prior = MeshFlow(model, 128, apertures=True)(wide, shut)
    fine = upsample_flow(prior[:, :2], prior, 512)
    plain = torch.nn.functional.interpolate(prior[:, :2], (512, 512), mode="bilinear")
    opening = aperture_maps(wide, 512)[:, :2].amax(1, keepdim=True)
    seam = shut[0, [rim[4], rim[-4]], :2].mean(0)
    slit = []
    for flow in (plain, fine):
        seen = warp(opening, flow)[0, 0] * 12  # pixels inside of the opening
        column = seen[int(seam[1]) - 8 : int(seam[1]) + 9, int(seam[0])]
        slit.append(int((column > 1).sum()))
    assert slit[0] >= 3 and slit[1] <= 1
    outside = (torch.arange(512) > seam[1] + 120) | (torch.arange(512) < seam[1] - 120)
    assert torch.equal(
        fine[:, :, outside & (torch.arange(512) < 100)], plain[:, :, outside & (torch.arange(512) < 100)]
    )


def test_nothing_that_moves_alike_is_changed_at_its_seams(face: FaceModel) -> None:
    zero = torch.zeros(1, 80), torch.zeros(1, 64)
    start = face.project(*zero, _pose(0, 0, 0, 0, 0, 16))
    prior = MeshFlow(face, 64, apertures=True)(start, start + torch.tensor([16.0, -8.0, 0.0]))
    plain = torch.nn.functional.interpolate(prior[:, :2], (512, 512), mode="bilinear")
    assert (upsample_flow(prior[:, :2], prior, 512) - plain).abs().max() < 0.05 * plain.abs().max()
