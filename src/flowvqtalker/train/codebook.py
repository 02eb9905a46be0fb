"""Stage ``codebook``: E_h, C and D_h by self-reconstruction with L1, perceptual and adversarial losses (eq. 13-17).

With ``region`` set, the lite codebook of a region of interest is trained (:mod:`flowvqtalker.train.region_codebook`);
without, the paper's, on whole images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from lightning_fabric import Fabric
from torch import Tensor, nn

from flowvqtalker.data.images import Augmentation, ImageDataset, find_images
from flowvqtalker.errors import UserError
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.vqvae import CodebookConfig, VQAutoencoder
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.gan import PatchDiscriminator, adversarial_loss, discriminator_loss
from flowvqtalker.train.image_stage import image_scores, load_codebook
from flowvqtalker.train.region_codebook import RegionCodebookStage, RegionCodebookTraining
from flowvqtalker.train.stage import Stage

__all__ = ["CodebookStage", "Config", "build"]


@dataclass(frozen=True)
class Data:
    """Where the paper's codebook finds its images, and what both begin with and are measured on."""

    images: Path = Path("data/faces")
    """Folder of face crops (512x512)."""
    table: Path | None = None
    """csv with the columns file and identity, for a split by person."""
    start: Path | None = None
    """Weights of a codebook of the same size to begin with (fine-tuning), with its codes."""
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(crop=256, min_scale=0.5))
    """Random views of the training images."""
    validation: int = 48
    """Held-out images that are measured."""


