"""The vector-quantized image generator VQIG (paper section 3.3 "VQIG", eq. 18, fig. 3b)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker.errors import UserError
from flowvqtalker.render.layers import Attention2d, ResBlock, adain, instance_norm, silu
from flowvqtalker.render.mesh_flow import OPENINGS, PRIOR, warp
from flowvqtalker.render.refiner import MouthPainter
from flowvqtalker.render.vqvae import WINDOWED, CodebookConfig, Decoder, Encoder, VQAutoencoder, cut
from flowvqtalker.render.warp import MOTION, MappingNetwork, WarpConfig, WarpingNetwork

__all__ = ["ABLATION", "VQIG", "Generated", "Source", "VQIGConfig"]

#: Variants of the paper's ablation (fig. 7) and their labels there. B keeps E_w, AdaIN and D_h alone; each of the
#: others adds one part to the variant before it, and the last is the whole generator.
ABLATION = {"B": "B", "W": "+W", "phi": "+φ", "M": "+M", "C": "+C"}


@dataclass(frozen=True)
class VQIGConfig:
    """Sizes and parts of VQIG. The switches are those of the paper's ablation (fig. 7): B, +W, +phi, +M, +C."""

    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    warp: WarpConfig = field(default_factory=WarpConfig)
    use_warp: bool = True
    """W: warp the source picture; off, E_w sees the source unmoved."""
    use_fuse: bool = True
    """phi: add the source's codes z_c to the warped picture's latents z_w."""
    use_attention: bool = True
    """M: cross-attention from z_f to z_c."""
    use_codes: bool = True
    """C: decode predicted codes; off, D_h decodes z_f itself."""
    transformer_dim: int = 512
    transformer_layers: int = 9
    transformer_heads: int = 8
    transformer_mlp: int = 1024
    """Code transformer T; the defaults are CodeFormer's."""
    adain_width: int = 64
    """Hidden channels of the image-level AdaIN."""
    tune_decoder: bool = False
    """Decode with a copy of D_h that the second stage trains (ours); off, D_h stays frozen as in the paper. Codes are
    read and predicted with the frozen codebook either way."""
    openings: bool = False
    """Show E_w where the face mesh opens mouth and eyes and where the irises are, and shut lips and lids without a slit
    (ours): the mesh flow carries it as further channels (:class:`flowvqtalker.render.mesh_flow.MeshFlow`). Needs
    ``warp.prior = "mesh"``. I_w alone does not say whether stretched lips are lips or a mouth that opens."""
    residual: bool = False
    """D_h draws what is to be added to the warped picture, beginning with nothing (ours), instead of the picture
    itself: what the warp already shows sharply is kept, the decoder corrects the rest. Needs ``tune_decoder``."""
    window: tuple[int, int, int, int] | None = None
    """Top, left, height and width of the part of the picture that D_h's finest levels decode (ours); the rest is I_w.
    The crop puts every face at the same place, so one window does for all. None decodes everything. Needs
    ``residual``, which fades out at the window's rim."""
    painter_width: int = 0
    """Channels of the painter of the mouth's inside (ours, :mod:`flowvqtalker.render.refiner`), which stage ``mouth``
    trains and adds; 0 is none, as in the paper. Needs ``openings``."""

    def __post_init__(self) -> None:
        if self.painter_width and not self.openings:
            raise ValueError("image generator: the mouth's painter needs openings, which tell it where the lips open")
        if self.openings and self.warp.prior != "mesh":
            raise ValueError('image generator: openings come from the face mesh; set warp.prior to "mesh"')
        if self.residual and not self.tune_decoder:
            raise ValueError("image generator: residual needs tune_decoder: the codebook's D_h draws whole pictures")
        if self.window is not None:
            top, left, height, width = self.window
            if not self.residual:
                raise ValueError("image generator: a window needs residual, which adds to the warped picture around it")
            if min(top, left) < 0 or min(height, width) < 64 or max(top + height, left + width) > 512:
                raise ValueError(f"image generator: window {self.window} does not lie in the picture of 512x512 pixels")
            if any(value % 16 for value in self.window):
                raise ValueError(f"image generator: window {self.window} must be in steps of 16 pixels")

    @classmethod
    def paper(cls) -> VQIGConfig:
        """The paper's sizes, where it gives any, with those of CodeFormer, RestoreFormer and PIRender for the rest."""
        return cls(codebook=CodebookConfig.paper(), warp=WarpConfig(prior="none"))

    @classmethod
    def lite(cls) -> VQIGConfig:
        """The embedded default, made for CPUs: at most 32 GFLOP a frame, with mesh prior and residual."""
        return cls(
            codebook=CodebookConfig.lite(),
            warp=WarpConfig(input_size=128, width=16, max_width=128),
            transformer_dim=256,
            transformer_layers=4,
            transformer_mlp=512,
            adain_width=32,
            tune_decoder=True,
            openings=True,
            residual=True,
            window=(128, 96, 384, 320),
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VQIGConfig:
        """Inverse of :meth:`to_dict`; a switch that is left out keeps its default."""
        values = dict(values)
        if values.get("window") is not None:
            values["window"] = tuple(values["window"])
        return cls(
            codebook=CodebookConfig.from_dict(values.pop("codebook")), warp=WarpConfig(**values.pop("warp")), **values
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @property
    def prior_channels(self) -> int:
        """Channels of what the generator wants of the mesh: the flow, and with it openings and seams."""
        return PRIOR if self.openings else 2

    def ablated(self, variant: str) -> VQIGConfig:
        """This configuration with the parts of one variant of fig. 7, a key of :data:`ABLATION`; sizes stay.

        Raises:
            UserError: if there is no such variant.
        """
        if variant not in ABLATION:
            raise UserError(f"unknown variant {variant!r} of the image generator; choose one of {', '.join(ABLATION)}")
        parts = list(ABLATION).index(variant)
        return replace(
            self,
            use_warp=parts >= 1,
            use_fuse=parts >= 2,
            use_attention=parts >= 3,
            use_codes=parts >= 4,
            openings=self.openings and parts >= 1,
            painter_width=self.painter_width if parts >= 1 else 0,
        )


class Source(NamedTuple):
    """What of the source picture every frame needs, computed once."""

    image: Tensor
    """I_0, (B, 3, 512, 512) in [-1, 1]."""
    codes: Tensor
    """z_c = q(E_h(I_0)), (B, d, 16, 16)."""
    small: Tensor
    """I_0 as W sees it, (B, 3, h, w)."""

    def expand(self, batch: int) -> Source:
        """The same source for a batch of frames."""
        return Source(*(value.expand(batch, -1, -1, -1) for value in self))


class Generated(NamedTuple):
    """Result of :class:`VQIG`."""

    image: Tensor
    """Generated frames, (B, 3, H, W) in about [-1, 1]."""
    warped: Tensor
    """I_w, the warped source."""
    flow: Tensor
    """Backward flow (B, 2, h, w)."""
    logits: Tensor | None
    """Code predictions (B, 16 * 16, N); None without C."""
    latent: Tensor
    """Features z_f after fusion and attention, (B, d, 16, 16)."""


class CodeTransformer(nn.Module):
    """T: latent map (B, d, h, w) to code logits (B, h * w, N). CodeFormer's: learned positions, pre-norm layers,
    GELU."""

    def __init__(self, dim_in: int, dim: int, layers: int, heads: int, mlp: int, codes: int, positions: int) -> None:
        super().__init__()
        self.inp = nn.Linear(dim_in, dim)
        self.position = nn.Parameter(torch.randn(positions, dim) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, mlp, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, codes, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.inp(rearrange(z, "b c h w -> b (h w) c"))
        if x.shape[1] != len(self.position):
            raise ValueError(
                f"expected {len(self.position)} positions, got {x.shape[1]}; VQIG works on 512x512 pictures"
            )
        x = x + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(self.norm(x))
        return logits


class SpatialAdaIN(nn.Module):
    """Image-level AdaIN: E_w's feature map at one scale sets scale and shift of D_h's features there, position by
    position.

    x + gamma(w) * IN(x) + beta(w); the last layer starts at zero, so the frozen decoder starts unchanged.
    """

    def __init__(self, channels: int, guide_channels: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(guide_channels, width, 3, padding=1)
        self.out = nn.Conv2d(width, 2 * channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, guide: Tensor) -> Tensor:
        gamma, beta = self.out(silu(self.hidden(guide))).chunk(2, dim=1)
        return torch.addcmul(beta, gamma, instance_norm(x)).add_(x)


class _Modulation(nn.Module):
    """Hands E_w's maps of one forward pass to the decoder's levels."""

    def __init__(self, blocks: nn.ModuleDict, maps: dict[int, Tensor]) -> None:
        super().__init__()
        self.blocks, self.maps = blocks, maps

    def forward(self, level: int, x: Tensor) -> Tensor:
        out: Tensor = self.blocks[str(level)](x, self.maps[level])
        return out


def _rim(window: tuple[int, int, int, int], width: int = 24) -> Tensor:
    """(1, 1, h, w) weights of a window: 1 inside, falling to 0 at its sides, but not at those of the picture."""
    top, left, h, w = window

    def ramp(length: int, near: bool, far: bool) -> Tensor:
        place = torch.arange(length) + 0.5
        weight = torch.ones(length)
        if near:
            weight = torch.minimum(weight, place / width)
        if far:
            weight = torch.minimum(weight, (length - place) / width)
        return weight * weight * (3 - 2 * weight)

    rows, columns = ramp(h, top > 0, top + h < 512), ramp(w, left > 0, left + w < 512)
    return (rows[:, None] * columns)[None, None]


class VQIG(nn.Module):
    """I_0 and motion to a talking frame: warp, encode, fuse with the source's codes, predict codes, decode.

    E_h, C and D_h come trained from the codebook stage and stay frozen; E_w starts as a copy of E_h.
    """

    motion_mean: Tensor
    motion_std: Tensor
    rim: Tensor | None

    def __init__(self, config: VQIGConfig) -> None:
        super().__init__()
        self.config = config
        book, dim = config.codebook, config.codebook.dim
        self.autoencoder = VQAutoencoder(book).requires_grad_(False).eval()
        self.register_buffer("motion_mean", torch.zeros(MOTION))
        self.register_buffer("motion_std", torch.ones(MOTION))
        self.mapping = MappingNetwork(config.warp.descriptor) if config.use_warp else None
        self.warping = WarpingNetwork(config.warp) if config.use_warp else None
        self.encoder = Encoder(book)
        self.decoder = Decoder(book) if config.tune_decoder else None
        self.openings = (
            nn.Conv2d(2 * OPENINGS, self.encoder.stem.out_channels, 3, padding=1) if config.openings else None
        )
        if self.openings is not None:  # begin as if there were none
            nn.init.zeros_(self.openings.weight)
            nn.init.zeros_(self.openings.bias)  # type: ignore[arg-type]
        self.fuse = (
            nn.Sequential(nn.Conv2d(2 * dim, dim, 3, padding=1), ResBlock(dim), nn.Conv2d(dim, dim, 3, padding=1))
            if config.use_fuse
            else None
        )
        self.attention = Attention2d(dim) if config.use_attention else None
        self.transformer = (
            CodeTransformer(
                dim,
                config.transformer_dim,
                config.transformer_layers,
                config.transformer_heads,
                config.transformer_mlp,
                book.codes,
                (512 // book.stride) ** 2,
            )
            if config.use_codes
            else None
        )
        decoder = self.autoencoder.decoder
        self.modulation = nn.ModuleDict(
            {
                str(i): SpatialAdaIN(book.decoder_channels[i], book.channels[i], config.adain_width)
                for i in decoder.level_ids[1:]
            }
        )
        self.residual = None
        if config.residual and self.decoder is not None:
            self.residual, self.decoder.out = self.decoder.out, nn.Identity()
            for parameter in self.residual.parameters():  # begin with the warped picture
                nn.init.zeros_(parameter)
        self.painter = MouthPainter(config.painter_width) if config.painter_width else None
        if self.painter is not None:
            self.painter.requires_grad_(False)  # stage mouth trains it
        self.register_buffer("rim", None if config.window is None else _rim(config.window), persistent=False)

    def train(self, mode: bool = True) -> VQIG:
        """Training mode; the frozen codebook stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def load_codebook(self, state: dict[str, Tensor]) -> None:
        """Take over E_h, C and D_h, and start E_w from E_h (and the decoder that is tuned from D_h)."""
        self.autoencoder.load_state_dict(state)
        self.encoder.load_state_dict(self.autoencoder.encoder.state_dict())
        if self.decoder is not None:
            own = self.decoder.state_dict()
            self.decoder.load_state_dict({k: v for k, v in self.autoencoder.decoder.state_dict().items() if k in own})

    @torch.no_grad()
    def prepare(self, image: Tensor) -> Source:
        """Encode and quantise the source picture (B, 3, 512, 512) in [-1, 1]."""
        _, indices = self.autoencoder.encode(image)
        codes = self.autoencoder.codebook.lookup(indices).to(image.dtype)
        return Source(image, codes, image if self.warping is None else self.warping.reduce(image))

    def flow(self, source: Source, motion: Tensor, prior: Tensor | None = None) -> Tensor:
        """W's backward flow (B, 2, h, w); arguments as :meth:`predict`.

        Raises:
            ValueError: if this generator has no W.
        """
        if self.warping is None or self.mapping is None:
            raise ValueError("a generator without W does not warp")
        sigma = self.mapping(((motion - self.motion_mean) / self.motion_std).to(source.image.dtype))
        flow: Tensor = self.warping(source.small, sigma, None if prior is None else prior[:, :2])
        return flow

    def predict(self, source: Source, motion: Tensor, prior: Tensor | None = None) -> tuple[Generated, list[Tensor]]:
        """Everything up to the code predictions (the code-level stage needs no more); ``image`` is I_w. Also E_w's
        maps.

        Arguments:
            source: from :meth:`prepare`.
            motion: (B, 27, 70) coefficients [beta, rho] around each frame.
            prior: (B, 2, h, w) flow of the face mesh, for ``warp.prior = "mesh"``; with ``openings`` (B, 13, h, w), all
                of :class:`~flowvqtalker.render.mesh_flow.MeshFlow` with openings.
        """
        extra = None
        if self.openings is not None:
            if prior is None or prior.shape[1] != self.config.prior_channels:
                raise ValueError("a generator with openings needs a mesh flow with openings (MeshFlow(openings=True))")
            places = prior[:, 2 : 2 + 2 * OPENINGS]
            side = self.encoder.stem_size(source.image.shape[-1])
            extra = F.interpolate(self.openings(places.to(source.image.dtype)), (side, side), mode="bilinear")
        if self.warping is not None:
            flow = self.flow(source, motion, prior)
            warped = warp(source.image, flow, None if self.openings is None else prior)
        else:
            flow = source.image.new_zeros(len(motion), 2, self.config.warp.flow_size, self.config.warp.flow_size)
            warped = source.image
        z_w, maps = self.encoder.features(warped, extra)
        z = z_w if self.fuse is None else z_w + self.fuse(torch.cat([z_w, source.codes.to(z_w.dtype)], dim=1))
        if self.attention is not None:
            z = self.attention(z, source.codes.to(z.dtype))
        logits = None if self.transformer is None else self.transformer(z)
        return Generated(warped, warped, flow, logits, z), maps

    def forward(self, source: Source, motion: Tensor, prior: Tensor | None = None) -> Generated:
        """Frames; arguments as :meth:`predict`."""
        found = self._draw(*self.predict(source, motion, prior))
        if self.painter is None or prior is None:
            return found
        return found._replace(image=self.painter(found.image, found.warped, prior[:, 2 : 2 + 2 * OPENINGS]))

    def _draw(self, found: Generated, maps: list[Tensor]) -> Generated:
        """Decode what :meth:`predict` found."""
        z = found.latent
        if found.logits is not None:
            side = z.shape[-1]
            codes = self.autoencoder.codebook.lookup(found.logits.float().argmax(-1).view(len(z), side, side))
            # As in CodeFormer the looked-up codes carry no gradient; z_f reaches the picture through the AdaIN.
            z = adain(codes.to(z.dtype), z)
        decoder = self.autoencoder.decoder if self.decoder is None else self.decoder
        first, window = decoder.level_ids[-1], self.config.window
        if window is not None:
            for i, level in enumerate(range(first, min(first + len(maps), WINDOWED + 1))):
                maps[i] = cut(maps[i], window, level)
        guides = dict(zip(range(first, first + len(maps)), maps, strict=True))
        features = decoder.features(z, _Modulation(self.modulation, guides), window)
        if self.residual is None:
            return found._replace(image=decoder.out(features))
        change = self.residual(features)
        if self.rim is None or window is None:
            return found._replace(image=found.warped + change)
        top, left, height, width = window
        image = found.warped.clone()
        part = image[:, :, top : top + height, left : left + width]
        change = change.to(part.dtype, memory_format=torch.contiguous_format)
        part.addcmul_(change, self.rim.to(part.dtype))
        return found._replace(image=image)
