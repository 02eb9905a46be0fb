"""The default generator's region on sharp held-out clips, beside what other codes draw and I_w.

    python benchmarks/region.py SHARD [--weights FOLDER] [--pairs 56] [--sheet region.png] [--json OUT]

SHARD is what ``flowvqtalker prepare`` wrote; its validation split (by identity) is used. The source is the frame of a
clip whose lips are shut furthest, the targets its four frames whose expression differs most from that. Columns: the
MobileNet-perceptual distance to the real frame of the region, of the mouth and the eyes (enlarged as in training), and
of the mouths that open; SSIM; sharpness, the variance of the Laplacian as a share of the real frame's. The sheet shows
source, real frame, I_w, the generator and the codes alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowvqtalker.data.gaps import lip_gap
from flowvqtalker.data.pairs import PairDataset, PairMix
from flowvqtalker.data.shards import Shard
from flowvqtalker.loading import load_face_model, load_generator
from flowvqtalker.render.mesh_flow import MeshFlow
from flowvqtalker.render.perceptual import PerceptualLoss
from flowvqtalker.render.region import RegionVQIG
from flowvqtalker.train.image_stage import make_views
from flowvqtalker.train.region_losses import distances, feature_points
from flowvqtalker_eval.metrics.reenactment import to_image
from flowvqtalker_eval.metrics.ssim import ssim

#: Least side of a sharp clip's crop in the original; change of the lips' gap from which on a mouth opens.
_SHARP, _OPENS = 300.0, 0.1
_FURTHEST = 4
_SHOWN = ("copied source", "real", "I_w alone", "VQIG", "codes alone")


def hard_pairs(data: PairDataset, most: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Numbers of source and target, spread evenly over the clips, and which mouths open."""
    shard = data.shard
    gap = np.nan_to_num(lip_gap(shard.landmarks(shard.image_row)))
    beta = np.asarray(shard.expression)[shard.image_row].astype(np.float32)
    pairs = []
    for numbers in data.groups:
        source = min(numbers, key=lambda number: gap[number])
        change = {number: np.linalg.norm(beta[number] - beta[source]) for number in numbers if number != source}
        pairs += [(source, target) for target in sorted(change, key=lambda n: -change[n])[:_FURTHEST]]
    chosen = np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int)
    kept = [pairs[i] for i in chosen]
    return kept, np.array([gap[target] - gap[source] > _OPENS for source, target in kept])


def pictures(generator: RegionVQIG, source: Tensor, target: Tensor, motion: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """Regions (1, 3, H, W) by name."""
    known = generator.prepare(source)
    found = generator.predict(known, motion, prior)
    book, grid = generator.autoencoder.codes, generator.config.codebook.grid
    expected = generator.codes(found)
    _, true = generator.autoencoder.encode(target)
    random = torch.randint(len(book.weight), (1, *grid), generator=torch.Generator().manual_seed(0))
    other = {
        "likeliest codes": book.lookup(found.logits.argmax(-1).view(-1, *grid)),
        "the source's codes": known.codes,
        "no codes": torch.zeros_like(expected),
        "random codes": book.lookup(random),
        "the target's codes (T's upper bound)": book.lookup(true),
    }
    strengths = {"VQIG": None, "VQIG, strength 1": 1.0, "codes alone": 0.0}
    drawn = {name: generator.draw(expected, found, strength) for name, strength in strengths.items()}
    drawn |= {name: generator.draw(codes, found) for name, codes in other.items()}
    warped = generator.cut(found.warped)
    return {
        "copied source": generator.cut(source),
        "I_w alone": warped,
        **{name: generator.refine(image, warped) for name, image in drawn.items()},
        "VQIG, not refined": drawn["VQIG"][:, :3],
        "codebook of the target": generator.autoencoder.decode(true),
    }


def sharpness(image: np.ndarray) -> float:
    """Variance of the Laplacian of grey levels."""
    return float(cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32), cv2.CV_32F).var())


def scores(image: Tensor, target: Tensor, points: Tensor, distance: Callable[..., Tensor]) -> dict[str, float]:
    """The columns for one region."""
    levels, real = to_image(image[0]), to_image(target[0])
    far = distances(distance, image, target, points)
    return {
        "region": float(far["perceptual"]),
        "mouth": float(far["mouth"]),
        "eyes": float(far["eyes"]),
        "ssim": float(ssim(real, levels)[0]),
        "sharpness": sharpness(levels) / sharpness(real),
    }


@torch.inference_mode()
def main() -> None:
    """Measure, print the table, write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--pairs", type=int, default=56)
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    generator, face = load_generator(options.weights), load_face_model(options.weights)
    if not isinstance(generator, RegionVQIG):
        parser.exit(2, "the weights hold the paper's generator; benchmarks/reenactment.py measures it\n")
    mesh = MeshFlow(face, generator.config.mesh_size, apertures=True)
    data = PairDataset(Shard(options.shard), "val", PairMix(min_native=_SHARP))
    data.pairs, opens = hard_pairs(data, options.pairs)
    distance = PerceptualLoss("mobilenet")
    rows: dict[str, list[dict[str, float]]] = {}
    sheet = []
    for i in tqdm(range(len(data))):
        batch = {key: value[None] for key, value in data[i].items()}
        source, prior, vertices = make_views(face, mesh, batch)
        points = feature_points(vertices, generator.config.codebook.roi)
        target = generator.cut(batch["target"])
        motion = torch.cat([batch["target_expression"], batch["target_pose"]], 1)
        drawn = {k: v.float().clamp(-1, 1) for k, v in pictures(generator, source, target, motion, prior).items()}
        for name, image in drawn.items():
            rows.setdefault(name, []).append(scores(image, target, points, distance))
        if i % max(1, len(data) // 12) == 0:
            sheet.append(np.hstack([to_image(({"real": target} | drawn)[name][0]) for name in _SHOWN]))
    means = {name: {k: float(np.mean([v[k] for v in values])) for k in values[0]} for name, values in rows.items()}
    for name, values in rows.items():
        means[name]["opening"] = float(
            np.mean([v["mouth"] for v, opening in zip(values, opens, strict=True) if opening])
        )
    columns = ("region", "mouth", "eyes", "opening", "ssim", "sharpness")
    print(f"{len(data)} pairs, {opens.sum()} mouths open\n\n| | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
    for name, mean in means.items():
        print(f"| {name} | {' | '.join(f'{mean[column]:.3f}' for column in columns)} |")
    own, warped = means["VQIG"], means["I_w alone"]
    print("| VQIG / I_w |", " | ".join(f"{own[column] / warped[column]:.3f}" for column in columns), "|")
    if options.sheet is not None:
        cv2.imwrite(str(options.sheet), np.vstack(sheet)[..., ::-1])
    if options.json is not None:
        options.json.write_text(json.dumps({"pairs": len(data), "opening": int(opens.sum()), "rows": means}, indent=1))


if __name__ == "__main__":
    main()
