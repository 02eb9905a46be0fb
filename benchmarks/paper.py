"""The paper's configuration: its sizes by part beside the published ones, and one step of its training.

    python benchmarks/paper.py                              the table of sizes (no memory, no time: meta tensors)
    python benchmarks/paper.py --step codebook              one step with discriminator and VGG19, 512x512, batch 1
    python benchmarks/paper.py --step vqig-code             one step with code-level supervision
    python benchmarks/paper.py --step vqig-image            one step with image-level supervision and discriminator
    python benchmarks/paper.py --activations                memory that a picture takes in training, by stage

Steps run on made-up pictures (scikit-image's astronaut and moved copies of it), with VGG19 of the right shapes and
random weights: time and memory do not depend on them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowvqtalker import weights
from flowvqtalker.data.shards import Clip, ShardWriter
from flowvqtalker.data.splits import split_of
from flowvqtalker.render import perceptual
from flowvqtalker.render.vqig import VQIG, VQIGConfig
from flowvqtalker.render.vqvae import VQAutoencoder
from flowvqtalker.train import stage_module
from flowvqtalker.train.config import load_yaml
from flowvqtalker.train.gan import PatchDiscriminator
from flowvqtalker.train.loop import fit

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = {
    "codebook": ("codebook", {"adversarial_start": 0}),
    "vqig-code": ("vqig", {"code_steps": 10, "adversarial_start": 10}),
    "vqig-image": ("vqig", {"code_steps": 0, "adversarial_start": 0}),
}

#: What is published of each part: the paper where it says something, else the network that it builds on.
PUBLISHED = {
    "E_h": "CodeFormer: 64 x (1,2,2,4,4,8), 2 blocks a level, attention at 16",
    "C": "paper: N = 1024, d = 256, 16x16 codes",
    "D_h": "CodeFormer: as E_h, mirrored",
    "psi": "PIRender: 27 frames, kernel 7, 3 dilated layers, 256-d",
    "W": "PIRender: ADAIN hourglass, base 32, at most 256, flow a quarter of the picture",
    "E_w": "paper: E_h, fine-tuned",
    "phi": "paper: fusion of z_w and z_c, no size",
    "MHCA": "RestoreFormer: 8 heads, q, k, v of 16x16 maps",
    "T": "CodeFormer: 9 layers, 512-d, 8 heads, MLP 1024",
    "AdaIN": "paper: image level, no size",
    "discriminator": "VQGAN: PatchGAN, 64 channels, 4 layers",
}


def _count(module: nn.Module | None) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6 if module is not None else 0.0


def _gflop(run: Callable[[], object]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def part_sizes(config: VQIGConfig) -> dict[str, tuple[float, float]]:
    """Part -> million parameters, GFLOP a 512x512 picture."""
    with torch.device("meta"):
        model = VQIG(config).eval()
        critic = PatchDiscriminator(64, 4)
        image, motion = torch.zeros(1, 3, 512, 512), torch.zeros(1, 27, 70)
        sigma = torch.zeros(1, config.warp.descriptor)
        flow = torch.zeros(1, 2, config.warp.flow_size, config.warp.flow_size)
        z = torch.zeros(1, config.codebook.dim, 16, 16)
    assert model.mapping and model.warping and model.fuse and model.attention and model.transformer
    auto, mapping, warping = model.autoencoder, model.mapping, model.warping
    fuse, attention, transformer = model.fuse, model.attention, model.transformer
    parts: dict[str, tuple[nn.Module, Callable[[], object]]] = {
        "E_h": (auto.encoder, lambda: auto.encoder(image)),
        "C": (auto.codebook, lambda: None),
        "D_h": (auto.decoder, lambda: auto.decoder(z)),
        "psi": (mapping, lambda: mapping(motion)),
        "W": (warping, lambda: warping(image, sigma, flow)),
        "E_w": (model.encoder, lambda: model.encoder(image)),
        "phi": (fuse, lambda: fuse(torch.cat([z, z], 1))),
        "MHCA": (attention, lambda: attention(z, z)),
        "T": (transformer, lambda: transformer(z)),
        "discriminator": (critic, lambda: critic(image)),
    }
    found = {key: (_count(module), _gflop(run)) for key, (module, run) in parts.items()}
    source = model.prepare(image)
    whole = _gflop(lambda: model(source, motion, flow))
    rest = whole - sum(found[key][1] for key in ("D_h", "psi", "W", "E_w", "phi", "MHCA", "T"))
    found["AdaIN"] = (_count(model) - sum(found[key][0] for key in found if key != "discriminator"), rest)
    found["a frame"] = (_count(model) - found["E_h"][0], whole)
    found["a portrait, once"] = (found["E_h"][0] + found["C"][0], _gflop(lambda: model.prepare(image)))
    return found


def sizes() -> None:
    """Print parameters and GFLOP of every part of the paper's configuration."""
    print("| part | M parameters | GFLOP | published |\n|---|---|---|---|")
    for key, (parameters, flops) in part_sizes(VQIGConfig.paper()).items():
        print(f"| {key} | {parameters:.2f} | {flops:.1f} | {PUBLISHED.get(key, '')} |")


