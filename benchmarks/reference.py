"""Does a reference's expression arrive on another face? Motion alone, without images.

    python benchmarks/reference.py SHARD [--json OUT] [--weights FOLDER] [--limit N] [--frames 60]

SHARD is what `flowvqtalker prepare` wrote. References are all emotional clips of people who also have a neutral clip,
and people photographed neutral and smiling: only there is it known what the reference differs by. Truth is the
difference of the tracker's own blendshapes, mean of the reference less median of the person's neutral frames, over
brows, eyes, cheeks and corners of the mouth. Held-out portraits speak held-out speech with the reference and without
it, from one seed; the figure is the cosine between truth and the mean difference of the two motions. Three ways:
`z_ref` as in the paper, the difference with an estimated calm face (the default), and with the person's real one.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from flowvqtalker.constants import EMOTIONS
from flowvqtalker.data.shards import SAMPLES, Shard
from flowvqtalker.face.arkit import ARKIT_NAMES
from flowvqtalker.face.fit import fit
from flowvqtalker.face.model import FaceModel
from flowvqtalker.loading import load_face_model, load_flows
from flowvqtalker.motion.sampler import MotionGenerator
from flowvqtalker.speech.features import windows
from flowvqtalker.train.identity_split import find_pairs

REGIONS = ("brow", "eyeSquint", "eyeWide", "eyeBlink", "cheekSquint", *(f"mouth{x}" for x in ("Smile", "Frown")))
SHAPES = [i for i, name in enumerate(ARKIT_NAMES) if name.startswith((*REGIONS, "mouthDimple", "mouthStretch"))]
NEUTRAL = EMOTIONS.index("neutral")


@dataclass(frozen=True)
class Reference:
    """A person's expression (R, 64), their calm face (N, 64), and the difference (n,) by the tracker's blendshapes."""

    name: str
    emotion: str
    split: str
    kind: str
    expression: np.ndarray
    calm: np.ndarray
    truth: np.ndarray


def references(shard: Shard, face: FaceModel) -> Iterator[Reference]:
    """References whose own neutral face is known."""
    people: dict[str, list[int]] = defaultdict(list)
    for number in np.flatnonzero(~shard.is_image & (shard.emotion >= 0)).tolist():
        people[str(shard.identity[number])].append(number)
    for numbers in people.values():
        calm = [shard.rows(n) for n in numbers if shard.emotion[n] == NEUTRAL][:20]
        for number in numbers:
            emotion = EMOTIONS[shard.emotion[number]]
            if calm and emotion not in ("neutral", "natural"):
                rest = np.nanmedian(np.concatenate([shard.blendshapes[rows] for rows in calm]).astype(np.float32), 0)
                shown = np.nanmean(np.asarray(shard.blendshapes[shard.rows(number)], np.float32), 0)
                own = np.concatenate([shard.expression[rows] for rows in calm])
                beta = np.array(shard.expression[shard.rows(number)])
                name, split = str(shard.name[number]), str(shard.split[number])
                yield Reference(name, emotion, split, "clip", beta, own, (shown - rest)[SHAPES])
    for pair in find_pairs(shard):
        rows = [int(shard.start[n]) for n in np.flatnonzero(shard.is_image & (shard.identity == pair.identity))]
        shapes = {row: np.asarray(shard.blendshapes[row], np.float32) for row in rows}
        smile = [i for i, name in enumerate(ARKIT_NAMES) if name.startswith("mouthSmile")]
        low, *_, high = sorted(rows, key=lambda row: float(shapes[row][smile].mean()))
        own, beta = (fit(face, points).expression for points in (pair.neutral, pair.smiling))
        truth = (shapes[high] - shapes[low])[SHAPES]
        yield Reference(pair.identity, "happy", pair.split, "picture", beta, own, truth)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of the angle between two vectors."""
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-9))


class Bench:
    """Weights, held-out speech and portraits."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shard, self.face = Shard(options.shard), load_face_model(options.weights)
        self.flows = load_flows(options.weights)
        speech = self.shard.select("val", speech=True, is_image=False, min_length=options.frames)
        self.speech = [self.shard.wave(n)[: options.frames * SAMPLES] for n in speech[:: max(1, len(speech) // 8)][:8]]
        images = self.shard.select("val", is_image=True)
        self.portraits = [np.array(self.shard.expression[self.shard.start[n]]) for n in images]

    def motion(
        self, number: int, reference: Reference | None, *, calm: bool = False, plain: bool = False
    ) -> np.ndarray:
        """Expression (T, 64) for the speech and portrait of a number; ``plain``: z_ref alone."""
        generator = MotionGenerator(
            *self.flows,
            beta0=torch.from_numpy(self.portraits[number % len(self.portraits)]),
            pose0=torch.zeros(6),
            emotion="neutral" if reference is None else None,
            reference=None if reference is None else torch.from_numpy(reference.expression),
            calm=torch.from_numpy(reference.calm) if reference is not None and calm else None,
            blink_rate=0,
            seed=number,
        )
        if plain:
            rollout = generator._rollout
            rollout.condition = replace(
                rollout.condition, emotion_bias=torch.zeros_like(rollout.condition.emotion_bias)
            )
        heard = windows(self.speech[number % len(self.speech)], generator.frontend)
        return generator(heard, last=True).expression.numpy()

    def score(self, number: int, reference: Reference) -> dict[str, object]:
        """Cosines and sizes of one reference's three ways."""
        without = self.motion(number, None)
        turn = self.face.arkit[:, :-1].numpy()
        opening = self.flows[0].opening.numpy()
        row: dict[str, object] = {k: getattr(reference, k) for k in ("name", "emotion", "split", "kind")}
        for way, settings in {"z_ref": {"plain": True}, "estimated": {}, "own calm": {"calm": True}}.items():
            made = self.motion(number, reference, **settings)
            difference = ((made - without).mean(0) @ turn.T)[SHAPES]
            row[way] = cosine(difference, reference.truth)
            row[f"{way} size"] = float(np.linalg.norm(difference) / np.linalg.norm(reference.truth))
            row[f"{way} lips r"] = float(np.corrcoef(made @ opening, without @ opening)[0, 1])
        return row


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path, help="folder of weights; default: inside the package")
    parser.add_argument("--limit", type=int, default=0, help="number of references; 0 takes all")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--json", type=Path, help="file for the row of every reference")
    options = parser.parse_args()
    bench = Bench(options)
    chosen = list(references(bench.shard, bench.face))
    chosen = chosen[:: max(1, len(chosen) // options.limit)] if options.limit else chosen
    table = pd.DataFrame([bench.score(number, reference) for number, reference in enumerate(chosen)])
    if options.json is not None:
        options.json.write_text(json.dumps(table.to_dict("records"), indent=1))
    numbers = table.select_dtypes("number").columns
    for columns in (["kind", "split"], ["kind", "emotion"]):
        groups = table.groupby(columns)
        print(groups[numbers].mean().assign(n=groups.size()).round(2).to_markdown(), end="\n\n")


if __name__ == "__main__":
    main()
