"""The codebook of the region of interest (ours): codes as moving averages that start from k-means.

What happens when is a fraction of the run's steps, so that one recipe fits a minute and a night: the first steps train
E_h and D_h without a quantiser, k-means of their latents gives the first codes, and the discriminator joins at the end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.data.regions import RegionDataset, RegionViews
from flowvqtalker.data.shards import Shard
from flowvqtalker.errors import UserError
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.region_vqvae import RegionCodebookConfig, RegionVQVAE
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.gan import PatchDiscriminator, adversarial_loss, discriminator_loss
from flowvqtalker.train.image_stage import image_scores, load_codebook
from flowvqtalker.train.region_losses import backward_through, balanced_gradient, band_loss, feature_weights
from flowvqtalker.train.stage import Stage

__all__ = ["CodeAverages", "RegionCodebookStage", "RegionCodebookTraining", "kmeans"]

#: Latents that k-means sees at most, its rounds, and how many latents it compares at once.
_KMEANS_LATENTS, _KMEANS_ROUNDS, _KMEANS_CHUNK = 150_000, 12, 16_384
#: Moving average of the latents per code below which a code is dead.
_DEAD = 0.3
#: Part of the run over which the adversarial gradient grows to its full size.
_RAMP = 0.05


@dataclass(frozen=True)
class RegionCodebookTraining:
    """What the region's codebook learns from, and how."""

    model: RegionCodebookConfig = field(default_factory=RegionCodebookConfig)
    shard: Path = Path("data/shards")
    """Shard with images and landmarks (`flowvqtalker prepare`)."""
    views: RegionViews = field(default_factory=RegionViews)
    """Random views of the training regions."""
    min_native: float = 195.0
    """Use only images whose crop had at least this many pixels a side in the original."""
    quantise_from: float = 0.06
    """Fraction of the steps after which latents are quantised."""
    adversarial_from: float = 0.7
    """Fraction of the steps after which the discriminator and its loss set in, and the codes move less."""
    revive_until: float = 0.85
    """Fraction of the steps after which dead codes are left alone."""
    kmeans_images: int = 384
    """Training images whose latents give the first codes."""
    decay: tuple[float, float] = (0.98, 0.995)
    """Decay of the codes' moving averages before and after the discriminator sets in."""
    band_weight: float = 0.5
    """Weight of the coarse and the fine band of the L1 loss."""
    perceptual_weight: float = 0.35
    """Weight of L_per."""
    commitment_weight: float = 0.25
    """lambda_feat of eq. 17."""
    adversarial_ratio: float = 0.15
    """Norm of the adversarial gradient on the image, as a fraction of the reconstruction's."""
    adversarial_most: float = 0.2
    """Largest factor that this scaling gives the adversarial loss."""

    def __post_init__(self) -> None:
        fractions = ("quantise_from", "adversarial_from", "revive_until")
        weights = ("band_weight", "perceptual_weight", "commitment_weight", "adversarial_ratio", "adversarial_most")
        check(
            *((0 <= getattr(self, n) <= 1, f"{n} must be in [0, 1], got {getattr(self, n)}") for n in fractions),
            *((getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}") for n in weights),
            (self.kmeans_images > 0, f"kmeans_images must be positive, got {self.kmeans_images}"),
        )


@torch.no_grad()
def kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm: (P, d) points to (count, d) centres; a centre without points restarts at a random point.

    Arguments:
        points: on any device.
        count: of the centres.
        generator: CPU generator of all random choices.
    """
    order = torch.randperm(len(points), generator=generator)[:_KMEANS_LATENTS]
    points = points[order.to(points.device)]
    centres = points[torch.randint(len(points), (count,), generator=generator).to(points.device)]
    if len(points) >= count:
        centres = points[:count].clone()
    for _ in range(_KMEANS_ROUNDS):
        nearest = torch.cat([
            (centres.square().sum(1) - 2 * part @ centres.T).argmin(1) for part in torch.split(points, _KMEANS_CHUNK)
        ])  # fmt: skip
        sizes = points.new_zeros(count).index_add_(0, nearest, points.new_ones(len(points)))
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        spare = points[torch.randint(len(points), (count,), generator=generator).to(points.device)]
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], spare)
    return centres


class CodeAverages(nn.Module):
    """Moving averages of how many latents choose each code and of their sum: codes are their quotient (VQ-VAE-2).

    Replaces the first term of eq. 16. Codes that hardly any latent chooses restart at random latents.
    """

    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))

    def start(self, weight: Tensor, latents_per_code: float) -> None:
        """Begin with the codes (N, d), as if each had been chosen so often in every step."""
        self.counts.fill_(latents_per_code)
        self.sums.copy_(weight * latents_per_code)

    @torch.no_grad()
    def update(self, z: Tensor, indices: Tensor, decay: float, revive: bool) -> tuple[Tensor, Tensor]:
        """Take in latents (B, d, h, w) and the codes (B, h, w) that they chose.

        Returns:
            the codes (N, d), and how many restarted.
        """
        flat = z.detach().movedim(1, -1).reshape(-1, z.shape[1]).float()
        chosen = indices.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, flat)
        spare = flat[torch.randint(len(flat), (len(counts),), device=flat.device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for value in (counts, sums):  # every process keeps the same codes
                torch.distributed.all_reduce(value)
            torch.distributed.broadcast(spare, 0)
        self.counts.lerp_(counts, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        dead = (self.counts < _DEAD) & revive
        self.sums.copy_(torch.where(dead[:, None], spare, self.sums))
        self.counts.copy_(torch.where(dead, 1.0, self.counts))
        return self.sums / self.counts.clamp(min=1e-6)[:, None], dead.sum()


class RegionCodebookStage(Stage):
    """Trains :class:`~flowvqtalker.render.region_vqvae.RegionVQVAE` against a patch discriminator.

    Arguments:
        training: data, model and losses.
        loop: how long is trained.
        config: the stage's whole configuration, for the checkpoint.
        perceptual: L_per, or None.
        discriminator: of the regions.
        discriminator_lr: factor on the learning rate of the discriminator.
        start: weights of a codebook of the same size to begin with; its codes are used from the first step on.
        validation: held-out images that are measured.
    """

    name = "codebook"
    monitor = "l1"

    def __init__(
        self,
        training: RegionCodebookTraining,
        loop: LoopConfig,
        config: Any,
        perceptual: PerceptualLoss | None,
        discriminator: PatchDiscriminator,
        *,
        discriminator_lr: float,
        start: Path | None = None,
        validation: int = 48,
    ) -> None:
        self.training, self.loop, self.config = training, loop, config
        self.perceptual, self.discriminator, self.discriminator_lr = perceptual, discriminator, discriminator_lr
        self.validation = validation
        model = training.model
        self.autoencoder = RegionVQVAE(model)
        self.averages = CodeAverages(model.codes, model.dim)
        self.quantise_from = 0 if start else round(training.quantise_from * loop.steps)
        self.started = start is not None
        if start is not None:
            try:
                self.autoencoder.load_state_dict(load_codebook(start, "data.start"))
            except RuntimeError as error:
                raise UserError(f"{start} (data.start) does not hold a codebook of this size; leave it out") from error
            self.averages.start(self.autoencoder.codes.weight, self._latents_per_code)
        self.module = nn.ModuleDict({"autoencoder": self.autoencoder, "discriminator": discriminator})
        self.module["averages"] = self.averages
        self.shard = Shard(training.shard)
        self._fake: Tensor | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None

    @property
    def _latents_per_code(self) -> float:
        rows, columns = self.training.model.grid
        return self.loop.batch_size * rows * columns / self.training.model.codes

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "generator": list(self.autoencoder.parameters()),
            "discriminator": list(self.discriminator.parameters()),
        }

    def lr_scale(self, group: str) -> float:
        return self.discriminator_lr if group == "discriminator" else 1.0

    def dataset(self, split: str) -> RegionDataset:
        training = self.training
        return RegionDataset(
            self.shard, split, training.model.roi, training.views, min_native=training.min_native,
            seed=self.loop.seed, limit=self.validation,
        )  # fmt: skip

    def _first_codes(self, batch: Tensor) -> None:
        """Codes from the latents of training images: the same on every process and after every resume."""
        data, size = self.dataset("train"), len(batch)
        latents = []
        with torch.no_grad():
            for begin in range(0, self.training.kmeans_images, size):
                images = torch.stack([data[i]["image"] for i in range(begin, begin + size)]).to(batch.device)
                z = self.autoencoder.encoder(images)
                latents.append(z.movedim(1, -1).reshape(-1, z.shape[1]).float())
            torch.clear_autocast_cache()  # weights cast without gradients must not serve the step that follows
            generator = torch.Generator().manual_seed(self.loop.seed)
            with torch.autocast(batch.device.type, enabled=False):
                codes = kmeans(torch.cat(latents), self.training.model.codes, generator)
            self.autoencoder.codes.weight.copy_(codes)
            self.averages.start(codes, self._latents_per_code)

    def loss(self, group: str, batch: dict[str, Tensor], step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        training, image = self.training, batch["image"]
        progress = step / self.loop.steps
        adversarial = progress >= training.adversarial_from
        if group == "discriminator":
            if not adversarial or self._fake is None:
                return None, {}
            real, fake = self.discriminator(image), self.discriminator(self._fake)
            logs: dict[str, float | Tensor] = {"real": real.detach().mean(), "fake": fake.detach().mean()}
            return discriminator_loss(real.float(), fake.float()), logs

        if step == self.quantise_from and not self.started:
            self._first_codes(image)
        z = self.autoencoder.encoder(image)
        commitment = z.new_zeros(())
        quantised, self._chosen = z, None
        if step >= self.quantise_from:
            indices = self.autoencoder.codes.nearest(z.detach())
            codes = self.autoencoder.codes.lookup(indices).to(z.dtype)
            commitment = F.mse_loss(z.float(), codes.float())
            quantised = z + (codes - z).detach()  # straight-through gradient
            self._chosen = z.detach(), indices
        drawn = self.autoencoder.decoder(quantised)
        self._fake = drawn.detach()
        seen = drawn.detach().float().requires_grad_()
        weight = feature_weights(batch["points"], *image.shape[-2:])
        l1, band = band_loss(seen, image, weight)
        reconstruction = l1 + training.band_weight * band
        logs = {"l1": l1.detach(), "commitment": commitment.detach()}
        if self.perceptual is not None:
            far = self.perceptual.to(image.device)(seen, image)
            reconstruction = reconstruction + training.perceptual_weight * far
            logs["perceptual"] = far.detach()
        adv = None
        if adversarial:
            adv = adversarial_loss(self.discriminator(seen).float())
            logs["adversarial"] = adv.detach()
        ratio = training.adversarial_ratio * min(1.0, (progress - training.adversarial_from) / _RAMP)
        gradient, logs["balance"] = balanced_gradient(seen, reconstruction, adv, ratio, training.adversarial_most)
        loss = backward_through(drawn, gradient, reconstruction) + training.commitment_weight * commitment
        return loss, logs

    def on_step_end(self, step: int) -> None:
        if self._chosen is None:
            return
        progress = step / self.loop.steps
        decay = self.training.decay[progress >= self.training.adversarial_from]
        codes, _ = self.averages.update(*self._chosen, decay, progress < self.training.revive_until)
        self.autoencoder.codes.weight.copy_(codes)
        self._chosen = None

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Scores of :func:`~flowvqtalker.train.image_stage.image_scores` on held-out regions, the share of codes used,
        and the perplexity of their distribution."""
        data = self.dataset("val")
        used = torch.zeros(self.training.model.codes)
        sums: dict[str, float] = {}
        for i in range(len(data)):
            image = data[i]["image"][None].to(fabric.device)
            _, indices = self.autoencoder.encode(image)
            used += torch.bincount(indices.flatten(), minlength=len(used)).cpu()
            for key, value in image_scores(self.autoencoder.decode(indices), image, self.perceptual).items():
                sums[key] = sums.get(key, 0.0) + value / len(data)
        share = used / used.sum()
        perplexity = float(torch.exp(-(share * (share + 1e-9).log()).sum()))
        return sums | {"codes_used": float((used > 0).float().mean()), "perplexity": perplexity}

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.autoencoder.state_dict(), asdict(self.training.model)