def _clip(name: str, identity: str, pictures: list[np.ndarray[Any, Any]]) -> Clip:
    frames = len(pictures)
    pose = np.tile(np.array([0, 0, 0, 0, 0, 16], np.float32), (frames, 1))
    codes = [cv2.imencode(".png", picture[..., ::-1])[1].tobytes() for picture in pictures]
    return Clip(
        name=name, source="made up", identity=identity, split=split_of(identity), emotion=5, speech=False,
        is_image=frames == 1, identity_shape=np.zeros(80, np.float32),
        expression=np.random.default_rng(0).normal(0, 0.3, (frames, 64)).astype(np.float32), pose=pose,
        blendshapes=np.zeros((frames, 52), np.float32), landmarks=np.full((frames, 478, 3), 256, np.float32),
        residual=np.zeros(frames, np.float32), audio=None, crop=np.eye(2, 3),
        valid=np.array([[0, 0], [512, 0], [512, 512], [0, 512]], np.float32), native=512.0,
        images=list(enumerate(codes)),
    )  # fmt: skip


def make_data(folder: Path, vqig: VQIGConfig) -> dict[str, dict[str, Path]]:
    """Pictures, a shard, an untrained codebook and VGG19's shapes; the paths that the stages need."""
    import skimage.data

    portrait = skimage.data.astronaut()
    people = [next(f"{s}{i}" for i in range(999) if split_of(f"{s}{i}") == s) for s in ("train", "val")]
    faces = folder / "faces"
    faces.mkdir()
    with ShardWriter(folder / "shard") as writer:
        for person in people:
            cv2.imwrite(str(faces / f"{person}.png"), portrait[..., ::-1])
            writer.add(_clip(f"clip {person}", person, [np.roll(portrait, 3 * t, axis=1) for t in range(3)]))
            writer.add(_clip(f"still {person}", person, [portrait]))
    save_file(VQAutoencoder(vqig.codebook).state_dict(), folder / "codebook.safetensors")
    torch.save(perceptual.VGG19Features().state_dict(), folder / "vgg19.pth")
    face = weights.folder() / "face_model.safetensors"
    return {
        "codebook": {"images": faces},
        "vqig": {"shard": folder / "shard", "codebook": folder / "codebook.safetensors", "face_model": face},
    }


def prepared(name: str, scratch: Path, **changes: Any) -> Any:
    """The paper's configuration of a stage, on made-up data, at batch 1 on the CPU."""
    config = load_yaml(stage_module(name).Config, CONFIGS / "paper" / f"{name}.yaml")
    paths = make_data(scratch, config.model if name == "vqig" else VQIGConfig.lite())[name]
    loop = replace(config.loop, steps=1, batch_size=1, workers=0, device="cpu", threads=1, validate_every=0)
    config = replace(config, loop=loop, data=replace(config.data, validation=1, **paths), **changes)
    if config.perceptual == "vgg19":
        file = scratch / "vgg19.pth"
        perceptual.find_weights = lambda kind, path=None: file  # ImageNet's are a download with another hash
    return config


def step(which: str) -> None:
    """Run one step of a stage as `train` does, and print what it took."""
    name, changes = STEPS[which]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        config = prepared(name, scratch, **changes)
        stage = stage_module(name).build(config)
        stage.validate = lambda fabric: {}
        counts = {g: sum(p.numel() for p in ps) / 1e6 for g, ps in stage.parameter_groups().items()}
        begun = time.perf_counter()
        with FlopCounterMode(display=False) as counter:
            fit(stage, config.loop, scratch / "run")
        took = time.perf_counter() - begun
        header, values = (scratch / "run" / "log.csv").read_text().splitlines()[:2]
    row = dict(zip(header.split(","), values.split(","), strict=True))
    print(f"{which}, paper, {config.loop.precision}, batch 1, 512x512, one CPU core")
    print("trained parameters (M):", ", ".join(f"{key} {value:.2f}" for key, value in counts.items()))
    print(f"one step: {1 / float(row['steps_per_s']):.0f} s (with checkpoints {took:.0f} s)")
    print(f"one step: {counter.get_total_flops() / 1e9:.0f} GFLOP")
    print(f"peak memory of the process: {float(row['memory_mib']) / 1024:.2f} GiB")
    print(", ".join(f"{key} {value}" for key, value in row.items() if "/" in key))


def activations() -> None:
    """Print the memory of what one item of a batch leaves for the backward pass, with every loss switched on."""
    for name in ("codebook", "vqig"):
        with tempfile.TemporaryDirectory() as scratch:
            changes = {"adversarial_start": 0} | ({"code_steps": 0} if name == "vqig" else {"adaptive": False})
            config = prepared(name, Path(scratch), **changes)
            torch.manual_seed(0)
            stage = stage_module(name).build(config)
            stage.module.to(memory_format=torch.channels_last)
            item = stage.dataset("train")[0]
            batch = item[None] if isinstance(item, Tensor) else {key: value[None] for key, value in item.items()}
            own = {p.data_ptr() for p in stage.module.parameters()}
            kept: dict[int, int] = {}

            def note(tensor: Tensor, kept: dict[int, int] = kept, own: set[int] = own) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), \
                    torch.autocast("cpu", torch.bfloat16):  # fmt: skip
                stage.loss("generator", batch, 0)
            trained = sum(p.numel() for group in stage.parameter_groups().values() for p in group)
            print(f"paper/{name}: {sum(kept.values()) / 2**30:.2f} GiB an item; weights, averages, gradients and "
                  f"moments {trained * 20 / 2**30:.2f} GiB")  # fmt: skip


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=list(STEPS))
    parser.add_argument("--activations", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.step:
        step(options.step)
    elif options.activations:
        activations()
    else:
        sizes()


if __name__ == "__main__":
    main()
