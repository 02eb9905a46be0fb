"""Stage ``vqig``: the image generator on a frozen codebook, code-level supervision first, then image-level (paper
section 3.3)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.face.model import FaceModel
from flowvqtalker.face.topology import EYES, LIPS
from flowvqtalker.render.mesh_flow import MeshFlow, warp
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.vqig import VQIG, Generated, VQIGConfig
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.gan import PatchDiscriminator, adversarial_loss, discriminator_loss
from flowvqtalker.train.loop import Stage

__all__ = ["Config", "VQIGStage", "build"]

Batch = dict[str, Tensor]

logger = logging.getLogger(__name__)

#: Side of the mouth's crop in pixels of the picture.
_MOUTH = 128


@dataclass(frozen=True)
class Data:
    """Where the pictures and the frozen models are."""

    shard: Path = Path("data/shards/frames")
    """Shard with pictures (`flowvqtalker prepare`)."""
    codebook: Path = Path("runs/codebook/weights.safetensors")
    """Trained codebook."""
    face_model: Path = Path("runs/face_model/face_model.safetensors")
    """Face model with which the shard was made."""
    start: Path | None = None
    """Weights of an image generator to begin with, as far as this one has the same parts (ablation, fine-tuning)."""
    stills: float = 0.5
    """Share of pairs made from a still picture moved by the face mesh."""
    colour: float = 0.1
    """Largest relative change of brightness, contrast and colour of a pair."""
    min_native: float = 0.0
    """Use only pictures whose crop had at least this many pixels of side in the original."""
    hardest_of: int = 1
    """Of so many pairs drawn, the one whose expressions differ most is learnt from (ours): most frames of a clip are
    much alike, and what warping cannot do is seen where they are not."""
    validation: int = 32
    """Held-out pairs that are measured."""


@dataclass(frozen=True)
class Config:
    """Configuration of the image generator's stage."""

    data: Data = field(default_factory=Data)
    model: VQIGConfig = field(default_factory=VQIGConfig.lite)
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=2e-4, batch_size=4, ema=0.995))
    code_steps: int = 2000
    """Steps with code-level supervision only (eq. 18); image-level losses join after them."""
    code_weight: float = 0.5
    """Weight of the cross entropy of the codes (CodeFormer)."""
    feature_weight: float = 1.0
    """Weight of the distance between z_f and the target's z_c (eq. 18)."""
    warp_weight: float = 1.0
    """Weight of the warped picture's own L1 and perceptual loss, which is what trains psi and W."""
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
    """Weight of a perceptual loss on the mouth alone, twice enlarged (ours): teeth are few pixels of the picture."""
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
            (self.loop.accumulate == 1, "loop.accumulate must be 1: the discriminator sees the last batch's pictures"),
            (0 < self.patch <= 512, f"patch must be in (0, 512], got {self.patch}"),
            (0 <= self.data.stills <= 1, f"data.stills must be in [0, 1], got {self.data.stills}"),
            (self.data.hardest_of >= 1, f"data.hardest_of must be at least 1, got {self.data.hardest_of}"),
        )


