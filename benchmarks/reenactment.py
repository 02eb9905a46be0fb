"""Self-reenactment on held-out people: a clip's first stored frame driven to its others by their tracked beta and rho.

    python benchmarks/reenactment.py SHARD [--weights FOLDER] [--limit 120] [--grid out/reenactment.png]

SHARD is a ``frames`` shard of ``flowvqtalker prepare``; its validation split (by identity) is used. Rows: the copied
source, the codebook's reconstruction of the target, the warped source alone (I_w), and VQIG; columns as
:class:`flowvqtalker.metrics.reenactment.Scores` describes them. The grid shows source, target, I_w and ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from flowvqtalker.loading import load_face_model, load_generator
from flowvqtalker.metrics.figures import ablation, style
from flowvqtalker.metrics.reenactment import Reenactment, Scores
from flowvqtalker.metrics.report import markdown


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
    options.grid.parent.mkdir(parents=True, exist_ok=True)
    style.check_figure(options.grid)
    pairs = Reenactment(
        options.shard,
        load_face_model(options.weights),
        {"VQIG": load_generator(options.weights)},
        limit=options.limit,
        warped=("VQIG",),
    )
    scores, shown = Scores(), []
    for i, pair in enumerate(tqdm(pairs)):
        scores.add(pair)
        if i % max(1, len(pairs) // options.rows) == 0 and len(shown) < options.rows:
            shown.append(pair)
    print(markdown(scores.table(f"{len(pairs)} pairs of {pairs.people} held-out people from {options.shard.name}")))
    files = style.save(ablation.make(shown, {"I_w of VQIG": "Warped source", "VQIG": "Ours"}), options.grid)
    print(", ".join(map(str, files)))


if __name__ == "__main__":
    main()
