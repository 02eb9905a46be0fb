"""Cost of motion: milliseconds per frame of ExpFlow and PoseFlow together, parameters, first-frame time.

    python benchmarks/motion.py [--threads 1 2] [--frames 200] [--weights FOLDER | --untrained]

Streams windows one at a time through :class:`flowvqtalker.motion.sampler.MotionGenerator`, as a live stream does, with
the manifold projection on. Medians, so that other load on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from flowvqtalker import weights
from flowvqtalker.motion.flow import ExpFlow, Flow, PoseFlow
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.sampler import MotionGenerator


def load(folder: Path | None, untrained: bool) -> tuple[ExpFlow, PoseFlow, LatentBank]:
    """The flows and a bank; random ones of the default size without weights."""
    if untrained:
        torch.manual_seed(0)
        expflow = ExpFlow().eval()
        emotion = torch.arange(9000) % 9
        return expflow, PoseFlow().eval(), LatentBank(expflow.latent.mean[emotion] + torch.randn(9000, 64), emotion)
    state, config = weights.load("expflow", folder)
    bank = LatentBank.load(state)
    if bank is None:
        raise SystemExit("the weights hold no latent bank")
    return ExpFlow.load(state, config), PoseFlow.load(*weights.load("poseflow", folder)), bank


def parameters(flow: Flow) -> str:
    """Counts by part."""
    parts = {"audio": flow.audio, "context": flow.encoder, "steps": flow.steps}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return f"{sum(counts.values()):,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--untrained", action="store_true")
    options = parser.parse_args()
    expflow, poseflow, bank = load(options.weights, options.untrained)
    print("ExpFlow parameters:", parameters(expflow))
    print("PoseFlow parameters:", parameters(poseflow))
    print(f"look-ahead: {expflow.config.audio.lookahead_ms:g} ms of speech after the start of a frame")
    speech = torch.randn(options.frames, 80, 16, generator=torch.Generator().manual_seed(0))
    for threads in options.threads:
        torch.set_num_threads(threads)
        for projection in (0.5, 0.0):
            started = time.perf_counter()
            generator = MotionGenerator(
                expflow,
                poseflow,
                bank,
                beta0=torch.zeros(64),
                pose0=torch.zeros(6),
                emotion="happy",
                manifold=projection,
            )
            first, times = 0.0, []
            for window in speech:
                tick = time.perf_counter()
                beta, _ = generator(window[None])
                times.append(time.perf_counter() - tick)
                if len(beta) and not first:
                    first = time.perf_counter() - started
            quiet = [1e3 * t for t in sorted(times[10:])]
            print(
                f"{threads} thread(s), projection {'on ' if projection else 'off'}: "
                f"median {statistics.median(quiet):.2f} ms a frame, tenth percentile {quiet[len(quiet) // 10]:.2f}, "
                f"first frame {1e3 * first:.0f} ms after loading"
            )


if __name__ == "__main__":
    main()
