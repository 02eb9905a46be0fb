"""Self-reenactment on held-out people: a clip's first stored frame driven to its others by their tracked beta and rho.

    python benchmarks/reenactment.py SHARD [--weights FOLDER] [--limit 120] [--grid out/reenactment.png]

SHARD is a ``frames`` shard of ``flowvqtalker prepare``; its validation split (by identity) is used. Rows: the copied
source, the codebook's reconstruction of the target, the warped source alone (I_w), and VQIG; columns as
:class:`flowvqtalker_eval.metrics.reenactment.Scores` describes them. The grid shows source, target, I_w and ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from flowvqtalker.errors import UserError
from flowvqtalker.loading import fast_dtype, load_face_model, load_generator
from flowvqtalker_eval.figures import ablation, style
from flowvqtalker_eval.metrics.reenactment import Reenactment, Scores
from flowvqtalker_eval.report import Table, markdown, write


def own(options: argparse.Namespace) -> Table:
    """Self-reenactment: write the grid, return the table."""
    pairs = Reenactment(
        options.shard,
        load_face_model(options.weights),
        {"VQIG": load_generator(options.weights)},
        limit=options.limit,
        warped=("VQIG",),
        dtype=fast_dtype(torch.device("cpu")),
    )
    scores, shown = Scores(), []
    for i, pair in enumerate(tqdm(pairs)):
        scores.add(pair)
        if i % max(1, len(pairs) // options.rows) == 0 and len(shown) < options.rows:
            shown.append(pair)
    style.save(ablation.make(shown, {"I_w of VQIG": "Warped source", "VQIG": "Ours"}), options.grid)
    return scores.table(f"{len(pairs)} pairs of {pairs.people} held-out people from {options.shard.name}")


def main() -> None:
    """Measure, print and write the table, write the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--limit", type=int, default=120, help="pairs of pictures, 0 takes all")
    parser.add_argument("--grid", type=Path, default=Path("out/reenactment.png"))
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        options.grid.parent.mkdir(parents=True, exist_ok=True)
        style.check_figure(options.grid)
        table = own(options)
        print(markdown(table))
        print(", ".join(map(str, write(table, options.grid.with_suffix("")))))
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
