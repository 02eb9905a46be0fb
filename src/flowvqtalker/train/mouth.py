"""Stage ``mouth``: the painter of the mouth's inside, on crops of pictures that a trained image generator has warped
(ours)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import INNER_LIPS
from flowvqtalker.loading import load_face_model, load_generator
from flowvqtalker.render.mesh_flow import MeshFlow, openings, warp
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.refiner import HEIGHT, WIDTH, MouthPainter, corners, crops, inside
from flowvqtalker.render.vqig import VQIG
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.gan import PatchDiscriminator, adversarial_loss, discriminator_loss
from flowvqtalker.train.loop import Stage

__all__ = ["Config", "MouthCrops", "MouthStage", "build", "shut"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """Where the pictures and the generator are."""

    shard: Path = Path("data/shards/frames")
    """Shard with pictures (`flowvqtalker prepare`)."""
    weights: Path | None = None
    """Folder of weights with the face model, the codebook and the image generator that gets the painter; the
    package's by default."""
    stills: float = 0.6
    """Share of pairs made from a still picture moved by the face mesh."""
    opening: float = 0.6
    """Share of pairs whose lips are shut in the source and open in the target."""
    min_native: float = 0.0
    """Use only pictures whose crop had at least this many pixels of side in the original."""
    pool: int = 8000
    """Pairs that are warped, once, and then kept as crops (130 kB each)."""
    cache: Path | None = None
    """Folder in which the crops are kept for the next run; in memory by default."""
    shift: int = 12
    """Largest shift of a crop from its place, in pixels."""
    colour: float = 0.1
    """Largest relative change of brightness and of each colour."""
    validation: int = 64
    """Held-out pairs that are measured, every other one with opening lips."""


