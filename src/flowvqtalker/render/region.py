"""The lite image generator (ours): VQIG on a region of interest, whose picture comes from the codes.

The paper decodes the whole crop (section 3.3 "VQIG", fig. 3b). Here the codes cover the inner face; around it the
warped picture I_w stays, and a feather joins the two. Codes enter D_h at 1/16. E_w's features of I_w modulate D_h at
1/8 and 1/4 with a strength that can be lowered to 0 (CodeFormer's w), where the codes alone draw. The motion
descriptor sigma comes from the frame's own coefficients instead of 27 frames, so no frame waits for later ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.render.layers import take_over
from flowvqtalker.render.mesh_flow import APERTURES, PRIOR, warp
from flowvqtalker.render.region_vqvae import (
    ChannelNorm,
    RegionAttention,
    RegionCodebookConfig,
    RegionDecoder,
    RegionEncoder,
    RegionVQVAE,
)
from flowvqtalker.render.vqig import Source, ablation_switches
from flowvqtalker.render.warp import MOTION, WarpConfig, WarpingNetwork

if TYPE_CHECKING:
    from flowvqtalker.render.compiled import CompiledGenerator

__all__ = ["RegionConfig", "RegionGenerated", "RegionPrediction", "RegionVQIG", "feather"]


@dataclass(frozen=True)
class RegionConfig:
    """Sizes of the lite generator, and how it draws."""

    codebook: RegionCodebookConfig = field(default_factory=RegionCodebookConfig)
    warp: WarpConfig = field(
        default_factory=lambda: WarpConfig(prior="mesh", input_size=64, flow_size=64, width=16, max_width=128)
    )
    """Sizes of W, which corrects the mesh flow at an eighth of the crop's resolution."""
    mesh_size: int = 128
    """Side of the mesh flow."""
    transformer_layers: int = 3
    transformer_heads: int = 8
    transformer_mlp: int = 512
    """Code transformer T, as wide as a code."""
    decoder_attention: bool = True
    decoder_blocks: tuple[int, int] = (2, 2)
    """D_h's attention at 1/16, and its residual blocks at 1/8 and 1/4. The codebook's D_h, from which it starts, has an
    attention and two blocks each."""
    strength: float = 0.5
    """How much E_w's maps modulate D_h, from 0 (codes alone) to 1."""
    temperature: float = 1.0
    """Temperature of the softmax over T's logits; lower is sharper and flickers more."""
    warped_map: bool = False
    """E_w's first level sees the portrait once, and its map is warped for each frame, instead of seeing each I_w."""
    fine_band: float = 0.0
    """How much of I_w's fine band (what a 3x3 binomial filter takes off) takes the place of D_h's where D_h's mask is
    1; 0 leaves D_h's."""
    colour: float = 0.0
    """How much of I_w's colour takes the place of D_h's where D_h's mask is 1, from 0 to 1."""
    mask_bias: float = 0.0
    """Added to D_h's mask. Losses prefer a blur to detail that is a pixel off, so a trained mask wants a push: else the
    sharpness of a video would come and go."""
    use_warp: bool = True
    """psi, W and the mesh: off, E_w sees the source unmoved. These switches are those of the paper's ablation (fig. 7);
    a part that is off keeps its weights and does nothing."""
    use_fuse: bool = True
    """phi: add the source's codes z_c to E_w's latents."""
    use_attention: bool = True
    """M: cross-attention to z_c."""
    use_codes: bool = True
    """C: draw the codes that T predicts; off, D_h draws z_f itself."""

    def __post_init__(self) -> None:
        if not (0 <= self.strength <= 1 and 0 <= self.colour <= 1 and self.temperature > 0 and self.fine_band >= 0):
            raise ValueError("image generator: strength and colour are from 0 to 1, temperature > 0, fine_band >= 0")

    @property
    def refined(self) -> bool:
        """Whether D_h draws a mask beside the colours, of where I_w refines them."""
        return self.fine_band > 0 or self.colour > 0

    @property
    def reach(self) -> int:
        """Frames of motion before and after each frame that the generator needs."""
        return 0

    @property
    def apertures(self) -> bool:
        """Whether it needs the aperture channels of the mesh flow."""
        return True

    def ablated(self, variant: str) -> RegionConfig:
        """This configuration with the parts of one variant of fig. 7.

        Raises:
            UserError: if there is no such variant.
        """
        return replace(self, **ablation_switches(variant))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RegionConfig:
        """Inverse of :meth:`to_dict`."""
        values = dict(values)
        codebook = RegionCodebookConfig.from_dict(values.pop("codebook"))
        blocks = tuple(values.pop("decoder_blocks"))
        return cls(codebook=codebook, warp=WarpConfig(**values.pop("warp")), decoder_blocks=blocks, **values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


class RegionGenerated(NamedTuple):
    """Result of :class:`RegionVQIG`."""

    image: Tensor
    """Generated frames (B, 3, 512, 512) in about [-1, 1]: I_w with the region in it."""
    region: Tensor
    """D_h's picture (B, 3, H, W), refined."""
    warped: Tensor
    """I_w (B, 3, 512, 512)."""
    logits: Tensor
    """Code predictions (B, h w, N); without C none, (B, 0, N)."""
    latent: Tensor
    """z_f after fusion and attention, (B, d, h, w)."""


class RegionPrediction(NamedTuple):
    """What :meth:`RegionVQIG.predict` finds before D_h draws."""

    warped: Tensor
    """I_w (B, 3, 512, 512)."""
    logits: Tensor
    """Code predictions (B, h w, N); without C none, (B, 0, N)."""
    latent: Tensor
    """z_f, (B, d, h, w)."""
    middle: Tensor
    """E_w's map at 1/8."""
    fine: Tensor
    """E_w's map at 1/4."""


class ControlledAdaIN(nn.Module):
    """Image-level AdaIN of a controlled strength w: x + w (gamma(guide) norm(x) + beta(guide)), position by position.

    Starts as the identity.
    """

    def __init__(self, channels: int, hidden: int = 64) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, affine=False)
        self.hidden = nn.Conv2d(channels, hidden, 1)
        self.out = nn.Conv2d(hidden, 2 * channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, guide: Tensor, strength: Tensor | float) -> Tensor:
        gamma, beta = self.out(F.silu(self.hidden(guide))).chunk(2, dim=1)
        change = torch.addcmul(beta, gamma, self.norm(x).to(gamma.dtype))
        return x + change * (strength.to(change.dtype) if isinstance(strength, Tensor) else strength)


