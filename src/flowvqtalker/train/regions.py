"""Stage ``regions``: the painters of mouth and eyes, on crops of pictures warped by the face mesh (ours)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.discriminator import PatchDiscriminator, adversarial_loss, discriminator_loss
from flowvqtalker.render.mesh import OPENINGS, MeshFlow, warp
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.regions import REGIONS, RegionPainter, corners, crops, places
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.loop import Stage
from flowvqtalker.train.vqig import views

__all__ = ["Config", "RegionCrops", "RegionsStage", "build"]

Batch = dict[str, Tensor]

#: Side of the mesh's maps.
_MAPS = 128
_PAINTERS = ("mouth", "eye")


@dataclass(frozen=True)
class Data:
    """Where the pictures are."""

    shard: Path = Path("data/shards/frames")
    """Shard with pictures (`flowvqtalker prepare`)."""
    face_model: Path = Path("runs/face_model/face_model.safetensors")
    """Face model with which the shard was made."""
    generator: Path | None = None
    """Weights of the image generator (of stage vqig) that the painters belong to: with them the exported weights hold
    both, ready for `python -m flowvqtalker.weights add vqig`."""
    stills: float = 0.5
    """Share of pairs made from a still picture moved by the face mesh."""
    min_native: float = 0.0
    """Use only pictures whose crop had at least this many pixels of side in the original."""
    hardest_of: int = 3
    """Of so many pairs drawn, the one whose expressions differ most is learnt from."""
    pool: int = 8000
    """Pairs that are warped, once, and then kept in memory as crops (150 kB each)."""
    shift: int = 12
    """Largest shift of a crop from its place, in pixels."""
    colour: float = 0.1
    """Largest relative change of brightness and of each colour."""
    validation: int = 60
    """Held-out pairs that are measured."""


@dataclass(frozen=True)
class Config:
    """Configuration of the painters' stage."""

    data: Data = field(default_factory=Data)
    width: int = 40
    """Channels of the mouth's painter at its finest level; three fifths of it are the eyes'."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=4e-4, batch_size=8, ema=0.998))
    l1_weight: float = 1.0
    """Weight of the absolute difference."""
    open_weight: float = 2.0
    """How much more it counts where mouth or eyes are open than around them."""
    perceptual: Literal["vgg19", "mobilenet", "none"] = "mobilenet"
    """Network of the perceptual loss."""
    perceptual_weights: Path | None = None
    """File of its ImageNet weights, if it is not found by itself."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss, of crops at their size and twice enlarged in turn."""
    adversarial_weight: float = 0.03
    """Weight of the hinge adversarial loss."""
    adversarial_start: int = 3000
    """Step at which the discriminators and their loss set in."""
    discriminator_width: int = 32
    """Channels of the discriminators' first layer."""
    discriminator_lr: float = 2.0
    """Learning rate of the discriminators, as a factor on loop.lr."""

    def __post_init__(self) -> None:
        weights = ("l1_weight", "open_weight", "perceptual_weight", "adversarial_weight", "adversarial_start")
        check(
            *(
                (getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
                for name in weights
            ),
            (self.loop.accumulate == 1, "loop.accumulate must be 1: the discriminator sees the last batch's pictures"),
            (self.width >= 8 and self.width % 20 == 0, f"width must be a multiple of 20, got {self.width}"),
            (self.data.pool > 0, f"data.pool must be positive, got {self.data.pool}"),
            (self.data.shift >= 0, f"data.shift must not be negative, got {self.data.shift}"),
            (0 <= self.data.stills <= 1, f"data.stills must be in [0, 1], got {self.data.stills}"),
        )


class RegionCrops(Dataset[Batch]):
    """Crops of warped pictures and of what they should show.

    Items: ``mouth`` (3, 128, 128) of the warped picture, ``mouth_target`` of the same shape in [-1, 1],
    ``mouth_openings`` (6, 32, 32); ``eye``, ``eye_target`` (3, 64, 96) and ``eye_openings`` (6, 16, 24) of one of the
    eyes, as a right one. Item ``i`` depends on the seed and ``i`` alone; the pool is filled as items ask for it.

    Arguments:
        pairs: what is warped; the first ``pool`` items of it.
        face: the shard's face model.
        data: how crops are taken and changed.
        seed: of the choice.
    """

    def __init__(self, pairs: PairDataset, face: FaceModel, data: Data, seed: int) -> None:
        self.pairs, self.face, self.data, self.seed = pairs, face, data, seed
        self.mesh = MeshFlow(face, _MAPS, openings=True)
        self.train = pairs.split == "train"
        self.size = data.pool if self.train else len(pairs)
        self._filled = np.zeros(self.size, bool)
        self._pool = [
            (
                np.zeros((self.size, 2, 3, region.height, region.width), np.uint8),
                np.zeros((self.size, 2 * OPENINGS, region.height // 4, region.width // 4), np.int8),
            )
            for region in REGIONS
        ]

    def __len__(self) -> int:
        return 2**62 if self.train else self.size

    @torch.no_grad()
    def _fill(self, slot: int) -> None:
        """Warp a pair and keep its crops."""
        batch = {key: value[None] for key, value in self.pairs[slot].items()}
        source, prior, vertices = views(self.face, self.mesh, batch)
        warped = warp(source, prior[:, :2])
        middles = places(vertices)
        if self.train:
            rng = np.random.default_rng((self.seed, 1, slot))
            middles = middles + torch.from_numpy(rng.uniform(-1, 1, middles.shape).astype(np.float32) * self.data.shift)
        for number, (pictures, openings) in enumerate(self._pool):
            box = corners(middles, number)
            for k, image in enumerate((warped, batch["target"])):
                crop = crops(image, box, number)[0]
                pictures[slot, k] = crop.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()
            openings[slot] = crops(prior[:, 2:], box, number)[0].mul(127).round().to(torch.int8).numpy()
        self._filled[slot] = True

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, 2, index))
        slot = int(rng.integers(self.size)) if self.train else index
        if not self._filled[slot]:
            self._fill(slot)
        item = {}
        gain = 1 + self.data.colour * rng.uniform(-1, 1, (3, 1, 1)) + self.data.colour * rng.uniform(-1, 1)
        for name, number in (("mouth", 0), ("eye", 1 + int(rng.integers(2)) if self.train else 1)):
            pictures, openings = (array[slot] for array in self._pool[number])
            if self.train and name == "mouth" and rng.random() < 0.5:
                pictures, openings = pictures[..., ::-1], openings[..., ::-1]
            values = pictures.astype(np.float32) / 127.5 - 1
            if self.train:
                values = ((values + 1) * gain - 1).clip(-1, 1).astype(np.float32)
            item[name], item[f"{name}_target"] = (torch.from_numpy(np.ascontiguousarray(v)) for v in values)
            item[f"{name}_openings"] = torch.from_numpy(openings.astype(np.float32) / 127)
        return item


class RegionsStage(Stage):
    """Trains :class:`~flowvqtalker.render.regions.RegionPainter` against a patch discriminator for each painter."""

    name = "regions"
    monitor = "mouth"

    def __init__(self, config: Config) -> None:
        self.config = config
        if not config.data.face_model.is_file():
            raise UserError(f"{config.data.face_model} not found; train face-model first, or set data.face_model")
        self._generator()  # a mistake shows now, not after training
        self.painter = RegionPainter(config.width)
        self.discriminators = nn.ModuleDict(
            {name: PatchDiscriminator(config.discriminator_width, 3) for name in _PAINTERS}
        )
        self.module = nn.ModuleDict({"painter": self.painter, "discriminators": self.discriminators})
        self.shard = Shard(config.data.shard)
        self.face = FaceModel.load(config.data.face_model)
        self.perceptual = (
            None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights)
        )
        if self.perceptual is None:
            self.monitor = "mouth_l1"
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"painter": list(self.painter.parameters()), "discriminator": list(self.discriminators.parameters())}

    def lr_scale(self, group: str) -> float:
        """The spectrally normalised discriminators learn slowly."""
        return self.config.discriminator_lr if group == "discriminator" else 1.0

    def dataset(self, split: str) -> RegionCrops:
        data, seed = self.config.data, self.config.loop.seed
        pairs = PairDataset(
            self.shard,
            split,
            stills=data.stills,
            colour=0.0,
            min_native=data.min_native,
            hardest_of=data.hardest_of,
            seed=seed,
            limit=data.validation if split != "train" else 0,
        )
        return RegionCrops(pairs, self.face, data, seed)

    def loss(self, group: str, batch: Batch, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        config = self.config
        adversarial = step >= config.adversarial_start and config.adversarial_weight > 0
        logs: dict[str, float | Tensor] = {}
        total = batch["mouth"].new_zeros(())
        if group == "discriminator":
            if not adversarial or not self._pairs:
                return None, {}
            for name, (fake, real) in self._pairs.items():
                a, b = self.discriminators[name](real).float(), self.discriminators[name](fake).float()
                total = total + discriminator_loss(a, b)
                logs |= {f"{name}_real": a.detach().mean(), f"{name}_fake": b.detach().mean()}
            return total, logs
        for name in _PAINTERS:
            warped, target, told = batch[name], batch[f"{name}_target"], batch[f"{name}_openings"]
            painted = warped + getattr(self.painter, name)(warped, told)
            inside = F.interpolate(told[:, :2].amax(1, keepdim=True), warped.shape[-2:], mode="bilinear")
            weight = 1 + config.open_weight * (inside > -0.3).float()
            l1 = ((painted.float() - target).abs() * weight).mean() / weight.mean()
            total = total + config.l1_weight * l1
            logs[f"{name}_l1"] = l1.detach()
            if self.perceptual is not None:
                far = self._distance(painted, target, 2 if step % 2 else 1)
                total = total + config.perceptual_weight * far
                logs[f"{name}_perceptual"] = far.detach()
            if adversarial:
                adv = adversarial_loss(self.discriminators[name](painted).float())
                total = total + config.adversarial_weight * adv
                logs[f"{name}_adversarial"] = adv.detach()
                self._pairs[name] = painted.detach(), target
        return total, logs

    def _distance(self, image: Tensor, target: Tensor, scale: int) -> Tensor:
        assert self.perceptual is not None
        self.perceptual.to(target.device)
        if scale > 1:
            image, target = (F.interpolate(x.float(), scale_factor=scale) for x in (image, target))
        distance: Tensor = self.perceptual(image, target)
        return distance

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Perceptual distance (crops twice enlarged) and L1 of the painted crops of held-out pairs, beside those of the
        warped crops (``warp_``)."""
        data = self.dataset("val")
        sums: dict[str, float] = {}
        for i in range(len(data)):
            batch = {key: value[None].to(fabric.device) for key, value in data[i].items()}
            for name in _PAINTERS:
                warped, target = batch[name], batch[f"{name}_target"]
                painted = warped + getattr(self.painter, name)(warped, batch[f"{name}_openings"])
                for prefix, image in (("", painted.float().clamp(-1, 1)), ("warp_", warped)):
                    values = {f"{prefix}{name}_l1": F.l1_loss(image, target).item()}
                    if self.perceptual is not None:
                        values[prefix + name] = self._distance(image, target, 2).item()
                    for key, value in values.items():
                        sums[key] = sums.get(key, 0.0) + value / len(data)
        return sums

    def _generator(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights and configuration of the image generator that the painters are put into; empty without one."""
        file = self.config.data.generator
        if file is None:
            return {}, {}
        about = file.with_name("config.json" if file.name == "weights.safetensors" else file.stem + ".json")
        if not file.is_file() or not about.is_file():
            raise UserError(
                f"{file} (data.generator) and {about.name} beside it are needed; give weights of stage vqig"
            )
        found = json.loads(about.read_text(encoding="utf-8"))
        if found.get("stage") != "vqig" or not found.get("config", {}).get("openings"):
            raise UserError(
                f"{file} (data.generator) is of no image generator with openings; give weights of stage vqig"
            )
        return load_file(file), found["config"]

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The painters, together with the image generator where ``data.generator`` names one."""
        state, config = self._generator()
        state = {key: value for key, value in state.items() if not key.startswith("painter.")}
        state |= {f"painter.{key}": value for key, value in self.painter.state_dict().items()}
        return state, {**config, "painter_width": self.config.width}


def build(config: Config) -> RegionsStage:
    """The stage for a configuration."""
    return RegionsStage(config)
