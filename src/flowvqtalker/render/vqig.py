"""The vector-quantized image generator VQIG (paper section 3.3 "VQIG", eq. 18, fig. 3b)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from flowvqtalker.errors import UserError
from flowvqtalker.render.layers import Attention2d, ResBlock, adain, instance_norm, silu
from flowvqtalker.render.mesh_flow import warp
from flowvqtalker.render.vqvae import CodebookConfig, Encoder, VQAutoencoder
from flowvqtalker.render.warp import MOTION, WINDOW, MappingNetwork, WarpConfig, WarpingNetwork

__all__ = ["ABLATION", "VQIG", "Generated", "Source", "VQIGConfig", "ablation_switches"]

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

    @classmethod
    def paper(cls) -> VQIGConfig:
        """The paper's sizes, where it gives any, with those of CodeFormer, RestoreFormer and PIRender for the rest."""
        return cls(codebook=CodebookConfig.paper(), warp=WarpConfig(prior="none"))

    @classmethod
    def lite(cls) -> VQIGConfig:
        """Small sizes and the mesh prior, to train the ablation of fig. 7 on CPUs."""
        return cls(
            codebook=CodebookConfig.lite(),
            warp=WarpConfig(input_size=128, width=16, max_width=128),
            transformer_dim=256,
            transformer_layers=4,
            transformer_mlp=512,
            adain_width=32,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VQIGConfig:
        """Inverse of :meth:`to_dict`; a switch that is left out keeps its default."""
        values = dict(values)
        return cls(
            codebook=CodebookConfig.from_dict(values.pop("codebook")), warp=WarpConfig(**values.pop("warp")), **values
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @property
    def reach(self) -> int:
        """Frames of motion before and after each frame that the generator needs."""
        return WINDOW // 2

    @property
    def mesh_size(self) -> int | None:
        """Side of the mesh flow that the generator needs; None if it needs none."""
        return self.warp.flow_size if self.use_warp and self.warp.prior == "mesh" else None

    @property
    def apertures(self) -> bool:
        """Whether it needs the aperture channels of the mesh flow."""
        return False

    def ablated(self, variant: str) -> VQIGConfig:
        """This configuration with the parts of one variant of fig. 7, a key of :data:`ABLATION`; sizes stay.

        Raises:
            UserError: if there is no such variant.
        """
        return replace(self, **ablation_switches(variant))


def ablation_switches(variant: str) -> dict[str, Any]:
    """Which parts a variant of fig. 7 has, a key of :data:`ABLATION`.

    Raises:
        UserError: if there is no such variant.
    """
    if variant not in ABLATION:
        raise UserError(f"unknown variant {variant!r} of the image generator; choose one of {', '.join(ABLATION)}")
    parts = list(ABLATION).index(variant)
    return {name: parts > i for i, name in enumerate(("use_warp", "use_fuse", "use_attention", "use_codes"))}


class Source(NamedTuple):
    """What of the source picture every frame needs, computed once."""

    image: Tensor
    """I_0, (B, 3, 512, 512) in [-1, 1]."""
    codes: Tensor
    """z_c = q(E_h(I_0)), (B, d, 16, 16)."""
    small: Tensor
    """I_0 as W sees it, (B, 3, h, w)."""
    fine: Tensor | None = None
    """E_w's map of I_0 at 1/4, (B, C, 128, 128), where it is warped for each frame."""

    def expand(self, batch: int) -> Source:
        """The same source for a batch of frames."""
        image, codes, small = (value.expand(batch, -1, -1, -1) for value in self[:3])
        return Source(image, codes, small, None if self.fine is None else self.fine.expand(batch, -1, -1, -1))


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


class VQIG(nn.Module):
    """I_0 and motion to a talking frame: warp, encode, fuse with the source's codes, predict codes, decode.

    E_h, C and D_h come trained from the codebook stage and stay frozen; E_w starts as a copy of E_h.
    """

    motion_mean: Tensor
    motion_std: Tensor

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

    def train(self, mode: bool = True) -> VQIG:
        """Training mode; the frozen codebook stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def load_codebook(self, state: dict[str, Tensor]) -> None:
        """Take over E_h, C and D_h, and start E_w from E_h."""
        self.autoencoder.load_state_dict(state)
        self.encoder.load_state_dict(self.autoencoder.encoder.state_dict())

    @torch.no_grad()
    def prepare(self, image: Tensor) -> Source:
        """Encode and quantise the source picture (B, 3, 512, 512) in [-1, 1]."""
        _, indices = self.autoencoder.encode(image)
        codes = self.autoencoder.codebook.lookup(indices).to(image.dtype)
        return Source(image, codes, image if self.warping is None else self.warping.reduce(image))

    def reconstruct(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, 512, 512) through the frozen codebook."""
        out: Tensor = self.autoencoder(image)[0]
        return out

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
            prior: (B, 2, h, w) flow of the face mesh, for ``warp.prior = "mesh"``.
        """
        if self.warping is not None:
            flow = self.flow(source, motion, prior)
            warped = warp(source.image, flow)
        else:
            flow = source.image.new_zeros(len(motion), 2, self.config.warp.flow_size, self.config.warp.flow_size)
            warped = source.image
        z_w, maps = self.encoder.features(warped)
        z = z_w if self.fuse is None else z_w + self.fuse(torch.cat([z_w, source.codes.to(z_w.dtype)], dim=1))
        if self.attention is not None:
            z = self.attention(z, source.codes.to(z.dtype))
        logits = None if self.transformer is None else self.transformer(z)
        return Generated(warped, warped, flow, logits, z), maps

    def forward(self, source: Source, motion: Tensor, prior: Tensor | None = None) -> Generated:
        """Frames; arguments as :meth:`predict`."""
        return self._draw(*self.predict(source, motion, prior))

    def _draw(self, found: Generated, maps: list[Tensor]) -> Generated:
        """Decode what :meth:`predict` found."""
        z = found.latent
        if found.logits is not None:
            side = z.shape[-1]
            codes = self.autoencoder.codebook.lookup(found.logits.float().argmax(-1).view(len(z), side, side))
            # As in CodeFormer the looked-up codes carry no gradient; z_f reaches the picture through the AdaIN.
            z = adain(codes.to(z.dtype), z)
        decoder = self.autoencoder.decoder
        first = decoder.level_ids[-1]
        guides = dict(zip(range(first, first + len(maps)), maps, strict=True))
        image: Tensor = decoder(z, _Modulation(self.modulation, guides))
        return found._replace(image=image)
