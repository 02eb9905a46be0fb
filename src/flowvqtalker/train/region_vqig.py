"""The image generator on a region of interest (ours): code level first, then image level (paper section 3.3).

At the image level a part of the items is drawn without E_w's maps or with the target's own codes, so that D_h learns to
draw from codes alone and to trust them. When each level begins is a fraction of the run's steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.face.model import FaceModel
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.region import RegionConfig, RegionPrediction, RegionVQIG
from flowvqtalker.train.config import LoopConfig, check
from flowvqtalker.train.gan import adversarial_loss, discriminator_loss
from flowvqtalker.train.image_stage import image_scores, make_views
from flowvqtalker.train.region_losses import (
    RegionDiscriminator,
    backward_through,
    balanced_gradient,
    band_loss,
    detail_loss,
    distances,
    feature_points,
    feature_weights,
)
from flowvqtalker.train.stage import Stage

__all__ = ["RegionVQIGStage", "RegionVQIGTraining"]

Batch = dict[str, Tensor]

#: Names of the perceptual distances on the region, the mouth and the eyes.
_DISTANCES = ("perceptual", "mouth", "eyes")
#: Weights of the adversarial losses of region, mouth and eyes.
_ADVERSARIAL = (1.0, 1.2, 1.0)


@dataclass(frozen=True)
class RegionVQIGTraining:
    """What the region's generator is, and how it is trained. Of two weights, the second is the image level's."""

    model: RegionConfig = field(default_factory=RegionConfig)
    only: tuple[str, ...] = ()
    """Parts of the generator that are trained, such as transformer, fuse and attention; none named: all but the
    codebook."""
    image_from: float = 0.35
    """Fraction of the steps after which image-level losses join."""
    adversarial_from: float = 0.42
    """Fraction of the steps after which the discriminators and their loss set in."""
    discriminators_first: float = 0.0
    """Fraction of the steps after ``adversarial_from`` in which the discriminators alone learn. A generator that starts
    from good weights would fool young ones before they see anything, and blur."""
    ramp: float = 0.07
    """Fraction of the steps over which the adversarial gradient grows to its full size."""
    code_weight: tuple[float, float] = (0.5, 0.25)
    """Weight of the cross entropy of the codes (CodeFormer)."""
    feature_weight: tuple[float, float] = (1.0, 0.25)
    """Weight of the distance between z_f and the target's codes (eq. 18)."""
    warp_weight: tuple[float, float] = (1.0, 0.5)
    """Weight of I_w's own loss, which is what trains psi and W."""
    band_weight: float = 0.5
    """Weight of the coarse and the fine band of the L1 loss."""
    detail_weight: float = 0.0
    """Weight of the difference in local detail: without discriminators the image level blurs."""
    perceptual_weight: float = 1.0
    """Weight of L_per on the region."""
    mouth_weight: float = 0.8
    """Weight of L_per on the enlarged mouth."""
    eye_weight: float = 0.6
    """Weight of L_per on the enlarged eyes."""
    no_maps: float = 0.22
    """Share of items drawn with strength 0, from codes alone."""
    some_maps: float = 0.16
    """Share of items drawn with a random strength."""
    true_codes: float = 0.18
    """Share of items drawn from the target's own codes."""
    adversarial_ratio: float = 0.3
    """Norm of the adversarial gradient on the image, as a fraction of the reconstruction's."""
    adversarial_most: float = 0.3
    """Largest factor that this scaling gives the adversarial loss."""

    def __post_init__(self) -> None:
        fractions = (
            "image_from",
            "adversarial_from",
            "discriminators_first",
            "ramp",
            "no_maps",
            "some_maps",
            "true_codes",
        )
        losses = ("band", "detail", "perceptual", "mouth", "eye")
        weights = (*(f"{name}_weight" for name in losses), "adversarial_ratio")
        check(
            *((0 <= getattr(self, n) <= 1, f"{n} must be in [0, 1], got {getattr(self, n)}") for n in fractions),
            *((getattr(self, n) >= 0, f"{n} must not be negative, got {getattr(self, n)}") for n in weights),
            (self.no_maps + self.some_maps <= 1, "no_maps and some_maps must not exceed 1 together"),
            (self.adversarial_from >= self.image_from, "adversarial_from must not come before image_from"),
        )


