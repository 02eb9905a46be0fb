"""The tool for a borrowed GPU, on a toy shard and a CPU: pack, train within the time, go on."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file

from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.region import RegionConfig, RegionVQIG
from tests.render.test_generator import face
from tests.train.test_region import shard

__all__ = ["face", "shard"]

TOOL = Path(__file__).parents[1] / "tools" / "gpu_session.py"
LOOP = {"batch_size": 2, "lr": 1e-3, "threads": 1, "workers": 0, "ema": 0.5}
BOOK = {"roi": [208, 208, 96, 96], "channels": [4, 8, 8, 16], "bottleneck": 8, "codes": 24, "dim": 16}
CODEBOOK = {
    "region": {"model": BOOK, "kmeans_images": 4}, "loop": LOOP, "perceptual": "none", "discriminator_width": 4,
    "data": {"validation": 1},
}  # fmt: skip
VQIG = {
    "region": {"model": {
        "warp": {"prior": "mesh", "input_size": 64, "flow_size": 64, "width": 4, "max_width": 8},
        "transformer_layers": 1, "transformer_mlp": 16,
    }},
    "loop": LOOP, "perceptual": "none", "discriminator_width": 4, "data": {"validation": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_session"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def archive(tool: ModuleType, shard: Path, face: FaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    face.save(tmp_path / "face.safetensors")
    (tmp_path / "network.pth").write_bytes(b"weights of the perceptual network")
    monkeypatch.setattr(tool, "find_weights", lambda kind: tmp_path / "network.pth")
    file = tmp_path / "session.tar.gz"
    tool.Pack((shard,), file, hold_out=("nobody",), face_model=tmp_path / "face.safetensors").run()
    return file


@pytest.mark.slow
def test_the_archive_trains_both_stages_without_pyav_and_mediapipe(archive: Path, tmp_path: Path) -> None:
    for name, config in (("codebook", CODEBOOK), ("vqig", VQIG)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    code = (
        "import runpy, sys; sys.modules['av'] = sys.modules['mediapipe'] = None; "
        f"sys.argv[0] = {str(TOOL)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [
        sys.executable, "-c", code, "train", str(archive), "--minutes", "0.1", "--measured-steps", "1",
        "-o", str(tmp_path / "results"), "--work", str(tmp_path / "work"),
        "--codebook", str(tmp_path / "codebook.yaml"), "--vqig", str(tmp_path / "vqig.yaml"),
    ]  # fmt: skip
    for _ in range(2):  # the second call finds the runs
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    book = load_file(tmp_path / "results" / "codebook" / "weights.safetensors")
    assert book["codes.weight"].shape == (24, 16) and str(book["codes.weight"].dtype) == "torch.float16"
    generator = load_file(tmp_path / "results" / "vqig" / "weights.safetensors")
    assert any(key.startswith("transformer.") for key in generator)
    assert not any(key.startswith("autoencoder.") for key in generator)


@pytest.mark.slow
def test_an_archive_with_weights_goes_on_from_them(
    tool: ModuleType, shard: Path, face: FaceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = {"codebook": CODEBOOK, "vqig": {**VQIG, "loop": {**LOOP, "steps": 2}, "region": {
        "model": {**VQIG["region"]["model"], "fine_band": 1.5}, "image_from": 0.0, "adversarial_from": 0.5,
    }}}  # fmt: skip
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    start = tmp_path / "start"
    start.mkdir()
    face.save(start / "face.safetensors")
    (tmp_path / "network.pth").write_bytes(b"weights of the perceptual network")
    monkeypatch.setattr(tool, "find_weights", lambda kind: tmp_path / "network.pth")
    pack = tool.Pack((shard,), tmp_path / "a.tar.gz", hold_out=("nobody",), face_model=start / "face.safetensors",
                     start=start)  # fmt: skip
    with pytest.raises(UserError, match="has no codebook"):
        pack.run()
    smaller = RegionConfig.from_dict({
        **RegionConfig().to_dict(), **VQIG["region"]["model"], "codebook": BOOK, "fine_band": 0.0,
    })  # fmt: skip
    model = RegionVQIG(smaller)
    state = model.state_dict()
    save_file(model.autoencoder.state_dict(), start / "codebook.safetensors")
    own = {k: v for k, v in state.items() if not k.startswith("autoencoder.")}
    save_file(own, start / "vqig.safetensors")
    pack.run()
    tool.Train(tmp_path / "a.tar.gz", output=tmp_path / "results", work=tmp_path / "work", measured_steps=0,
               codebook=tmp_path / "codebook.yaml", vqig=tmp_path / "vqig.yaml").run()  # fmt: skip
    found = load_file(tmp_path / "results" / "vqig" / "weights.safetensors")
    assert not (tmp_path / "results" / "codebook").exists()
    bias = found["decoder.out.bias"].float()
    assert len(bias) == 16 and (bias[12:] - 2).abs().max() < 0.1  # of the mask, which the start has not
    for key, value in own.items():  # two steps of 1e-3 move little
        assert (found[key].float()[: len(value)] - value).abs().max() < 0.02, key


def test_images_are_sharp_in_the_region_alone(tool: ModuleType, shard: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    import cv2

    stored = cv2.imdecode(np.frombuffer(tool.Pack((shard,), quality=95)._encoded(image), np.uint8), cv2.IMREAD_COLOR)
    assert stored[300:310, 250:260].std() > 20 and stored[:20, :20].std() < 8
    mask = tool.sharp_mask((160, 112, 320, 288), 512)
    assert mask[160:480, 112:400].min() == 1 and mask[0, 0] == 0


def test_images_are_thinned_to_the_limit(tool: ModuleType, shard: Path, archive: Path) -> None:
    def images(count: int, plain: bool) -> object:
        return tool.Images(Shard(shard), 0, np.arange(count), [b"x" * 10_000] * count, plain)

    clips = [images(4, False), images(1, True), images(1, True), images(1, False)]
    assert [len(clip.data) for clip in tool.thin(clips, 100_000)] == [4, 1, 1, 1]
    fewer = tool.thin(clips, 35_000)
    assert [len(clip.data) for clip in fewer if not clip.plain] == [2, 1]
    assert sum(clip.plain for clip in fewer) < 2
    with pytest.raises(UserError, match="too many images"):
        tool.thin(clips, 1000)
    assert archive.stat().st_size < 2**20
