"""Cost of the image generator: GFLOP, parameters and milliseconds a frame of every module, and of the whole; and what
of `flowvqtalker render` repeats with every frame, from coefficients to a written video.

    python benchmarks/render.py [--config lite|paper] [--threads 2] [--dtype bfloat16|float32] [--batch 4]
    python benchmarks/render.py --video 250     end to end alone, over this many frames (0: modules alone)
    python benchmarks/render.py --runtimes      the networks after the warp by torch, torch.compile and OpenVINO

Modules: medians over ten runs after two of warm-up, and beside them the speed of a plain convolution on this machine.
The paper's weights are random, which does not change the cost. End to end: the package's weights, scikit-image's
astronaut and the bundled speech, from the 25th frame on, without and with two workers (`Renderer(workers=)`). Each runs
in a process of its own, whose peak of memory the kernel reports (ru_maxrss).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowvqtalker.io.video import write_video
from flowvqtalker.loading import load_face_model, load_generator
from flowvqtalker.pipeline import Talker
from flowvqtalker.render.mesh_flow import MeshFlow, warp
from flowvqtalker.render.region import RegionPrediction, RegionVQIG
from flowvqtalker.render.renderer import Renderer
from flowvqtalker.render.vqig import VQIG, VQIGConfig

#: Name -> what runs it, and its parameters' module.
Parts = dict[str, tuple[Callable[[], object], nn.Module | None]]
Run = Callable[[], Tensor]

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
    parser.add_argument("--runtimes", action="store_true", help="compare runtimes instead")
    options = parser.parse_args()
    if options.runtimes:
        runtimes(options)
        return
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


def convolution_speed(options: argparse.Namespace) -> float:
    """TFLOP/s of a 3x3 convolution of 128 channels on 64x64 places: what this machine could do at best."""
    conv = nn.Conv2d(128, 128, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(options.batch, 128, 64, 64).contiguous(memory_format=torch.channels_last)
    flops = 2 * options.batch * 64 * 64 * 128 * 128 * 9
    with torch.inference_mode(), autocast(options):
        return flops / (milliseconds(lambda: conv(x), 1) / 1000) / 1e12


def autocast(options: argparse.Namespace) -> torch.autocast:
    """bfloat16 where it is asked for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def paper_parts(model: VQIG, batch: int) -> Parts:
    """The paper's networks, with what runs each of them."""
    config, book = model.config, model.config.codebook
    image = torch.rand(batch, 3, 512, 512).contiguous(memory_format=torch.channels_last) * 2 - 1
    motion, flow = torch.randn(batch, 27, 70), torch.zeros(batch, 2, config.warp.flow_size, config.warp.flow_size)
    z = torch.randn(batch, book.dim, 16, 16)
    source = model.prepare(image)
    assert model.mapping and model.warping and model.fuse and model.attention and model.transformer
    mapping, warping, fuse, attention = model.mapping, model.warping, model.fuse, model.attention
    transformer, decoder = model.transformer, model.autoencoder.decoder
    sigma = mapping(motion)
    return {
        "psi": (lambda: mapping(motion), mapping),
        "W": (lambda: warping(image, sigma, flow), warping),
        "warp 512x512": (lambda: warp(image, flow), None),
        "E_w": (lambda: model.encoder.features(image), model.encoder),
        "phi": (lambda: fuse(torch.cat([z, z], 1)), fuse),
        "MHCA": (lambda: attention(z, z), attention),
        "T": (lambda: transformer(z), transformer),
        "D_h": (lambda: decoder(z), decoder),
        "whole frame": (lambda: model(source, motion, flow), model),
    }


def region_parts(model: RegionVQIG, batch: int) -> Parts:
    """The default generator's networks, with what runs each of them; the mesh flow too, which takes no FLOPs."""
    face = load_face_model()
    mesh = MeshFlow(face, model.config.mesh_size, apertures=True)
    pose = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 13.0])
    start = face.project(torch.zeros(80), torch.zeros(64), pose)[None]
    beta = torch.randn(batch, 64, generator=torch.Generator().manual_seed(0)) * 0.5
    target = face.project(torch.zeros(batch, 80), beta, pose.expand(batch, -1))
    prior, motion = mesh(start, target), torch.cat([beta, pose.expand(batch, -1)], 1)
    image = torch.rand(batch, 3, 512, 512).contiguous(memory_format=torch.channels_last) * 2 - 1
    source = model.prepare(image)
    sigma = model.mapping((motion - model.motion_mean) / model.motion_std)
    found = model.predict(source, motion, prior)
    codes, region = model.codes(found), model.cut(found.warped)
    side = model.config.warp.flow_size
    fine = None if source.fine is None else model.cut(source.fine)
    coarse = nn.functional.interpolate(prior[:, :2], (side, side), mode="area")
    return {
        "mesh flow": (lambda: mesh(start, target), None),
        "psi": (lambda: model.mapping(motion), model.mapping),
        "W": (lambda: model.warping(source.small, sigma, coarse), model.warping),
        "warp 512x512": (lambda: warp(image, prior[:, :2], prior), None),
        "E_w": (
            lambda: model.encoder.features(region) if fine is None else model.encoder.further(fine),
            model.encoder,
        ),
        "phi": (lambda: model.fuse(torch.cat([codes, codes], 1)), model.fuse),
        "MHCA": (lambda: model.attention(codes, codes), model.attention),
        "T": (lambda: model.transformer(codes, sigma), model.transformer),
        "D_h": (lambda: model.draw(codes, found), model.decoder),
        "whole frame": (lambda: model(source, motion, prior), model),
    }