class RegionVQIGStage(Stage):
    """Trains all of :class:`~flowvqtalker.render.region.RegionVQIG` but the frozen codebook.

    Arguments:
        training: model and losses.
        loop: how long is trained.
        config: the stage's whole configuration, for the checkpoint.
        generator: with the codebook's weights and the motion's statistics.
        data: pairs for a split.
        face: the shard's face model.
        perceptual: L_per, or None.
        discriminator: of region, mouth and eyes.
        discriminator_lr: factor on the learning rate of the discriminator.
    """

    name = "vqig"
    monitor = "l1"

    def __init__(
        self,
        training: RegionVQIGTraining,
        loop: LoopConfig,
        config: Any,
        generator: RegionVQIG,
        data: dict[str, PairDataset],
        face: FaceModel,
        perceptual: PerceptualLoss | None,
        discriminator: RegionDiscriminator,
        discriminator_lr: float,
    ) -> None:
        self.training, self.loop, self.config = training, loop, config
        self.generator, self.discriminator = generator, discriminator
        self.data, self.face, self.perceptual, self.discriminator_lr = data, face, perceptual, discriminator_lr
        self.mesh = MeshFlow(face, training.model.mesh_size, apertures=True)
        self.module = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
        if perceptual is not None:
            self.monitor = "perceptual"
        self._patches: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        if training.only:
            parts = sorted(set(dict(generator.named_children())) - {"autoencoder"})
            for part in training.only:
                check((part in parts, f"region.only: {part!r} is no part; allowed: {', '.join(parts)}"))
            for name, child in generator.named_children():
                child.requires_grad_(name in training.only)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        learned = [p for p in self.generator.parameters() if p.requires_grad]
        return {"generator": learned, "discriminator": list(self.discriminator.parameters())}

    def lr_scale(self, group: str) -> float:
        return self.discriminator_lr if group == "discriminator" else 1.0

    def dataset(self, split: str) -> PairDataset:
        return self.data[split]

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Source images, mesh flow, and the target's points in the region."""
        device = batch["target"].device
        source, prior, vertices = make_views(self.face.to(device), self.mesh.to(device), batch)
        return source, prior, feature_points(vertices, self.training.model.codebook.roi)

    def _predict(self, batch: Batch, source: Tensor, prior: Tensor) -> RegionPrediction:
        motion = torch.cat([batch["target_expression"], batch["target_pose"]], 1)
        return self.generator.predict(self.generator.prepare(source), motion, prior)

    def loss(self, group: str, batch: Batch, step: int) -> tuple[Tensor | None, dict[str, float | Tensor]]:
        training, progress = self.training, step / self.loop.steps
        image_level = progress >= training.image_from
        adversarial = progress >= training.adversarial_from
        if group == "discriminator":
            return self._discriminator_loss() if adversarial and self._patches is not None else (None, {})
        source, prior, points = self._views(batch)
        target = self.generator.cut(batch["target"])
        if adversarial and progress < training.adversarial_from + training.discriminators_first:
            with torch.no_grad():
                found = self._predict(batch, source, prior)
                warped = self.generator.cut(found.warped)
                self._patches = target, self._draw(found, self._codes(target)[1], warped), warped, points
            return None, {}
        found = self._predict(batch, source, prior)
        indices, codes = self._codes(target)
        feature = F.mse_loss(found.latent.float(), codes)
        # At half the size: W moves what is there, so its loss needs no fine texture.
        warped, wanted = (F.avg_pool2d(x.float(), 2) for x in (self.generator.cut(found.warped), target))
        near, band = band_loss(warped, wanted)
        warp = near + training.band_weight * band
        terms = {"feature": (training.feature_weight, feature), "warp": (training.warp_weight, warp)}
        if training.model.use_codes:
            entropy = F.cross_entropy(found.logits.float().flatten(0, 1), indices.flatten())
            terms["code"] = training.code_weight, entropy
        logs: dict[str, float | Tensor] = {name: term.detach() for name, (_, term) in terms.items()}
        logs["hits"] = (found.logits.argmax(-1) == indices.flatten(1)).float().mean() if "code" in terms else 0.0
        loss = torch.stack([weights[image_level] * term for weights, term in terms.values()]).sum()
        if image_level:
            image, more = self._image_loss(found, codes, target, points, progress if adversarial else None)
            loss, logs = loss + image, logs | more
        return loss, logs

    @torch.no_grad()
    def _codes(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Indices (B, h, w) and vectors (B, dim, h, w) of a region's own codes."""
        _, indices = self.generator.autoencoder.encode(target)
        return indices, self.generator.autoencoder.codes.lookup(indices)

    def _draw(self, found: RegionPrediction, true: Tensor, warped: Tensor) -> Tensor:
        """Regions drawn from T's codes, or from ``true`` ones, with E_w's maps, without them or in between."""
        training = self.training
        draw = torch.rand(2, len(true), 1, 1, 1, device=true.device)
        partial = ((draw[0] - training.no_maps) / max(training.some_maps, 1e-6)).clamp(0, 1)
        usual = training.model.strength
        strength = torch.where(draw[0] < training.no_maps + training.some_maps, partial, usual)
        expected = self.generator.codes(found)
        codes = torch.where(draw[1] < training.true_codes, true.to(expected.dtype), expected)
        return self.generator.refine(self.generator.draw(codes, found, strength), warped)

    def _image_loss(
        self, found: RegionPrediction, true: Tensor, target: Tensor, points: Tensor, progress: float | None
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Image-level losses; ``progress`` is that of the run once the discriminators take part."""
        training = self.training
        warped = self.generator.cut(found.warped).detach().float()
        drawn = self._draw(found, true, warped)
        seen = drawn.detach().float().requires_grad_()
        l1, band = band_loss(seen, target, feature_weights(points, *target.shape[-2:]))
        reconstruction = l1 + training.band_weight * band
        logs: dict[str, float | Tensor] = {"l1": l1.detach()}
        if training.detail_weight:
            detail = detail_loss(seen, target)
            reconstruction, logs["detail"] = reconstruction + training.detail_weight * detail, detail.detach()
        weights = (training.perceptual_weight, training.mouth_weight, training.eye_weight)
        far_weights = dict(zip(_DISTANCES, weights, strict=True))
        for name, far in self._perceptual(seen, target, points).items():
            reconstruction = reconstruction + far_weights[name] * far
            logs[name] = far.detach()
        adv, ratio = None, 0.0
        if progress is not None:
            scores = [adversarial_loss(logits.float()) for logits in self.discriminator(seen, warped, points)]
            adv = torch.stack([weight * score for weight, score in zip(_ADVERSARIAL, scores, strict=True)]).sum()
            begun = training.adversarial_from + training.discriminators_first
            ramp = (progress - begun) / max(training.ramp, 1e-6)
            ratio = training.adversarial_ratio * min(1.0, ramp)
            self._patches = target, drawn.detach(), warped, points
            logs["adversarial"] = adv.detach()
        gradient, logs["balance"] = balanced_gradient(seen, reconstruction, adv, ratio, training.adversarial_most)
        return backward_through(drawn, gradient, reconstruction), logs

    def _perceptual(self, image: Tensor, target: Tensor, points: Tensor) -> dict[str, Tensor]:
        """L_per on the region, the enlarged mouth and the enlarged eyes; nothing without a network."""
        if self.perceptual is None:
            return {}
        return distances(self.perceptual.to(target.device), image, target, points)

    def _discriminator_loss(self) -> tuple[Tensor, dict[str, float | Tensor]]:
        assert self._patches is not None
        *images, points = self._patches
        real, fake, warped = (image.float() for image in images)
        logits = (self.discriminator(image, warped, points) for image in (real, fake))
        parts = zip(*logits, strict=True)
        losses = [discriminator_loss(a.float(), b.float()) for a, b in parts]
        names = ("region", "mouth", "eyes")
        return torch.stack(losses).sum(), {n: x.detach() for n, x in zip(names, losses, strict=True)}

    def validate(self, fabric: Fabric) -> dict[str, float]:
        """Scores of held-out regions, with the perceptual distances of the enlarged mouth and eyes; beside them those
        of the copied source (``copy_``), the warped source (``warp_``) and what the codes draw alone (``codes_``)."""
        data = self.dataset("val")
        sums: dict[str, float] = {}
        for i in range(len(data)):
            batch = {key: value[None].to(fabric.device) for key, value in data[i].items()}
            source, prior, points = self._views(batch)
            found = self._predict(batch, source, prior)
            target, codes = self.generator.cut(batch["target"]), self.generator.codes(found)
            warped = self.generator.cut(found.warped)
            images = {
                "": self.generator.refine(self.generator.draw(codes, found), warped),
                "codes_": self.generator.draw(codes, found, 0.0)[:, :3],
                "warp_": warped,
                "copy_": self.generator.cut(source),
            }
            for prefix, image in images.items():
                image = image.float().clamp(-1, 1)
                far = {key: value.item() for key, value in self._perceptual(image, target, points).items()}
                for key, value in (image_scores(image, target, None) | far).items():
                    sums[prefix + key] = sums.get(prefix + key, 0.0) + value / len(data)
        return sums

    def export(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The generator without E_h, C and D_h, which the codebook's file holds."""
        state = {k: v for k, v in self.generator.state_dict().items() if not k.startswith("autoencoder.")}
        return state, self.training.model.to_dict()
