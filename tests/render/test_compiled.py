"""The compiled graphs of the default weights against torch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowvqtalker import weights
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_compiled, load_face_model, load_generator, render_dtype
from flowvqtalker.render.compiled import CompiledGenerator, warp_levels
from flowvqtalker.render.mesh_flow import MeshFlow, warp
from flowvqtalker.render.region import RegionVQIG
from flowvqtalker.render.renderer import Renderer

pytest.importorskip("openvino")
_POSE = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0, 13.0])


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return load_face_model()


@pytest.fixture(scope="module")
def generator() -> RegionVQIG:
    generator = load_generator(compiled=True)
    assert isinstance(generator, RegionVQIG)
    assert generator.compiled is not None, "run tools/compile_generator.py: the weights have changed"
    return generator


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    from skimage.data import astronaut

    return np.ascontiguousarray(astronaut())


def _frames(generator: RegionVQIG, face: FaceModel, portrait: np.ndarray, dtype: torch.dtype, workers: int = 1):
    beta = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * 0.5
    start = (torch.zeros(80), torch.zeros(64), _POSE)
    renderer = Renderer(generator, face, portrait, *start, dtype=dtype, workers=workers)
    return np.stack(list(renderer.render([Motion(beta, _POSE.expand(3, 6))]))).astype(np.float64)


def test_frames_are_those_of_torch(generator: RegionVQIG, face: FaceModel, portrait: np.ndarray) -> None:
    exact = _frames(generator, face, portrait, torch.float32)
    fast = _frames(generator, face, portrait, torch.int8)
    assert (10 * np.log10(255**2 / ((fast - exact) ** 2).mean((1, 2, 3))) > 42).all()
    assert np.array_equal(fast, _frames(generator, face, portrait, torch.int8, workers=2))


def test_processors_without_bfloat16_draw_in_float32(
    generator: RegionVQIG, face: FaceModel, portrait: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO chooses other kernels there."""
    monkeypatch.setattr(CompiledGenerator, "_bfloat16", lambda self: False)
    expected = _frames(generator, face, portrait, torch.float32)
    monkeypatch.setattr(generator, "compiled", load_compiled())
    frames = _frames(generator, face, portrait, torch.int8)
    assert (10 * np.log10(255**2 / ((frames - expected) ** 2).mean((1, 2, 3))) > 42).all()


def test_warped_levels_are_those_of_torch(face: FaceModel, portrait: np.ndarray) -> None:
    pose = torch.stack([_POSE, torch.tensor([0.0, 0.15, 0.05, 0.0, 0.0, 13.0])])
    beta = torch.randn(2, 64, generator=torch.Generator().manual_seed(2)) * 0.5
    views = face.project(torch.zeros(2, 80), beta, pose)
    prior = MeshFlow(face, 128, apertures=True)(views[:1], views[1:])
    wanted = warp(torch.from_numpy(portrait).permute(2, 0, 1)[None].float(), prior[:, :2], prior)
    found = warp_levels(portrait, prior[0, :2].numpy(), prior[0].numpy())
    away = np.abs(found - wanted[0].permute(1, 2, 0).numpy())
    assert away.mean() < 0.5
    assert np.quantile(away, 0.999) < 6  # remap rounds places to 1/32 of a pixel


def test_other_weights_than_the_compiled_ones_are_drawn_by_torch(
    generator: RegionVQIG, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert render_dtype(generator, cpu) == torch.int8
    monkeypatch.setattr("flowvqtalker.loading.fast_dtype", lambda device: torch.bfloat16)
    assert render_dtype(generator, gpu) == torch.bfloat16
    entries = weights.manifest()
    changed = dataclasses.replace(entries["vqig.safetensors"], sha256="0" * 64)
    monkeypatch.setattr(weights, "manifest", lambda *args, **own: entries | {"vqig.safetensors": changed})
    assert load_compiled() is None
    monkeypatch.setattr(weights, "manifest", lambda *args, **own: entries)
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert load_compiled() is None


def test_int8_without_graphs_is_refused(face: FaceModel, portrait: np.ndarray, generator: RegionVQIG) -> None:
    kept, generator.compiled = generator.compiled, None
    try:
        with pytest.raises(ValueError, match="compiled graphs"):
            Renderer(generator, face, portrait, torch.zeros(80), torch.zeros(64), _POSE, dtype=torch.int8)
    finally:
        generator.compiled = kept


def test_openvino_reports_nothing_to_its_makers(tmp_path):
    """Its telemetry writes an identifier into the home folder at import, and fails where there is no home."""
    pytest.importorskip("openvino_telemetry")
    code = "import sys; from flowvqtalker.runtime import load_openvino; load_openvino()\n"
    code += "sys.exit(any(name.startswith('openvino_telemetry') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
