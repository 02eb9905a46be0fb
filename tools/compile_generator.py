"""Compile the default generator for CPUs: trace it, quantise it to int8 on training pairs, add it to the weights.

    python tools/compile_generator.py SHARD [--weights FOLDER] [--pairs 64]

Needs openvino and nncf. Run it after every change of ``vqig``, ``codebook`` or ``face_model``: a compiled file that was
made of other weights is not used. Prints the PSNR of held-out regions to float32's. Attention stays in bfloat16: int8
was slower.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from flowvqtalker import weights
from flowvqtalker.data.pairs import PairDataset, PairMix
from flowvqtalker.data.shards import Shard
from flowvqtalker.face.model import FaceModel
from flowvqtalker.io.atomic import atomic_write
from flowvqtalker.loading import compiled_from, load_face_model, load_generator
from flowvqtalker.render import mesh_flow
from flowvqtalker.render import warp as render_warp
from flowvqtalker.render.mesh_flow import APERTURES, MeshFlow, MeshSource, warp
from flowvqtalker.render.region import RegionPrediction, RegionVQIG
from flowvqtalker.render.region_vqvae import ChannelNorm, RegionAttention
from flowvqtalker.train.image_stage import make_views
from flowvqtalker.train.release import write_entry

Arrays = list[np.ndarray[Any, Any]]


class Mesh(nn.Module):
    """Graph ``mesh``: coefficients and the portrait's view to the mesh flow, and its field as W sees it."""

    def __init__(self, face: FaceModel, mesh: MeshFlow, side: int) -> None:
        super().__init__()
        self.face, self.mesh, self.side = face, mesh, side

    def forward(self, motion: Tensor, identity: Tensor, surface: Tensor, apertures: Tensor) -> tuple[Tensor, Tensor]:
        target = self.face.project(identity, motion[:, :64], motion[:, 64:])
        prior = self.mesh(MeshSource(surface, apertures), target)
        return prior, F.avg_pool2d(prior[:, :2], self.mesh.size // self.side)


class Warp(nn.Module):
    """Graph ``warp``: psi and W. The change of the flow comes as (s, s, 2), as OpenCV wants it."""

    def __init__(self, generator: RegionVQIG) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, motion: Tensor, coarse: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.generator.mapping((motion - self.generator.motion_mean) / self.generator.motion_std)
        change = self.generator.warping(small, sigma, coarse) - coarse
        return change[0].permute(1, 2, 0), sigma


class Finish(nn.Module):
    """RegionVQIG.refine, the feather and levels, on blocks of 2x2 pixels as channels (place in the block, then colour).
    A module, which gives its operations a name: they stay in floating point, since scales of int8 would clip colours
    that no training face has.

    Two convolutions do all of the refining but for the mask: the graph's time is in the number of passes over the
    picture, and in maps of three channels.
    """

    def __init__(self, generator: RegionVQIG) -> None:
        super().__init__()
        unit, nothing = torch.zeros(3, 3, 5, 5), torch.zeros(3, 3, 5, 5)
        unit[range(3), range(3), 2, 2] = 1
        for name, pair in (("drawn", (unit, nothing)), ("warped", (nothing, unit))):
            self.register_buffer(name, _on_blocks(_change(generator, *pair)))
        self.register_buffer("feather", _blocks(generator.feather.expand(-1, 3, -1, -1)))

    def forward(self, drawn: Tensor, mask: Tensor, warped: Tensor) -> Tensor:
        change = F.conv2d(drawn, self.drawn, padding=1) + F.conv2d(warped, self.warped, padding=1)
        image = warped + self.feather * (drawn + F.hardsigmoid(mask) * change - warped)
        return ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _change(generator: RegionVQIG, drawn: Tensor, warped: Tensor) -> Tensor:
    """What refining adds to D_h's picture where the mask is 1, as a kernel (3, 3, 3, 3) of three unit pictures."""
    everywhere = torch.full_like(drawn[:, :1], 3 - generator.config.mask_bias)
    change = generator.refine(torch.cat([drawn, everywhere], 1), warped) - drawn
    return change[..., 1:4, 1:4].flip(-1, -2).transpose(0, 1)


def _blocks(x: Tensor) -> Tensor:
    """Maps (B, C, 2 h, 2 w) as (B, 4 C, h, w): blocks of 2x2, by place in the block, then channel."""
    return F.pixel_unshuffle(x, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)


def _on_blocks(kernel: Tensor) -> Tensor:
    """A 3x3 kernel (3, 3, 3, 3) of pixels as one of blocks, (12, 12, 3, 3)."""
    places = [F.pad(kernel, (1 + j, 2 - j, 1 + i, 2 - i)) for i in range(2) for j in range(2)]
    return _blocks(torch.cat(places))


class Region(nn.Module):
    """Graph ``region``: levels of I_w (1, H / 2, W / 2, 12) and E_w's warped map (1, H / 4, W / 4, C) to levels of the
    frame; see :class:`Finish`."""

    def __init__(self, generator: RegionVQIG) -> None:
        super().__init__()
        self.generator, self.finish = generator, Finish(generator)
        last, generator.decoder.picture = generator.decoder.out, F.silu
        # The mask, the fourth of four channels, thrice: a product of maps of one shape needs no copies.
        self.colours, self.mask = (nn.Conv2d(last.in_channels, 12, 3, padding=1) for _ in range(2))
        for part, channels in ((self.colours, (0, 1, 2)), (self.mask, (3, 3, 3))):
            order = [place + 4 * channel for place in range(4) for channel in channels]
            part.weight.data, part.bias.data = last.weight.data[order], last.bias.data[order]
        self.mask.bias.data += generator.config.mask_bias

    def forward(self, levels: Tensor, apertures: Tensor, sigma: Tensor, codes: Tensor, known: Tensor) -> Tensor:
        warped = levels.permute(0, 3, 1, 2).float() / 127.5 - 1
        fine = known.permute(0, 3, 1, 2)
        found = RegionPrediction(warped, *self.generator.encode(warped, apertures, sigma, codes, fine))
        maps = self.generator.draw(self.generator.codes(found), found)
        finished: Tensor = self.finish(self.colours(maps), self.mask(maps), warped)
        return finished


def _norm(self: ChannelNorm, x: Tensor) -> Tensor:
    """ChannelNorm without a change of layout."""
    x = x - x.mean(1, keepdim=True)
    x = x * torch.rsqrt((x * x).mean(1, keepdim=True) + 1e-6)
    return x if self.weight is None else x * self.weight[:, None, None] + self.bias[:, None, None]


def _everywhere(values: Tensor, size: int, image_size: int) -> tuple[slice, Tensor]:
    """mesh_flow._near for all values: a graph is the same for every frame."""
    return slice(0, size), (torch.arange(size, dtype=torch.float32) + 0.5) * (image_size / size)


def _instance_norm(x: Tensor) -> Tensor:
    """Instance norm without GroupNormalization, whose float32 form crashes OpenVINO 2026.4."""
    x = x - x.mean((2, 3), keepdim=True)
    return x * torch.rsqrt((x * x).mean((2, 3), keepdim=True) + 1e-5)


def _heads(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention over positions (B, N, C), with positions before heads: OpenVINO computes it as one operation."""
    b, n, c = q.shape
    parts = (x.reshape(b, n, heads, c // heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(b, n, c)


def _attend(self: RegionAttention, x: Tensor, memory: Tensor | None = None) -> Tensor:
    """RegionAttention with a product each for keys and values: OpenVINO is slow to split their maps."""
    b, c, h, w = x.shape
    memory = self.norm_memory(x if memory is None else memory)
    parts = zip(self.key_value.weight.detach().chunk(2), self.key_value.bias.detach().chunk(2), strict=True)
    maps = (self.query(self.norm_query(x)), *(F.conv2d(memory, *part) for part in parts))
    found = _heads(*(m.flatten(2).transpose(1, 2) for m in maps), self.heads)
    return x + self.out(found.transpose(1, 2).reshape(b, c, h, w))


def _layer(self: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """A layer of T, with a product each for queries, keys and values."""
    attention, y = self.self_attn, self.norm1(x)
    parts = zip(attention.in_proj_weight.detach().chunk(3), attention.in_proj_bias.detach().chunk(3), strict=True)
    x = x + attention.out_proj(_heads(*(F.linear(y, *part) for part in parts), attention.num_heads))
    return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


def _blocks_first(convolution: nn.Conv2d) -> None:
    """Sort the channels for :func:`_shuffle`."""
    for part in (convolution.weight, convolution.bias):
        part.data = part.data.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1).contiguous()


_pixel_shuffle = F.pixel_shuffle


def _shuffle(x: Tensor, factor: int) -> Tensor:
    """D_h's pixel shuffles, for channels sorted by places in the block: whole pixels are copied, not channel by
    channel."""
    if factor != 2:  # W's last layer
        return _pixel_shuffle(x, factor)
    b, c, h, w = x.shape
    return x.reshape(b, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


@torch.inference_mode()
def inputs(
    generator: RegionVQIG, face: FaceModel, mesh: MeshFlow, shard: Path, split: str, count: int
) -> Iterator[tuple[Arrays, Arrays, Arrays]]:
    """What the graphs see of pairs of a split."""
    pairs = PairDataset(Shard(shard), split, PairMix(synthetic=0.3, hard_candidates=4), seed=5, limit=count)
    for i in range(min(count, len(pairs))):
        batch = {key: value[None] for key, value in pairs[i].items()}
        image, prior, _ = make_views(face, mesh, batch)
        source = generator.prepare(image)
        motion = torch.cat([batch["target_expression"], batch["target_pose"]], 1)
        sigma = generator.mapping((motion - generator.motion_mean) / generator.motion_std)
        coarse = F.interpolate(prior[:, :2], source.small.shape[-2:], mode="area")
        flow = generator.flow(source, sigma, prior)
        warped = generator.cut(warp(image, flow, prior))
        levels = ((_blocks(warped) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        apertures = generator.cut(prior[:, 2 : 2 + 2 * APERTURES])
        identity = batch["source_identity"]
        start = mesh.prepare(face.project(identity, batch["source_expression"], batch["source_pose"]))
        view, given, drawn = (motion, identity, *start), (motion, coarse, source.small), [levels, apertures, sigma]
        drawn += [source.codes, generator.cut(warp(source.fine, flow)).permute(0, 2, 3, 1)]
        yield tuple([x.contiguous().numpy() for x in each] for each in (view, given, drawn))


def trace(module: nn.Module, example: Arrays) -> Any:
    """OpenVINO's graph of a module for inputs of the example's shapes and types."""
    tensors = tuple(torch.from_numpy(x) for x in example)
    with torch.inference_mode():
        return openvino.convert_model(module, example_input=tensors, input=[list(x.shape) for x in example])


def outputs(model: Any, data: list[Arrays], precision: str) -> np.ndarray[Any, Any]:
    """The first output of every item."""
    ready = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return np.stack([np.array(ready(item)[0], np.float64) for item in data])


def stored(model: Any, name: str, exact: bool = False) -> dict[str, Tensor]:
    """A graph's two files as tensors, numbers that are not int8 in float16 unless they shall stay exact."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.xml"
        openvino.save_model(model, path, compress_to_fp16=not exact)
        files = (path, path.with_suffix(".bin"))
        return {file.name: torch.from_numpy(np.fromfile(file, np.uint8)) for file in files}


def main() -> None:
    """Compile, measure and add."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path, help="folder of weights; default: the package's own")
    parser.add_argument("--pairs", type=int, default=64, help="training pairs whose activations set the scales")
    options = parser.parse_args()
    generator = load_generator(options.weights)
    if not isinstance(generator, RegionVQIG) or not (generator.config.warped_map and generator.config.refined):
        parser.exit(2, "the weights hold another generator than the default one, which alone is compiled\n")
    face = load_face_model(options.weights)
    mesh = MeshFlow(face, generator.config.mesh_size, apertures=True)
    seen = list(inputs(generator, face, mesh, options.shard, "train", options.pairs))
    held = [region for *_, region in inputs(generator, face, mesh, options.shard, "val", 16)]
    ChannelNorm.forward, RegionAttention.forward = _norm, _attend  # type: ignore[method-assign]
    nn.TransformerEncoderLayer.forward = _layer  # type: ignore[assignment]
    decoder = generator.decoder
    for convolution in (decoder.up8, decoder.up4, decoder.up2):
        _blocks_first(convolution)
    F.pixel_shuffle = _shuffle
    mesh_flow._near, render_warp.instance_norm = _everywhere, _instance_norm
    # What OpenVINO does not know.
    torch.Tensor.mT = property(lambda x: x.transpose(-1, -2))  # type: ignore[assignment]
    torch.hypot = lambda x, y: (x * x + y * y).sqrt()  # type: ignore[assignment]
    torch.backends.mha.set_fastpath_enabled(False)
    modules = (Mesh(face, mesh, generator.config.warp.flow_size), Warp(generator), Region(generator))
    flow, warping, region = (trace(part.eval(), given) for part, given in zip(modules, seen[0], strict=True))
    ignored = nncf.IgnoredScope(types=["ScaledDotProductAttention"], patterns=["__module.finish/.*"])
    data = nncf.Dataset([given for *_, given in seen])
    quantised = nncf.quantize(region, data, subset_size=len(seen), preset=nncf.QuantizationPreset.MIXED,
                              ignored_scope=ignored)  # fmt: skip
    exact = outputs(region, held, "f32")
    error = ((outputs(quantised, held, "bf16") - exact) ** 2).mean((1, 2, 3, 4))
    fidelity = float(np.mean(10 * np.log10(255**2 / error)))
    print(f"int8 against float32 on {len(held)} held-out regions: {fidelity:.2f} dB")
    place = weights.folder(options.weights)
    file = place / f"{weights.COMPILED}.safetensors"
    tensors = stored(flow, "mesh", exact=True) | stored(warping, "warp") | stored(quantised, "region")
    atomic_write(file, lambda temporary: temporary.write_bytes(save(tensors)))
    config = {**compiled_from(weights.manifest(place)), "psnr": round(fidelity, 2), "pairs": len(seen)}
    about = f"vqig, codebook and face model, compiled with openvino {openvino.__version__} and nncf {nncf.__version__}"
    write_entry(file, weights.Entry(weights.sha256(file), "", config, about))
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
