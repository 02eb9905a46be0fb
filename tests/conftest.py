"""What several test files use."""

from __future__ import annotations

import wave
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

# Worker processes import this file for its helpers, so that torch is imported where it is needed.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests: one that begins last leaves the other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """Write (n,) or (n, channels) samples in [-1, 1] as 16-bit WAV."""
    samples = np.atleast_2d(samples.T).T
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return path


def babble(seconds: float, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """Something with the loudness contour of speech: (n,) float64."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    voice = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 12))
    return 0.2 * voice * (0.5 + 0.5 * np.sin(2 * np.pi * 4 * time)) + 0.01 * generator.standard_normal(len(time))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The tests themselves run side by side."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder that is not the user's: signing keys are made there."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def sample_speech() -> Path:
    """The bundled ten seconds of speech."""
    return Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg"))


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """One second of babble."""
    return write_wav(tmp_path / "speech.wav", babble(1.0))


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """A real portrait in the public domain, (512, 512, 3) uint8."""
    import skimage.data

    return np.asarray(skimage.data.astronaut())


@pytest.fixture(scope="session")
def portrait_file(astronaut: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real portrait as a file."""
    from PIL import Image

    path = tmp_path_factory.mktemp("portrait") / "astronaut.png"
    Image.fromarray(astronaut).save(path)
    return path


@pytest.fixture(scope="session")
def tiny_weights(astronaut: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder of weights: tiny untrained networks, and a face model of the astronaut's own shape."""
    import torch
    from safetensors.torch import save_file

    from flowvqtalker.face.model import FaceModel
    from flowvqtalker.face.topology import EYE_CORNERS, surface_triangles
    from flowvqtalker.face.tracker import FaceTracker
    from flowvqtalker.motion.flow import ExpFlow, ExpFlowConfig, PoseFlow, PoseFlowConfig
    from flowvqtalker.motion.manifold import LatentBank
    from flowvqtalker.render.vqig import VQIG, VQIGConfig
    from flowvqtalker.render.vqvae import CodebookConfig
    from flowvqtalker.render.warp import WarpConfig
    from flowvqtalker.speech.encoder import AudioConfig
    from flowvqtalker.train.config import to_dict
    from flowvqtalker.train.release import add_weights

    folder = tmp_path_factory.mktemp("tiny_weights")
    generator = torch.Generator().manual_seed(0)

    def store(name: str, state: dict[str, torch.Tensor], config: dict[str, object]) -> None:
        file = folder / f"{name}.raw"
        save_file({key: value.contiguous() for key, value in state.items()}, file)
        add_weights(file, name, path=folder, config=config, data="nothing", steps=0)
        file.unlink()

    with FaceTracker() as tracker:
        points = torch.from_numpy(tracker.detect(astronaut)[0].landmarks)
    mean = points - points.mean(0)
    mean = mean / (mean[EYE_CORNERS[0], :2] - mean[EYE_CORNERS[1], :2]).norm()
    triangles = torch.from_numpy(surface_triangles())
    face = FaceModel(
        mean=mean,
        identity=torch.randn(80, 478, 3, generator=generator) * 0.005,
        expression=torch.randn(64, 478, 3, generator=generator) * 0.005,
        arkit=torch.randn(52, 65, generator=generator) * 0.1,
        triangles=triangles,
        mouth_triangles=triangles[:18],
        eye_triangles=triangles[:28],
    )
    store("face_model", face.state_dict(), {})

    torch.manual_seed(0)
    audio = AudioConfig(width=16, layers=2, lookahead=1)
    expflow = ExpFlow(ExpFlowConfig(steps=2, width=16, heads=2, audio=audio))
    # Untrained, a flow is near the identity: draws from the latent are wide. Trained ones give coefficients near one.
    bank = LatentBank(torch.randn(400, 64, generator=generator), torch.arange(400) % 9)
    store("expflow", {**expflow.state_dict(), **bank.tensors()}, to_dict(expflow.config))
    poseflow = PoseFlow(PoseFlowConfig(steps=2, width=16, heads=2, audio=audio))
    poseflow.data_std.fill_(0.02)
    store("poseflow", poseflow.state_dict(), to_dict(poseflow.config))

    channels = (8, 8, 8, 8, 8, 16)
    book = CodebookConfig(
        channels, channels, blocks=1, decoder_blocks=1, codes=32, dim=8, attention=False, full_resolution=False,
        upsample_kernel=1,
    )  # fmt: skip
    config = VQIGConfig(
        codebook=book,
        warp=WarpConfig(input_size=64, flow_size=32, width=4, max_width=8),
        transformer_dim=16,
        transformer_layers=1,
        transformer_heads=2,
        transformer_mlp=16,
        adain_width=8,
    )
    vqig = VQIG(config)
    store("codebook", vqig.autoencoder.state_dict(), book.to_dict())
    own = {key: value for key, value in vqig.state_dict().items() if not key.startswith("autoencoder.")}
    store("vqig", own, config.to_dict())
    return folder
