"""Stage ``vqig``: the image generator on a frozen codebook, code-level supervision first, then image-level (paper
section 3.3).

With ``region`` set, the lite generator of a region of interest is trained (:mod:`flowvqtalker.train.region_vqig`);
without, the paper's, or a variant of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.data.pairs import PairDataset, PairMix
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import EYES, LIPS
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.region import RegionVQIG
from flowvqtalker.render.vqig import VQIG, Generated, VQIGConfig
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.gan import PatchDiscriminator, adversarial_loss, discriminator_loss
from flowvqtalker.train.image_stage import image_scores, load_codebook, load_matching, make_views, motion_statistics
from flowvqtalker.train.region_losses import RegionDiscriminator
from flowvqtalker.train.region_vqig import RegionVQIGStage, RegionVQIGTraining
from flowvqtalker.train.stage import Stage

__all__ = ["Config", "VQIGStage", "build"]

Batch = dict[str, Tensor]

#: Side of the mouth's crop in pixels of the image.
_MOUTH = 128


@dataclass(frozen=True)
class Data:
    """Where the images and the frozen models are."""

    shard: Path = Path("data/shards/frames")
    """Shard with images (`flowvqtalker prepare`)."""
    codebook: Path = Path("runs/codebook/weights.safetensors")
    """Trained codebook."""
    face_model: Path = Path("runs/face_model/face_model.safetensors")
    """Face model with which the shard was made."""
    start: Path | None = None
    """Weights of an image generator to begin with, as far as this one has the same parts (ablation, fine-tuning)."""
    pairs: PairMix = field(default_factory=PairMix)
    """Which pairs are drawn."""
    validation: int = 32
    """Held-out pairs that are measured."""


@dataclass(frozen=True)
class Config:
    """Configuration of the image generator's stage."""

    data: Data = field(default_factory=Data)
    region: Annotated[RegionVQIGTraining | None, tyro.conf.AvoidSubcommands] = None
    """Train the generator of a region of interest; the settings of losses below are the paper generator's
    alone."""
    model: VQIGConfig = field(default_factory=VQIGConfig.lite)
    """Sizes of the paper's generator."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=2e-4, batch_size=4, ema=0.995))
    code_steps: int = 2000
    """Steps with code-level supervision only (eq. 18); image-level losses join after them."""
    code_weight: float = 0.5
    """Weight of the cross entropy of the codes (CodeFormer)."""
    feature_weight: float = 1.0
    """Weight of the distance between z_f and the target's z_c (eq. 18)."""
    warp_weight: float = 1.0
    """Weight of the warped image's own L1 and perceptual loss, which is what trains psi and W."""
    l1_weight: float = 1.0
    """Weight of L_rec."""
    region_weight: float = 4.0
    """How much more the mouth (and half as much more the eyes) counts in L_rec than the rest (ours)."""
    perceptual: Literal["vgg19", "mobilenet", "none"] = "mobilenet"
    """Network of the perceptual loss; vgg19 is the paper's."""
    perceptual_weights: Path | None = None
    """File of its ImageNet weights, if it is not found by itself."""
    perceptual_weight: float = 1.0
    """Weight of L_per."""
    mouth_weight: float = 1.0
    """Weight of a perceptual loss on the mouth alone, twice enlarged (ours): teeth are few pixels of the image."""
    adversarial: Literal["hinge", "log"] = "hinge"
    """hinge as in CodeFormer's code, log as eq. 15 is written."""
    adversarial_weight: float = 0.05
    """Weight of L_adv. Fixed: the adaptive weight would be measured on a frozen layer here."""
    adversarial_start: int = 4000
    """Step at which the discriminator and its loss set in."""
    patch: int = 256
    """Side of the face patch that the discriminator sees."""
    discriminator_width: int = 32
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Strided layers of the discriminator."""
    discriminator_lr: float = 4.0
    """Learning rate of the discriminator, as a factor on loop.lr."""

    def __post_init__(self) -> None:
        weights: tuple[str, ...] = (
            "code_weight",
            "feature_weight",
            "warp_weight",
            "l1_weight",
            "region_weight",
            "perceptual_weight",
        )
        weights += ("mouth_weight", "adversarial_weight", "code_steps", "adversarial_start")
        check(
            *(
                (getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
                for name in weights
            ),
            (self.loop.accumulate == 1, "loop.accumulate must be 1: the discriminator sees the last batch's images"),
            (0 < self.patch <= 512, f"patch must be in (0, 512], got {self.patch}"),
        )


class VQIGStage(Stage):
    """Trains psi, W, E_w, phi, MHCA, T and the image-level AdaIN; E_h, C and D_h stay as the codebook stage left
    them."""

    name = "vqig"
    monitor = "perceptual"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.generator = VQIG(config.model)
        self.shard, self.face = _prepare(self.generator, config)
        self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.module = nn.ModuleDict({"generator": self.generator, "discriminator": self.discriminator})
        self.mesh = MeshFlow(self.face, config.model.warp.flow_size, apertures=config.model.apertures)
        self.perceptual = (
            None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights)
        )
        if self.perceptual is None:
            self.monitor = "l1"
        self._patches: tuple[Tensor, Tensor] | None = None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        frozen = {id(p) for p in self.generator.autoencoder.parameters()}
        learned = [p for p in self.generator.parameters() if id(p) not in frozen]
        return {"generator": learned, "discriminator": list(self.discriminator.parameters())}

    def lr_scale(self, group: str) -> float:
        """The spectrally normalised discriminator learns slowly: at the generator's rate it stayed undecided."""
        return self.config.discriminator_lr if group == "discriminator" else 1.0

    def dataset(self, split: str) -> PairDataset:
        return _pairs(self.shard, split, self.config)

    def generate(self, batch: Batch, decode: bool) -> tuple[Generated, Tensor, Tensor]:
        """The generator on a batch: its result, the source images, the target's vertices."""
        device = batch["target"].device
        source, prior, vertices = make_views(self.face.to(device), self.mesh.to(device), batch)
        generator = self.generator
        prepared = generator.prepare(source)
        if decode:
            return generator(prepared, batch["motion"], prior), source, vertices
        return generator.predict(prepared, batch["motion"], prior)[0], source, vertices

    def loss(self, group: str, batch: Batch, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        config = self.config
        target = batch["target"]
        decode = step >= config.code_steps
        adversarial = decode and step >= config.adversarial_start
        if group == "discriminator":
            if not adversarial or self._patches is None:
                return None, {}
            real, fake = (self.discriminator(x) for x in self._patches)
            logs: dict[str, float | Tensor] = {"real": real.detach().mean(), "fake": fake.detach().mean()}
            return discriminator_loss(real.float(), fake.float(), config.adversarial), logs

        found, _, vertices = self.generate(batch, decode)
        valid = F.interpolate(batch["valid"][:, None], target.shape[-2:])
        region = self._region(vertices, target.shape[-1])
        with torch.no_grad():
            _, indices = self.generator.autoencoder.encode(target)
            codes = self.generator.autoencoder.codebook.lookup(indices)
        feature = F.mse_loss(found.latent.float(), codes.float())
        loss = config.feature_weight * feature
        logs = {"feature": feature.detach()}
        if found.logits is not None:
            entropy = F.cross_entropy(found.logits.float().flatten(0, 1), indices.flatten())
            hits = (found.logits.argmax(-1) == indices.flatten(1)).float().mean()
            loss = loss + config.code_weight * entropy
            logs |= {"code": entropy.detach(), "hits": hits}
        if self.generator.warping is not None:
            # At half the size: W moves what is there, so its perceptual loss needs no fine texture.
            halves = [F.avg_pool2d(x, 2) for x in (found.warped, target, valid, region)]
            near, far = self._image_losses(*halves)
            loss = loss + config.warp_weight * (near + config.perceptual_weight * far)
            logs |= {"warp_l1": near.detach(), "warp_perceptual": far.detach()}
        if decode:
            near, far = self._image_losses(found.image, target, valid, region)
            loss = loss + config.l1_weight * near + config.perceptual_weight * far
            logs |= {"l1": near.detach(), "perceptual": far.detach()}
            if self.perceptual is not None and config.mouth_weight > 0:
                mouths = [F.interpolate(x, scale_factor=2) for x in self._cut(found.image, target, vertices, _MOUTH)]
                mouth = self.perceptual(*mouths)
                loss = loss + config.mouth_weight * mouth
                logs["mouth"] = mouth.detach()
        if adversarial:
            fake, real = self._cut(found.image, target, vertices, config.patch, step)
            self._patches = (real.detach(), fake.detach())
            adv = adversarial_loss(self.discriminator(fake).float(), config.adversarial)
            loss = loss + config.adversarial_weight * adv
            logs["adversarial"] = adv.detach()
        return loss, logs

    def _image_losses(self, image: Tensor, target: Tensor, valid: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
        """L1 with the regions' weight, and the perceptual distance, where the target shows something real."""
        image = torch.where(valid > 0.5, image.to(target.dtype), target)
        l1 = ((image - target).abs() * region).mean() / region.mean()
        if self.perceptual is None:
            return l1, l1.new_zeros(())
        self.perceptual.to(target.device)
        return l1, self.perceptual(image, target)

    def _region(self, vertices: Tensor, side: int) -> Tensor:
        """(B, 1, side, side) weights: 1, more in boxes around the mouth and the eyes."""
        place = (torch.arange(side, device=vertices.device) + 0.5)[None]
        weight = vertices.new_ones(len(vertices), 1, side, side)
        for points, extra in ((LIPS, 1.0), (EYES[0], 0.5), (EYES[1], 0.5)):
            box = vertices[:, list(points), :2]
            low, high = box.amin(1) - 8, box.amax(1) + 8
            inside = [((place > low[:, k : k + 1]) & (place < high[:, k : k + 1])).float() for k in (0, 1)]
            weight = weight + self.config.region_weight * extra * (
                inside[1][:, None, :, None] * inside[0][:, None, None, :]
            )
        return weight

    def _cut(
        self, image: Tensor, target: Tensor, vertices: Tensor, patch: int, step: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same patch of both images, around the mouth; with a step, moved at random."""
        side = target.shape[-1]
        corner = vertices[:, list(LIPS), :2].mean(1).cpu() - patch / 2
        if step is not None:
            generator = torch.Generator().manual_seed(self.config.loop.seed * 7919 + step)
            # From the chin up to the brows, and to both cheeks.
            corner = corner + (torch.rand(len(image), 2, generator=generator) - torch.tensor([0.5, 0.8])) * 200
        corners = corner.round().long().clamp(0, side - patch).tolist()
        cut = [[x[i, :, t : t + patch, s : s + patch] for i, (s, t) in enumerate(corners)] for x in (image, target)]
        return torch.stack(cut[0]), torch.stack(cut[1])

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Scores of :func:`~flowvqtalker.train.image_stage.image_scores` of held-out pairs, beside the copied source's
        (``copy_``) and the warped source's (``warp_``)."""
        data = self.dataset("val")
        sums: dict[str, float] = {}
        for i in range(len(data)):
            batch = {key: value[None].to(fabric.device) for key, value in data[i].items()}
            found, source, _ = self.generate(batch, True)
            for prefix, image in (("", found.image), ("warp_", found.warped), ("copy_", source)):
                for key, value in image_scores(image, batch["target"], self.perceptual).items():
                    sums[prefix + key] = sums.get(prefix + key, 0.0) + value / len(data)
        return sums

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The generator without E_h, C and D_h, which the codebook's file holds."""
        state = {k: v for k, v in self.generator.state_dict().items() if not k.startswith("autoencoder.")}
        return state, self.config.model.to_dict()


def _prepare(generator: VQIG | RegionVQIG, config: Config) -> tuple[Shard, FaceModel]:
    """Give a generator its codebook, the statistics of the motion and the weights it starts from.

    Returns:
        the shard and its face model.
    """
    data = config.data
    codebook, face = load_codebook(data.codebook, "data.codebook"), FaceModel.load(data.face_model)
    try:
        generator.load_codebook(codebook)
    except RuntimeError as error:
        raise UserError(
            f"{data.codebook} does not fit the model's codebook; give the configuration it was trained with"
        ) from error
    shard = Shard(data.shard)
    mean, deviation = motion_statistics(shard)
    generator.motion_mean.copy_(mean)
    generator.motion_std.copy_(deviation)
    if data.start is not None:
        load_matching(generator, data.start)
    return shard, face


def _pairs(shard: Shard, split: str, config: Config) -> PairDataset:
    limit = config.data.validation if split != "train" else 0
    return PairDataset(shard, split, config.data.pairs, seed=config.loop.seed, limit=limit)


def build(config: Config) -> VQIGStage | RegionVQIGStage:
    """The stage for a configuration."""
    if config.region is None:
        return VQIGStage(config)
    generator = RegionVQIG(config.region.model)
    shard, face = _prepare(generator, config)
    return RegionVQIGStage(
        config.region,
        config.loop,
        config,
        generator,
        {split: _pairs(shard, split, config) for split in ("train", "val")},
        face,
        None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights),
        RegionDiscriminator(config.discriminator_width, config.discriminator_layers),
        config.discriminator_lr,
    )