class VQIGStage(Stage):
    """Trains psi, W, E_w, phi, MHCA, T and the image-level AdaIN; E_h, C and D_h stay as the codebook stage left
    them."""

    name = "vqig"
    monitor = "perceptual"

    def __init__(self, config: Config) -> None:
        self.config = config
        for file in (config.data.codebook, config.data.face_model):
            if not file.is_file():
                raise UserError(
                    f"{file} not found; train face-model and codebook first, or set data.codebook, data.face_model"
                )
        self.generator = VQIG(config.model)
        codebook = load_file(config.data.codebook)
        try:
            self.generator.load_codebook({key: value.float() for key, value in codebook.items()})
        except RuntimeError as error:
            raise UserError(
                f"{config.data.codebook} does not fit model.codebook; give the configuration it was trained with"
            ) from error
        self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.module = nn.ModuleDict({"generator": self.generator, "discriminator": self.discriminator})
        self.shard = Shard(config.data.shard)
        self.face = FaceModel.load(config.data.face_model)
        self.mesh = MeshFlow(self.face, config.model.warp.flow_size, apertures=config.model.apertures)
        self.perceptual = (
            None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights)
        )
        if self.perceptual is None:
            self.monitor = "l1"
        self._standardise()
        if config.data.start is not None:
            self._begin_with(config.data.start)
        self._patches: tuple[Tensor, Tensor] | None = None

    def _standardise(self) -> None:
        """Means and deviations of the motion coefficients in the training split, for psi."""
        clips = self.shard.select("train")
        rows = torch.cat(
            [
                torch.arange(int(s), int(s + n))
                for s, n in zip(self.shard.start[clips], self.shard.length[clips], strict=True)
            ]
        )
        picked = rows[:: max(1, len(rows) // 20_000)].numpy()
        values = torch.cat(
            [torch.from_numpy(self.shard.expression[picked]), torch.from_numpy(self.shard.pose[picked])], dim=1
        )
        self.generator.motion_mean.copy_(values.mean(0))
        self.generator.motion_std.copy_(values.std(0).clamp(min=1e-3))

    def _begin_with(self, file: Path) -> None:
        """Take over what fits of another image generator's weights: its parts, and the means and deviations that its
        psi knows."""
        if not file.is_file():
            raise UserError(f"{file} not found; set data.start to the weights of an image generator, or leave it out")
        own = self.generator.state_dict()
        given = load_file(file)
        taken = {key: value.float() for key, value in given.items() if key in own and own[key].shape == value.shape}
        new = sorted({key.split(".")[0] for key in own if key not in taken} - {"autoencoder"})
        if not any(key.startswith("encoder.") for key in taken):
            raise UserError(f"{file} (data.start) holds no image generator of this size; give one, or leave it out")
        self.generator.load_state_dict(taken, strict=False)
        logger.info(
            "%d of %d tensors come from %s; new parts: %s", len(taken), len(given), file, ", ".join(new) or "none"
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        frozen = {id(p) for p in self.generator.autoencoder.parameters()}
        learned = [p for p in self.generator.parameters() if id(p) not in frozen]
        return {"generator": learned, "discriminator": list(self.discriminator.parameters())}

    def lr_scale(self, group: str) -> float:
        """The spectrally normalised discriminator learns slowly: at the generator's rate it stayed undecided."""
        return self.config.discriminator_lr if group == "discriminator" else 1.0

    def dataset(self, split: str) -> PairDataset:
        data = self.config.data
        limit = data.validation if split != "train" else 0
        return PairDataset(
            self.shard,
            split,
            stills=data.stills,
            colour=data.colour,
            min_native=data.min_native,
            hardest_of=data.hardest_of,
            seed=self.config.loop.seed,
            limit=limit,
        )

    @torch.no_grad()
    def views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Source picture (stills moved by the mesh), mesh flow from target back to source, target's vertices."""
        device = batch["target"].device
        face, mesh = self.face.to(device), self.mesh.to(device)
        with torch.autocast(device.type, enabled=False):
            start = face.project(batch["identity"], batch["source_expression"], batch["source_pose"])
            end = face.project(batch["identity"], batch["target_expression"], batch["target_pose"])
            source = batch["source"]
            still = batch["still"].bool()
            if still.any():
                source = source.clone()
                back = mesh(end[still], start[still])
                source[still] = warp(batch["target"][still], back[:, :2], back)
            return source, mesh(start, end), end

    def generate(self, batch: Batch, decode: bool) -> tuple[Generated, Tensor, Tensor]:
        """The generator on a batch: result, source picture, target's vertices."""
        source, prior, vertices = self.views(batch)
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
            near, far = self._picture_losses(*halves)
            loss = loss + config.warp_weight * (near + config.perceptual_weight * far)
            logs |= {"warp_l1": near.detach(), "warp_perceptual": far.detach()}
        if decode:
            near, far = self._picture_losses(found.image, target, valid, region)
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

    def _picture_losses(self, image: Tensor, target: Tensor, valid: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
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
        """The same patch of both pictures, around the mouth; with a step, moved at random."""
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
        """L1, PSNR (dB), SSIM (skimage, 7x7) and perceptual distance of held-out pairs, beside the copied source
        (``copy_``) and the warped source alone (``warp_``)."""
        from skimage.metrics import structural_similarity

        data = self.dataset("val")
        sums: dict[str, float] = {}
        for i in range(len(data)):
            batch = {key: value[None].to(fabric.device) for key, value in data[i].items()}
            found, source, _ = self.generate(batch, True)
            target = batch["target"]
            for prefix, image in (("", found.image), ("warp_", found.warped), ("copy_", source)):
                image = image.float().clamp(-1, 1)
                a, b = (((x[0].cpu().numpy() + 1) * 127.5).round().astype("uint8") for x in (image, target))
                values = {
                    "l1": F.l1_loss(image, target).item(),
                    "psnr": float(10 * torch.log10(4 / F.mse_loss(image, target).clamp(min=1e-6))),
                    "ssim": float(structural_similarity(a, b, channel_axis=0)),
                }
                if self.perceptual is not None:
                    values["perceptual"] = self.perceptual.to(fabric.device)(image, target).item()
                for key, value in values.items():
                    sums[prefix + key] = sums.get(prefix + key, 0.0) + value / len(data)
        return sums

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The generator without E_h, C and D_h, which the codebook's file holds."""
        state = {k: v for k, v in self.generator.state_dict().items() if not k.startswith("autoencoder.")}
        return state, self.config.model.to_dict()


def build(config: Config) -> VQIGStage:
    """The stage for a configuration."""
    return VQIGStage(config)