class RegionTransformer(nn.Module):
    """T: latents (B, d, h, w) and sigma (B, d) to code logits (B, h w, N), with learned positions (CodeFormer)."""

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        dim, (rows, columns) = config.codebook.dim, config.codebook.grid
        self.position = nn.Parameter(torch.randn(rows * columns, dim) * 0.02)
        self.motion = nn.Linear(config.warp.descriptor, dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, config.transformer_heads, config.transformer_mlp, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.transformer_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, config.codebook.codes, bias=False)

    def forward(self, z: Tensor, sigma: Tensor) -> Tensor:
        x = z.flatten(2).transpose(1, 2) + self.position.to(z.dtype) + self.motion(sigma)[:, None]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(self.norm(x))
        return logits


def feather(height: int, width: int, border: int = 24) -> Tensor:
    """(1, 1, height, width) weights of the region: 1 inside, falling smoothly to 0 over ``border`` pixels."""
    ramps = []
    for length in (height, width):
        place = torch.arange(length) + 0.5
        x = torch.minimum(place, length - place).div(border).clamp(max=1)
        ramps.append(x * x * (3 - 2 * x))
    return (ramps[0][:, None] * ramps[1])[None, None]


def _binomial(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) through the filter [1, 2, 1] / 4 along both axes; the border repeats."""
    return F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), "replicate"), 2, 1), 2, 1)


def _luma(x: Tensor) -> Tensor:
    """Luma (B, 1, H, W) of RGB (BT.601)."""
    red, green, blue = x.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[:, None]


class RegionVQIG(nn.Module):
    """I_0 and motion to a talking frame: warp, encode the region, fuse with the source's codes, predict codes, decode.

    E_h and C come trained from the codebook stage and stay frozen. E_w and D_h start as copies and are trained on.
    """

    motion_mean: Tensor
    motion_std: Tensor
    feather: Tensor

    def __init__(self, config: RegionConfig) -> None:
        super().__init__()
        self.config = config
        book, descriptor = config.codebook, config.warp.descriptor
        dim, (_, fine, middle, coarse) = book.dim, book.channels
        self.autoencoder = RegionVQVAE(book).requires_grad_(False).eval()
        self.register_buffer("motion_mean", torch.zeros(MOTION))
        self.register_buffer("motion_std", torch.ones(MOTION))
        self.mapping = nn.Sequential(nn.Linear(MOTION, dim), nn.SiLU(), nn.Linear(dim, descriptor))
        self.warping = WarpingNetwork(config.warp)
        self.encoder = RegionEncoder(book)
        self.aperture = nn.Conv2d(2 * APERTURES, fine, 3, padding=1)
        self.motion = nn.Linear(descriptor, 2 * coarse)
        for layer in (self.aperture, self.motion):  # start without effect
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.fuse = nn.Sequential(nn.Conv2d(2 * dim, dim, 1), nn.SiLU(), nn.Conv2d(dim, dim, 1))
        self.attention = RegionAttention(dim)
        self.transformer = RegionTransformer(config)
        self.decoder = RegionDecoder(
            book, attention=config.decoder_attention, blocks=config.decoder_blocks, extra=int(config.refined)
        )
        self.modulation = nn.ModuleDict({"middle": ControlledAdaIN(middle), "fine": ControlledAdaIN(fine)})
        self.register_buffer("feather", feather(*book.roi[2:]), persistent=False)
        self.compiled: CompiledGenerator | None = None  # of the same weights, if there is one

    def train(self, mode: bool = True) -> RegionVQIG:
        """Training mode; the frozen codebook stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def load_codebook(self, state: dict[str, Tensor]) -> None:
        """Take over E_h, C and D_h, and start E_w and the trained D_h from them."""
        self.autoencoder.load_state_dict(state)
        self.encoder.load_state_dict(self.autoencoder.encoder.state_dict())
        take_over(self.decoder, self.autoencoder.decoder.state_dict())

    def cut(self, image: Tensor) -> Tensor:
        """The region of maps (B, C, s, s) of the whole crop."""
        return self.autoencoder.cut(image)

    def prepare(self, image: Tensor) -> Source:
        """Encode and quantise the source picture (B, 3, 512, 512) in [-1, 1]."""
        with torch.no_grad():
            _, indices = self.autoencoder.encode(self.cut(image))
            codes = self.autoencoder.codes.lookup(indices).to(image.dtype)
        fine = self.encoder.first(image) if self.config.warped_map else None
        return Source(image, codes, self.warping.reduce(image), fine)

    def reconstruct(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, 512, 512) with the region through the frozen codebook."""
        return self.paste(self.autoencoder(self.cut(image)), image)

    def flow(self, source: Source, sigma: Tensor, prior: Tensor) -> Tensor:
        """Backward flow (B, 2, s, s) for sigma (B, 256): the mesh's, corrected by W."""
        size = self.config.warp.flow_size
        coarse = F.interpolate(prior[:, :2].float(), (size, size), mode="area")
        change = self.warping(source.small, sigma, coarse).float() - coarse
        return prior[:, :2] + F.interpolate(change.contiguous(), prior.shape[-2:], mode="bilinear", align_corners=False)

    def predict(self, source: Source, motion: Tensor, prior: Tensor) -> RegionPrediction:
        """Everything up to the code predictions; the code-level stage needs no more.

        Arguments:
            source: from :meth:`prepare`.
            motion: (B, 70) coefficients [beta, rho] of the frames, or windows (B, n, 70), whose middle frame counts.
            prior: (B, 13, 128, 128) of :class:`~flowvqtalker.render.mesh_flow.MeshFlow` with apertures.
        """
        if prior.shape[1] != PRIOR:
            raise ValueError("the region's generator needs a mesh flow with apertures (MeshFlow(apertures=True))")
        motion = motion if motion.ndim == 2 else motion[:, motion.shape[1] // 2]
        sigma = self.mapping((motion - self.motion_mean) / self.motion_std)
        apertures = self.cut(prior[:, 2 : 2 + 2 * APERTURES])
        if self.config.use_warp:
            flow = self.flow(source, sigma, prior)
            warped, fine = warp(source.image, flow, prior), None if source.fine is None else warp(source.fine, flow)
        else:
            warped, fine = source.image, source.fine
            sigma, apertures = torch.zeros_like(sigma), torch.zeros_like(apertures)
        fine = None if fine is None else self.cut(fine)
        found = self.encode(self.cut(warped), apertures, sigma, source.codes, fine)
        return RegionPrediction(warped, *found)

    def encode(
        self, region: Tensor, apertures: Tensor, sigma: Tensor, codes: Tensor, fine: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """E_w, phi, MHCA and T: logits, z_f, and E_w's maps at 1/8 and 1/4.

        Arguments:
            region: (B, 3, H, W) of I_w.
            apertures: (B, 6, H / 4, W / 4) of the mesh flow.
            sigma: (B, 256) motion descriptor.
            codes: (B, d, h, w) of the source.
            fine: (B, C, H / 4, W / 4), E_w's first map of the source, warped: takes the place of the region's.
        """
        extra = self.aperture(apertures.to(sigma.dtype))
        maps = self.encoder.features(region, extra) if fine is None else self.encoder.further(fine + extra)
        coarse, middle, fine = maps
        gamma, beta = self.motion(sigma)[..., None, None].chunk(2, dim=1)
        z = self.encoder.out(torch.addcmul(beta, coarse.to(gamma.dtype), 1 + gamma))
        codes = codes.to(z.dtype)
        if self.config.use_fuse:
            z = z + self.fuse(torch.cat([z, codes], 1))
        if self.config.use_attention:
            z = self.attention(z, codes)
        empty = z.new_zeros(len(z), 0, self.config.codebook.codes)
        return self.transformer(z, sigma) if self.config.use_codes else empty, z, middle, fine

    def codes(self, found: RegionPrediction) -> Tensor:
        """What D_h draws, (B, d, h, w): the codes' expectation, which does not flicker. Without C it is z_f."""
        if not self.config.use_codes:
            return found.latent
        return self.autoencoder.codes.expect(found.logits / self.config.temperature, self.config.codebook.grid)

    def draw(self, codes: Tensor, found: RegionPrediction, strength: Tensor | float | None = None) -> Tensor:
        """D_h: codes (B, d, h, w) to the region (B, 3, H, W), with the mask of :meth:`refine` as a fourth channel in a
        ``refined`` configuration.

        Arguments:
            codes: of :meth:`codes`, or others.
            found: of :meth:`predict`.
            strength: how much E_w's maps modulate D_h, a number or (B, 1, 1, 1); None is the configuration's.
        """
        weight = self.config.strength if strength is None else strength

        def modulate(scale: int, x: Tensor) -> Tensor:
            name, guide = ("middle", found.middle) if scale == 8 else ("fine", found.fine)
            out: Tensor = self.modulation[name](x, guide, weight)
            return out

        image: Tensor = self.decoder(codes, modulate)
        return image

    def refine(self, drawn: Tensor, warped: Tensor) -> Tensor:
        """D_h's picture with what no code holds, taken from I_w: pores, hairs and grain, and the very colours.

        Where, says D_h's mask: I_w is torn where a mouth or an eye opens. Warping softens the fine band, so a
        ``fine_band`` above 1 makes up for it.

        Arguments:
            drawn: (B, 3 or 4, H, W) of :meth:`draw`.
            warped: (B, 3, H, W) of I_w.
        """
        if not self.config.refined:
            return drawn
        drawn = drawn.float()
        region, mask = drawn[:, :3], drawn[:, 3:]
        change = torch.zeros_like(region)
        if self.config.fine_band:
            detail = self.config.fine_band * warped - region
            change = detail - _binomial(detail)
        colour = warped - region - change
        change = change + self.config.colour * (colour - _luma(colour))
        return region + F.hardsigmoid(mask + self.config.mask_bias) * change

    def paste(self, region: Tensor, warped: Tensor) -> Tensor:
        """I_w (B, 3, 512, 512) with the region (B, 3, H, W) in it."""
        image = warped.clone(memory_format=torch.contiguous_format)
        part = self.cut(image)
        part += (region.to(part.dtype) - part) * self.feather.to(part.dtype)
        return image

    def forward(
        self, source: Source, motion: Tensor, prior: Tensor, strength: Tensor | float | None = None
    ) -> RegionGenerated:
        """Frames; arguments as :meth:`predict` and :meth:`draw`."""
        found = self.predict(source, motion, prior)
        region = self.refine(self.draw(self.codes(found), found, strength), self.cut(found.warped))
        return RegionGenerated(self.paste(region, found.warped), region, found.warped, found.logits, found.latent)
