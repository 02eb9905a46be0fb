"""The mesh flow against its definition."""

from __future__ import annotations

import pytest
import torch

from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS
from flowvqtalker.loading import load_face_model
from flowvqtalker.render.mesh_flow import MeshFlow, _inside, aperture_maps


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return load_face_model()


def _view(face: FaceModel, count: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pose = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0, 13.0]).expand(count, 6)
    return face.project(torch.zeros(count, 80), torch.randn(count, 64, generator=generator) * 0.5, pose)


def test_prepared_source_gives_the_same_flow(face: FaceModel) -> None:
    mesh, source, targets = MeshFlow(face, 64, apertures=True), _view(face), _view(face, 3, seed=1)
    prepared = mesh.prepare(source)
    assert torch.equal(mesh(prepared, targets), mesh(source, targets))
    assert not torch.equal(mesh(prepared, targets), mesh(targets[:1], targets))
    assert mesh(prepared, targets[1:2]).allclose(mesh(prepared, targets)[1:2], atol=1e-6)


def test_splat_adds_bilinear_shares_and_drops_what_lies_outside(face: FaceModel) -> None:
    mesh = MeshFlow(face, 4, 4)  # cells of one pixel with centres at .5
    cell, share = mesh._cells(torch.tensor([[[1.5, 2.5], [1.75, 0.5], [-3.0, 1.0]]]))
    out = mesh._splat(cell, share, torch.tensor([[[2.0, 8.0, 100.0]]]))
    wanted = torch.zeros(4, 4)
    wanted[2, 1], wanted[0, 1], wanted[0, 2] = 2, 6, 2
    assert out[0, 0].allclose(wanted)


def test_aperture_maps_equal_the_distances_of_every_place(face: FaceModel) -> None:
    vertices = _view(face, 2)
    place = torch.arange(64) * 8 + 4.0
    x, y = (axis.reshape(1, 1, -1) for axis in torch.meshgrid(place, place, indexing="xy"))
    whole = (_inside(vertices[:, list(INNER_LIPS), :2], x, y) / 12).clamp(-1, 1).view(2, 64, 64)
    assert torch.equal(aperture_maps(vertices, 64)[:, 0], whole)
