"""Self-reenactment on held-out people: a clip's first stored frame driven to its others by their tracked beta and rho.

    python benchmarks/reenactment.py SHARD [--weights FOLDER] [--limit 120] [--grid out/reenactment.png]

SHARD is a ``frames`` shard of ``flowvqtalker prepare``; its validation split (by identity) is used. Rows: the copied
source, the warped source alone (I_w), the codebook's reconstruction of the target, and VQIG. Columns: L1 of [0, 1]
colours,
PSNR in dB, SSIM (skimage, 7x7, 512x512), MobileNet-perceptual distance of the frame and of the mouth's crop. The grid
shows source | target | I_w | ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from flowvqtalker.data.pairs import PairDataset
from flowvqtalker.data.shards import Shard
from flowvqtalker.face.topology import LIPS
from flowvqtalker.loading import load_face_model, load_generator
from flowvqtalker.render.mesh import MeshFlow
from flowvqtalker.render.perceptual import PerceptualLoss


def picture(image: Tensor) -> np.ndarray:
    """(1, 3, H, W) in [-1, 1] to (H, W, 3) uint8."""
    values = image[0].float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return values.permute(1, 2, 0).cpu().numpy()


def main() -> None:
    """Measure, print the table and write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("--grid", type=Path, default=Path("out/reenactment.png"))
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    face, generator, perceptual = (
        load_face_model(options.weights),
        load_generator(options.weights).eval(),
        PerceptualLoss(),
    )
    mesh = MeshFlow(face, generator.config.warp.flow_size)
    shard = Shard(options.shard)
    data = PairDataset(shard, "val", limit=options.limit)
    names = ("copied source", "I_w alone", "codebook of the target", "VQIG")
    sums = {name: np.zeros(5) for name in names}
    rows: list[np.ndarray] = []
    with torch.inference_mode():
        for i in tqdm(range(len(data))):
            item = {key: value[None] for key, value in data[i].items()}
            start = face.project(item["identity"], item["source_expression"], item["source_pose"])
            end = face.project(item["identity"], item["target_expression"], item["target_pose"])
            with torch.autocast("cpu", torch.bfloat16):
                found = generator(generator.prepare(item["source"]), item["motion"], mesh(start, end))
                rebuilt, _ = generator.autoencoder(item["target"])
            lips = end[0, list(LIPS), :2]
            centre = lips.mean(0).round().long().clamp(64, 448).tolist()
            target = item["target"]
            for name, image in zip(names, (item["source"], found.warped, rebuilt, found.image), strict=True):
                image = image.float().clamp(-1, 1)
                crops = [
                    x[..., centre[1] - 64 : centre[1] + 64, centre[0] - 64 : centre[0] + 64] for x in (image, target)
                ]
                sums[name] += (
                    F.l1_loss(image, target).item() / 2,
                    float(10 * torch.log10(4 / F.mse_loss(image, target).clamp(min=1e-6))),
                    structural_similarity(picture(image), picture(target), channel_axis=2),
                    perceptual(image, target).item(),
                    perceptual(F.interpolate(crops[0], scale_factor=2), F.interpolate(crops[1], scale_factor=2)).item(),
                )
            if i % max(1, len(data) // options.rows) == 0 and len(rows) < options.rows:
                rows.append(np.hstack([picture(x) for x in (item["source"], target, found.warped, found.image)]))
    people = len({str(shard.identity[shard.image_clip[target]]) for _, target in data.pairs})
    print(f"{len(data)} pairs of {people} held-out people, 512x512, from {options.shard.name}")
    print("| | L1 | PSNR | SSIM | MobileNet-perceptual | the same, mouth |\n|---|---|---|---|---|---|")
    for name in names:
        l1, psnr, ssim, whole, mouth = sums[name] / len(data)
        print(f"| {name} | {l1:.4f} | {psnr:.2f} | {ssim:.3f} | {whole:.3f} | {mouth:.3f} |")
    options.grid.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(options.grid), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    print(f"grid: {options.grid} (source | target | I_w | VQIG)")


if __name__ == "__main__":
    main()
