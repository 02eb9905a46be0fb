"""Cost of the image generator: GFLOP, parameters and milliseconds a frame of every module, and of the whole.

    python benchmarks/render.py [--config lite|paper] [--threads 2] [--dtype bfloat16|float32] [--batch 4]

Medians over ten runs after two of warm-up. Weights are random: they do not change the cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowvqtalker.render.generator import VQIG, VQIGConfig
from flowvqtalker.render.mesh import warp

RUNS = 10


def milliseconds(run: Callable[[], object], frames: int) -> float:
    """Median time of one frame."""
    times = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) / frames * 1000


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["lite", "paper"], default="lite")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = getattr(VQIGConfig, options.config)()
    model = VQIG(config).eval().to(memory_format=torch.channels_last)
    batch, book = options.batch, config.codebook
    image = torch.rand(batch, 3, 512, 512).contiguous(memory_format=torch.channels_last) * 2 - 1
    motion, prior = torch.randn(batch, 27, 70), torch.zeros(batch, 2, config.warp.flow_size, config.warp.flow_size)
    places = torch.zeros(batch, config.prior_channels, config.warp.flow_size, config.warp.flow_size)
    z = torch.randn(batch, book.dim, 16, 16)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")
    with torch.inference_mode(), autocast:
        source = model.prepare(image)
        assert model.mapping and model.warping and model.fuse and model.attention and model.transformer
        mapping, warping, fuse, attention = model.mapping, model.warping, model.fuse, model.attention
        transformer, decoder = model.transformer, model.decoder or model.autoencoder.decoder
        sigma = mapping(motion)
        parts: dict[str, tuple[Callable[[], object], nn.Module | None]] = {
            "psi": (lambda: mapping(motion), mapping),
            "W": (lambda: warping(image, sigma, prior), warping),
            "warp 512x512": (lambda: warp(image, prior), None),
            "E_w": (lambda: model.encoder.features(image), model.encoder),
            "phi": (lambda: fuse(torch.cat([z, z], 1)), fuse),
            "MHCA": (lambda: attention(z, z), attention),
            "T": (lambda: transformer(z), transformer),
            "D_h": (lambda: decoder.out(decoder.features(z, window=config.window)), decoder),
            "whole frame": (lambda: model(source, motion, places), model),
        }
        print(
            f"{options.config}, {options.dtype}, {options.threads} thread(s), batch {batch}, torch {torch.__version__}"
        )
        print("| module | GFLOP | ms a frame | parameters (M) |\n|---|---|---|---|")
        for name, (run, module) in parts.items():
            with FlopCounterMode(display=False) as counter:
                run()
            parameters = sum(p.numel() for p in module.parameters()) / 1e6 if module is not None else 0.0
            flops = counter.get_total_flops() / batch / 1e9
            print(f"| {name} | {flops:.2f} | {milliseconds(run, batch):.1f} | {parameters:.2f} |")


if __name__ == "__main__":
    main()
