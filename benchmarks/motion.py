"""Cost of motion: milliseconds per frame of ExpFlow and PoseFlow together, parameters, time to the first frame.

    python benchmarks/motion.py [--threads 1 2] [--frames 200] [--weights FOLDER | --untrained]
    python benchmarks/motion.py --track           with an emotion that changes every two seconds
    python benchmarks/motion.py --drift 10        ten minutes of speech: the last minute's statistics beside the first's
    python benchmarks/motion.py --intensity       mean blendshapes over intensity

Streams windows one at a time through :class:`flowvqtalker.motion.sampler.MotionGenerator`, as a live stream does, with
manifold projection. Prints medians of processor time, which other load on the machine affects least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from flowvqtalker.constants import EMOTIONS, SAMPLE_RATE
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.io import audio as decode
from flowvqtalker.io.coefficients import Motion
from flowvqtalker.loading import load_flows
from flowvqtalker.motion.emotion import EmotionKey, EmotionTrack
from flowvqtalker.motion.flow import ExpFlow, Flow, PoseFlow
from flowvqtalker.motion.manifold import LatentBank
from flowvqtalker.motion.options import MotionOptions
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.pipeline import Talker


def load(folder: Path | None, untrained: bool) -> tuple[ExpFlow, PoseFlow, LatentBank]:
    """The flows and a bank; untrained ones of the default size if asked for."""
    if untrained:
        torch.manual_seed(0)
        expflow = ExpFlow().eval()
        emotion = torch.arange(9000) % 9
        return expflow, PoseFlow().eval(), LatentBank(expflow.latent.mean[emotion] + torch.randn(9000, 64), emotion)
    expflow, poseflow, bank = load_flows(folder)
    if bank is None:
        raise SystemExit("the weights hold no latent bank")
    return expflow, poseflow, bank


def parameters(flow: Flow) -> str:
    """Counts by part."""
    parts = {"audio": flow.audio, "context": flow.encoder, "steps": flow.steps}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return f"{sum(counts.values()):,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"


def sample() -> np.ndarray:
    """The bundled ten seconds of speech."""
    return decode.load(Path(str(files("flowvqtalker") / "assets" / "sample_speech.ogg")))


def drift(minutes: float, emotions: list[str], folder: Path | None) -> None:
    """Stream the bundled speech repeatedly in blocks of 40 ms and compare the first and the last minute."""
    talker = Talker.from_pretrained(folder, device="cpu", components=("face", "motion"))
    speech = np.tile(sample(), round(6 * minutes) + 1)[: round(minutes * 60 * SAMPLE_RATE)]
    for emotion in emotions:
        stream = talker.stream(options=MotionOptions(emotion=emotion))
        started = time.process_time()
        motion = Motion.join(stream.run(speech[i : i + 640] for i in range(0, len(speech), 640)))
        cost = 1e3 * (time.process_time() - started) / stream.frames
        beta, pose = motion.expression, motion.pose
        shapes = talker.face_model.blendshapes(beta)
        lids = shapes[:, ARKIT_NAMES.index("eyeBlinkLeft")]
        print(f"{emotion}: {stream.frames} frames, {cost:.2f} ms a frame, latency {stream.latency_ms:g} ms")
        for name, rows in (("first", slice(0, 1500)), ("last", slice(-1500, None))):
            part, head, shut = beta[rows], pose[rows], lids[rows] > 0.5
            print(
                f"  {name:5} minute: |beta| {part.norm(dim=1).mean():.2f}, std {part.std(0).mean():.3f}, "
                f"speed {part.diff(dim=0).norm(dim=1).mean():.3f}, blinks {int((shut[1:] & ~shut[:-1]).sum())}, "
                f"head {', '.join(f'{x:.2f}' for x in head[:, :3].rad2deg().mean(0))} "
                f"± {', '.join(f'{x:.2f}' for x in head[:, :3].rad2deg().std(0))} deg, depth {head[:, 5].mean():.2f}"
            )
        first, last = beta[:1500].mean(0), beta[-1500:].mean(0)
        print(
            f"  distance of the minutes' means {(first - last).norm():.2f}, beta's own spread {beta.std(0).norm():.2f}"
        )


def intensity(emotions: list[str], seeds: int, folder: Path | None) -> None:
    """For every emotion, the blendshapes that move most between intensity 0 and 1, over intensity."""
    talker = Talker.from_pretrained(folder, device="cpu", components=("face", "motion"))
    speech, levels = sample(), (0.0, 0.5, 1.0, 1.5, 2.0)
    for emotion in emotions:
        rows = []
        for level in levels:
            streams = [
                talker.stream(options=MotionOptions(emotion=emotion, intensity=level, seed=seed))
                for seed in range(seeds)
            ]
            motion = Motion.join(block for stream in streams for block in stream.run([speech]))
            rows.append(talker.face_model.blendshapes(motion.expression).mean(0))
        table = torch.stack(rows)
        chosen = (table[2] - table[0]).abs().topk(3).indices.tolist()
        way = table[2] - table[0]
        along = (table - table[0]) @ way / way.square().sum()
        shown = "; ".join(f"{ARKIT_NAMES[i]} " + " ".join(f"{x:.2f}" for x in table[:, i]) for i in chosen)
        steps = " ".join(f"{x:.2f}" for x in along)
        verdict = "rises" if (along.diff() > 0).all() else "DOES NOT RISE"
        print(f"{emotion}: {shown}; along the emotion {steps} ({verdict})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--untrained", action="store_true")
    parser.add_argument("--track", action="store_true", help="an emotion that changes every two seconds")
    parser.add_argument("--drift", type=float, metavar="MINUTES")
    parser.add_argument("--intensity", action="store_true")
    parser.add_argument("--emotions", nargs="+", default=["happy"], help="of --drift and --intensity")
    parser.add_argument("--seeds", type=int, default=3, help="of --intensity")
    options = parser.parse_args()
    if options.drift or options.intensity:
        torch.set_num_threads(1)
        if options.drift:
            drift(options.drift, options.emotions, options.weights)
        if options.intensity:
            intensity(options.emotions, options.seeds, options.weights)
        return
    names = [EMOTIONS[i % 9] for i in range(options.frames // 50 + 1)]
    track = EmotionTrack(tuple(EmotionKey(2.0 * i, name) for i, name in enumerate(names))) if options.track else None
    expflow, poseflow, bank = load(options.weights, options.untrained)
    print("ExpFlow parameters:", parameters(expflow))
    print("PoseFlow parameters:", parameters(poseflow))
    print(f"look-ahead: {expflow.audio.config.lookahead} frames")
    shape = options.frames, expflow.audio.config.mels, expflow.audio.config.columns
    speech = torch.randn(shape, generator=torch.Generator().manual_seed(0))
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
                emotion=None if options.track else "happy",
                track=track,
                manifold=projection,
            )
            first, times = 0.0, []
            for window in speech:
                tick = time.thread_time()
                ready = len(generator(window[None]))
                times.append(time.thread_time() - tick)
                if ready and not first:
                    first = time.perf_counter() - started
            quiet = [1e3 * t for t in sorted(times[10:])]
            print(
                f"{threads} thread(s), projection {'on ' if projection else 'off'}: "
                f"median {statistics.median(quiet):.2f} ms a frame, mean {statistics.mean(quiet):.2f}, "
                f"tenth percentile {quiet[len(quiet) // 10]:.2f}, "
                f"first frame {1e3 * first:.0f} ms after loading"
            )


if __name__ == "__main__":
    main()