@dataclass(frozen=True)
class Config:
    """Configuration of the codebook stage."""

    data: Data = field(default_factory=Data)
    region: Annotated[RegionCodebookTraining | None, tyro.conf.AvoidSubcommands] = None
    """Train the codebook of a region of interest; the settings of losses below are the paper codebook's alone."""
    model: CodebookConfig = field(default_factory=CodebookConfig.lite)
    """Sizes of the paper's codebook."""
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(lr=2e-4, batch_size=8, ema=0.995))
    perceptual: Literal["vgg19", "mobilenet", "none"] = "mobilenet"
    """Network of the perceptual loss; vgg19 is the paper's."""
    perceptual_weights: Path | None = None
    """File of its ImageNet weights, if it is not found by itself."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss."""
    adversarial: Literal["hinge", "log"] = "hinge"
    """hinge as in VQGAN's code, log as eq. 15 is written."""
    adversarial_weight: float = 0.8
    """lambda_adv."""
    adaptive: bool = True
    """Scale lambda_adv by the ratio of the gradients at the last layer, clamped to [0, 1] (CodeFormer); off: fixed
    (paper)."""
    adversarial_start: int = 5000
    """Step at which the discriminator and its loss set in."""
    commitment_weight: float = 0.25
    """lambda_feat of eq. 17."""
    discriminator_width: int = 32
    """Channels of the discriminator's first layer (64 in VQGAN)."""
    discriminator_layers: int = 3
    """Strided layers of the discriminator."""
    discriminator_lr: float = 4.0
    """Learning rate of the discriminator, as a factor on loop.lr."""
    revive_every: int = 25
    """Steps between two looks for dead codes; the last fifth of the steps lets the codes settle."""

    def __post_init__(self) -> None:
        weights = ("perceptual_weight", "adversarial_weight", "commitment_weight", "adversarial_start")
        check(
            *(
                (getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
                for name in weights
            ),
            (self.loop.accumulate == 1, "loop.accumulate must be 1: the discriminator sees the last batch's images"),
            (self.revive_every > 0, f"revive_every must be positive, got {self.revive_every}"),
            (
                self.data.augmentation.crop % self.model.stride == 0,
                f"data.augmentation.crop must be divisible by {self.model.stride}",
            ),
        )


class CodebookStage(Stage):
    """Trains :class:`~flowvqtalker.render.vqvae.VQAutoencoder` against a patch discriminator."""

    name = "codebook"
    monitor = "perceptual"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.autoencoder = VQAutoencoder(config.model)
        if config.data.start is not None:
            self._begin_with(config.data.start)
        self.discriminator = PatchDiscriminator(config.discriminator_width, config.discriminator_layers)
        self.module = nn.ModuleDict({"autoencoder": self.autoencoder, "discriminator": self.discriminator})
        self.perceptual = (
            None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights)
        )
        if self.perceptual is None:
            self.monitor = "l1"
        self.images = find_images(config.data.images, config.data.table)
        self._fake: Tensor | None = None
        self._latents: Tensor | None = None

    def _begin_with(self, file: Path) -> None:
        """Take over the weights of a codebook."""
        try:
            self.autoencoder.load_state_dict(load_codebook(file, "data.start"))
        except RuntimeError as error:
            raise UserError(f"{file} (data.start) does not hold a codebook of this size; leave it out") from error

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "generator": list(self.autoencoder.parameters()),
            "discriminator": list(self.discriminator.parameters()),
        }

    def dataset(self, split: str) -> ImageDataset:
        return ImageDataset(self.images, split, self.config.data.augmentation, self.config.loop.seed)

    def lr_scale(self, group: str) -> float:
        """The spectrally normalised discriminator learns slowly: at the generator's rate it stayed undecided."""
        return self.config.discriminator_lr if group == "discriminator" else 1.0

    def on_start(self, batch: Tensor) -> None:
        """Begin with codes that are latents of real images, unless they come from ``data.start``."""
        if self.config.data.start is not None:
            return
        with torch.no_grad():
            z = self.autoencoder.encoder(batch)
        self.autoencoder.codebook.usage.zero_()
        self.autoencoder.codebook.revive(z, torch.Generator().manual_seed(self.config.loop.seed))

    def loss(self, group: str, batch: Tensor, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        config = self.config
        adversarial = step >= config.adversarial_start
        if group == "discriminator":
            if not adversarial or self._fake is None:
                return None, {}
            real, fake = self.discriminator(batch), self.discriminator(self._fake)
            logs: dict[str, float | Tensor] = {"real": real.detach().mean(), "fake": fake.detach().mean()}
            return discriminator_loss(real.float(), fake.float(), config.adversarial), logs

        fake, quantized = self.autoencoder(batch)
        self._fake = fake.detach()
        with torch.no_grad():
            look = (step + 1) % config.revive_every == 0 and step < 0.8 * config.loop.steps
            self._latents = self.autoencoder.encoder(batch) if look else None
        l1 = (fake.float() - batch.float()).abs().mean()
        logs = {"l1": l1.detach(), "code": quantized.code_loss.detach()}
        loss = l1
        if self.perceptual is not None:
            per = self._perceptual(fake, batch)
            logs["perceptual"] = per.detach()
            loss = loss + config.perceptual_weight * per
        if adversarial:
            adv = adversarial_loss(self.discriminator(fake).float(), config.adversarial)
            weight: float | Tensor = config.adversarial_weight
            if config.adaptive:
                weight = weight * self._adaptive(loss, adv)
                logs["adaptive"] = weight
            logs["adversarial"] = adv.detach()
            loss = loss + weight * adv
        return loss + quantized.code_loss + config.commitment_weight * quantized.commitment_loss, logs

    def _perceptual(self, fake: Tensor, real: Tensor) -> Tensor:
        assert self.perceptual is not None
        self.perceptual.to(fake.device)
        loss: Tensor = self.perceptual(fake, real)
        return loss

    def _adaptive(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """VQGAN's weight: ratio of the gradient norms at D_h's last layer, clamped to [0, 1]."""
        last = self.autoencoder.decoder.last_weight
        rec = torch.autograd.grad(reconstruction, last, retain_graph=True)[0].norm()
        adv = torch.autograd.grad(adversarial, last, retain_graph=True)[0].norm()
        weight: Tensor = (rec / (adv + 1e-4)).clamp(0, 1).detach()
        return weight

    def on_step_end(self, step: int) -> None:
        if self._latents is not None:
            seed = self.config.loop.seed * 1_000_003 + step
            codebook = self.autoencoder.codebook
            several = torch.distributed.is_available() and torch.distributed.is_initialized()
            if several:  # a code is dead only if no process uses it
                torch.distributed.all_reduce(codebook.usage)
                codebook.usage /= torch.distributed.get_world_size()
            codebook.revive(self._latents, torch.Generator().manual_seed(seed))
            if several:  # every process revived with latents of its own
                torch.distributed.broadcast(codebook.weight.data, 0)
            self._latents = None

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Scores of :func:`~flowvqtalker.train.image_stage.image_scores` and the share of codes used on held-out
        images."""
        data = self.dataset("val")
        used: set[int] = set()
        sums: dict[str, float] = {}
        count = min(len(data), self.config.data.validation)
        for i in range(count):
            real = data[i * len(data) // count][None].to(fabric.device)
            fake, quantized = self.autoencoder(real)
            used.update(quantized.indices.flatten().tolist())
            for key, value in image_scores(fake, real, self.perceptual).items():
                sums[key] = sums.get(key, 0.0) + value / count
        return sums | {"codes_used": len(used) / self.config.model.codes}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.autoencoder.state_dict(), self.config.model.to_dict()


def build(config: Config) -> CodebookStage | RegionCodebookStage:
    """The stage for a configuration."""
    if config.region is None:
        return CodebookStage(config)
    return RegionCodebookStage(
        config.region,
        config.loop,
        config,
        None if config.perceptual == "none" else PerceptualLoss(config.perceptual, config.perceptual_weights),
        PatchDiscriminator(config.discriminator_width, config.discriminator_layers),
        discriminator_lr=config.discriminator_lr,
        start=config.data.start,
        validation=config.data.validation,
    )
