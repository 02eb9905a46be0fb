"""What the short look-ahead and the shut mouth cost: lips of held-out people with either speech encoder.

    python benchmarks/lookahead.py SHARD [--clips 14] [--frames 75] [--weights FOLDER]

Prints, for both encoders, with the mouth shut in silence and without: the correlation of the lips' opening with the
real clip's, mean over clips, and the share of the frames in which the detector hears speech.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from flowvqtalker import EMOTIONS
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.loading import load_face_model, load_flows, load_live_encoder
from flowvqtalker.motion.mouth import MouthCloser, MouthGate
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.speech.features import windows


def chosen(shard: Shard, clips: int) -> list[int]:
    """The longest clip with speech of each held-out person, then the second longest, ..."""
    numbers = shard.select("val", speech=True, is_image=False, min_length=25).tolist()
    places: dict[str, int] = {}
    order = []
    for number in sorted(numbers, key=lambda n: -int(shard.length[n])):
        person = str(shard.identity[number])
        places[person] = places.get(person, 0) + 1
        order.append((places[person], number))
    return [number for _, number in sorted(order)][:clips]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--clips", type=int, default=14)
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    shard, face = Shard(options.shard), load_face_model(options.weights)
    expflow, poseflow, bank = load_flows(options.weights)
    encoders = {"252.5 ms": None, "92.5 ms": load_live_encoder(options.weights)}
    found: dict[str, list[float]] = {f"{name}, {kind}": [] for name in encoders for kind in ("as sampled", "shut")}
    speaking = []
    for number in chosen(shard, options.clips):
        rows = shard.rows(number)
        real = torch.from_numpy(np.array(shard.expression[rows][: options.frames], np.float32))
        wave = shard.wave(number)[: len(real) * SAMPLES]
        label = int(shard.emotion[number])
        identity = torch.from_numpy(np.array(shard.identity_shape[number], np.float32))
        closer = MouthCloser(face, identity)
        for name, encoder in encoders.items():
            motion = MotionGenerator(
                expflow,
                poseflow,
                bank,
                beta0=real[0],
                pose0=torch.from_numpy(np.array(shard.pose[rows][0], np.float32)),
                emotion=EMOTIONS[label] if label >= 0 else "neutral",
                seed=0,
                speech_encoder=encoder,
            )
            sampled = motion(windows(wave, motion.frontend), last=True).expression[: len(real)]
            gate = MouthGate(closer)
            gate.push(np.pad(wave, (0, 4 * SAMPLES)))
            for kind, expression in (("as sampled", sampled), ("shut", gate(sampled))):
                pair = torch.stack([closer.gap(expression), closer.gap(real)])
                found[f"{name}, {kind}"].append(float(torch.corrcoef(pair)[0, 1]))
            speaking.append(float((expression == sampled).all(1).float().mean()))
    for name, scores in found.items():
        print(f"{name:22s} lips r {np.mean(scores):.3f}")
    print(f"frames that the detector leaves as they are: {np.mean(speaking):.2f}")


if __name__ == "__main__":
    main()
