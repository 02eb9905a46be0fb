"""Batches that are rendered at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_face_model
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import VQIG, VQIGConfig
from flowvqtalker.render.vqvae import CodebookConfig
from flowvqtalker.render.warp import WarpConfig

_POSE = torch.tensor([0.1, 0.0, 0.0, 0.0, 0.0, 13.0])


@pytest.fixture(scope="module")
def face() -> FaceModel:
    return load_face_model()


@pytest.fixture(scope="module")
def generator() -> VQIG:
    book = CodebookConfig(
        (8, 8, 8, 8, 8, 16),
        (8, 8, 8, 8, 8, 16),
        blocks=1,
        decoder_blocks=1,
        attention=False,
        full_resolution=False,
        upsample_kernel=1,
        codes=16,
        dim=16,
    )
    torch.manual_seed(0)
    return VQIG(
        VQIGConfig(
            book,
            WarpConfig(input_size=64, flow_size=64, width=8, max_width=16, descriptor=16),
            transformer_dim=16,
            transformer_layers=1,
            transformer_heads=2,
            transformer_mlp=16,
        )
    )


def _renderer(generator: VQIG, face: FaceModel, workers: int | None) -> Renderer:
    portrait = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    return Renderer(
        generator,
        face,
        portrait,
        torch.zeros(80),
        torch.zeros(64),
        _POSE,
        batch_size=2,
        dtype=torch.float32,
        workers=workers,
    )


def _motion(frames: int) -> Motion:
    beta = torch.randn(frames, 64, generator=torch.Generator().manual_seed(1))
    return Motion(beta, _POSE.expand(frames, 6))


@pytest.mark.slow
def test_workers_give_the_same_frames_in_the_same_order(generator: VQIG, face: FaceModel) -> None:
    def frames(workers: int) -> npt.NDArray[np.uint8]:
        return np.stack(list(_renderer(generator, face, workers).render([_motion(5)])))

    one, two = frames(1), frames(2)
    assert one.shape == (5, 512, 512, 3)
    assert len(np.unique(one.reshape(5, -1), axis=0)) == 5
    # Sums of another number of threads may round otherwise.
    assert np.abs(one.astype(int) - two).max() <= 1


def test_batches_are_rendered_at_the_same_time(generator: VQIG, face: FaceModel) -> None:
    renderer = _renderer(generator, face, 2)
    both = threading.Barrier(2, timeout=20)

    def meet(motion: Tensor) -> npt.NDArray[np.uint8]:
        both.wait()
        return np.zeros((len(motion), 1, 1, 3), np.uint8)

    renderer._batch = meet  # type: ignore[method-assign, assignment]
    assert len(list(renderer.render([_motion(8)]))) == 8


def test_the_number_of_threads_stays(generator: VQIG, face: FaceModel) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        renderer = _renderer(generator, face, None)
        assert renderer.workers == 2
        seen = []
        renderer._batch = lambda motion: seen.append(torch.get_num_threads()) or np.zeros((len(motion), 3))  # type: ignore
        assert len(list(renderer.render([_motion(5)]))) == 5
        assert seen == [1, 1, 1]
        assert torch.get_num_threads() == 3
        fresh: list[int] = []
        thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert fresh == [3]
    finally:
        torch.set_num_threads(before)


def test_errors_of_motion_and_of_rendering_arrive(generator: VQIG, face: FaceModel) -> None:
    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield _motion(30)
        raise OSError("the speech ended early")

    given: list[npt.NDArray[np.uint8]] = []
    with pytest.raises(OSError, match="ended early"):
        given.extend(_renderer(generator, face, 2).render(broken()))
    renderer = _renderer(generator, face, 2)
    del renderer.mesh
    with pytest.raises(AttributeError, match="mesh"):
        next(renderer.render([_motion(3)]))