def modules(options: argparse.Namespace) -> None:
    """Print a row for each module."""
    torch.set_num_threads(options.threads)
    model = VQIG(VQIGConfig.paper()) if options.config == "paper" else load_generator()
    model = model.eval().to(memory_format=torch.channels_last)
    print(f"{options.config}, {options.dtype}, {options.threads} thread(s), batch {options.batch}, "
          f"torch {torch.__version__}; convolutions {convolution_speed(options):.2f} TFLOP/s")  # fmt: skip
    with torch.inference_mode(), autocast(options):
        parts = (
            region_parts(model, options.batch) if isinstance(model, RegionVQIG) else paper_parts(model, options.batch)
        )
        print("| module | GFLOP | ms a frame | parameters (M) |\n|---|---|---|---|")
        for name, (run, module) in parts.items():
            torch.backends.mha.set_fastpath_enabled(False)  # fused attention is not counted
            with FlopCounterMode(display=False) as counter:
                run()
            torch.backends.mha.set_fastpath_enabled(True)
            parameters = sum(p.numel() for p in module.parameters()) / 1e6 if module is not None else 0.0
            flops = counter.get_total_flops() / options.batch / 1e9
            print(f"| {name} | {flops:.2f} | {milliseconds(run, options.batch):.1f} | {parameters:.2f} |", flush=True)


class Networks(nn.Module):
    """What follows the warp: E_w to D_h in one module, from tensors to the region."""

    def __init__(self, generator: RegionVQIG) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, region: Tensor, apertures: Tensor, sigma: Tensor, codes: Tensor, *known: Tensor) -> Tensor:
        found = RegionPrediction(region, *self.generator.encode(region, apertures, sigma, codes, *known))
        return self.generator.refine(self.generator.draw(self.generator.codes(found), found), region)


def openvino_rows(
    options: argparse.Namespace, module: nn.Module, inputs: Sequence[Tensor], row: Callable[[str, Run], None]
) -> None:
    """A row for each precision of OpenVINO."""
    import openvino

    program = openvino.convert_model(module, example_input=tuple(inputs))
    arrays = [value.contiguous().numpy() for value in inputs]
    for precision in ("bf16", "f32"):
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": options.threads}
        ready = openvino.compile_model(program, "CPU", settings)
        row(f"OpenVINO {precision}", partial(lambda model: torch.from_numpy(model(arrays)[0]), ready))


def runtimes(options: argparse.Namespace) -> None:
    """Print milliseconds a frame of the networks after the warp: torch, torch.compile, OpenVINO where installed."""
    torch.set_num_threads(options.threads)
    generator = load_generator()
    if not isinstance(generator, RegionVQIG):
        raise SystemExit("the weights hold the paper's generator; the runtimes are compared on the default one")
    module = Networks(generator).eval().to(memory_format=torch.channels_last)
    rows, columns = generator.config.codebook.grid
    inputs = [
        torch.rand(options.batch, 3, 16 * rows, 16 * columns).contiguous(memory_format=torch.channels_last) * 2 - 1,
        torch.zeros(options.batch, 6, 4 * rows, 4 * columns),
        torch.randn(options.batch, generator.config.warp.descriptor),
        torch.randn(options.batch, generator.config.codebook.dim, rows, columns),
    ]
    if generator.config.warped_map:
        inputs.append(torch.randn(options.batch, generator.config.codebook.channels[1], 4 * rows, 4 * columns))
    print(f"batch {options.batch}, {options.threads} thread(s); convolutions {convolution_speed(options):.2f} TFLOP/s")
    print("| runtime | ms a frame | mean difference from torch float32 (levels) |\n|---|---|---|")
    with torch.inference_mode():
        exact = module(*inputs)

        def row(name: str, run: Run) -> None:
            off = float((run().float() - exact).abs().mean()) * 127.5
            print(f"| {name} | {milliseconds(run, options.batch):.1f} | {off:.2f} |", flush=True)

        with autocast(options):
            row(f"torch {options.dtype}", lambda: module(*inputs))
        if find_spec("openvino") is not None:
            openvino_rows(options, module, inputs, row)
        with autocast(options):
            torch.backends.mha.set_fastpath_enabled(False)  # mixes types under autocast when it is traced
            compiled = torch.compile(module)
            row(f"torch.compile {options.dtype}", lambda: compiled(*inputs))


if __name__ == "__main__":
    main()