@dataclass(frozen=True)
class Config:
    """Configuration of the painter's stage."""

    data: Data = field(default_factory=Data)
    width: int = 32
    """Channels of the painter at its finest level."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=4e-4, batch_size=8, ema=0.998))
    l1_weight: float = 1.0
    """Weight of the absolute difference where the painter may paint."""
    perceptual: Literal["vgg19", "mobilenet", "none"] = "mobilenet"
    """Network of the perceptual loss."""
    perceptual_weights: Path | None = None
    """File of its ImageNet weights, if it is not found by itself."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss, of the crops' middle, twice enlarged."""
    adversarial_weight: float = 0.1
    """Weight of the hinge adversarial loss."""
    adversarial_start: int = 1000
    """Step at which the discriminator and its loss set in."""
    discriminator_width: int = 32
    """Channels of the discriminator's first layer."""
    discriminator_lr: float = 2.0
    """Learning rate of the discriminator, as a factor on loop.lr."""

    def __post_init__(self) -> None:
        weights = ("l1_weight", "perceptual_weight", "adversarial_weight", "adversarial_start")
        check(
            *(
                (getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
                for name in weights
            ),
            (self.loop.accumulate == 1, "loop.accumulate must be 1: the discriminator sees the last batch's pictures"),
            (self.width >= 8 and self.width % 8 == 0, f"width must be a multiple of 8, got {self.width}"),
            (self.data.pool > 0, f"data.pool must be positive, got {self.data.pool}"),
            (self.data.shift >= 0, f"data.shift must not be negative, got {self.data.shift}"),
            (0 <= self.data.stills <= 1, f"data.stills must be in [0, 1], got {self.data.stills}"),
            (0 <= self.data.opening <= 1, f"data.opening must be in [0, 1], got {self.data.opening}"),
        )


def shut(face: FaceModel, identity: Tensor, expression: Tensor) -> Tensor:
    """Expressions (B, 64) whose lips touch along their whole length: the nearest to those given (least squares).

    Lips that are nearly shut on one face are not on another, and the mesh would leave what is behind them to be seen.
    """
    half = len(INNER_LIPS) // 2
    upper, lower = list(INNER_LIPS[1:half]), list(INNER_LIPS[half + 1 :])[::-1]

    def gap(points: Tensor) -> Tensor:
        return points[..., lower, 1] - points[..., upper, 1]

    slope = gap(face.expression)  # (64, gaps)
    gaps = gap(face.mean) + identity @ gap(face.identity) + expression @ slope
    nearest: Tensor = expression - gaps @ torch.linalg.pinv(slope, rtol=1e-2)
    return nearest


class MouthCrops(Dataset[Batch]):
    """Crops of warped pictures around the mouth and of what they should show.

    Items: ``warped``, ``target`` (3, 128, 160) in [-1, 1], ``told`` (2, h, w): the mouth's opening in the target and
    that in the source, moved. Item ``i`` depends on the seed and ``i`` alone; the pool is filled as items ask for it.

    Arguments:
        pairs: what is warped.
        face: the shard's face model.
        generator: whose W warps.
        data: how crops are taken and changed.
        seed: of the choice.

    Raises:
        UserError: if ``data.cache`` holds crops of other settings.
    """

    def __init__(self, pairs: PairDataset, face: FaceModel, generator: VQIG, data: Data, seed: int) -> None:
        self.pairs, self.face, self.generator, self.data, self.seed = pairs, face, generator, data, seed
        self.mesh = MeshFlow(face, generator.config.warp.flow_size, openings=True)
        self.train = pairs.split == "train"
        self.size = data.pool if self.train else data.validation
        maps = generator.config.warp.flow_size
        shapes: dict[str, Any] = {
            "pictures": ((self.size, 2, 3, HEIGHT, WIDTH), np.uint8),
            "told": ((self.size, 2, HEIGHT * maps // 512, WIDTH * maps // 512), np.int8),
            "filled": ((self.size,), np.bool_),
        }
        if data.cache is None or not self.train:
            arrays: dict[str, Any] = {name: np.zeros(shape, kind) for name, (shape, kind) in shapes.items()}
        else:
            arrays = self._kept(data.cache, shapes)
        self.pictures, self.told, self.filled = arrays["pictures"], arrays["told"], arrays["filled"]

    def _kept(self, folder: Path, shapes: dict[str, Any]) -> dict[str, Any]:
        """The pool in a folder: memory maps."""
        about = folder / "about.json"
        settings = {key: str(value) for key, value in asdict(self.data).items() if key not in ("cache", "colour")}
        settings |= {"seed": str(self.seed)}
        if about.is_file():
            if json.loads(about.read_text(encoding="utf-8")) != settings:
                raise UserError(f"{folder} (data.cache) holds crops of other settings; name another folder")
            return {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in shapes}
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)
            for name, (shape, kind) in shapes.items()
        }
        about.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return arrays

    def __len__(self) -> int:
        return 2**62 if self.train else self.size

    @torch.no_grad()
    def fill(self, slot: int) -> None:
        """Warp a pair and keep its crops."""
        rng = np.random.default_rng((self.seed, 1, slot))
        opening = rng.random() < self.data.opening if self.train else slot % 2 == 1 and self.pairs.opens
        item = self.pairs.opening(rng) if opening else self.pairs[slot if self.train else slot // 2 % len(self.pairs)]
        batch = {key: value[None] for key, value in item.items()}
        if opening and bool(batch["still"]):
            batch["source_expression"] = shut(self.face, batch["identity"], batch["source_expression"])
        start = self.face.project(batch["identity"], batch["source_expression"], batch["source_pose"])
        end = self.face.project(batch["identity"], batch["target_expression"], batch["target_pose"])
        source = batch["source"]
        if bool(batch["still"]):
            back = self.mesh(end, start)
            source = warp(batch["target"], back[:, :2], back)
            if opening:  # shut lips meet in a dark line
                far = F.interpolate(openings(start, 128)[:, :1], source.shape[-2:], mode="bilinear") * 12
                shade = rng.uniform(0, 0.6) * torch.exp(-0.5 * (far / 1.5) ** 2)
                source = (source + 1) * (1 - shade) - 1
        prior = self.mesh(start, end)
        flow = self.generator.flow(self.generator.prepare(source), batch["motion"], prior)
        warped = warp(source, flow, prior)
        told = prior[:, [2, 5]]
        places = corners(told[:, 0])
        if self.train:
            shift = (rng.uniform(-1, 1, 2) * self.data.shift / 4).round().astype(int) * 4
            left, top = np.clip(np.add(places[0], shift), 0, (512 - WIDTH, 512 - HEIGHT)).tolist()
            places = [(left, top)]
        for k, image in enumerate((warped, batch["target"])):
            crop = crops(image, places)[0]
            self.pictures[slot, k] = crop.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()
        self.told[slot] = crops(told, places)[0].mul(127).round().to(torch.int8).numpy()
        self.filled[slot] = True

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng((self.seed, 2, index))
        slot = int(rng.integers(self.size)) if self.train else index
        if not self.filled[slot]:
            self.fill(slot)
        pictures, told = self.pictures[slot], self.told[slot]
        if self.train and rng.random() < 0.5:
            pictures, told = pictures[..., ::-1], told[..., ::-1]
        values = pictures.astype(np.float32) / 127.5 - 1
        if self.train:
            gain = 1 + self.data.colour * rng.uniform(-1, 1, (3, 1, 1)) + self.data.colour * rng.uniform(-1, 1)
            values = ((values + 1) * gain - 1).clip(-1, 1).astype(np.float32)
        warped, target = (torch.from_numpy(np.ascontiguousarray(value)) for value in values)
        return {"warped": warped, "target": target, "told": torch.from_numpy(told.astype(np.float32) / 127)}


class MouthStage(Stage):
    """Trains :class:`~flowvqtalker.render.refiner.MouthPainter` against a patch discriminator that is told the opening
    too."""

    name = "mouth"
    monitor = "perceptual"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.generator = load_generator(config.data.weights)
        if not self.generator.config.openings:
            raise UserError("the image generator (data.weights) has no openings, which the mouth's painter needs")
        self.face = load_face_model(config.data.weights)
        self.painter = MouthPainter(config.width)
        self.discriminator = PatchDiscriminator(config.discriminator_width, 3, channels=4)
        self.module = nn.ModuleDict({"painter": self.painter, "discriminator": self.discriminator})
        self.shard = Shard(config.data.shard)
        self.perceptual = (
            None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights)
        )
        if self.perceptual is None:
            self.monitor = "l1"
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"painter": list(self.painter.parameters()), "discriminator": list(self.discriminator.parameters())}

    def lr_scale(self, group: str) -> float:
        """The spectrally normalised discriminator learns slowly."""
        return self.config.discriminator_lr if group == "discriminator" else 1.0

    def dataset(self, split: str) -> MouthCrops:
        data, seed = self.config.data, self.config.loop.seed
        pairs = PairDataset(
            self.shard, split, stills=data.stills, colour=0.0, min_native=data.min_native, hardest_of=3, seed=seed,
            limit=0 if split == "train" else (data.validation + 1) // 2,
        )  # fmt: skip
        return MouthCrops(pairs, self.face, self.generator, data, seed)

    def painted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Painted crops (B, 3, 128, 160), and where there may be paint."""
        where = inside(batch["told"])
        return batch["warped"] + where * self.painter.paint(batch["warped"], batch["told"]).float(), where

    def loss(self, group: str, batch: Batch, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        config = self.config
        adversarial = step >= config.adversarial_start and config.adversarial_weight > 0
        if group == "discriminator":
            if not adversarial or self._last is None:
                return None, {}
            fake, true, where = self._last
            real, made = self.discriminator(true).float(), self.discriminator(fake).float()
            weight = self._patches(where, real)
            logs: dict[str, float | Tensor] = {
                k: (weight * v).detach().mean() for k, v in (("real", real), ("fake", made))
            }
            return discriminator_loss(real, made, weight=weight), logs
        target, told = batch["target"], batch["told"]
        image, where = self.painted(batch)
        l1 = ((image - target).abs() * where).mean() / where.mean()
        loss: Tensor = config.l1_weight * l1
        logs = {"l1": l1.detach()}
        if self.perceptual is not None:
            far = self._distance(image, target)
            loss = loss + config.perceptual_weight * far
            logs["perceptual"] = far.detach()
        if adversarial:
            seen = F.interpolate(told[:, :1], image.shape[-2:], mode="bilinear")
            fake = torch.cat([image, seen], 1)
            made = self.discriminator(fake).float()
            adv = adversarial_loss(made, weight=self._patches(where, made))
            loss = loss + config.adversarial_weight * adv
            logs["adversarial"] = adv.detach()
            self._last = fake.detach(), torch.cat([target, seen], 1), where
        return loss, logs

    @staticmethod
    def _patches(where: Tensor, logits: Tensor) -> Tensor:
        """Weights of the discriminator's patches, 1 on average: those count that show paint."""
        weight = F.adaptive_avg_pool2d(where, (logits.shape[-2], logits.shape[-1]))
        return weight / weight.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)

    def _distance(self, image: Tensor, target: Tensor) -> Tensor:
        assert self.perceptual is not None
        self.perceptual.to(target.device)
        middles = (x[..., 16:-16, 16:-16].float() for x in (image, target))
        distance: Tensor = self.perceptual(*(F.interpolate(x, scale_factor=2) for x in middles))
        return distance

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Perceptual distance (the crops' middle, twice enlarged) and L1 of the painted crops of held-out pairs, and
        of those whose lips open alone (``opening_``), beside those of the warped crops (``warp_``)."""
        data = self.dataset("val")
        sums: dict[str, float] = {}
        for i in range(len(data)):
            batch = {key: value[None].to(fabric.device) for key, value in data[i].items()}
            for prefix, image in (("", self.painted(batch)[0].clamp(-1, 1)), ("warp_", batch["warped"])):
                values = {f"{prefix}l1": F.l1_loss(image, batch["target"]).item()}
                if self.perceptual is not None:
                    values[f"{prefix}perceptual"] = self._distance(image, batch["target"]).item()
                if i % 2:
                    values |= {f"opening_{key}": 2 * value for key, value in values.items()}
                for key, value in values.items():
                    sums[key] = sums.get(key, 0.0) + value / len(data)
        return sums

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The painter, together with the image generator that it belongs to."""
        state = {
            key: value
            for key, value in self.generator.state_dict().items()
            if not key.startswith(("autoencoder.", "painter."))
        }
        state |= {f"painter.{key}": value for key, value in self.painter.state_dict().items()}
        return state, replace(self.generator.config, painter_width=self.config.width).to_dict()


def build(config: Config) -> MouthStage:
    """The stage for a configuration."""
    return MouthStage(config)
