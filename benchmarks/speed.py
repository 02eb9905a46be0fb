"""Where the time of `animate` goes: processor time of every stage, and frames a second end to end.

    python benchmarks/speed.py [--threads 2] [--frames 150] [--dtype auto|bfloat16|float32] [--preset quality|fast]

Stages run one after the other on one thread; a figure is the least processor time of a frame among the repeats, which
other work on the machine hardly changes. End to end, motion is made, drawn, marked and encoded as `animate` does it.
Beside them stands what a plain bfloat16 convolution reaches on all threads in the same run: compare machines by the
last column, frames a second for each TFLOP/s. Portrait: scikit-image's astronaut; speech: the package's, repeated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flowvqtalker.face.portrait import Portrait
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.io.format import PRESETS, VideoFormat
from flowvqtalker.io.video import VideoWriter
from flowvqtalker.pipeline import Talker
from flowvqtalker.provenance.marks import write_marked
from flowvqtalker.provenance.watermark import Watermark, payload
from flowvqtalker.render.compiled import warp_levels

_SPEECH = Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg"))
_REPEATS = 12


def core_ms(run: Callable[[], object], repeats: int = _REPEATS) -> float:
    """Least processor time of a call, in milliseconds."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times) * 1000


def convolution_speed() -> float:
    """TFLOP/s of a bfloat16 3x3 convolution of 128 channels on 64x64 places, on all threads: best of the repeats."""
    conv = nn.Conv2d(128, 128, 3, padding=1).to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(4, 128, 64, 64).to(torch.bfloat16, memory_format=torch.channels_last)
    best = np.inf
    with torch.inference_mode():
        for _ in range(_REPEATS):
            start = time.perf_counter()
            conv(x)
            best = min(best, time.perf_counter() - start)
    return 2 * x[:, 0].numel() * 128 * 128 * 9 / best / 1e12


@torch.inference_mode()
def drawing(talker: Talker, portrait: Portrait, motion: Motion) -> dict[str, float]:
    """Stages between coefficients and frame; only their sum where torch draws."""
    renderer = talker.renderer(portrait, workers=1)
    now = torch.cat([motion.expression, motion.pose], 1)[len(motion) // 2]
    whole = {"draw a frame": core_ms(lambda: renderer.draw(now[None]))}
    compiled = renderer._compiled
    if compiled is None:
        return whole
    infer, seen = compiled._infer, {}

    def noted(name: str, *inputs: Any) -> list[Any]:
        seen[name] = [value.copy() for value in inputs]
        return infer(name, *inputs)

    compiled._infer = noted  # type: ignore[method-assign]
    renderer.draw(now[None])
    prior = infer("mesh", *seen["mesh"])[0][0].copy()
    return {
        "mesh flow": core_ms(lambda: infer("mesh", *seen["mesh"])),
        "psi, W": core_ms(lambda: infer("warp", *seen["warp"])),
        "warp 512x512": core_ms(lambda: warp_levels(portrait.image, prior[:2], prior)),
        "E_w to D_h": core_ms(lambda: infer("region", *seen["region"])),
        **whole,
    }


def encoding(frames: list[Any], video: VideoFormat) -> dict[str, float]:
    """What the writer takes for a frame: the mark, and all of colour conversion, mark and x264 with its threads."""
    luma = frames[0][..., 1].copy()
    mark = Watermark(payload())
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        with VideoWriter(Path(folder) / "a.mp4", fps=video.rate, preset=video.x264, mark=mark) as writer:
            for frame in frames:
                writer.write(frame)
        whole = (time.process_time() - start) / len(frames) * 1000
    return {"mark": core_ms(lambda: mark(luma)), "convert, mark, encode": whole}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--frames", type=int, default=150, help="frames of motion of the video")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    parser.add_argument("--preset", choices=list(PRESETS), default="quality")
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    from skimage.data import astronaut

    video = VideoFormat(preset=options.preset)
    torch.set_num_threads(1)
    talker = Talker.from_pretrained(device="cpu", dtype=options.dtype)
    portrait = talker.portrait(astronaut())
    start = time.process_time()
    blocks = list(talker.motion(_SPEECH, portrait, emotion="happy"))
    motion = Motion.join(blocks)
    stages = {"motion": (time.process_time() - start) / len(motion) * 1000}
    stages |= drawing(talker, portrait, motion)
    some = list(video.resized(talker.render(portrait, [Motion(motion.expression[:25], motion.pose[:25])])))
    stages |= encoding(some * 2, video)
    print("| stage | ms of a core for a frame |\n|---|---:|")
    for name, value in stages.items():
        print(f"| {name} | {value:.1f} |", flush=True)
    torch.set_num_threads(options.threads)
    speed = convolution_speed()
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        again = chain.from_iterable(talker.motion(_SPEECH, portrait, emotion="happy") for _ in repeat(None))
        frames = talker.render(portrait, again, video=video)
        wanted = video.frames(options.frames)
        some_frames = (frame for frame, _ in zip(frames, range(wanted), strict=False))
        busy = time.process_time()
        path = Path(folder) / "a.mp4"
        write_marked(some_frames, path, None, wanted, lambda *_: times.append(time.perf_counter()), video=video)
        busy = (time.process_time() - busy) / wanted * 1000
    skipped = min(25, len(times) // 2)
    fps = (len(times) - 1 - skipped) / (times[-1] - times[skipped])
    found = {"fps": fps, "core_ms": busy, "tflops": speed, "fps_per_tflops": fps / speed, "threads": options.threads}
    print("\n| frames a second | ms of a core for a frame, all of it | TFLOP/s | frames a second for each TFLOP/s |")
    print(f"|---:|---:|---:|---:|\n| {fps:.1f} | {busy:.1f} | {speed:.2f} | {fps / speed:.1f} |")
    if options.json is not None:
        options.json.write_text(json.dumps(found | {"stages": stages}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
