"""What the flows generate, measured on held-out people of a shard, beside the real clips.

    python benchmarks/motion_quality.py SHARD [--clips 24] [--seeds 10] [--temperature X] [--articulation X]

Prints: whether one seed gives one motion to the last bit; mean distance of beta between seeds beside that between real
clips of the emotion; correlation of mouth opening with loudness and with the real clip's mouth opening, generated and
real; speed, range and blinks beside the real ones; and, for every emotion, means of the ARKit blendshapes that it
should move, over held-out portraits.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowvqtalker import EMOTIONS
from flowvqtalker.audio.features import windows
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.face.arkit import ARKIT_NAMES as NAMES
from flowvqtalker.loading import load_face_model, load_flow
from flowvqtalker.motion.blink import measure_blinks
from flowvqtalker.motion.flow import ExpFlow, PoseFlow
from flowvqtalker.motion.sampler import ARTICULATION, TEMPERATURE, MotionGenerator

_UPPER, _LOWER = 13, 14


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one of the two does not move."""
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 1e-9 and b.std() > 1e-9 else 0.0


def pairwise(sequences: list[Tensor]) -> float:
    """Mean over pairs and frames of the Euclidean distance, on the frames that both have."""
    found = []
    for a, b in combinations(sequences, 2):
        length = min(len(a), len(b))
        found.append(float((a[:length] - b[:length]).norm(dim=1).mean()))
    return float(np.mean(found)) if found else float("nan")


def loudness(wave: np.ndarray) -> np.ndarray:
    """Root mean square of each frame's samples in dB, floored 40 dB below the loudest."""
    power = np.log10(np.square(wave.reshape(-1, SAMPLES)).mean(1) + 1e-10) * 10
    return np.maximum(power, power.max() - 40)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--portraits", type=int, default=20, help="held-out pictures of the blendshapes' means")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE)
    parser.add_argument("--articulation", type=float, default=ARTICULATION)
    options = parser.parse_args()
    torch.set_num_threads(1)
    face = load_face_model(options.weights)
    expflow, bank = load_flow(ExpFlow, "expflow", options.weights)
    poseflow, _ = load_flow(PoseFlow, "poseflow", options.weights)
    shard = Shard(options.shard)
    gap = face.expression[:, _LOWER, 1] - face.expression[:, _UPPER, 1]
    jaw, lids = NAMES.index("jawOpen"), face.arkit[NAMES.index("eyeBlinkLeft")].numpy()

    def generate(number: int, emotion: str, seed: int, beta0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = shard.rows(number)
        beta, rho = (torch.from_numpy(np.array(x[rows])) for x in (shard.expression, shard.pose))
        motion = MotionGenerator(
            expflow,
            poseflow,
            bank,
            beta0=beta[0] if beta0 is None else beta0,
            pose0=rho.mean(0),
            emotion=emotion,
            temperature=options.temperature,
            articulation=options.articulation,
            seed=seed,
        )
        return motion(windows(shard.wave(number)), last=True)

    # The longest clips with speech of each held-out person, round and round, so that nobody fills the list.
    speech = shard.select("val", speech=True, picture=False, min_length=25)
    places: dict[str, int] = {}
    order = []
    for number in sorted(speech.tolist(), key=lambda n: -int(shard.length[n])):
        person = str(shard.identity[number])
        places[person] = places.get(person, 0) + 1
        order.append((places[person], number))
    chosen = [number for _, number in sorted(order)][: options.clips]
    scores: dict[str, list[float]] = {}
    for number in chosen:
        label = int(shard.emotion[number])
        drawn, pose = generate(number, EMOTIONS[label] if label >= 0 else "neutral", 0)
        rows = shard.rows(number)
        real, real_pose = (torch.from_numpy(np.array(x[rows])) for x in (shard.expression, shard.pose))
        sound = loudness(shard.wave(number))
        openings = {name: (x @ gap).numpy() for name, x in (("generated", drawn), ("real", real))}
        values = {
            "opening-loudness generated": correlation(openings["generated"], sound),
            "opening-loudness real": correlation(openings["real"], sound),
            "opening generated-real": correlation(openings["generated"], openings["real"]),
            "opening range generated/real": float(openings["generated"].std() / openings["real"].std()),
            "speed generated/real": float(drawn.diff(dim=0).norm(dim=1).mean() / real.diff(dim=0).norm(dim=1).mean()),
            "head angle std generated (deg)": float(pose[:, :3].std(0).mean().rad2deg()),
            "head angle std real (deg)": float(real_pose[:, :3].std(0).mean().rad2deg()),
        }
        for name, x in (("generated", drawn), ("real", real)):
            values[f"blinks a minute {name}"] = measure_blinks([x.numpy()], lids)[1]
        for name, value in values.items():
            scores.setdefault(name, []).append(value)
    people = len({str(shard.identity[n]) for n in chosen})
    settings = f"temperature {options.temperature}, articulation {options.articulation}"
    print(f"{len(chosen)} held-out clips of {people} people, {settings}")
    for name, found in scores.items():
        print(f"  {name}: {np.mean(found):.3f} (median {np.median(found):.3f})")

    longest = chosen[0]
    first, again = generate(longest, "happy", 0)[0], generate(longest, "happy", 0)[0]
    print(f"same seed, same motion to the last bit: {torch.equal(first, again)}")
    print("| emotion | seeds: distance | real clips | jawOpen | mouthSmile | mouthFrown | browDown | browInnerUp |")
    print("|---|---|---|---|---|---|---|---|")
    pictures = shard.select("val", picture=True)
    pictures = pictures[:: max(1, len(pictures) // options.portraits)][: options.portraits]
    for label, emotion in enumerate(EMOTIONS):
        takes = [generate(longest, emotion, seed)[0] for seed in range(options.seeds)]
        clips = np.flatnonzero((shard.emotion == label) & ~shard.picture & (shard.length >= 25))[
            :: 1 if label < 8 else 30
        ]
        real = [torch.from_numpy(np.array(shard.expression[shard.rows(int(n))])) for n in clips[:60]]
        portraits = [torch.from_numpy(np.array(shard.expression[shard.start[n]])) for n in pictures]
        drawn = [generate(longest, emotion, seed, beta0)[0] for seed, beta0 in enumerate(portraits)]
        shapes = face.blendshapes(torch.cat(drawn)).mean(0)

        def both(name: str, shapes: Tensor = shapes) -> float:
            return float(np.mean([shapes[i] for i, other in enumerate(NAMES) if other.startswith(name)]))

        cells = [float(shapes[jaw]), both("mouthSmile"), both("mouthFrown"), both("browDown"), both("browInnerUp")]
        row = " | ".join(f"{x:.3f}" for x in cells)
        print(f"| {emotion} | {pairwise(takes):.2f} | {pairwise(real):.2f} ({len(real)}) | {row} |")


if __name__ == "__main__":
    main()
