"""Cost of the image generator: GFLOP, parameters and milliseconds a frame of every module, and of the whole; and what
of `flowvqtalker render` repeats with every frame, from coefficients to a written video.

    python benchmarks/render.py [--config lite|paper] [--threads 2] [--dtype bfloat16|float32] [--batch 4]
    python benchmarks/render.py --video 250     end to end alone, over this many frames (0: modules alone)

Modules: medians over ten runs after two of warm-up. Weights are random: they do not change the cost. End to end: the
package's weights, scikit-image's astronaut and the bundled speech, from the 25th frame on, without and with two workers
(`Renderer(workers=)`). Each runs in a process of its own, whose peak of memory the kernel reports (ru_maxrss).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flowvqtalker.io.video import write_video
from flowvqtalker.loading import load_generator
from flowvqtalker.pipeline import Talker
from flowvqtalker.render.mesh_flow import warp
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import VQIG, VQIGConfig

RUNS = 10
WARM = 25


def milliseconds(run: Callable[[], object], frames: int) -> float:
    """Median time of one frame."""
    times: list[float] = []
    for _ in range(RUNS + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:]) / frames * 1000


def video(frames: int, workers: int, options: argparse.Namespace) -> None:
    """Print a row: milliseconds a frame and frames a second, end to end, and the peak of memory."""
    from skimage.data import astronaut

    torch.set_num_threads(options.threads)
    speech = Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg"))
    talker = Talker.from_pretrained()
    face = talker.portrait(astronaut())
    blocks = list(talker.motion(speech, face))
    blocks = (blocks * (frames // sum(map(len, blocks)) + 1))[: -(-frames // len(blocks[0]))]
    total = sum(map(len, blocks))
    renderer = Renderer(
        load_generator(),
        talker.face_model,
        face.image,
        face.identity,
        face.expression,
        face.pose,
        batch_size=options.batch,
        dtype=getattr(torch, options.dtype),
        workers=workers,
    )
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        write_video(
            renderer.render(blocks),
            Path(folder) / "out.mp4",
            speech,
            total,
            lambda *_: times.append(time.perf_counter()),
        )
    each = (times[-1] - times[WARM]) / (len(times) - 1 - WARM)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {workers} | {each * 1000:.1f} | {1 / each:.1f} | {peak:.0f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["lite", "paper"], default="lite")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--video", type=int, metavar="FRAMES", help="frames of the video; default: modules and 250")
    options = parser.parse_args()
    if not options.video:
        modules(options)
    if options.video != 0:
        print("| workers | ms a frame, end to end | frames a second | peak (MiB) |\n|---|---|---|---|", flush=True)
        for workers in (1, 2):
            process = multiprocessing.get_context("spawn").Process(
                target=video, args=(options.video or 250, workers, options)
            )
            process.start()
            process.join()


def modules(options: argparse.Namespace) -> None:
    """Print a row for each module."""
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
